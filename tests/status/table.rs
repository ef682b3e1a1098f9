//! The status table: held rows, hostile values, and a table that is altered or dropped hurt nobody else.

use serde_json::json;

use super::{becomes, id, is_online, of, settled, socket, stage, writes};
use crate::program::cli::{line_with, serve};
use crate::support::client::Client;
use crate::support::database::connect;
use crate::support::program::output;
use crate::support::stage::Stage;
use crate::support::{eventually, token};

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_held_is_written_later_and_no_other_waits() {
    let stage = stage(|settings| settings.status_sweep_ms = Some(300)).await;
    for number in 1..=3 {
        stage.run(&format!("insert into people (id) values ('{}')", id(number))).await;
    }
    let holder = stage.database.connect().await;
    let hold = format!("begin; select from people where id = '{}' for update", id(2));
    holder.batch_execute(&hold).await.unwrap();
    let clients =
        [socket(&stage.relay, 1).await, socket(&stage.relay, 2).await, socket(&stage.relay, 3).await];
    becomes(&stage.database, 1, true).await;
    becomes(&stage.database, 3, true).await;
    settled(&stage, &stage.relay).await;
    assert_eq!(is_online(&stage.database, 2).await, Some(false));
    holder.batch_execute("rollback").await.unwrap();
    becomes(&stage.database, 2, true).await;
    holder.batch_execute(&hold).await.unwrap();
    drop(clients);
    becomes(&stage.database, 1, false).await;
    assert_eq!(is_online(&stage.database, 2).await, Some(true));
    holder.batch_execute("rollback").await.unwrap();
    becomes(&stage.database, 2, false).await;
    assert_eq!(stage.relay.figure("relay_status_failed_updates_total"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_values_harm_only_their_own_row() {
    let stage = stage(|_| {}).await;
    stage.run("alter table people add check (id <> '0000000f-0000-4000-8000-000000000000')").await;
    let hostile = [
        "nonsense",
        "'; drop table people; --",
        "{a,b}",
        "NULL",
        "",
        " ",
        "00000001-0000-4000-8000-00000000000",
        "\u{1F600}",
        // Refused by a constraint of the table.
        "0000000f-0000-4000-8000-000000000000",
    ];
    let mut clients = vec![socket(&stage.relay, 1).await];
    for sub in hostile {
        for role in ["authenticated", "anon", "postgres", "x\"; drop table people; --"] {
            clients.push(Client::connect(&stage.relay, &token(role, Some(sub), json!({}))).await);
        }
    }
    let long = "x".repeat(10_000);
    clients.push(Client::connect(&stage.relay, &token("authenticated", Some(&long), json!({}))).await);
    clients.push(socket(&stage.relay, 2).await);
    becomes(&stage.database, 1, true).await;
    becomes(&stage.database, 2, true).await;
    settled(&stage, &stage.relay).await;
    assert_eq!(stage.database.value("select count(*) from people where not name = ''").await, "0");
    assert_eq!(
        stage
            .database
            .value("select count(*) from relay.status_connected where user_id !~ '^[0-9a-f]{8}-'")
            .await,
        "0"
    );
    assert!(stage.relay.figure("relay_status_failed_updates_total") >= 7);
    drop(clients);
    becomes(&stage.database, 1, false).await;
    becomes(&stage.database, 2, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_is_never_cut_to_the_value_of_another_user() {
    let stage = Stage::new(
        "create table short (id varchar(4) primary key, up boolean not null default false);
         insert into short values ('abcd'), ('7');
         select relay.status_on('short', 'id', 'up', null, null)",
    )
    .await;
    writes(&stage.relay).await;
    let of = |sub: &str| token("authenticated", Some(sub), json!({}));
    let _long = Client::connect(&stage.relay, &of("abcde")).await;
    let _seven = Client::connect(&stage.relay, &of("7")).await;
    let up = "select coalesce(string_agg(id, ' '), '') from short where up";
    eventually("the other user is up", || async { (stage.database.value(up).await == "7").then_some(()) })
        .await;
    eventually("the long one is refused", || async {
        (stage.relay.figure("relay_status_failed_updates_total") > 0).then_some(())
    })
    .await;
    assert_eq!(stage.database.value(up).await, "7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_altered_or_dropped_is_told_and_hurts_nothing_else() {
    for (statement, why, back) in [
        (
            "alter table people drop column seen",
            "has no column seen",
            "alter table people add seen timestamptz",
        ),
        (
            "alter table people alter active type text",
            "is of type text",
            "alter table people alter active type timestamptz using active::timestamptz",
        ),
        (
            "alter table people drop constraint people_pkey",
            "has no unique index",
            "alter table people add primary key (id)",
        ),
        (
            "alter table people rename is_online to up",
            "has no column is_online",
            "alter table people rename up to is_online",
        ),
        ("drop table people", "was dropped", super::PEOPLE),
    ] {
        let stage = Stage::new(super::PEOPLE).await;
        let (_child, mut log, url) =
            serve(&["--database-url", &stage.database.url, "--status-sweep-ms", "300"]).await;
        let address = url.trim_start_matches("http://").parse().unwrap();
        let mut listener = stage.join(&token("service_role", None, json!({}))).await;
        stage.run(statement).await;
        let _client = Client::at(address, &of(1), "").await.unwrap();
        // A statement that ran at the same time may have failed before, with words of PostgreSQL.
        let line = line_with(&mut log, why).await;
        assert!(line.contains("status not written"), "{statement}: {line}");
        let (code, found, _) = output(&["doctor", "--database-url", &stage.database.url]).await;
        assert!(
            code == 1 && found.lines().any(|line| line.starts_with("FAULT") && line.contains(why)),
            "{found}"
        );
        // Changes go on.
        stage.changes(&mut listener).await;
        stage.run(back).await;
        becomes(&stage.database, 1, true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_status_table_is_refused_with_what_to_do() {
    let stage = Stage::new(
        "create table fit (id uuid primary key, up boolean);
         create table loose (id uuid, up boolean);
         create table texts (id json, up text);
         create view looks as select * from fit",
    )
    .await;
    for (call, why) in [
        ("'fit'", "has no column \"userId\""),
        ("'fit', 'id', 'down'", "has no column down"),
        ("'fit', 'id', 'up', 'up', null", "column up of the status table"),
        ("'loose', 'id', 'up', null, null", "has no unique index on id alone"),
        ("'texts', 'id', 'up', null, null", "column id of the status table"),
        ("'looks', 'id', 'up', null, null", "is no table"),
        ("'fit', null, 'up'", "are needed"),
    ] {
        let session = connect(&stage.database.url).await;
        let refused = session.batch_execute(&format!("select relay.status_on({call})")).await.unwrap_err();
        let refused = refused.as_db_error().unwrap();
        assert!(refused.message().contains(why), "{call}: {}", refused.message());
    }
    assert_eq!(stage.database.value("select count(*) from relay.status_table").await, "0");
    stage.run("select relay.status_on('fit', 'id', 'up', null, null)").await;
    writes(&stage.relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_row_gets_one_only_if_the_table_lets_it() {
    let stage = Stage::new(
        "create table named (id uuid primary key, name text not null, up boolean not null default false);
         select relay.status_on('named', 'id', 'up', null, null)",
    )
    .await;
    writes(&stage.relay).await;
    let mut client = socket(&stage.relay, 1).await;
    eventually("the connection is known", || async {
        (stage.database.value("select count(*) from relay.status_connected").await == "1").then_some(())
    })
    .await;
    assert_eq!(stage.database.value("select count(*) from named").await, "0");
    assert_eq!(stage.relay.figure("relay_status_failed_updates_total"), 0);
    stage.run(&format!("insert into named values ('{}', 'Ann')", id(1))).await;
    drop(client);
    client = socket(&stage.relay, 1).await;
    eventually("its row is written", || async {
        (stage.database.value("select coalesce(bool_or(up), false) from named").await == "t").then_some(())
    })
    .await;
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_written_with_the_rights_of_the_tables_owner_and_no_others() {
    let stage = Stage::new(
        "create role \"$DB_owner\"; create schema theirs authorization \"$DB_owner\";
         set role \"$DB_owner\";
         create table theirs.people (id uuid primary key, up boolean not null default false, by_whom text);
         create function theirs.note() returns trigger language plpgsql as $$ begin new.by_whom := current_user; return new; end $$;
         create trigger note before insert or update on theirs.people for each row execute function theirs.note();
         alter table theirs.people enable row level security;
         reset role;
         select relay.status_on('theirs.people', 'id', 'up', null, null)",
    )
    .await;
    writes(&stage.relay).await;
    let _first = socket(&stage.relay, 1).await;
    let written = "select coalesce(string_agg(distinct by_whom, ' '), '') from theirs.people";
    let owner = format!("{}_owner", stage.name);
    eventually("it is written", || async { (stage.database.value(written).await == owner).then_some(()) })
        .await;
    // The owner may alter the function that runs as the owner; as another it runs nothing.
    stage
        .run(
            "set role \"$DB_owner\";
             alter function relay.status_run(text, text[], boolean[], timestamptz[], boolean[]) security invoker;
             reset role",
        )
        .await;
    let _second = socket(&stage.relay, 2).await;
    eventually("it is refused", || async {
        (stage.relay.figure("relay_status_failed_updates_total") > 0).then_some(())
    })
    .await;
    let session = connect(&stage.database.url).await;
    let called = "select * from relay.status_run('select current_user::text', null, null, null, null)";
    let refused = session.batch_execute(called).await.unwrap_err();
    assert!(refused.as_db_error().unwrap().message().contains("owner of the status table has changed"));
    assert_eq!(stage.database.value(written).await, owner);
    stage.run("select relay.status_on('theirs.people', 'id', 'up', null, null)").await;
    eventually("both are written", || async {
        (stage.database.value("select count(*) from theirs.people where up").await == "2").then_some(())
    })
    .await;
}
