//! Bindings and filters.

pub mod filter;
pub mod groups;
pub mod healing;
pub mod heavy_filters;
pub mod hidden;
pub mod like;
pub mod wire_bindings;
