//! `relay tail`: what it says while it waits, over an outage, and when it is refused.

use std::collections::HashSet;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use crate::program::cli::{line_with, serve};
use crate::support::database::Database;
use crate::support::program::{output, relay};
use crate::support::proxy::Proxy;
use crate::support::{PATIENCE, SECRET, token};

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_without_a_relay_says_once_that_it_waits_and_begins_when_there_is_one() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to service_role").await;
    database.run("select relay.watch('t')").await;
    let place = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = place.local_addr().unwrap().to_string();
    let url = format!("http://{address}");
    let mut tail = relay(&["tail", "t", "--url", &url, "--jwt-secret", SECRET]).spawn().unwrap();
    let mut told = BufReader::new(tail.stderr.take().unwrap()).lines();
    for _ in 0..3 {
        drop(timeout(PATIENCE, place.accept()).await.expect("it tries again").unwrap());
    }
    drop(place);
    let options = ["serve", "--jwt-secret", SECRET, "--listen", &address, "--database-url", &database.url];
    let _relay = relay(&options).spawn().unwrap();
    let mut said = Vec::new();
    while !said.last().is_some_and(|line: &String| line.contains("following public.t")) {
        said.push(timeout(PATIENCE, told.next_line()).await.unwrap().unwrap().unwrap());
    }
    assert!(said[0].contains(&format!("waiting for a relay at {url}")), "{said:?}");
    let once: HashSet<_> = said.iter().collect();
    assert_eq!(once.len(), said.len(), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_stays_while_the_database_is_away_and_shows_what_follows() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to service_role").await;
    database.run("select relay.watch('t')").await;
    let (proxy, through) = Proxy::to_server(&database.url).await;
    let (_relay, _lines, url) = serve(&["--database-url", &through, "--stall-seconds", "1"]).await;
    let mut tail = relay(&["tail", "t", "--url", &url, "--jwt-secret", SECRET]).spawn().unwrap();
    let mut told = BufReader::new(tail.stderr.take().unwrap()).lines();
    let mut changes = BufReader::new(tail.stdout.take().unwrap()).lines();
    line_with(&mut told, "following public.t").await;
    proxy.hold();
    proxy.cut();
    line_with(&mut told, "Stalled:").await;
    proxy.release();
    database.run("insert into t values (1)").await;
    line_with(&mut changes, r#"INSERT public.t {"id":1}"#).await;
    line_with(&mut told, "Feed resumed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_that_is_refused_says_in_plain_words_what_to_do() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to anon").await;
    database.run("select relay.watch('t')").await;
    let (_relay, _lines, url) = serve(&["--database-url", &database.url]).await;
    let anon = token("anon", None, json!({}));
    for (more, expected) in [
        (vec!["t", "--jwt-secret", SECRET], "grant select on public.t to service_role"),
        (vec!["t", "--token", &anon, "--filter", "id>7"], "A filter is column=op.value"),
        (vec!["t", "--token", &anon, "--filter", "nope=eq.7"], "public.t has no column nope"),
        (vec!["t", "--token", "nonsense"], "refuses the token"),
        (vec!["t", "--token", &format!("{}AA", &anon[..anon.len() - 2])], "signed it is not this relay's"),
        (vec!["t", "--token", "non sense"], "not allowed in an address"),
        (vec!["t", "--jwt-secret", &"another ".repeat(4)], "has to be that of its `relay serve`"),
    ] {
        let arguments = [vec!["tail", "--url", &url], more].concat();
        let (code, _, told) = timeout(PATIENCE, output(&arguments)).await.expect("it ends");
        assert_eq!(code, 1);
        assert!(told.contains(expected) && !told.contains("Realtime"), "{expected:?} is not in {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_shows_what_was_written_while_the_relay_was_away_and_nothing_twice() {
    let database = Database::new().await;
    database.run("create table t (id int primary key); grant select on t to service_role").await;
    database.run("select relay.watch('t')").await;
    let (mut relay_one, _lines, url) = serve(&["--database-url", &database.url]).await;
    let address = url.strip_prefix("http://").unwrap();
    let mut tail = relay(&["tail", "t", "--url", &url, "--jwt-secret", SECRET]).spawn().unwrap();
    let mut told = BufReader::new(tail.stderr.take().unwrap()).lines();
    let mut changes = BufReader::new(tail.stdout.take().unwrap()).lines();
    line_with(&mut told, "following public.t").await;
    database.run("insert into t values (1)").await;
    line_with(&mut changes, r#"INSERT public.t {"id":1}"#).await;
    relay_one.kill().await.unwrap();
    line_with(&mut told, "went away").await;
    database.run("insert into t values (2)").await;
    let options = ["serve", "--jwt-secret", SECRET, "--listen", address, "--database-url", &database.url];
    let _relay_two = relay(&options).spawn().unwrap();
    let next = timeout(PATIENCE, changes.next_line()).await.unwrap().unwrap().unwrap();
    assert!(next.contains(r#"INSERT public.t {"id":2}"#), "{next}");
}
