//! Limits of clients, and the memory they cost.

pub mod client_limits;
pub mod limits_speech;
pub mod memory;
pub mod sizes;
