//! The relay's figures in one run, against targets: `make bench`, or with the URL of a throwaway cluster in
//! `RELAY_TEST_DATABASE_URL`: `cargo bench -- [--quick] [SECTION ...]`, where a section is one of `SECTIONS`.
//!
//! The relay is the release binary in a process of its own; writers and clients are here. What a machine and its kernel
//! can do at all is measured beside it in the same run, by a server that knows neither policy nor protocol (`floor`).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program for the terminal that may fail loudly"
)]

mod fanout;
mod floor;
mod follower;
mod latency;
mod ledger;
mod machine;
mod memory;
mod policies;
mod process;
mod report;
mod side;
mod stalled;
mod storm;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;
mod swarm;
mod transaction;
mod writer;
mod writers;

use report::Report;

const SECTIONS: [&str; 8] =
    ["latency", "writers", "fanout", "policies", "memory", "stalled", "transaction", "storm"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [flag, url] = arguments.as_slice()
        && flag == "--floor"
    {
        return floor::serve(url);
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let wanted: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|argument| *argument != "--quick").collect();
    if let Some(unknown) = wanted.iter().find(|name| !SECTIONS.contains(name)) {
        println!("unknown: {unknown}; choose among --quick {}", SECTIONS.join(" "));
        std::process::exit(2);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut report = Report::begin(quick).await;
        for section in SECTIONS {
            if wanted.is_empty() || wanted.contains(&section) {
                match section {
                    "latency" => latency::run(&mut report).await,
                    "writers" => writers::run(&mut report).await,
                    "fanout" => fanout::run(&mut report).await,
                    "policies" => policies::run(&mut report).await,
                    "memory" => memory::run(&mut report).await,
                    "stalled" => stalled::run(&mut report).await,
                    "transaction" => transaction::run(&mut report).await,
                    _ => storm::run(&mut report).await,
                }
            }
        }
        report.end();
    });
}
