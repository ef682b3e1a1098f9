//! Cursors, sessions and histories that end.

pub mod cursors;
pub mod history;
pub mod hostile_cursors;
pub mod restored;
pub mod resume;
pub mod retention;
