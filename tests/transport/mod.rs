//! The wire: WebSocket, HTTP, tokens.

pub mod admin;
pub mod autobahn;
pub mod changes;
pub mod conflate;
pub mod explain;
pub mod hostile_tokens;
pub mod http_answers;
pub mod http_edges;
pub mod inspector;
pub mod keys;
pub mod metrics;
pub mod pages;
pub mod several_tables;
pub mod sockets_since;
pub mod tokens;
pub mod upstream;
pub mod websocket;
pub mod wire;
pub mod wire_edges;
pub mod wire_life;
