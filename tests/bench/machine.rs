//! What `/proc` tells of the machine and of one process.

use std::fs::read_to_string;
use std::time::Duration;

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub fn processor() -> String {
    let text = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| String::from("unknown processor"), |(_, name)| name.to_owned())
}

/// The average over one minute.
pub fn load() -> String {
    let text = read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// How many files a process may hold.
pub fn file_limit() -> usize {
    let text = read_to_string("/proc/self/limits").unwrap();
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(usize::MAX)
}

/// The processor time that a process has used, user and system.
pub fn cpu(pid: u32) -> Duration {
    let text = read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The second field is a name in parentheses, which may hold anything.
    let (_, fields) = text.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    // USER_HZ is 100 on every architecture that Rust's Linux targets name.
    Duration::from_millis(ticks * 10)
}

/// The resident memory of a process in KiB.
pub fn resident_kib(pid: u32) -> u64 {
    status_kib(pid, "VmRSS:")
}

/// The most that was resident since the process began, or since [`forget_peak`], in KiB.
pub fn peak_kib(pid: u32) -> u64 {
    status_kib(pid, "VmHWM:")
}

/// From now on the peak is that of what follows.
pub fn forget_peak(pid: u32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

fn status_kib(pid: u32, name: &str) -> u64 {
    let text = read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
