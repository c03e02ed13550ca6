//! The usual metrics of a process, read from /proc; nothing where there is no /proc.

use std::fmt::Write as _;
use std::fs;

/// Clock ticks per second in /proc: 100 for user space on every architecture of Linux.
const TICKS: f64 = 100.0;
const KIB: f64 = 1024.0;

/// In the format of Prometheus.
pub(super) fn render() -> String {
    read().unwrap_or_default()
}

fn read() -> Option<String> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let fds = fs::read_dir("/proc/self/fd").ok()?.count();
    text(&stat, &status, &boot, fds)
}

fn text(stat: &str, status: &str, boot: &str, fds: usize) -> Option<String> {
    // The name of the program is in brackets and may hold anything; fields are counted from behind it, from the third on.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    let kib = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse::<f64>().ok()
    };
    let booted: f64 = boot.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()?;
    let mut out = String::new();
    let mut put = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
    };
    put("process_cpu_seconds_total", "counter", "user and system CPU time", (ticks(14)? + ticks(15)?) / TICKS);
    put("process_resident_memory_bytes", "gauge", "resident memory", kib("VmRSS:")? * KIB);
    put("process_virtual_memory_bytes", "gauge", "virtual memory", kib("VmSize:")? * KIB);
    put("process_open_fds", "gauge", "open file descriptors", fds as f64);
    put("process_threads", "gauge", "threads", ticks(20)?);
    put("process_start_time_seconds", "gauge", "start of the process as Unix time", booted + ticks(22)? / TICKS);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_the_programs_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 9 0 1000 5 6";
        let text = text(stat, "Name:\ta\nVmSize:\t   200 kB\nVmRSS:\t   100 kB\n", "cpu 1\nbtime 1700000000\n", 12);
        let text = text.expect("all there");
        for line in [
            "process_cpu_seconds_total 2\n",
            "process_resident_memory_bytes 102400\n",
            "process_threads 9\n",
            "process_start_time_seconds 1700000010\n",
            "process_open_fds 12\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
    }
}
