//! `relay tail`: joins one table's channel at a running relay and prints the changes.

use clap::Args;

/// What to follow.
#[derive(Args)]
pub struct Options {
    /// The table, with its schema if that is not public
    table: String,
}

/// Placeholder
pub async fn run(_options: Options) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    std::future::pending::<()>().await;
    Ok(())
}
