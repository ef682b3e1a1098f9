//! Broadcasts from the database: rows that are inserted into `realtime.messages`.

pub mod delivery;
pub mod http;
pub mod installed;
pub mod outage;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::relay::Relay;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::token;

/// The table and a function as Supabase has them: partitioned by day, of another role. `$DB` stands for the database's name.
const SUPABASE: &str = "
    create role $DB_admin;
    create role $DB_app;
    create schema realtime authorization $DB_admin;
    create table realtime.messages (
      topic text not null, extension text not null, payload jsonb, event text, private boolean default false,
      updated_at timestamp not null default now(), inserted_at timestamp not null default now(),
      id uuid not null default gen_random_uuid(), binary_payload bytea,
      primary key (id, inserted_at)
    ) partition by range (inserted_at);
    create table realtime.messages_today partition of realtime.messages
      for values from ('2000-01-01') to ('2100-01-01');
    alter table realtime.messages owner to $DB_admin;
    alter table realtime.messages_today owner to $DB_admin;
    alter table realtime.messages enable row level security;
    grant usage on schema realtime to $DB_app;
    grant insert on realtime.messages to $DB_app;
    create function realtime.topic() returns text language sql stable
      as $f$ select nullif(current_setting('realtime.topic', true), '')::text $f$;
    create function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void language sql
      as $f$ insert into realtime.messages (payload, event, topic, private, extension) values ($1, $2, $3, $4, 'broadcast') $f$;
    alter function realtime.topic() owner to $DB_admin;
    alter function realtime.send(jsonb, text, text, boolean) owner to $DB_admin;
";

/// The versions of the protocol.
const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

fn anon() -> String {
    token("anon", None, json!({}))
}

/// A socket that has joined the channel `name`, and has read the reply.
async fn member(relay: &Relay, version: &'static str, name: &str) -> Socket {
    let mut socket = Socket::open(relay, version, &anon()).await;
    join(&mut socket, name, json!({})).await;
    socket
}

async fn join(socket: &mut Socket, name: &str, config: Value) {
    socket.join("1", &format!("realtime:{name}"), config).await;
    let reply = socket.message_frame().await;
    assert_eq!((&reply[3], &reply[4]["status"]), (&json!("phx_reply"), &json!("ok")), "{reply}");
}

/// The next frame of a socket as a broadcast: topic, event, payload and meta. Bytes are `{"bytes": [...]}`.
async fn heard(socket: &mut Socket) -> (String, String, Value, Value) {
    match socket.raw().await {
        Message::Text(text) => {
            let frame: Value = serde_json::from_str(&text).unwrap();
            let (topic, event, payload) = match &frame {
                Value::Object(fields) => (&fields["topic"], &fields["event"], &fields["payload"]),
                frame => (&frame[2], &frame[3], &frame[4]),
            };
            assert_eq!((event, &payload["type"]), (&json!("broadcast"), &json!("broadcast")), "{frame}");
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            (text(topic), text(&payload["event"]), payload["payload"].clone(), payload["meta"].clone())
        }
        Message::Binary(bytes) => {
            let &[4, topic, event, meta, encoding, ref rest @ ..] = &*bytes else { panic!("{bytes:?}") };
            let (topic, rest) = rest.split_at(topic.into());
            let (event, rest) = rest.split_at(event.into());
            let (meta, content) = rest.split_at(meta.into());
            let content = if encoding == 0 {
                json!({ "bytes": content })
            } else {
                serde_json::from_slice(content).unwrap()
            };
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            (text(topic), text(event), content, serde_json::from_slice(meta).unwrap())
        }
        other => panic!("{other}"),
    }
}

/// The events that a member of a topic hears until one that is sent now.
async fn events(stage: &Stage, socket: &mut Socket, name: &str) -> Vec<String> {
    stage.run(&format!("select realtime.send('{{}}', 'until now', '{name}', false)")).await;
    let mut events = Vec::new();
    loop {
        match heard(socket).await.1 {
            event if event == "until now" => return events,
            event => events.push(event),
        }
    }
}
