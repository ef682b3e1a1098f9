//! `GET /realtime/v1/explain`: the service role learns why a user would receive a row or not, and nobody else does.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::http::{Answer, get};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token, token_for};

async fn stage() -> Stage {
    let sql = format!(
        "create table todos (id int primary key, owner uuid, title text); alter table todos enable row level security;
         create policy own on todos for select to authenticated using (owner = (select auth.uid()));
         grant select on todos to authenticated; select relay.watch('todos');
         create table closed (id int primary key); alter table closed enable row level security;
         grant select on closed to authenticated; select relay.watch('closed');
         insert into todos values (1, '{ANN}', 'a'), (2, '{BOB}', 'b')"
    );
    // With a login that sees all rows.
    Stage::with(&sql, |settings, url| settings.database_url = Some(url.to_owned())).await
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

async fn asked(address: SocketAddr, by: &str, query: &str) -> Answer {
    get(address, &format!("/realtime/v1/explain?{query}"), &format!("authorization: Bearer {by}\r\n")).await
}

fn service() -> String {
    token("service_role", None, json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_role_is_told_the_verdict_its_first_line_and_the_reasons() {
    let stage = stage().await;
    let address = stage.relay.address;
    let bearer = token("authenticated", Some(ANN), json!({}));
    let ended = token_for("authenticated", Some(ANN), json!({}), Duration::ZERO);
    let (unsigned, _) = bearer.rsplit_once('.').unwrap();
    let row = encoded(&json!({"id": 9, "owner": ANN, "title": "x"}).to_string());
    let org = encoded(r#"{"org": "a"}"#);
    let none = "no permissive policy lets the row through";
    for (query, told) in [
        (format!("table=todos&sub={ANN}"), "would receive"),
        (format!("table=public.todos&sub={ANN}&key=1"), "would receive"),
        (format!("table=todos&sub={ANN}&key=2"), none),
        (format!("table=todos&token={bearer}&key=1"), "would receive"),
        (format!("table=todos&token={bearer}&key=2"), none),
        (format!("table=todos&token={ended}&key=1"), "relay token --sub UUID makes one"),
        (format!("table=todos&token={unsigned}.AAAA&key=1"), "is not this relay's"),
        (format!("table=todos&sub={ANN}&row={row}"), "would receive"),
        (format!("table=todos&sub={BOB}&row={row}"), none),
        (format!("table=todos&claims={org}"), "the token has no (auth.jwt() ->> 'sub')::uuid"),
        (format!("table=todos&sub={ANN}&filter=titel=eq.a"), "there is title"),
        (format!("table=todos&sub={ANN}&key=1&filter=title=eq.b"), "does not match the filter"),
        (format!("table=closed&sub={ANN}"), "create policy ... on public.closed"),
        (String::from("table=closed&role=anon"), "grant select on public.closed to anon"),
        (String::from("table=todo"), "there is public.todos"),
    ] {
        let answer = asked(address, &service(), &query).await;
        assert_eq!(answer.status, 200, "{query}: {answer:?}");
        let body = answer.body;
        let first = body["first"].as_str().unwrap();
        assert!(first.contains(told), "{query}: {told:?} is not in {first}");
        assert_eq!(body["would_receive"] == true, told == "would receive", "{query}: {body}");
        let reasons = body["reasons"].as_array().unwrap();
        assert_eq!(reasons.is_empty(), told == "would receive", "{query}: {body}");
        assert!(reasons.iter().all(|why| !why.as_str().unwrap().is_empty()), "{query}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_changelog_is_explained_for_each_user_by_the_rules_of_now() {
    let stage = stage().await;
    let database = &stage.database;
    database
        .run("update todos set title = 'c' where id = 1; delete from todos where id = 2; truncate closed")
        .await;
    let change = async |condition: &str| {
        let row = format!("select number || '&txid=' || xid from relay.changes where {condition}");
        database.value(&row).await
    };
    let verdicts = async |number: &str| {
        let query = format!("table=todos&sub={ANN},{BOB}&number={number}");
        let answer = asked(stage.relay.address, &service(), &query).await;
        let verdicts =
            answer.body["verdicts"].as_array().cloned().unwrap_or_else(|| panic!("{query}: {answer:?}"));
        let of =
            |verdict: &Value| (verdict["sub"].as_str().unwrap().to_owned(), verdict["would_receive"] == true);
        verdicts.iter().map(of).collect::<Vec<_>>()
    };
    let expected = |ann, bob| vec![(ANN.to_owned(), ann), (BOB.to_owned(), bob)];
    let inserted = change("after::jsonb ->> 'id' = '1' and operation = 'I'").await;
    let updated = change("operation = 'U'").await;
    let deleted = change("operation = 'D'").await;
    assert_eq!(verdicts(&inserted).await, expected(true, false));
    assert_eq!(verdicts(updated.split('&').next().unwrap()).await, expected(true, false));
    assert_eq!(verdicts(&deleted).await, expected(false, true));
    // By the rules of now, not of then.
    database.run("alter policy own on todos using (owner <> auth.uid())").await;
    assert_eq!(verdicts(&inserted).await, expected(false, true));
    let said = async |query: String| asked(stage.relay.address, &service(), &query).await;
    let missing = said(format!("table=todos&sub={ANN}&number=999999")).await;
    assert_eq!((missing.status, &missing.body["first"]), (200, &json!("would not: there is no such row")));
    let other = said(format!("table=closed&sub={ANN}&number={inserted}")).await;
    assert!(other.body["would_receive"] == false, "{other:?}");
    database.run("alter table todos add more int; update todos set more = 1 where id = 1").await;
    let older = said(format!("table=todos&sub={ANN}&number={inserted}")).await;
    assert!(older.status == 400 && older.body["error"].as_str().unwrap().contains("columns"), "{older:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_relay_may_not_read_is_not_said_to_be_missing() {
    let sql = "create table t (id int primary key); alter table t enable row level security;
               create policy p on t for select to authenticated using (true); grant select on t to authenticated;
               select relay.watch('t'); insert into t values (1)";
    let stage = Stage::new(sql).await;
    for grant in ["", "grant select on t to relay_test_reader"] {
        stage.run(grant).await;
        let answer = asked(stage.relay.address, &service(), "table=t&key=1").await;
        let told = answer.body["error"].as_str().unwrap();
        assert!(answer.status == 400 && told.contains("give the row itself"), "{grant}: {answer:?}");
        let answer = asked(stage.relay.address, &service(), "table=t&row=%7b%22id%22:1%7d").await;
        assert_eq!(answer.body["would_receive"], true, "{grant}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_is_told_and_keeps_no_other_from_its_explanation() {
    let stage = stage().await;
    let mut holder = stage.database.connect().await;
    let lock = holder.transaction().await.unwrap();
    lock.batch_execute("lock table todos in access exclusive mode").await.unwrap();
    let address = stage.relay.address;
    let locked = format!("table=todos&sub={ANN}&key=1");
    let waiting = tokio::spawn(async move { asked(address, &service(), &locked).await });
    let other = asked(address, &service(), &format!("table=closed&sub={ANN}")).await;
    assert_eq!((other.status, &other.body["would_receive"]), (200, &json!(false)), "{other:?}");
    let told = waiting.await.unwrap();
    assert_eq!(told.status, 503, "{told:?}");
    assert!(told.body["error"].as_str().unwrap().contains("locked by another transaction"), "{told:?}");
    let waits = "select count(*)::text from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    assert_eq!(stage.database.value(waits).await, "0");
    lock.rollback().await.unwrap();
    let seen = asked(address, &service(), &format!("table=todos&sub={ANN}&key=1")).await;
    assert_eq!(seen.body["would_receive"], true, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn which_of_the_connected_would_get_a_row_is_told_with_the_number_of_their_channels() {
    let stage = stage().await;
    // One token for each: tokens of different seconds are different claims.
    let tokens = [ANN, BOB].map(|sub| token("authenticated", Some(sub), json!({})));
    let binding = |filter: Option<&str>| json!([{"event": "*", "schema": "public", "table": "todos", "filter": filter}]);
    let other = json!([{"event": "*", "schema": "public", "table": "marker"}]);
    let mut clients = Vec::new();
    for (sub, topic, bindings) in [
        (ANN, "realtime:a", binding(None)),
        (ANN, "realtime:b", binding(None)),
        (ANN, "realtime:c", binding(Some("title=eq.a"))),
        // PostgreSQL evaluates this filter, in a lane of its own.
        (ANN, "realtime:d", binding(Some("title=match.^z"))),
        (BOB, "realtime:a", json!([{"event": "*", "schema": "public"}])),
        (BOB, "realtime:b", other),
    ] {
        let mut client = Client::connect(&stage.relay, &tokens[usize::from(sub == BOB)]).await;
        client.subscribe(topic, bindings).await;
        clients.push(client);
    }
    let told = async |more: &str| {
        let body =
            asked(stage.relay.address, &service(), &format!("table=todos&connected=true{more}")).await.body;
        let line = |reader: &Value| {
            let sub = if reader["sub"] == ANN { "ann" } else { "bob" };
            format!("{sub} {} {}", reader["channels"], reader["would_receive"])
        };
        let mut lines: Vec<String> =
            body["connected"].as_array().unwrap_or_else(|| panic!("{body}")).iter().map(line).collect();
        lines.sort();
        (body["channels_receiving"].clone(), lines)
    };
    let all = |two: bool, matching: bool, bob: bool| {
        [
            format!("ann 1 {matching}"),
            String::from("ann 1 false"),
            format!("ann 2 {two}"),
            format!("bob 1 {bob}"),
        ]
    };
    let sorted = |mut lines: [String; 4]| {
        lines.sort();
        lines.to_vec()
    };
    assert_eq!(told("&key=1").await, (json!(3), sorted(all(true, true, false))));
    assert_eq!(told("&key=2").await, (json!(1), sorted(all(false, false, true))));
    drop(clients.remove(0));
    eventually("one has gone", || async { (told("&key=1").await.0 == 2).then_some(()) }).await;
    let body = asked(stage.relay.address, &service(), "table=closed&connected=true").await.body;
    // Bob follows the whole schema.
    assert_eq!((&body["channels_receiving"], body["connected"].as_array().unwrap().len()), (&json!(0), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_service_role_gets_an_explanation() {
    let stage = stage().await;
    let address = stage.relay.address;
    let query = format!("table=todos&sub={ANN}&key=1");
    for role in ["authenticated", "anon", "postgres", "service_role_2", "SERVICE_ROLE"] {
        let answer = asked(address, &token(role, Some(ANN), json!({})), &query).await;
        assert_eq!(answer.status, 403, "{role}: {answer:?}");
        let body = answer.body.to_string();
        assert!(body.contains("only the role service_role"), "{role}: {body}");
        assert!(!body.contains("todos") && !body.contains("own"), "{role}: {body}");
    }
    for bad in ["", "nonsense", &token_for("service_role", None, json!({}), Duration::ZERO)] {
        let answer = asked(address, bad, &query).await;
        assert_eq!(answer.status, 401, "{bad:?}: {answer:?}");
    }
    for (query, told) in [
        ("sub=a", "table: the name of a table is expected"),
        ("table=todos&tabel=x", "tabel: there is no such parameter"),
        ("table=todos&key=1&number=2", "one of key, row and number"),
        ("table=todos&number=x", "number: a number is expected"),
        ("table=todos&key=x", "does not fit public.todos"),
        ("table=a%20b", "invalid name"),
        ("table=todos&row=1", "row: a JSON object"),
        ("table=todos&claims=[]", "claims: a JSON object"),
        ("table=todos&token=x", "token: "),
        ("table=todos&token=x&sub=y", "leave out sub"),
        ("table=todos&connected=yes", "connected: true is expected"),
        ("table=todos&connected=true&sub=a", "the open subscriptions say who is meant"),
        ("table=todos&table=t", "more than once"),
        ("table=%ff", "table: this is not UTF-8"),
    ] {
        let answer = asked(address, &service(), query).await;
        assert_eq!(answer.status, 400, "{query}: {answer:?}");
        assert!(answer.body["error"].as_str().unwrap().contains(told), "{query}: {answer:?}");
    }
    let many = format!("table=todos&sub={}", vec!["a"; 101].join(","));
    assert_eq!(asked(address, &service(), &many).await.status, 400);
}
