//! F1 and F2: a thousand subscribers, each another user, all of whom get every row.

use std::time::Duration;

use crate::report::{Report, Target, percentile};
use crate::side::{Side, Stretch};
use crate::writer::AHEAD;

const TABLE: &str = "bench_fanout";
const CLIENTS: usize = 1000;
const RATE: f64 = 100.0;
const WARM_UP: u64 = 100;
/// More rows than any machine delivers in a run.
const MOST_ROWS: usize = 400_000;

/// What one server did, a value a repetition.
#[derive(Default)]
struct Done {
    paced: Vec<f64>,
    saturated: Vec<f64>,
    saturated_rate: Vec<f64>,
    /// Milliseconds of every message.
    latencies: Vec<f64>,
}

pub async fn run(report: &mut Report) {
    report.section("fanout");
    let (repetitions, seconds) = if report.quick { (1, 3) } else { (5, 4) };
    let mut sides =
        [Side::floor(TABLE, CLIENTS, MOST_ROWS).await, Side::relay(TABLE, CLIENTS, MOST_ROWS).await];
    let mut done = [Done::default(), Done::default()];
    for side in &mut sides {
        side.paced(WARM_UP, RATE).await;
        side.ledger.take_latencies();
    }
    for _ in 0..repetitions {
        for (side, done) in sides.iter_mut().zip(&mut done) {
            let Stretch { cpu_per_message, .. } = side.paced(RATE as u64 * seconds, RATE).await;
            done.paced.push(cpu_per_message);
            done.latencies.extend(side.ledger.take_latencies());
        }
        for (side, done) in sides.iter_mut().zip(&mut done) {
            let Stretch { cpu_per_message, per_second } = side.saturated(Duration::from_secs(seconds)).await;
            done.saturated.push(cpu_per_message);
            done.saturated_rate.push(per_second);
            side.ledger.take_latencies();
        }
    }
    for side in sides {
        side.leave(report);
    }

    let [mut floor, mut relay] = done;
    let median = |values: &[f64]| percentile(&mut values.to_vec(), 0.5);
    let ratio = |ours: &[f64], theirs: &[f64]| {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        median(&pairs)
    };
    let beside = "a bare server on LISTEN, in turns with the relay";
    let how = format!(
        "{CLIENTS} clients, {RATE} rows/s, median of {repetitions}x {seconds} s; the server's processor time"
    );
    let mut tell = |name: &str, value: f64, unit: &str, target: Target, how: &str| {
        report.figure(name, value, unit, &target, how);
    };
    tell("F1 fan-out, CPU per message", median(&relay.paced), "µs", Target::AtMost(8.4), &how);
    tell("   floor: CPU per message", median(&floor.paced), "µs", Target::None, beside);
    tell(
        "F1 fan-out, CPU against the floor",
        ratio(&relay.paced, &floor.paced),
        "",
        Target::AtMost(1.5),
        &how,
    );
    let how = "the same rows; INSERT sent to frame read";
    let [relay_99, floor_99] = [&mut relay, &mut floor].map(|done| percentile(&mut done.latencies, 0.99));
    tell("L2 fan-out, p50", percentile(&mut relay.latencies, 0.5), "ms", Target::None, how);
    tell("L2 fan-out, p99", relay_99, "ms", Target::AtMost(25.0), how);
    tell("   floor: p50", percentile(&mut floor.latencies, 0.5), "ms", Target::None, beside);
    tell("   floor: p99", floor_99, "ms", Target::None, beside);
    tell("L2 fan-out, p99 against the floor", relay_99 / floor_99, "", Target::AtMost(2.5), how);
    let how = format!(
        "{CLIENTS} clients, writer at most {AHEAD} rows ahead, its commits asynchronous, median of {repetitions}x {seconds} s"
    );
    tell("F2 saturated, CPU per message", median(&relay.saturated), "µs", Target::AtMost(1.3), &how);
    tell("   floor: CPU per message", median(&floor.saturated), "µs", Target::None, beside);
    let against = ratio(&relay.saturated, &floor.saturated);
    tell("F2 saturated, CPU against the floor", against, "", Target::AtMost(2.5), &how);
    let delivered = median(&relay.saturated_rate);
    tell("F2 saturated, delivered", delivered, "/s", Target::AtLeast(500_000.0), &how);
    tell("   floor: delivered", median(&floor.saturated_rate), "/s", Target::None, beside);
}
