//! The command line, the installation and a first use.

pub mod addresses;
pub mod cli;
pub mod compare;
pub mod explain;
pub mod first_use;
pub mod install;
pub mod stuck;
pub mod tail;
