//! What an operator calls and sees: refusals with their cure, who may make a webhook, what `relay doctor` says, and no secret.

use tokio_postgres::Client;

use super::receiver::{Reaction, Receiver};
use super::{ALERTS, becomes, hook, says, taken, values};
use crate::program::cli::line_with;
use crate::support::PATIENCE;
use crate::support::SECRET;
use crate::support::database::{Database, connect, with_login};
use crate::support::program::{output, relay};
use crate::support::stage::Stage;

const SIGNING: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The refusal of a statement, and what to do.
async fn refusal(client: &Client, sql: &str) -> String {
    let error = match client.batch_execute(sql).await {
        Ok(()) => panic!("accepted: {sql}"),
        Err(error) => error,
    };
    let error = error.as_db_error().unwrap();
    format!("{}: {}", error.message(), error.hint().unwrap_or_else(|| panic!("no hint: {sql}: {error}")))
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_its_cure() {
    let database = Database::new().await;
    database
        .run(&format!(
            "{ALERTS} create table keyless (n int); grant select on keyless to service_role; select relay.watch('keyless');
             create table unwatched (id int primary key); grant select on unwatched to service_role;
             create table unread (id int primary key); select relay.watch('unread');
             create schema far; create table far.away (id int primary key); grant select on far.away to service_role; select relay.watch('far.away');
             create table part (id int primary key, n int); grant select (n) on part to service_role; select relay.watch('part')"
        ))
        .await;
    let to = "'https://pager.example/hook'";
    for (call, expected) in [
        (
            format!("'unwatched', {to}"),
            "is not watched, so it has no changes to deliver: First: select relay.watch('public.unwatched')",
        ),
        (
            format!("'unread', {to}"),
            "service_role may not read public.unread, so nothing would be delivered: grant select on public.unread to service_role",
        ),
        (format!("'far.away', {to}"), "grant usage on schema far to service_role"),
        (format!("'keyless', {to}"), "or in_order => false"),
        (
            format!("'part', {to}"),
            "service_role may not read column id of public.part: grant select (id) on public.part to service_role",
        ),
        (format!("'alerts', {to}, columns => '{{nope}}'"), "has no column nope"),
        (format!("'alerts', {to}, columns => '{{}}'"), "no columns would be delivered"),
        (
            format!("'alerts', {to}, events => '{{TRUNCATE}}'"),
            "unknown events {TRUNCATE}: One or more of INSERT, UPDATE and DELETE",
        ),
        (format!("'alerts', {to}, events => '{{}}'"), "unknown events"),
        (
            format!("'alerts', {to}, role => 'nobody_here'"),
            "there is no role nobody_here: role => 'service_role'",
        ),
        (format!("'alerts', {to}, role => 'postgres'"), "postgres is a superuser"),
        (
            format!("'alerts', {to}, secret => 'whsec_short'"),
            "the secret cannot be used: whsec_ and the base64 of 24 to 64",
        ),
        (
            format!("'alerts', {to}, secret => 'hunter2hunter2hunter2hunter2hunter2'"),
            "the secret cannot be used",
        ),
        (format!("'alerts', {to}, attempts => 0"), "attempts from 1 to 100 are expected"),
        (format!("'alerts', {to}, pause => '2 hours'"), "a pause of at most an hour"),
        (format!("'alerts', {to}, name => ''"), "the name cannot be used"),
        (
            String::from("'alerts', 'pager.example'"),
            "the address of the receiver cannot be used: http:// or https://",
        ),
        (String::from("'alerts', 'ftp://pager.example/'"), "the address of the receiver cannot be used"),
        (
            String::from("'alerts', 'https://ann:canary@pager.example/'"),
            "the address of the receiver cannot be used",
        ),
        (String::from("'alerts', 'https://pager.example/a b'"), "the address of the receiver cannot be used"),
        (String::from("'alerts', null"), "the address of the receiver cannot be used"),
    ] {
        let refused = refusal(&database.client, &format!("select relay.webhook({call})")).await;
        assert!(refused.contains(expected), "{call}\n{refused}");
        assert!(!refused.contains("canary") && !refused.contains("hunter2"), "{refused}");
    }
    // A filter of one condition is tried as a subscription would be.
    for filter in ["nope=eq.1", "n=eq.x"] {
        let call = format!("select relay.webhook('alerts', {to}, filter => '{filter}')");
        assert!(database.client.batch_execute(&call).await.is_err(), "{filter}");
    }
    database.run(&format!("select relay.webhook('alerts', {to}, filter => 'or=(n.gt.5,title.eq.a)')")).await;
    let refused = refusal(&database.client, "select relay.webhook('alerts', 'https://other.example/')").await;
    assert!(
        refused.contains("public.alerts has a webhook to another address: Give this one a name"),
        "{refused}"
    );
    let refused = refusal(
        &database.client,
        &format!("select relay.webhook('keyless', {to}, 'public.alerts', in_order => false)"),
    )
    .await;
    assert!(refused.contains("relay.drop_webhook('public.alerts')"), "{refused}");
    for call in
        ["drop_webhook('x')", "enable_webhook('x')", "retry_dead_letters('x')", "discard_dead_letters('x')"]
    {
        let refused = refusal(&database.client, &format!("select relay.{call}")).await;
        assert!(
            refused.contains("there is no webhook x: select name, relation, url from relay.webhooks"),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn only_who_installed_the_relay_makes_and_changes_webhooks_whoever_runs_the_code_of_others() {
    let database = Database::new().await;
    let (_, name) = database.url.rsplit_once('/').unwrap();
    let (owner, member) = (format!("{name}_owner"), format!("{name}_member"));
    database
        .run(&format!(
            "{ALERTS} create role {owner} login; create role {member} login;
             grant create on schema public to {owner}; grant usage on schema relay to {owner};
             grant execute on all functions in schema relay to {owner}; alter table alerts owner to {owner}"
        ))
        .await;
    let as_owner = connect(&with_login(&database.url, &owner)).await;
    let call = "relay.webhook('alerts', 'https://pager.example/')";
    let mine = ["drop_webhook", "enable_webhook", "retry_dead_letters", "discard_dead_letters"]
        .map(|call| format!("relay.{call}('public.alerts')"));
    for call in std::iter::once(call.to_owned()).chain(mine) {
        let refused = refusal(&as_owner, &format!("select {call}")).await;
        assert!(refused.contains("who installed the relay, may do this"), "{refused}");
    }
    // In an index that is built anew, and in a definer's function, it runs as its author, in the session of a superuser.
    as_owner
        .batch_execute(&format!(
            "create function tried(t text) returns text language plpgsql immutable as $$
               begin perform {call}; return t; exception when insufficient_privilege then return t; end $$;
             create function tried_by_trigger() returns trigger language plpgsql security definer as $$
               begin perform tried('x'); return new; end $$;
             create table bait (v text); create index on bait (tried(v)); insert into bait values ('a'), ('b');
             create table trap (v text);
             create trigger trap before insert on trap for each row execute function tried_by_trigger()"
        ))
        .await
        .unwrap();
    for sql in ["insert into trap values ('a')", "analyze bait", "reindex table bait", "vacuum bait"] {
        database.run(sql).await;
    }
    assert_eq!(database.value("select count(*) from relay.webhooks").await, "0");
    // A member of the installer is one.
    database.run(&format!("grant postgres to {member}; select {call}")).await;
    let as_member = connect(&with_login(&database.url, &member)).await;
    as_member.batch_execute("select relay.drop_webhook('public.alerts')").await.unwrap();
    for sql in [
        "select * from relay.webhooks",
        "select * from relay.webhook_list",
        "update relay.webhook_list set url = 'https://x.example/'",
    ] {
        assert!(as_owner.batch_execute(sql).await.is_err(), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_is_made_again_keeps_its_position_and_its_secret() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::Status(500)).await;
    let secret = hook(&stage.database, &receiver, "").await;
    assert!(secret.starts_with("whsec_") && secret.len() == 50, "32 random bytes");
    stage.run("insert into alerts values (1, 1)").await;
    becomes(&stage.database, "waiting", "1").await;
    receiver.react(|_| Reaction::Status(200));
    assert_eq!(hook(&stage.database, &receiver, "events => '{INSERT}',").await, secret);
    let taken = taken(&receiver, 1).await;
    assert!(taken[0].is_signed_by(&secret));
    assert_eq!(hook(&stage.database, &receiver, &format!("secret => '{SIGNING}',")).await, SIGNING);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_a_view_a_metric_or_a_log() {
    let database = Database::new().await;
    database.run(ALERTS).await;
    let receiver = Receiver::reacting(|_| Reaction::Status(500)).await;
    hook(&database, &receiver, &format!("attempts => 2, secret => '{SIGNING}',")).await;
    let mut program =
        relay(&["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0", "--database-url", &database.url]);
    let mut child = program.env("RELAY_LOG", "debug").spawn().unwrap();
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stderr.take().unwrap()));
    line_with(&mut lines, "delivering webhooks").await;
    database.run("insert into alerts values (1, 1, 'canary-row')").await;
    becomes(&database, "dead_letters", "1").await;
    receiver.react(|_| Reaction::Status(410));
    database.run("insert into alerts values (2, 1, 'canary-row')").await;
    becomes(&database, "state", "disabled").await;
    child.start_kill().unwrap();
    let mut log = String::new();
    while let Ok(Some(line)) = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap() {
        log += &line;
        log.push('\n');
    }
    assert!(log.contains("410 Gone"), "{log}");
    let key = &SIGNING["whsec_".len()..];
    for hidden in [key, "canary-row", "canary-path"] {
        assert!(!log.contains(hidden), "{hidden} in\n{log}");
    }
    for view in ["webhooks", "dead_letters"] {
        let text = database.value(&format!("select string_agg(v::text, '') from relay.{view} v")).await;
        assert!(!text.contains(key), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_says_how_webhooks_are() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    hook(&stage.database, &receiver, "attempts => 1,").await;
    let doctor = async || {
        let (code, text, _) = output(&["doctor", "--database-url", &stage.database.url]).await;
        let lines: Vec<String> =
            text.lines().filter(|line| line.contains("webhook")).map(str::to_owned).collect();
        (code, lines.join("\n"))
    };
    stage.run("insert into alerts values (1, 1)").await;
    becomes(&stage.database, "delivered", "1").await;
    let (_, text) = doctor().await;
    assert!(text.contains("ok    the webhook alerts delivers changes of alerts"), "{text}");
    receiver.react(|_| Reaction::Status(422));
    stage.run("insert into alerts values (2, 1)").await;
    becomes(&stage.database, "dead_letters", "1").await;
    let (code, text) = doctor().await;
    assert!(code == 1 && text.contains("FAULT the webhook alerts has 1 dead letters"), "{text}");
    assert!(text.contains("select relay.retry_dead_letters('alerts')"), "{text}");
    receiver.react(|_| Reaction::Status(410));
    stage.run("insert into alerts values (3, 1)").await;
    becomes(&stage.database, "state", "disabled").await;
    let (code, text) = doctor().await;
    assert!(
        code == 1 && text.contains("FAULT the webhook alerts sends nothing: the receiver answered 410 Gone"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_only_the_relay_can_refuse_is_reported_until_it_is_mended() {
    let stage = Stage::new(ALERTS).await;
    let receiver = Receiver::start().await;
    for (filter, why) in [("or=(nope.eq.1,n.eq.2)", "nope"), ("n=in.(1,x)", "integer"), ("n", "filter")] {
        hook(&stage.database, &receiver, &format!("filter => '{filter}',")).await;
        says(&stage.database, "error", why).await;
    }
    stage.run("insert into alerts values (1, 1), (2, 9)").await;
    hook(&stage.database, &receiver, "filter => 'or=(n.eq.1,n.eq.2)',").await;
    assert_eq!(values(&taken(&receiver, 1).await, "id"), [1]);
    becomes(&stage.database, "state", "delivering").await;
}
