//! What the triggers log, and what DDL does to it.

pub mod drift;
pub mod ignored;
pub mod images;
pub mod migrations;
pub mod publications;
pub mod refresh;
pub mod refresh_cron;
pub mod refresh_on_change;
pub mod shapes;
pub mod strangers;
pub mod triggered_changes;
pub mod triggers;
pub mod watch_query;
pub mod writers;
