//! What ran, where and when; and a thread's place on a core.
#![forbid(unsafe_code)]

use std::fs;
use std::time::SystemTime;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The CPU's name, with family and model; the architecture's where it has none.
#[must_use]
pub fn cpu() -> String {
    cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let family = field("cpu family")?;
    // `model name` begins as `model` does.
    let model = text.lines().find(|line| line.starts_with("model\t"))?;
    let model = model.split_once(':')?.1.trim();
    Some(format!(
        "{} (family {family}, model {model})",
        field("model name")?
    ))
}

/// Now, in UTC, to the second.
#[must_use]
pub fn date() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// The CPUs that this thread may run on.
#[must_use]
pub fn cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .collect()
}

/// Keeps this thread on the last CPU that it may use, which is seldom the one that serves interrupts. Which one that is;
/// none if it may not choose.
#[must_use]
pub fn pin() -> Option<usize> {
    let last = cpus().pop()?;
    let mut only = CpuSet::new();
    only.set(last).ok()?;
    sched_setaffinity(Pid::from_raw(0), &only).ok()?;
    Some(last)
}
