//! What a process has used of its CPUs, and how often its threads have gone to sleep.
#![forbid(unsafe_code)]

use std::fs;
use std::ops::Sub;

/// All threads together, since they began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Usage {
    /// Seconds on a CPU.
    pub(super) busy_seconds: f64,
    /// How often a thread slept, to be woken.
    pub(super) sleeps: f64,
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            busy_seconds: self.busy_seconds - before.busy_seconds,
            sleeps: self.sleeps - before.sleeps,
        }
    }
}

impl Usage {
    /// Of a process; nothing of one that is gone.
    pub(super) fn of(pid: u32) -> Self {
        let mut all = Self {
            busy_seconds: 0.0,
            sleeps: 0.0,
        };
        let threads = fs::read_dir(format!("/proc/{pid}/task"));
        for thread in threads.into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            all.busy_seconds += busy_seconds(&read("schedstat"));
            all.sleeps += sleeps(&read("status"));
        }
        all
    }
}

/// Descriptors that a process has open.
pub(super) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The first number of a thread's `schedstat`: nanoseconds on a CPU.
fn busy_seconds(schedstat: &str) -> f64 {
    let first = schedstat.split_whitespace().next();
    let nanos: Option<f64> = first.and_then(|number| number.parse().ok());
    nanos.unwrap_or(0.0) / 1e9
}

/// Voluntary context switches, of a thread's `status`.
fn sleeps(status: &str) -> f64 {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|number| number.trim().parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use bulkhead_integration::processes::Process;

    use super::*;

    #[test]
    fn the_kernel_s_files_are_read() {
        assert!((busy_seconds("1500000000 7 9\n") - 1.5).abs() < 1e-9);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t42\nnonvoluntary_ctxt_switches:\t7\n";
        assert!((sleeps(status) - 42.0).abs() < 1e-9);
    }

    /// Of a process of its own: threads of other tests begin and end in this one meanwhile.
    #[test]
    fn work_and_sleep_are_seen() {
        let work = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done";
        let script =
            format!("{work}; for i in 1 2 3 4 5; do sleep 0.001; done; echo done; exec sleep 60");
        let shell = Process::start(Path::new("/bin/sh"), &["-c", &script]).expect("a shell starts");
        let before = Usage::of(shell.pid());
        assert!(shell.wait_for_log("done", Duration::from_secs(60)));
        let used = Usage::of(shell.pid()) - before;
        let all = Usage::of(shell.pid());
        assert!(used.busy_seconds >= 0.0 && used.sleeps >= 0.0, "{used:?}");
        assert!(all.busy_seconds > 0.0 && all.sleeps >= 5.0, "{all:?}");
        assert!(descriptors(shell.pid()) >= 3);
    }
}
