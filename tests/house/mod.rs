//! The house itself: layers, rooms, the table of faults and the installed schema.

pub mod layers;
pub mod promises;
pub mod schema;
