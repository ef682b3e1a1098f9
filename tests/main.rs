//! The promises, tried on a real PostgreSQL: one database a test, one binary for all (linking is what takes long).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests say what they do by their names"
)]

mod support;

mod browser;
mod capture;
mod cli;
mod clients;
mod crash;
mod doorbell;
mod install;
mod layers;
mod order;
mod refresh;
