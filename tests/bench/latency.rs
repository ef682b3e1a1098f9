//! L1: from the commit to the client, with one subscriber and nothing else to do.

use crate::report::{Report, Target, percentile};
use crate::side::Side;

const TABLE: &str = "bench_latency";
const RATE: f64 = 50.0;
/// Rows in a stretch.
const ROWS: u64 = 50;

/// Milliseconds per row.
#[derive(Default)]
struct Spans {
    from_commit: Vec<f64>,
    from_acknowledgement: Vec<f64>,
}

pub async fn run(report: &mut Report) {
    report.section("latency");
    let stretches = if report.quick { 3 } else { 10 };
    let room = (stretches as usize + 1) * ROWS as usize;
    let mut sides = [Side::floor(TABLE, 1, room).await, Side::relay(TABLE, 1, room).await];
    let mut spans = [Spans::default(), Spans::default()];
    for stretch in 0..=stretches {
        for (side, spans) in sides.iter_mut().zip(&mut spans) {
            let first = side.rows + 1;
            side.stage.write_commits(&side.ledger, first, ROWS, RATE).await;
            side.rows += ROWS;
            side.ledger.settle(side.rows).await;
            let latencies = side.ledger.take_latencies();
            // The first stretch is for warming up.
            if stretch > 0 {
                spans.from_commit.extend(latencies);
                spans.from_acknowledgement.extend(side.ledger.since_acknowledgement(first..=side.rows));
            }
        }
    }
    for side in sides {
        side.leave(report);
    }
    let [mut floor, mut relay] = spans;
    let how = format!("{} rows at {RATE}/s, one client; commit acknowledged to frame read", ROWS * stretches);
    let whole = "the same rows from COMMIT sent, so with the flush to disk";
    let beside = "a bare server on LISTEN, in turns with the relay";
    let mut tell = |name: &str, values: &mut [f64], part, target, how: &str| {
        report.figure(name, percentile(values, part), "ms", &target, how);
    };
    tell("L1 commit to client, p50", &mut relay.from_acknowledgement, 0.50, Target::AtMost(0.5), &how);
    tell("L1 commit to client, p99", &mut relay.from_acknowledgement, 0.99, Target::AtMost(5.0), &how);
    tell("   floor: p50", &mut floor.from_acknowledgement, 0.50, Target::None, beside);
    tell("   floor: p99", &mut floor.from_acknowledgement, 0.99, Target::None, beside);
    tell("   with the commit, p50", &mut relay.from_commit, 0.50, Target::None, whole);
    tell("   with the commit, p99", &mut relay.from_commit, 0.99, Target::None, whole);
    tell("   floor: with the commit, p50", &mut floor.from_commit, 0.50, Target::None, beside);
    tell("   floor: with the commit, p99", &mut floor.from_commit, 0.99, Target::None, beside);
}
