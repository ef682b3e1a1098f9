//! The machine under the relay: its process is held for a while, and its file descriptors run out.

use std::net::SocketAddr;
use std::process::Stdio;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::capture::strangers::most_memory;
use crate::program::cli::{line_with, serve, signal};
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::{SECRET, token};

async fn database() -> Database {
    let database = Database::new().await;
    let table =
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t')";
    database.run(table).await;
    database
}

async fn joined(address: SocketAddr) -> Client {
    let mut client = Client::at(address, &token("authenticated", None, json!({})), "").await.unwrap();
    client.subscribe("realtime:t", json!([{"event": "*", "schema": "public", "table": "t"}])).await;
    client
}

fn parsed(address: &str) -> SocketAddr {
    address.trim_start_matches("http://").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_held_and_let_go_catches_up() {
    let database = database().await;
    let (child, _lines, address) = serve(&["--database-url", &database.url]).await;
    let mut client = joined(parsed(&address)).await;
    for (first, last) in [(1, 300), (301, 600)] {
        signal(&child, "-STOP");
        database
            .run(&format!("do $$ begin for id in {first} .. {last} loop insert into t values (id); commit; end loop; end $$"))
            .await;
        signal(&child, "-CONT");
        for id in first..=last {
            assert_eq!(client.change().await["record"]["id"], id);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_file_descriptors_clients_go_on_and_the_database_can_be_reached_anew_and_others_come_in_later()
 {
    let database = database().await;
    let relay = env!("CARGO_BIN_EXE_relay");
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -n 80; exec {relay} serve --listen 127.0.0.1:0")])
        .env_clear()
        .envs([("DATABASE_URL", database.url.as_str()), ("RELAY_JWT_SECRET", SECRET)])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = line_with(&mut lines, "supabase-js at ").await;
    let address = parsed(line.split("supabase-js at ").nth(1).unwrap().split_whitespace().next().unwrap());
    let mut client = joined(address).await;
    database.run("insert into t values (1)").await;
    assert_eq!(client.change().await["record"]["id"], 1);
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..100 {
        crowd.spawn(async move {
            let _client = Client::at(address, &token("anon", None, json!({})), "").await;
            std::future::pending::<()>().await;
        });
    }
    line_with(&mut lines, "connection not accepted").await;
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and application_name like 'relay%'";
    for id in 2..=20 {
        if id % 4 == 0 {
            database.run(cut).await;
        }
        database.run(&format!("insert into t values ({id})")).await;
        assert_eq!(client.change().await["record"]["id"], id);
    }
    crowd.shutdown().await;
    let mut late = joined(address).await;
    database.run("insert into t values (21)").await;
    assert_eq!(
        (client.change().await["record"]["id"].clone(), late.change().await["record"]["id"].clone()),
        (json!(21), json!(21))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_200_megabytes_takes_little_memory() {
    const ROWS: i64 = 40_000;
    let database = database().await;
    database.run("alter table t add v text").await;
    let (child, _lines, address) = serve(&["--database-url", &database.url]).await;
    let mut client = joined(parsed(&address)).await;
    let before = most_memory(child.id().unwrap());
    database
        .run(&format!("insert into t select n, repeat('x', 5000) from generate_series(1, {ROWS}) n"))
        .await;
    for id in 1..=ROWS {
        assert_eq!(client.change().await["record"]["id"], id);
    }
    let grown = most_memory(child.id().unwrap()).saturating_sub(before);
    assert!(grown < 50_000, "{grown} KiB for 200 MB of rows");
}
