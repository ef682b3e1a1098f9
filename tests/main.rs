//! The promises, tried on a real PostgreSQL: one database a test, one binary for all (linking is what takes long).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests say what they do by their names"
)]

mod browser;
mod capture;
mod clients;
mod delivery;
mod house;
mod limits;
mod nodes;
mod program;
mod pubsub;
mod recovery;
mod sql_broadcasts;
mod status;
mod subscribe;
mod support;
mod systems;
mod transport;
mod visibility;
mod webhooks;
