//! A Postgres change-feed relay: delivers each row change to the subscribers who may see it by the table's own policies.
//!
//! ```text
//! writer ── SQL ──▶ trigger ──▶ relay.log              the changelog, in the writer's transaction
//!                          └──▶ NOTIFY                  the doorbell, only if the relay sleeps
//! ```
//!
//! Three sentences explain the rest. NOTIFY is a hint, the changelog is the truth. There is one recovery path:
//! resume from a cursor. A subscription exists only bound to verified claims.
//!
//! # The eight walks
//!
//! **A change.** `sql/101_capture.sql` writes it. [`postgres::changelog::doorbell`] wakes the relay,
//! [`postgres::changelog::reader`] reads a page, [`feed::read::source`] cuts it into batches, [`feed::router`] takes them in order.
//! [`feed::authorize::gate`] decides who may see what, [`feed::deliver::group`] encodes it once for each group of equal
//! subscribers, [`feed::deliver::outbox`] queues it for each client, [`transport::socket::frame_writer`] writes it.
//!
//! **A join.** [`transport::socket::driver`] reads a frame, [`model::codec::phoenix`] decodes it to a
//! [message](model::session::message), `transport::socket::channels` gives it to the session ([`model::session::machine`]) and
//! performs the actions that the session decides on. [`auth::verifier`] verifies the token,
//! [`feed::handle`] binds the request to the rights of its role ([`model::subscription::binding`]) and registers it with
//! [`feed::router`]. The channels encode the answer with the codec.
//!
//! **A poll.** [`transport::routes`] dispatches, [`transport::changes::request`] reads the parameters, [`transport::changes::poll`]
//! follows from the cursor ([`feed::catch_up`]), [`feed::replay::reader`] reads what was missed from the changelog, and the answer
//! waits for its client in [`transport::held_answer`].
//!
//! **A broadcast.** [`transport::socket::driver`] or [`transport::broadcast::request`] takes it from its sender and does not parse its
//! content. [`pubsub::topics`] finds the topic, [`pubsub::topic`] encodes it once for each protocol and queues it in
//! the [`feed::deliver::outbox`] of each member. Presence goes the same way: [`model::presence::state`] knows what changed.
//! With other relays, [`pubsub::outgoing`] queues both for them, [`nodes::service`] writes and reads them over [`postgres::nodes`].
//! A broadcast from SQL is a change: `sql/114_broadcasts.sql` logs it, and [`feed::deliver::broadcast_cache`] encodes it for the
//! channels of its topic.
//!
//! **A private join.** [`model::session::private`] asks for a judgement. [`feed::authorize::topic_judge`] decides it by the
//! [rules](model::catalog::topic_rules) of `realtime.messages`, or puts it to PostgreSQL with others that wait
//! ([`feed::authorize::topic_questions`]). The session answers the join, and its channels make it a member of the private topic.
//!
//! **A sign of life.** Each frame of a socket and each request with a token is noted on the [`status::board`], which decides
//! whether it is due. [`status::writer`] writes all users that are due by one statement ([`postgres::status`], `sql/116_status.sql`).
//! What it writes is a change as any other.
//!
//! **A refresh.** `sql/106_refresh_on_change.sql` notes that a table which a view reads has changed, [`postgres::maintenance::refresh`]
//! refreshes the view, and `sql/106_refresh.sql` logs how its rows differ from those that subscribers were told of.
//!
//! **A webhook.** [`webhooks::service`] holds a lock, so that one relay delivers. `webhooks::reader` follows from a cursor
//! as a poll does ([`feed::catch_up`]), `webhooks::queue` decides which delivery is in turn, `webhooks::request` sends it, and
//! `webhooks::worker` writes by [`postgres::webhooks`] how far it came and what waits.
//!
//! # Layers
//!
//! A layer imports only layers above it on this page: `model`, `postgres`, `feed`, `pubsub`, `nodes`, `status`, `webhooks`, `auth`, `transport`, then `assembly`,
//! `server` and `command`; `settings`, `config`, `observe` and `tls` stand beside them. What exactly each may import is the
//! table `IMPORTS` of `tests/house/layers.rs`. The folders of a layer import each other without cycles, too.
//!
//! # Glossary
//!
//! | Word | Meaning |
//! |---|---|
//! | changelog | the tables `relay.log_0` to `relay.log_2`, one row for each change of a watched table, broadcast from SQL, schema change or gap |
//! | image | a row as JSON, before or after a change |
//! | shape | the columns and types under which an image was written, with their catalog numbers |
//! | page | the changes that became visible between two snapshots, ordered by number; over HTTP also a part of the rows |
//! | batch, chunk | pieces of a page: delivered at once; read at once by those who missed it |
//! | position, cursor | which transactions a reader has received, and how far within a page; the same as text, for a client |
//! | epoch | the number of one history of transaction ids; cursors of another one are refused |
//! | gap | changes may be missing: the client reads the rows again |
//! | doorbell | NOTIFY and the advisory locks around it, by which writers wake the relay; to ring is to notify |
//! | leader | the relay that writers wake; it wakes the others, its followers |
//! | catalog | the watched relations with the rights and policies of each role |
//! | collection | a publication or schema whose tables are watched |
//! | identity | a role with verified claims |
//! | plan | how a policy is decided: here, by index, or by PostgreSQL |
//! | judging login | the login that evaluates policies in PostgreSQL (`--judge-url`) |
//! | judgement | what an identity may do in a private channel: by the rules of private channels, of reading or of writing |
//! | widening | a change of rules by which a role may see more than before |
//! | visibility | which images of a change a subscriber may see |
//! | subscription | what a channel asked for, bound to the rights of its identity |
//! | group, cohort | subscribers that get the same bytes; subscribers whose claims are equal as far as a policy reads them |
//! | session, bookmark | one client's channels, as a state machine of messages; the position of a channel, kept for a session with a name |
//! | codec | how a wire protocol writes the changes of a subscription; on a socket also the messages of the session |
//! | topic, presence | what channels of one name have in common; the objects that its members track |
//! | node, incarnation | a relay, as others of its database know it; one connection of it to them |
//! | outbox, frame | the bounded queue to one client; what is in it: a message, change or gap |
//! | webhook, delivery, dead letter | the changes of a table for an HTTP receiver; one of them, or a gap; one that failed too often |
//! | status, sweep | whether a user is online, in a table of the user's own; the look for users that are online and should not be |
//! | inspector | the page `/inspector` for operators, and what it reads |
//! | lane | one of three routers: in memory, filters that PostgreSQL evaluates, clients with many filter values |
//!
//! A *session* of PostgreSQL, in SQL and in [`postgres`], is a connection of a backend.
#![allow(
    clippy::disallowed_methods,
    reason = "the clock is forbidden in `model` alone, which turns this lint on again"
)]

/// What things mean: pure values and rules. No sockets, clock, tasks, SQL or logging.
#[deny(clippy::disallowed_methods)]
pub mod model {
    /// Row images and their values.
    pub mod row {
        pub mod datum;
        pub mod truth;
        pub mod pattern;
        pub mod utc;
        pub mod change;
        pub mod column;
        pub mod image;
    }
    /// Positions in the changelog.
    pub mod log {
        pub mod cursor;
        pub mod position;
    }
    /// Claims of a verified token, and bookmarks of named sessions.
    pub mod identity {
        pub mod claims;
        pub mod bookmark;
    }
    /// Row policies: compiled to conditions that are decided here, or to queries for PostgreSQL.
    pub mod policy {
        pub mod visibility;
        pub mod rights;
        pub mod claim_document;
        pub mod claim_function;
        pub mod claim_expr;
        pub mod scalar;
        pub mod predicate;
        pub mod raising;
        pub mod index_key;
        pub mod index;
        pub mod plan;
        pub mod compile;
    }
    /// Watched relations as `relay.catalog()` describes them.
    pub mod catalog {
        pub mod relation;
        pub mod held_parts;
        pub mod marks;
        pub mod near_names;
        pub mod shape;
        pub mod topic_rules;
    }
    /// What clients subscribe to.
    pub mod subscription {
        pub mod error;
        pub mod filter;
        pub mod typed_filter;
        pub mod paging;
        pub mod request;
        pub mod hidden;
        pub mod topic;
        pub mod binding;
    }
    /// Who is present in a topic.
    pub mod presence {
        pub mod state;
        pub mod status;
    }
    /// What relays of one database tell each other.
    pub mod node {
        pub mod message;
    }
    /// Wire protocols: what a protocol must do, then one file for each.
    pub mod codec {
        pub mod payload;
        pub mod presence;
        pub mod protocol;
        pub mod phoenix;
        pub mod change_event;
    }
    /// One client's session as a state machine of messages, whatever the wire protocol.
    pub mod session {
        pub mod limits;
        pub mod rate_limit;
        pub mod join;
        pub mod broadcast;
        pub mod stored_broadcast;
        pub mod message;
        pub mod action;
        pub mod channel;
        pub mod member;
        pub mod machine;
        mod binds;
        mod publish;
        pub mod private;
        mod tokens;
        #[cfg(test)]
        pub(crate) mod test_session;
    }
}

/// Everything that runs SQL. Knows nothing of clients.
pub mod postgres {
    /// Connection strings, TLS, pools and errors.
    pub mod connect {
        mod parameters;
        pub mod address;
        pub mod advice;
        pub mod error;
        pub mod within;
        pub mod pool;
        pub mod backoff;
    }
    pub mod locks;
    pub mod install;
    pub mod catalog;
    pub mod filter_compiler;
    mod function_bodies;
    /// Reading the changelog, and being woken for it.
    pub mod changelog {
        pub mod reader;
        pub mod transactions;
        pub mod access;
        pub mod chunks;
        pub mod doorbell;
    }
    /// Policies and filters that PostgreSQL evaluates, on row images.
    pub mod evaluate {
        mod circuit_breaker;
        mod impersonation;
        pub mod per_identity;
        pub mod set_based;
        pub mod pairs;
    }
    pub mod snapshot_rows;
    pub mod explain_queries;
    pub mod inspect_queries;
    pub mod doctor;
    pub mod bookmarks;
    pub mod broadcast_history;
    pub mod status;
    pub mod webhooks;
    pub mod nodes;
    /// Work on a schedule, by one relay at a time.
    pub mod maintenance {
        pub mod retention;
        pub mod refresh;
        pub mod collections;
    }
}

/// From the changelog to the clients' outboxes. Never waits for a client.
pub mod feed {
    /// Pages of the changelog, cut into batches.
    pub mod read {
        pub mod stall;
        pub mod batch;
        pub mod recent;
        pub mod backlog;
        mod poll_loop;
        pub mod source;
    }
    /// Who may see which change.
    pub mod authorize {
        pub mod filter_cost;
        pub mod subscriber_index;
        pub mod change_images;
        pub mod filter_evaluator;
        mod matcher;
        pub mod gate;
        pub mod topic_questions;
        pub mod topic_judge;
    }
    /// Frames, encoded once and queued for each client.
    pub mod deliver {
        pub mod frame;
        pub mod memory_budget;
        pub mod queue;
        pub mod outbox;
        pub mod encode_cache;
        pub mod broadcast_cache;
        pub mod conflation;
        pub mod members;
        pub mod group;
        pub mod fan_out;
        pub mod groups;
        pub mod hub;
    }
    pub mod command;
    /// What was missed, read from the changelog.
    pub mod replay {
        pub mod reader;
        pub mod task;
        pub mod bookmarks;
    }
    pub mod router;
    pub mod lanes;
    pub mod subscribe;
    pub mod handle;
    pub mod catch_up;
    /// Why a subscriber gets a row, or does not.
    pub mod explain {
        pub mod explanation;
        pub mod explainer;
        pub mod inspection;
    }
}

/// Topics: broadcasts and presence, from one client to others. Knows no SQL and no wire format.
pub mod pubsub {
    pub mod topic;
    pub mod outgoing;
    pub mod topics;
    pub mod remote;
}

/// The other relays of the database: what clients send and track there, and what they are told.
pub mod nodes {
    pub mod peers;
    pub mod service;
}

/// Who is online, written to the status table.
pub mod status {
    pub mod board;
    pub mod writer;
    pub mod service;
}

/// Changes sent to HTTP receivers.
pub mod webhooks {
    mod signature;
    mod delivery;
    mod queue;
    mod request;
    mod reader;
    mod worker;
    pub mod service;
}

/// Tokens and the keys that verify them.
pub mod auth {
    pub mod jwks;
    pub mod jwks_fetch;
    pub mod jwks_refresh;
    pub mod token;
    pub mod verifier;
}

/// HTTP and WebSocket. No SQL.
pub mod transport {
    pub mod listen;
    pub mod socket_buffers;
    pub mod connection_limits;
    pub mod intake;
    pub mod exchange;
    pub mod write_timeout;
    mod early_refusal;
    pub mod query;
    mod content_type;
    pub mod response;
    pub mod held_answer;
    pub mod broadcast_rates;
    pub mod upstream;
    pub mod clients;
    pub mod app;
    mod admission;
    mod body;
    /// `POST /realtime/v1/api/broadcast`.
    pub mod broadcast {
        mod batch;
        pub mod request;
    }
    pub mod presence;
    pub mod maintenance;
    /// `GET /realtime/v1/changes`.
    pub mod changes {
        mod refusal;
        mod tables;
        pub mod sse;
        pub mod poll;
        pub mod rows;
        pub mod request;
    }
    /// WebSocket sessions.
    pub mod socket {
        pub mod frame_writer;
        pub mod acks;
        pub mod inbound;
        mod channel_catch_up;
        pub mod resume;
        mod recalls;
        mod allowance;
        mod deliveries;
        mod memberships;
        mod judgements;
        mod channels;
        pub mod driver;
        pub mod handshake;
    }
    pub mod explain;
    mod health;
    mod metrics;
    /// `/inspector`: a page for operators, and what it reads.
    pub mod inspector {
        mod page;
        mod live;
        mod database;
        pub mod request;
    }
    pub mod admin;
    pub mod proxy;
    pub mod routes;
}

pub mod settings;
pub mod config;
pub mod observe;
pub mod tls;
pub mod assembly;
pub mod server;

/// The larger commands beside `serve`, one a file; `install`, `watch` and `unwatch` are in `main`.
pub mod command {
    pub mod secret_files;
    pub mod token;
    pub mod realtime_socket;
    pub mod tail;
    pub mod compare;
    pub mod explain;
    pub mod doctor;
}
