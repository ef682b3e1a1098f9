//! The relay's figures in one run, against targets: `make bench`, or with the URL of a throwaway cluster in
//! `RELAY_TEST_DATABASE_URL`: `cargo bench -- [--quick] [--against BINARY] [SECTION ...]`, where a section is one of
//! `SECTIONS`. With `--against` each section is measured with that older relay, too, right before it is with this one.
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

mod broadcast;
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

const SECTIONS: [&str; 9] =
    ["latency", "writers", "fanout", "broadcast", "policies", "memory", "stalled", "transaction", "storm"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [flag, url] = arguments.as_slice()
        && flag == "--floor"
    {
        return floor::serve(url);
    }
    let (mut quick, mut against, mut wanted) = (false, None, Vec::new());
    let mut rest = arguments.iter().map(String::as_str);
    while let Some(argument) = rest.next() {
        match argument {
            "--quick" => quick = true,
            "--against" => against = rest.next(),
            section => wanted.push(section),
        }
    }
    if let Some(missing) = against.filter(|binary| !std::path::Path::new(binary).is_file()) {
        println!(
            "--against {missing}: there is no such file; give the path of a relay that was built before"
        );
        std::process::exit(2);
    }
    if let Some(unknown) = wanted.iter().find(|name| !SECTIONS.contains(name)) {
        println!("unknown: {unknown}; choose among --quick --against {}", SECTIONS.join(" "));
        std::process::exit(2);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut report = Report::begin(quick).await;
        for section in SECTIONS.into_iter().filter(|section| wanted.is_empty() || wanted.contains(section)) {
            if let Some(older) = against {
                report.measure_older(true);
                process::measure(older);
                run(section, &mut report).await;
                report.measure_older(false);
                process::measure(process::RELAY);
            }
            run(section, &mut report).await;
        }
        report.end();
    });
}

async fn run(section: &str, report: &mut Report) {
    match section {
        "latency" => latency::run(report).await,
        "writers" => writers::run(report).await,
        "fanout" => fanout::run(report).await,
        "broadcast" => broadcast::run(report).await,
        "policies" => policies::run(report).await,
        "memory" => memory::run(report).await,
        "stalled" => stalled::run(report).await,
        "transaction" => transaction::run(report).await,
        _ => storm::run(report).await,
    }
}
