//! The edges of a socket: handshakes that are refused, frames that make no sense, clients that read nothing, the end.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::Client;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{SECRET, eventually, token};

fn anon() -> String {
    token("anon", None, json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_is_refused_with_the_status_and_the_words_of_the_protocol() {
    let stage = Stage::new("").await;
    let token = anon();
    let (unsigned, _) = token.rsplit_once('.').unwrap();
    let claims = |claims: Value| {
        relay::auth::verifier::mint(
            SECRET,
            claims.as_object().unwrap(),
            1000,
            std::time::Duration::from_secs(1),
        )
        .unwrap()
    };
    let expired = claims(json!({"role": "anon"}));
    let nobody = claims(json!({"exp": 4_000_000_000_u64}));
    let fields = "Fields `role` and `exp` are required in JWT";
    for (query, status, text) in [
        ("vsn=2.0.0".to_owned(), 401, "API key is missing"),
        ("apikey=&vsn=2.0.0".to_owned(), 401, "API key is missing"),
        ("apikey=garbage&vsn=1.0.0".to_owned(), 401, "The token provided is not a valid JWT"),
        (format!("apikey={unsigned}.AAAA&vsn=1.0.0"), 401, "Failed to validate JWT signature"),
        (format!("apikey={expired}"), 401, "Token has expired"),
        (format!("apikey={nobody}"), 401, fields),
    ] {
        let (status_found, body) =
            Socket::handshake(&stage.relay, &format!("/socket/websocket?{query}"), &[]).await.err().unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status_found, &body["error"]), (status, &json!(text)), "{query}");
    }
    for vsn in ["3.0.0", "", "2", "1.0.0%20", "null"] {
        let path = format!("/realtime/v1/websocket?apikey={token}&vsn={vsn}");
        assert_eq!(
            Socket::handshake(&stage.relay, &path, &[]).await.err(),
            Some((403, String::new())),
            "{vsn}"
        );
    }
    assert_eq!(Socket::handshake(&stage.relay, "/elsewhere", &[]).await.err().unwrap().0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_opens_on_both_paths_by_query_or_header_and_is_of_the_first_version_unless_it_says() {
    let stage = Stage::new("").await;
    let token = anon();
    for path in ["/realtime/v1/websocket", "/socket/websocket"] {
        for (query, headers) in [
            (format!("?apikey={token}"), vec![]),
            (format!("?vsn=1.0.0&log_level=info&eventsPerSecond=10&apikey={token}"), vec![]),
            (format!("?apikey=%20{}%0A", token.replace('.', "%2E")), vec![]),
            (String::new(), vec![("x-api-key", token.as_str())]),
            ("?apikey=garbage".to_owned(), vec![("x-api-key", token.as_str())]),
        ] {
            let mut socket = Socket::handshake(&stage.relay, &format!("{path}{query}"), &headers)
                .await
                .unwrap_or_else(|(status, body)| panic!("{path}{query}: {status} {body}"));
            socket.is_quiet().await;
        }
    }
    // Without an upgrade it is no handshake.
    let mut stream = TcpStream::connect(stage.relay.address).await.unwrap();
    let request =
        format!("GET /socket/websocket?apikey={token} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_counts_where_there_is_a_list_and_connections_are_counted() {
    let stage = Stage::with("", |settings, _| {
        settings.allowed_origin = vec!["https://app.example".to_owned(), "http://localhost:3000".to_owned()];
        settings.max_connections = Some(2);
    })
    .await;
    let path = format!("/realtime/v1/websocket?apikey={}", anon());
    for origin in ["https://evil.example", "null", "https://app.example.evil.example", "http://app.example"] {
        let refused = Socket::handshake(&stage.relay, &path, &[("origin", origin)]).await.err().unwrap();
        assert_eq!(refused.0, 403, "{origin}");
    }
    let first =
        Socket::handshake(&stage.relay, &path, &[("origin", "https://app.example")]).await.ok().unwrap();
    let mut second = Socket::handshake(&stage.relay, &path, &[]).await.ok().unwrap();
    second.is_quiet().await;
    eventually("both are counted", || async { (stage.relay.session_count() == 2).then_some(()) }).await;
    let (status, body) = Socket::handshake(&stage.relay, &path, &[]).await.err().unwrap();
    assert_eq!((status, body.as_str()), (429, r#"{"error":"Too many connected users"}"#));
    drop(first);
    eventually("one may come again", || async { Socket::handshake(&stage.relay, &path, &[]).await.ok() })
        .await;
    second.is_quiet().await;
}

/// A client's broadcast as the JS client sends it.
fn binary(kind: u8, encoding: u8, payload: &[u8]) -> Vec<u8> {
    let fields = ["1", "2", "realtime:room", "ping", "{}"];
    let mut frame = vec![kind];
    frame.extend(fields.map(|field| field.len() as u8));
    frame.push(encoding);
    frame.extend(fields.concat().as_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_makes_no_sense_is_answered_and_the_socket_lives() {
    let stage = Stage::new("").await;
    let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    let keys: Vec<String> = (0..50_000).map(|n| format!("\"{n}\":{n}")).collect();
    let no_json = "the frame is not JSON";
    let no_shape = "the frame does not have the shape of a message";
    let mut texts = Vec::new();
    for text in
        ["", "{", "nonsense", "\u{feff}[]", "[1e999]", "[NaN]", r#"["\ud800"]"#, "[] []", "[1,]", "\0"]
    {
        texts.push((text.to_owned(), no_json));
    }
    texts.push((nested(100_000), no_json));
    texts.push((format!(r#"["1","1","realtime:x","phx_join",{}]"#, nested(200)), no_json));
    for text in [
        "null",
        "7",
        "\"a\"",
        "[]",
        "{}",
        r#"["1","1","t","phx_join"]"#,
        r#"["1","1",7,"phx_join",{}]"#,
        r#"[{},"1","t","e",{}]"#,
    ] {
        texts.push((text.to_owned(), no_shape));
    }
    texts.push((format!("{{{}}}", keys.join(",")), no_shape));
    let mut blobs: Vec<(Vec<u8>, &str)> = Vec::new();
    let whole = binary(3, 1, br#"{"n":1}"#);
    blobs.extend((0..7 + 21).map(|cut| (whole[..cut].to_vec(), "the binary frame is malformed")));
    blobs.push((binary(3, 1, b"{"), no_json));
    blobs.push((binary(3, 1, &[0xff, 0xfe]), no_json));
    for kind in [0, 1, 2, 4, 255] {
        blobs.push((binary(kind, 1, b"{}"), "the kind of binary frame is not supported"));
    }
    for version in ["1.0.0", "2.0.0"] {
        let mut socket = Socket::open(&stage.relay, version, &anon()).await;
        let told = |message: &str| json!({"channel": "phoenix", "extension": "system", "status": "error", "message": message});
        for (text, message) in &texts {
            socket.send(Message::text(text.clone())).await;
            let expected = socket.expected(Value::Null, Value::Null, "phoenix", "system", told(message));
            assert_eq!(socket.frame().await, expected, "{text:.100}");
        }
        for (blob, message) in &blobs {
            // An empty frame has no kind; in the first version there is no kind at all.
            let message = if version == "1.0.0" && !blob.is_empty() {
                "the kind of binary frame is not supported"
            } else {
                message
            };
            socket.send(Message::binary(blob.clone())).await;
            let expected = socket.expected(Value::Null, Value::Null, "phoenix", "system", told(message));
            assert_eq!(socket.frame().await, expected, "{blob:?}");
        }
        // Control characters and the like in a topic are told back as they are, and nothing else happens.
        for topic in
            ["realtime:\u{1b}[31m\r\n\0", "realtime:../../etc", &format!("realtime:{}", "x".repeat(1000))]
        {
            socket.join("1", topic, json!({})).await;
            let reply = json!({"status": "ok", "response": {"postgres_changes": []}});
            assert_eq!(
                socket.frame().await,
                socket.expected(json!("1"), json!("1"), topic, "phx_reply", reply)
            );
        }
        socket.send(Message::Ping(bytes::Bytes::from_static(b"x"))).await;
        socket.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_may_have_five_megabytes_and_not_one_byte_more() {
    let stage = Stage::new("").await;
    let heartbeat = |bytes: usize| {
        let frame = |filling: &str| json!([null, "1", "phoenix", "heartbeat", {"x": filling}]).to_string();
        frame(&"x".repeat(bytes - frame("").len()))
    };
    let mut socket = Socket::open(&stage.relay, "2.0.0", &anon()).await;
    socket.send(Message::text(heartbeat(5_000_000))).await;
    assert_eq!(socket.frame().await[4]["status"], "ok");
    socket.try_send(Message::text(heartbeat(5_000_001))).await;
    assert_eq!(socket.closed().await.0, 1009);
    eventually("the session is gone", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
}

/// A raw connection after its handshake, for frames that no client library would send.
async fn raw(stage: &Stage) -> TcpStream {
    raw_with(stage, "").await
}

/// The same with more headers, a line each.
async fn raw_with(stage: &Stage, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(stage.relay.address).await.unwrap();
    let request = format!(
        "GET /socket/websocket?vsn=2.0.0&apikey={} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n",
        anon()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.to_lowercase().contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    assert!(!head.to_lowercase().contains("sec-websocket-extensions"), "{head}");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn compression_is_not_agreed_on_and_a_compressed_frame_closes_the_socket() {
    let stage = Stage::new("").await;
    let offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";
    let mut stream = raw_with(&stage, offer).await;
    // The text "Hello" as a client that compresses would send it.
    let frame = [0xc1, 0x87, 0, 0, 0, 0, 0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
    stream.write_all(&frame).await.unwrap();
    let mut close = [0; 4];
    stream.read_exact(&mut close).await.unwrap();
    assert_eq!((close[0], u16::from_be_bytes([close[2], close[3]])), (0x88, 1002));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_websocket_protocol_closes_the_socket_with_the_code_for_it() {
    let stage = Stage::new("").await;
    let mask = [0_u8; 4];
    let masked = |head: &[u8], payload: &[u8]| [head, &mask, payload].concat();
    for (frame, code) in [
        (vec![0x81, 0x02, b'h', b'i'], 1002),                // not masked
        (masked(&[0xc1, 0x80], b""), 1002),                  // a reserved bit
        (masked(&[0x83, 0x80], b""), 1002),                  // a reserved opcode
        (masked(&[0x80, 0x81], b"x"), 1002),                 // a continuation of nothing
        (masked(&[0x09, 0x80], b""), 1002),                  // a ping in fragments
        (masked(&[0x89, 0xfe, 0, 126], &[b'x'; 126]), 1002), // a ping that is too long
        (masked(&[0x81, 0x82], &[0xc3, 0x28]), 1007),        // no UTF-8
        (masked(&[0x81, 0xff, 0x7f, 255, 255, 255, 255, 255, 255, 255], b""), 1009), // 2^63 bytes, as it says
    ] {
        let mut stream = raw(&stage).await;
        stream.write_all(&frame).await.unwrap();
        let close = tokio::time::timeout(crate::support::PATIENCE, async {
            let (head, length) = (stream.read_u8().await.unwrap(), stream.read_u8().await.unwrap());
            let mut payload = vec![0; usize::from(length)];
            stream.read_exact(&mut payload).await.unwrap();
            (head, u16::from_be_bytes([payload[0], payload[1]]))
        });
        assert_eq!(close.await.unwrap(), (0x88, code), "{frame:?}");
    }
    eventually("all sessions are gone", || async { (stage.relay.session_count() == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_is_closed_and_the_others_go_on() {
    let sql =
        "create table t (id int primary key, v text); grant select on t to anon; select relay.watch('t')";
    let stage = Stage::new(sql).await;
    let mut idle = raw(&stage).await;
    let join =
        json!(["1", "1", "realtime:t", "phx_join", {"config": {"postgres_changes": [{"table": "t"}]}}])
            .to_string();
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend((join.len() as u16).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(join.as_bytes());
    idle.write_all(&frame).await.unwrap();
    let mut good =
        stage.subscribe(&anon(), json!([{"event": "INSERT", "schema": "public", "table": "t"}])).await;
    eventually("both are subscribed", || async {
        stage.relay.metrics().contains("relay_channels_open 2\n").then_some(())
    })
    .await;
    let full = "relay_sessions_closed_full_total 1\n";
    let mut written = 0;
    // What the kernel holds for a client that reads nothing differs: write until that is full and the outbox too.
    while !stage.relay.metrics().contains(full) {
        assert!(written < 2000, "200 MB went to a client that reads nothing");
        stage.run(&format!("insert into t values ({written}, repeat('x', 100000))")).await;
        let change = good.change().await;
        assert_eq!(change["record"]["id"], written);
        written += 1;
    }
    eventually("it is closed", || async { (stage.relay.session_count() == 1).then_some(()) }).await;
    stage.run("insert into t values (-1, 'after')").await;
    assert_eq!(stage.told(&mut good).await, [r#"INSERT {"id":-1,"v":"after"}"#]);
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_relay_closes_every_socket_after_its_last_frames() {
    let stage = Stage::new("").await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = Client::connect(&stage.relay, &anon()).await;
        client.subscribe("realtime:marker", json!([{"event": "*", "table": "marker"}])).await;
        clients.push(client);
    }
    let address = stage.relay.address;
    stage.run("insert into marker default values").await;
    for client in &mut clients[..10] {
        assert_eq!(client.change().await["type"], "INSERT");
    }
    let Stage { relay, .. } = stage;
    let started = std::time::Instant::now();
    let stopping = tokio::spawn(relay.stop());
    for client in &mut clients[10..] {
        assert_eq!(client.change().await["type"], "INSERT");
    }
    for client in &mut clients {
        assert_eq!(client.closed().await, (1012, "the relay restarts, connect again".to_owned()));
    }
    stopping.await.unwrap();
    assert!(started.elapsed() < std::time::Duration::from_secs(3), "took {:?}", started.elapsed());
    assert!(TcpStream::connect(address).await.is_err(), "the relay listens no more");
}
