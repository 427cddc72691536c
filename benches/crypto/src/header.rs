//! What ran, where and how: the header of the figures; and the thread's place on a core.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::time::SystemTime;

use bulkhead_benches::ratio::Pace;
use bulkhead_crypto::Kernel;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::peers::LIBRARIES;
use crate::row::Header;

/// Describes a run at `pace`.
#[must_use]
pub fn describe(pace: Pace, pinned_to: Option<usize>) -> Header {
    let peers = LIBRARIES
        .iter()
        .map(|library| (library.name, (library.version)()));
    Header {
        cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        pinned_to,
        kernel: Kernel::chosen().name().to_owned(),
        kernels: Kernel::available()
            .iter()
            .map(|kernel| kernel.name().to_owned())
            .collect(),
        peers: peers.collect::<BTreeMap<_, _>>(),
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        quick: pace == Pace::QUICK,
        method: format!(
            "one core; the sides of a case take a sample of {} us in turns, {} rounds, after {} us of warm-up each; \
             figures are medians over the rounds, ratio is the median of each round's ratio",
            pace.sample.as_micros(),
            pace.rounds,
            pace.warm_up.as_micros()
        ),
    }
}

/// Keeps this thread on the last CPU that it may use, which is seldom the one that serves interrupts. Which one that is;
/// none if it may not choose.
#[must_use]
pub fn pin() -> Option<usize> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).ok()?;
    let last = (0..CpuSet::count())
        .rev()
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))?;
    let mut only = CpuSet::new();
    only.set(last).ok()?;
    sched_setaffinity(this, &only).ok()?;
    Some(last)
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
