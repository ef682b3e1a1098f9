//! The house itself: layers, rooms, what stands in one place, the table of faults and the installed schema.

pub mod deploy;
pub mod layers;
pub mod one_place;
pub mod promises;
pub mod schema;
