//! The promises, tried on a real PostgreSQL: one database a test, one binary for all (linking is what takes long).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests say what they do by their names"
)]

mod support;

mod access_claims;
mod access_late;
mod access_locks;
mod access_order;
mod access_property;
mod access_settings;
mod addresses;
mod autobahn;
mod browser;
mod capture;
mod changes;
mod cli;
mod tail;
mod clients;
mod commits;
mod connections;
mod crash;
mod cursors;
mod doorbell;
mod drift;
mod explain;
mod faults;
mod filter;
mod first_use;
mod hostile_cursors;
mod hostile_tokens;
mod http_answers;
mod http_edges;
mod healing;
mod grants;
mod heavy_filters;
mod history;
mod images;
mod install;
mod keys;
mod large_transactions;
mod layers;
mod leader;
mod like;
mod limits;
mod limits_speech;
mod machine;
mod memory;
mod migrations;
mod one_cursor;
mod order;
mod overlaps;
mod pages;
mod outage;
mod policy;
mod policy_cost;
mod policy_generated;
mod policy_hostile;
mod policy_leaks;
mod policy_live;
mod policy_patterns;
mod policy_patterns_claims;
mod policy_patterns_members;
mod policy_patterns_mixed;
mod policy_patterns_odd;
mod policy_patterns_rows;
mod policy_rewrites;
mod policy_shapes;
mod policy_ways;
mod policy_withdrawn;
mod portions;
mod promises;
mod refresh;
mod replays;
mod restored;
mod resume;
mod retention;
mod shapes;
mod sizes;
mod strangers;
mod tokens;
mod triggers;
mod websocket;
mod wire;
mod wire_bindings;
mod wire_edges;
mod wire_life;
mod writers;
