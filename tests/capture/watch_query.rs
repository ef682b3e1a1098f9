//! `relay.watch_query`: one call makes a query a live, policy-checked feed.

use serde_json::json;

use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::relay::Relay;
use crate::support::{ANN, BOB, eventually, token};

async fn orders() -> Database {
    let database = Database::new().await;
    database
        .run(&format!(
            "create table orders (id int primary key, owner uuid, amount int);
             insert into orders values (1, '{ANN}', 10), (2, '{ANN}', 5), (3, '{BOB}', 1);"
        ))
        .await;
    database
}

async fn subscriber(relay: &Relay, user: &str) -> Client {
    let mut client = Client::connect(relay, &token("authenticated", Some(user), json!({}))).await;
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "totals"}])).await;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_becomes_a_feed_that_each_reads_by_the_policy() {
    let database = orders().await;
    database
        .run(
            "select relay.watch_query('totals', 'select owner, sum(amount)::int as total, count(*)::int as orders
                                                 from orders group by owner -- all of them',
                                      '{owner}', 'owner = auth.uid()', '100 milliseconds')",
        )
        .await;
    let relay = Relay::start(&database.url).await;
    eventually("the view is up to date", || async {
        (database.value("select dirty_since is null from relay.refreshes").await == "t").then_some(())
    })
    .await;
    let (mut ann, mut bob) = (subscriber(&relay, ANN).await, subscriber(&relay, BOB).await);
    database.run("update orders set amount = 20 where id = 1").await;
    assert_eq!(ann.change().await["record"], json!({"owner": ANN, "total": 25, "orders": 2}));
    database.run("update orders set amount = 2 where id = 3").await;
    assert_eq!(bob.change().await["record"], json!({"owner": BOB, "total": 2, "orders": 1}));
    database.run("delete from orders where id = 3; update orders set amount = 0").await;
    let change = bob.change().await;
    assert_eq!((&change["type"], &change["old_record"]), (&json!("DELETE"), &json!({"owner": BOB})));
    assert_eq!(ann.change().await["record"], json!({"owner": ANN, "total": 0, "orders": 2}));
    // Others do not read it at all.
    assert_eq!(database.value("select has_any_column_privilege('anon', 'totals', 'select')").await, "f");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_refused_says_why_and_leaves_nothing() {
    let database = orders().await;
    let objects = "select count(*) from (select oid from pg_class union all select oid from pg_trigger union all select oid from pg_type
                   union all select relation from relay.read_policies union all select relation from relay.watch_list
                   union all select relation from relay.refresh_schedule) o";
    let before = database.value(objects).await;
    let query = "'select id, amount from orders'";
    for (name, query, rest, expected) in [
        ("orders", query, "'{id}', 'true'", "public.orders exists already"),
        ("pg_catalog.pg_class", query, "'{id}', 'true'", "pg_catalog.pg_class exists already"),
        ("a.b.c", query, "'{id}', 'true'", "a.b.c is not the name of a view"),
        ("x", query, "'{id}', null", "a policy is required"),
        ("x", query, "'{id}', ' '", "a policy is required"),
        ("x", query, "'{}', 'true'", "a key is required"),
        ("x", query, "null, 'true'", "a key is required"),
        ("x", query, "'{nope}', 'true'", "column \"nope\" does not exist"),
        ("x", query, "'{id}', 'nope = 1'", "column \"nope\" does not exist"),
        ("x", query, "'{id}', 'true', '1 millisecond'", "the interval must be at least 100 milliseconds"),
        (
            "x",
            query,
            "'{id}', 'true', '1 second', '{nobody_at_all}'",
            "role \"nobody_at_all\" does not exist",
        ),
        ("x", "'select 1 as id, amount from orders'", "'{id}', 'true'", "could not create unique index"),
        ("x", "'select 1 as id'", "'{id}', 'true'", "x reads 0 tables"),
        (
            "x",
            "'select id from orders; drop table orders'",
            "'{id}', 'true'",
            "cannot open multi-query plan as cursor",
        ),
        (
            "x",
            "'select id from orders) with data; drop table orders; (select 1'",
            "'{id}', 'true'",
            "syntax error",
        ),
        ("x", "'delete from orders returning id'", "'{id}', 'true'", "syntax error"),
        (
            "x",
            "'with gone as (delete from orders returning id) select id from gone'",
            "'{id}', 'true'",
            "data-modifying",
        ),
        ("x", "'drop table orders'", "'{id}', 'true'", "cannot open DROP TABLE query as cursor"),
        ("x", "''", "'{id}', 'true'", "cannot open"),
        ("x", "null", "'{id}', 'true'", "null"),
    ] {
        let call = format!("select relay.watch_query('{name}', {query}, {rest})");
        let error = database.client.batch_execute(&call).await.unwrap_err();
        let message = error.as_db_error().unwrap().message();
        assert!(message.contains(expected), "{call}: {message}");
        assert_eq!(database.value(objects).await, before, "{call}");
    }
    assert_eq!(database.value("select count(*) from orders").await, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn default_privileges_show_it_to_no_others_and_the_end_leaves_nothing() {
    let database = orders().await;
    database
        .run(
            "create schema live; grant usage on schema live to anon, authenticated;
             alter default privileges grant all on tables to anon, authenticated, service_role;
             select relay.watch_query('live.\"All orders\"', 'table orders', '{id}', 'true', readers => '{service_role}');
             alter default privileges revoke all on tables from anon, authenticated, service_role",
        )
        .await;
    let may_read = "select string_agg(r.rolname, ' ') from pg_roles r
                    where r.rolname in ('anon', 'authenticated', 'service_role') and has_any_column_privilege(r.oid, 'live.\"All orders\"'::regclass, 'select')";
    assert_eq!(database.value(may_read).await, "service_role");
    let again = "select relay.watch_query('live.\"All orders\"', 'table orders', '{id}', 'true')";
    let error = database.client.batch_execute(again).await.unwrap_err();
    let hint = error.as_db_error().unwrap().hint().unwrap().to_owned();
    let remedy = hint.split("select relay.").nth(1).unwrap().split(". Else").next().unwrap();
    database.run(&format!("select relay.{remedy}; {again}; select relay.{remedy}")).await;
    for left in [
        "select count(*) from pg_class where relname = 'All orders'",
        "select count(*) from pg_trigger where tgname = '00_relay_signal'",
        "select (select count(*) from relay.watch_list) + (select count(*) from relay.told_rows) + (select count(*) from relay.told_views)
                + (select count(*) from relay.read_policies) + (select count(*) from relay.refresh_schedule)",
    ] {
        assert_eq!(database.value(left).await, "0", "{left}");
    }
}
