//! Webhooks: changes that reach an HTTP receiver, whatever happens to it, to the relay and to the table.

mod delivery;
mod failures;
mod operators;
mod receiver;
mod relays;
mod tables;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::support::database::Database;
use crate::support::eventually;
use receiver::{Received, Receiver};

/// A watched table whose rows the service role sees.
const ALERTS: &str = "
    create table alerts (id int primary key, n int not null default 0, title text);
    grant select on alerts to service_role;
    select relay.watch('alerts');";

/// Makes a webhook of `alerts` with short pauses, and further options. Returns its secret.
async fn hook(database: &Database, receiver: &Receiver, options: &str) -> String {
    let url = receiver.url();
    database
        .value(&format!(
            "select relay.webhook('alerts', '{url}', pause => '20 milliseconds', {options} name => 'alerts')"
        ))
        .await
}

/// Waits until the receiver has taken this many different deliveries, and returns what it has taken.
async fn taken(receiver: &Receiver, count: usize) -> Vec<Received> {
    eventually(&format!("{count} deliveries are taken"), || async {
        let taken = receiver.taken();
        let ids: BTreeSet<&String> = taken.iter().map(|one| &one.id).collect();
        (ids.len() >= count).then_some(taken.clone())
    })
    .await
}

/// Waits until a column of the view has this value as text.
async fn becomes(database: &Database, column: &str, value: &str) {
    let query = format!("select ({column})::text from relay.webhooks where name = 'alerts'");
    eventually(&format!("{column} is {value}"), || async {
        (database.value(&query).await == value).then_some(())
    })
    .await;
}

/// Waits until a column of the view contains this text.
async fn says(database: &Database, column: &str, text: &str) {
    let query = format!("select coalesce(({column})::text, '') from relay.webhooks where name = 'alerts'");
    eventually(&format!("{column} says {text:?}"), || async {
        database.value(&query).await.contains(text).then_some(())
    })
    .await;
}

/// The value of a column for each delivery, of the new row or else of the old one.
fn values(taken: &[Received], column: &str) -> Vec<i64> {
    let row = |one: &Received| {
        [&one.body["record"][column], &one.body["old_record"][column]].into_iter().find_map(Value::as_i64)
    };
    taken.iter().filter_map(row).collect()
}

/// Checks that the first arrivals of each row's changes are in the order of their `n`, without a hole from 1 on, and returns how
/// many rows there are.
#[track_caller]
fn in_order(taken: &[Received]) -> usize {
    let (mut seen, mut rows) = (BTreeSet::new(), BTreeMap::<i64, i64>::new());
    for one in taken.iter().filter(|one| one.body["type"] != "GAP") {
        if !seen.insert(one.id.clone()) {
            continue;
        }
        let (id, n) = (one.body["record"]["id"].as_i64().unwrap(), one.body["record"]["n"].as_i64().unwrap());
        let before = rows.insert(id, n).unwrap_or_default();
        assert_eq!(n, before + 1, "row {id}");
    }
    rows.len()
}
