//! What strangers in the same database or with another's cursor can get, or can make the relay do: nothing.

use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::program::cli::{line_with, serve};
use crate::support::database::{Database, with_login};
use crate::support::http::{get, metrics_path};
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token};

fn user(sub: &str) -> String {
    token("authenticated", Some(sub), json!({}))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_a_grant_can_neither_read_the_changelog_nor_call_its_functions() {
    let stage =
        Stage::new("create role $DB_stranger; create table t (id int primary key); select relay.watch('t')")
            .await;
    let stranger = format!("{}_stranger", stage.name);
    // All that each role may do in the schema, whoever granted it.
    let may = |role: &str| {
        format!(
            "select coalesce(string_agg(what, ' ' order by what), '') from (
               select 'schema:usage' as what where has_schema_privilege('{role}', 'relay', 'usage')
               union all select 'schema:create' where has_schema_privilege('{role}', 'relay', 'create')
               union all select c.relname || ':' || p from pg_class c,
                 unnest('{{select,insert,update,delete,truncate,references,trigger}}'::text[]) p
                 where c.relnamespace = 'relay'::regnamespace and c.relkind in ('r', 'v') and has_table_privilege('{role}', c.oid, p)
               union all select c.relname || ':' || p from pg_class c, unnest('{{usage,select,update}}'::text[]) p
                 where c.relnamespace = 'relay'::regnamespace and c.relkind = 'S' and has_sequence_privilege('{role}', c.oid, p)
               union all select f.proname from pg_proc f
                 where f.pronamespace = 'relay'::regnamespace and has_function_privilege('{role}', f.oid, 'execute')) x"
        )
    };
    for role in [stranger.as_str(), "anon", "authenticated", "service_role"] {
        assert_eq!(stage.database.value(&may(role)).await, "", "{role}");
    }
    // Who makes images, where casts that users wrote may run, may only make them.
    assert_eq!(stage.database.value(&may("relay_image")).await, "image");
    let writer = stage.database.value(&may("relay_writer")).await;
    let tables: Vec<&str> = writer.split(' ').filter(|right| right.contains(':')).collect();
    let logs = [
        "change_number:usage",
        "log_0:insert",
        "log_1:insert",
        "log_2:insert",
        "schema:usage",
        "shape_doubts:insert",
        "signals:insert",
        "widenings:insert",
    ];
    assert_eq!(tables, logs);
    let session = stage.database.connect().await;
    session.batch_execute(&format!("set role {stranger}")).await.unwrap();
    for tried in [
        "select * from relay.changes",
        "select * from relay.log_0",
        "select relay.cursor()",
        "select * from relay.page('1:1:', null, 0)",
        "select relay.watch('public.t')",
        "select relay.log_change(1, 1, 'I', false, null, '{}')",
        "select relay.retain(bytes => 1048576)",
        "create function relay.evil() returns int language sql as 'select 1'",
        "create trigger x after insert on public.t for each row execute function relay.capture('1')",
    ] {
        let error = session.batch_execute(tried).await.unwrap_err();
        assert_eq!(error.as_db_error().unwrap().code().code(), "42501", "{tried}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_a_user_wrote_runs_without_any_right_though_a_superuser_writes_the_row() {
    let stage = Stage::new(
        "create type mood as enum ('good'); create table loot (v text); insert into loot values ('secret');
         create function to_json(mood) returns json language plpgsql as $$
           declare found text; begin
             begin select v into found from public.loot; exception when others then found := sqlstate; end;
             begin perform from relay.changes; found := found || ' read'; exception when others then found := found || ' ' || sqlstate; end;
             begin perform relay.log_change(1, 1, 'I', false, null, '{\"id\": 666}'); found := found || ' logged';
             exception when others then found := found || ' ' || sqlstate; end;
             return to_json(current_user || ' ' || found);
           end $$;
         create cast (mood as json) with function to_json(mood);
         create table t (id int primary key, m mood, n mood[]); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    stage.run("insert into t values (1, 'good', '{good}')").await;
    let without = "relay_image 42501 42501 42501";
    let told = stage.changes(&mut ann).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["record"]["m"], without);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_cursor_of_another_one_gets_what_one_may_see_oneself() {
    let stage = Stage::new(
        "create table t (id int primary key, owner uuid); alter table t enable row level security;
         create policy own on t using (owner = auth.uid()); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let path =
        |sub: &str, more: &str| format!("/realtime/v1/changes?table=t&wait=0&apikey={}{more}", user(sub));
    let begin = get(stage.relay.address, &path(ANN, ""), "").await;
    let cursor = begin.body["cursor"].as_str().unwrap().to_owned();
    stage.run(&format!("insert into t values (1, '{ANN}'), (2, '{BOB}'), (3, '{ANN}')")).await;
    for (sub, expected) in [(BOB, vec![2]), (ANN, vec![1, 3])] {
        let mut ids = Vec::new();
        let mut since = cursor.clone();
        while ids.len() < expected.len() {
            let answer = get(stage.relay.address, &path(sub, &format!("&since={since}")), "").await;
            let changes = answer.body["changes"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
            ids.extend(changes.iter().map(|change| change["record"]["id"].as_i64().unwrap()));
            since = answer.body["cursor"].as_str().unwrap().to_owned();
        }
        assert_eq!(ids, expected);
    }
    // And none that is made up does any harm; none of it is shown to PostgreSQL.
    let long = "A".repeat(60_000);
    for bad in [
        "",
        "1:99999999999999999999999:",
        "1:1:",
        "%00",
        "AAAA",
        "'; drop table t; --",
        "💥",
        &long,
        "-",
        "%ff",
    ] {
        let bad = bad.replace(' ', "%20").replace('💥', "%F0%9F%92%A5");
        let answer = get(stage.relay.address, &path(BOB, &format!("&since={bad}")), "").await;
        assert!(matches!(answer.status, 400 | 431), "{bad:.50}: {answer:?}");
        assert!(!answer.body.to_string().contains("AAAAAAAA"), "what was sent is not sent back: {answer:?}");
    }
}

/// Whether the listeners of this database have read the notifications. PostgreSQL wakes listeners of other databases only when they
/// are four pages behind, out of a million.
const ARE_HEARD: &str = "select pg_notification_queue_usage() < 0.00001";

/// Notifications of a role without any right, in one transaction.
fn flood(database: &str, count: u32, bytes: usize) -> String {
    format!(
        "set role {database}_stranger;
         select count(pg_notify('relay', n || repeat('x', {bytes} - 8))) from generate_series(1, {count}) n; reset role"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_rings_from_a_stranger_turns_the_relay_to_polling_and_fills_no_queue() {
    const RINGS: u32 = 50_000;
    let stage = Stage::new(
        "create role $DB_stranger; create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    let mut ann = stage.join(&user(ANN)).await;
    stage.run(&flood(&stage.name, RINGS, 20)).await;
    stage.run("insert into t values (1)").await;
    assert_eq!(stage.told(&mut ann).await, [r#"INSERT {"id":1}"#]);
    eventually("the relay looks at its own pace, and all rings are heard", || async {
        let woken = !stage.relay.metrics().contains("relay_doorbell_wakes_total 0\n");
        (woken && stage.database.value(ARE_HEARD).await == "t").then_some(())
    })
    .await;
    stage.run("insert into t values (2)").await;
    assert_eq!(stage.told(&mut ann).await, [r#"INSERT {"id":2}"#]);
}

/// The most memory that a process held so far, in KiB.
pub fn most_memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_rings_while_changes_wait_for_their_judgement_takes_no_memory() {
    let database = Database::new().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    database
        .run(&format!(
            "create role {name}_stranger; create role {name}_judge login noinherit in role authenticated;
             create function seen(int) returns bool language plpgsql stable as 'begin return $1 > 0; end';
             create table t (id int primary key); alter table t enable row level security;
             create policy p on t using (seen(id)); grant select on t to authenticated; select relay.watch('t')"
        ))
        .await;
    let judge = with_login(&database.url, &format!("{name}_judge"));
    let (child, mut lines, address) = serve(&["--database-url", &database.url, "--judge-url", &judge]).await;
    let mut socket = Socket::at(address.trim_start_matches("http://"), "2.0.0", &user(ANN)).await;
    let bindings = json!({"postgres_changes": [{"event": "*", "schema": "public", "table": "t"}]});
    socket.join("1", "realtime:t", bindings).await;
    let (_reply, subscribed) = (socket.frame().await, socket.frame().await);
    assert_eq!(subscribed[4]["status"], "ok", "{subscribed}");
    database
        .run(&format!(
            "alter role {name}_judge nologin;
             select pg_terminate_backend(pid) from pg_stat_activity where usename = '{name}_judge'"
        ))
        .await;
    database.run("insert into t select generate_series(1, 3000)").await;
    line_with(&mut lines, "changes not authorized, retrying").await;
    let reading = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let before = most_memory(child.id().unwrap());
    for _ in 0..10 {
        database.run(&flood(name, 2000, 7900)).await;
    }
    // The relay always reads what it is rung: it never keeps others from ringing.
    eventually("all rings are heard", || async { (database.value(ARE_HEARD).await == "t").then_some(()) })
        .await;
    let grown = most_memory(child.id().unwrap()).saturating_sub(before);
    assert!(grown < 40_000, "{grown} KiB for 160 MB of rings");
    database.run(&format!("alter role {name}_judge login")).await;
    for id in 1..=3000 {
        let mut frame = socket.frame().await;
        // It may be told first that the feed stalls, and goes on.
        while frame[3] == "system" {
            frame = socket.frame().await;
        }
        assert_eq!(frame[4]["data"]["record"]["id"], id);
    }
    drop(child);
    reading.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_or_filter_raises_is_in_no_log_and_no_answer_of_rows_and_polls() {
    let database = Database::new().await;
    database
        .run(
            "create table t (id int primary key, v text); alter table t enable row level security;
             create function loud(text) returns bool language plpgsql as
               $$ begin raise exception 'canary-raised % %', $1, current_setting('request.jwt.claims'); end $$;
             create policy loud on t using (loud(v)); grant select on t to authenticated;
             create table u (id int primary key, v text); alter table u enable row level security;
             create policy cast_it on u using (v::int > 0); grant select on u to authenticated;
             insert into t values (1, 'canary-row'); insert into u values (1, 'canary-row');
             select relay.watch('t'), relay.watch('u')",
        )
        .await;
    let mut program = crate::support::program::relay(&["serve", "--jwt-secret", crate::support::SECRET]);
    program.args(["--listen", "127.0.0.1:0", "--database-url", &database.url]).env("RELAY_LOG", "trace");
    let mut child = program.spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let (sender, mut said) = tokio::sync::watch::channel(String::new());
    let reading = tokio::spawn(async move {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = tokio::io::AsyncReadExt::read(&mut stderr, &mut piece).await {
            sender.send_modify(|all| *all += &String::from_utf8_lossy(&piece[..count]));
        }
        sender
    });
    let is_up = said.wait_for(|text| text.contains("reading the changelog")).await.unwrap().clone();
    let address = is_up.split("http://").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let token = token("authenticated", Some(ANN), json!({"email": "canary-email"}));
    let mut answers = Vec::new();
    for (query, headers) in [
        ("table=t", ""),
        ("table=u", ""),
        ("table=t&filter=v=eq.canary-filter", ""),
        ("table=t&filter=id=eq.canary-filter", ""),
        // The name of a table that is refused is in the log, for the operator.
        ("table=nowhere", ""),
        ("table=t&since=canary-cursor", ""),
        ("table=t&canary=1", "x-canary: canary-header\r\nuser-agent: canary\r\n"),
        ("table=t&wait=canary", ""),
    ] {
        let answer = get(address, &format!("/realtime/v1/changes?{query}&apikey={token}"), headers).await;
        answers.push((query, answer.body.to_string()));
    }
    assert_eq!(get(address, "/realtime/v1/changes?table=t&apikey=canary.k.ey", "").await.status, 401);
    let mut socket = Socket::at(&address.to_string(), "2.0.0", &token).await;
    socket
        .join("1", "realtime:canary-\u{1b}[31m\ntopic", json!({"postgres_changes": [{"table": "u"}]}))
        .await;
    let (_reply, _subscribed) = (socket.frame().await, socket.frame().await);
    socket.try_send(Message::text("canary")).await;
    database.run("update t set v = 'canary-after'; update u set v = 'canary-after'").await;
    let judged = "relay_judgements_raised_total 0\n";
    eventually("the policy raised", || async {
        let metrics = crate::transport::tokens::get(&address.to_string(), &metrics_path()).await;
        (!metrics.contains(judged)).then_some(())
    })
    .await;
    child.start_kill().unwrap();
    let log = reading.await.unwrap().borrow().clone();
    let told: Vec<&str> = log.lines().filter(|line| line.contains("canary") || line.contains(ANN)).collect();
    assert!(told.is_empty(), "{}", told.join("\n"));
    for (query, answer) in answers {
        assert!(!answer.contains("canary-r") && !answer.contains("canary-email"), "{query}: {answer}");
    }
}
