//! A Postgres change-feed relay: each row change to those who may see it by the table's own policies.
//!
//! ```text
//! writer ── SQL ──▶ trigger ──▶ relay.log              the changelog, same transaction
//!                          └──▶ NOTIFY                  the doorbell, only if the relay sleeps
//! postgres/doorbell ─▶ feed/source ─▶ feed/gate ─▶ feed/router ─▶ model/session ─▶ transport ─▶ client
//!    wake-up            pages by        who may      frames,         one client       WebSocket
//!                       cursor          see what     encoded once
//! ```
//!
//! Three sentences explain the rest. NOTIFY is a hint, the changelog is the truth. There is one recovery path:
//! resume from a cursor. A subscription exists only bound to verified claims.
//!
//! Imports go one way, down this page: `main`, `server` → `transport` → `feed` → `postgres` → `model`, with
//! `config`, `observe` and `tls` beside them. `tests/layers.rs` holds the rule.
#![allow(
    clippy::disallowed_methods,
    reason = "the clock is forbidden in `model` alone, which turns this lint on again"
)]

/// What things mean: pure values and rules. Never a socket, a clock, a task, a question to PostgreSQL or a log line.
#[deny(clippy::disallowed_methods)]
pub mod model {
    pub mod change;
    pub mod cursor;
    pub mod position;
    pub mod claims;
    pub mod bookmark;
    pub mod datum;
    pub mod pattern;
    pub mod relation;
    pub mod marks;
    pub mod shape;
    pub mod utc;
    pub mod image;
    pub mod term;
    pub mod scalar;
    pub mod predicate;
    mod raising;
    pub mod anchor;
    pub mod index;
    pub mod plan;
    pub mod compile;
    pub mod policy;
    pub mod filter;
    pub mod bound_filter;
    pub mod refusal;
    pub mod subscription;
    pub mod delivery;
    pub mod phoenix;
    pub mod dress;
    pub mod join;
    pub mod session;
    pub mod limits;
    pub mod paging;
    pub mod pace;
}

/// Everything that speaks SQL. Never knows that there are clients.
pub mod postgres {
    mod parameters;
    pub mod address;
    mod advice;
    pub mod error;
    pub mod connect;
    pub mod backoff;
    pub mod install;
    pub mod doorbell;
    pub mod changelog;
    pub mod portions;
    pub mod transactions;
    pub mod catalog;
    mod breaker;
    mod stand_in;
    pub mod judge;
    pub mod census;
    pub mod enquiry;
    pub mod rows;
    pub mod jobs;
    pub mod retention;
    pub mod bookmarks;
}

/// From the changelog to the subscribers' outboxes. Never waits for a client that does not read.
pub mod feed {
    pub mod pulse;
    pub mod source;
    mod reading;
    pub mod readership;
    pub mod place;
    mod finder;
    pub mod load;
    pub mod filter_judge;
    pub mod gate;
    pub mod stretch;
    pub mod backlog;
    pub mod router;
    pub mod lanes;
    pub mod command;
    pub mod hub;
    pub mod audiences;
    pub mod audience;
    pub mod members;
    pub mod written;
    pub mod frame;
    pub mod budget;
    pub mod outbox;
    pub mod past;
    pub mod replay;
    pub mod follower;
    pub mod bookmarks;
    pub mod binding;
    pub mod explain;
}

/// Bytes to and from clients, and the keys that verify their tokens. Never says SQL.
pub mod transport {
    pub mod key_set;
    pub mod fetch;
    pub mod listen;
    pub mod keys;
    pub mod auth;
    pub mod admission;
    pub mod intake;
    pub mod kernel;
    pub mod exchange;
    pub mod deadline;
    mod accept;
    pub mod replies;
    pub mod refusing;
    pub mod http;
    pub mod query;
    pub mod changes;
    pub mod answer;
    pub mod stream;
    pub mod writer;
    pub mod pings;
    mod catch_up;
    pub mod resume;
    pub mod speech;
    pub mod ws;
}

pub mod config;
pub mod observe;
pub mod tls;
pub mod server;

/// The commands beside `serve`, one a file.
pub mod command {
    pub mod token;
    pub mod tail;
    pub mod explain;
    pub mod doctor;
}
