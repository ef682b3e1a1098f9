//! Each change once and in order, whatever fails.

pub mod commits;
pub mod connections;
pub mod crash;
pub mod doorbell;
pub mod faults;
pub mod large_transactions;
pub mod leader;
pub mod leaves;
pub mod machine;
pub mod one_cursor;
pub mod order;
pub mod outage;
pub mod portions;
pub mod replays;
