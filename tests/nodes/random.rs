//! Random joins, tracks, leaves and broadcasts at three relays, one of them a process that is killed, while connections are cut: at
//! rest every client knows who is there, and what it heard of each sender came in order and once.
#![allow(clippy::print_stdout, reason = "the seed is what a failure is repeated by")]

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio::process::Child;

use super::{State, apply, know, member, present, say, track, untrack};
use crate::nodes::faults::CUT;
use crate::program::cli::serve;
use crate::support::database::Database;
use crate::support::dice::Dice;
use crate::support::relay::Relay;
use crate::support::socket::Socket;

/// A client that is never present, and hears everything.
struct Watcher {
    socket: Socket,
    known: State,
    /// The last number that it heard of each sender.
    heard: BTreeMap<String, u64>,
}

impl Watcher {
    async fn at(address: &str) -> Self {
        let socket = member(address, present("watcher")).await;
        Self { socket, known: State::new(), heard: BTreeMap::new() }
    }

    /// Reads until it knows this presence.
    async fn knows(&mut self, truth: &State) {
        while &self.known != truth {
            let frame = self.socket.message_frame().await;
            if frame[3] != "broadcast" {
                apply(&mut self.known, &frame);
                continue;
            }
            let content = &frame[4]["payload"];
            let (from, n) = (content["from"].as_str().unwrap().to_owned(), content["n"].as_u64().unwrap());
            let last = self.heard.insert(from, n);
            assert!(last.is_none_or(|last| last < n), "{last:?} before {frame}");
        }
    }
}

struct Member {
    socket: Socket,
    place: usize,
    key: String,
    said: u64,
}

struct Run {
    database: Database,
    relays: Vec<Relay>,
    process: Option<(Child, String)>,
    watchers: Vec<Watcher>,
    members: Vec<Member>,
    truth: State,
    count: u64,
}

impl Run {
    async fn new() -> Self {
        let database = Database::new().await;
        let relays = vec![Relay::start(&database.url).await, Relay::start(&database.url).await];
        let mut run = Self {
            database,
            relays,
            process: None,
            watchers: Vec::new(),
            members: Vec::new(),
            truth: State::new(),
            count: 0,
        };
        for place in 0..2 {
            run.watchers.push(Watcher::at(&run.address(place)).await);
        }
        run.start_process().await;
        run
    }

    fn address(&self, place: usize) -> String {
        match self.relays.get(place) {
            Some(relay) => relay.address.to_string(),
            None => self.process.as_ref().unwrap().1.clone(),
        }
    }

    async fn start_process(&mut self) {
        let (child, mut log, url) = serve(&["--database-url", &self.database.url]).await;
        // Its log is read, so that it never waits.
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        self.process = Some((child, url.trim_start_matches("http://").to_owned()));
        know(&self.relays.iter().collect::<Vec<_>>(), 3).await;
        self.watchers.push(Watcher::at(&self.address(2)).await);
    }

    async fn kill_process(&mut self) {
        let (mut child, _) = self.process.take().unwrap();
        child.start_kill().unwrap();
        child.wait().await.unwrap();
        self.watchers.pop();
        for member in self.members.extract_if(.., |member| member.place == 2) {
            self.truth.remove(&member.key);
        }
    }

    async fn step(&mut self, dice: &mut Dice) {
        self.count += 1;
        let one = (!self.members.is_empty()).then(|| dice.below(self.members.len() as u64) as usize);
        match (dice.below(20), one) {
            (0..4, _) | (_, None) => {
                let (place, key) = (dice.below(3) as usize, format!("k{}", self.count));
                let socket = member(&self.address(place), present(&key)).await;
                self.members.push(Member { socket, place, key, said: 0 });
            }
            (4..10, Some(one)) => {
                let member = &mut self.members[one];
                let object = json!({"n": self.count});
                track(&mut member.socket, object.clone()).await;
                self.truth.insert(member.key.clone(), object);
            }
            (10..11, Some(one)) => {
                let member = &mut self.members[one];
                untrack(&mut member.socket).await;
                self.truth.remove(&member.key);
            }
            (11..13, Some(one)) => {
                let member = self.members.swap_remove(one);
                self.truth.remove(&member.key);
            }
            (13..19, Some(one)) => {
                let member = &mut self.members[one];
                member.said += 1;
                let content: Value = json!({"from": member.key, "n": member.said});
                say(&mut member.socket, content).await;
            }
            _ => self.database.run(CUT).await,
        }
    }

    /// Nothing happens any more: all know the truth, also those who come now.
    async fn rest(&mut self) {
        for place in 0..3 {
            self.watchers[place].knows(&self.truth).await;
            Watcher::at(&self.address(place)).await.knows(&self.truth).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_rest_all_clients_of_three_relays_know_who_is_there() {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let (mut dice, mut run) = (Dice(seed), Run::new().await);
    for round in 0..4 {
        for _ in 0..50 {
            run.step(&mut dice).await;
        }
        run.rest().await;
        if round < 3 {
            run.kill_process().await;
            for watcher in &mut run.watchers {
                watcher.knows(&run.truth).await;
            }
            run.start_process().await;
        }
    }
}
