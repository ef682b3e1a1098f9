//! Metrics of the process, under the names that the client libraries of Prometheus agree on.
//!
//! They are read from `/proc` when they are asked for, and left out where there is none.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Clock ticks a second in `/proc/PID/stat`, which Linux fixes for programs.
const TICKS: f64 = 100.0;

/// Returns a registry with the metrics of this process.
pub(super) fn registry() -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process));
    registry
}

/// Reads [`Figures`] for each answer.
#[derive(Debug)]
struct Process;

/// Figures of the process at one moment.
struct Figures {
    cpu_seconds: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    threads: f64,
    open_files: f64,
    max_files: f64,
    started: f64,
}

impl Figures {
    fn now() -> Option<Self> {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).ok();
        let stat = read("self/stat")?;
        // The name of the program, in parentheses, may contain anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // Numbers of proc(5), whose field 3 follows the name.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let status = read("self/status")?;
        let kilobytes = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<f64>().ok())
        };
        let limits = read("self/limits")?;
        let max_files = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        let booted =
            read("stat")?.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok())?;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / TICKS,
            resident_bytes: kilobytes("VmRSS:")? * 1024.0,
            virtual_bytes: kilobytes("VmSize:")? * 1024.0,
            threads: field(20)?,
            open_files: std::fs::read_dir("/proc/self/fd").ok()?.count() as f64,
            max_files: max_files.split_whitespace().next()?.parse().unwrap_or(f64::INFINITY),
            started: booted + field(22)? / TICKS,
        })
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(now) = Figures::now() else { return Ok(()) };
        let cpu = ConstCounter::new(now.cpu_seconds);
        let help = "User and system CPU time";
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, cpu.metric_type())?)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory", now.resident_bytes),
            ("process_virtual_memory_bytes", "Virtual memory", now.virtual_bytes),
            ("process_threads", "Threads", now.threads),
            ("process_open_fds", "Open file descriptors", now.open_files),
            ("process_max_fds", "Limit of open file descriptors", now.max_files),
            ("process_start_time_seconds", "Start of the process, as Unix time", now.started),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn the_figures_are_those_of_this_process() {
        let mut text = String::new();
        encode(&mut text, &registry()).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is missing: {text}")).parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        assert!(value("process_open_fds") >= 3.0 && value("process_max_fds") > value("process_open_fds"));
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        let now = time::OffsetDateTime::now_utc().unix_timestamp() as f64;
        let started = value("process_start_time_seconds");
        assert!(started > now - 86_400.0 && started <= now + 2.0, "{started}, and now is {now}");
    }
}
