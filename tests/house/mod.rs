//! The house itself: layers, rooms and the table of faults.

pub mod layers;
pub mod promises;
