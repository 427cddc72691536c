//! What a nightly compiler checks: tests of the data plane and its cipher under AddressSanitizer (which looks
//! for leaks at their end, too), and every fuzz target over its corpus and for a little longer.

use std::error::Error;
use std::path::Path;

use super::{Counts, report_suite};
use crate::{fuzz, nightly, report};

/// Test targets of the data plane: rings, requests, wire, memory, the in-flight region, workers, sessions; and
/// the cipher's.
const TARGETS: [&str; 11] = [
    "inflight",
    "memory",
    "packed",
    "packed_model",
    "server",
    "vhost_user",
    "vhost_user_random",
    "virtqueue",
    "virtqueue_both",
    "worker",
    "xts",
];
/// Tests that are left out, and why: a thread that has locked itself in may not make the calls that the
/// sanitizer makes.
const LEFT_OUT: [&str; 2] = [
    "worker::ring::escape",
    "storage::in_memory::tests::a_locked_in_worker_may_do_it",
];
const LOCKED_IN: [&str; 4] = [
    "asan worker::ring::escape: its threads lock themselves in",
    "asan storage::in_memory::tests::a_locked_in_worker_may_do_it: its thread locks itself in",
    "asan tests/escape: its processes lock themselves in",
    "asan tests/control: the data plane's process locks itself in",
];
/// Seconds that each fuzz target goes on after its corpus.
const FUZZ_SECONDS: u32 = 5;

/// Runs both, as far as the filter has them.
///
/// # Errors
/// When cargo or a target can't be started.
pub fn run(filter: Option<&str>, logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let wanted = |name: &str| filter.is_none_or(|filter| name.contains(filter));
    let mut counts = Counts::default();
    if let Some(reason) = nightly::missing() {
        for name in ["asan", "fuzz"].into_iter().filter(|name| wanted(name)) {
            counts.skipped.push(format!("{name}: {reason}"));
        }
        return Ok(counts);
    }
    if wanted("asan") {
        counts.add(tests(logs)?);
    }
    if wanted("fuzz") {
        counts.add(targets()?);
    }
    Ok(counts)
}

fn tests(logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let mut command = nightly::cargo();
    command.args([
        "test",
        "-p",
        "bulkhead-dataplane",
        "-p",
        "bulkhead-crypto",
        "--lib",
        "--no-fail-fast",
    ]);
    for target in TARGETS {
        command.args(["--test", target]);
    }
    command.args(["--", "--show-output"]);
    for name in LEFT_OUT {
        command.args(["--skip", name]);
    }
    let mut counts = report_suite("asan", &mut command, logs)?;
    counts.skipped.extend(LOCKED_IN.map(str::to_owned));
    Ok(counts)
}

fn targets() -> Result<Counts, Box<dyn Error>> {
    let mut counts = Counts::default();
    report::step("fuzz", || {
        if let Err(error) = fuzz::build() {
            counts.fail("fuzz: the targets are not built".to_owned());
            return Ok(format!("FAILED\n{error}"));
        }
        Ok("built".to_owned())
    })?;
    let built = counts.failed == 0;
    for target in bulkhead_fuzz::TARGETS.iter().filter(|_| built) {
        report::step(&format!("fuzz {}", target.name), || {
            let run = fuzz::fuzz(target.name, FUZZ_SECONDS)?;
            let Some(failure) = run.failure else {
                counts.passed += 1;
                return Ok(run.line);
            };
            counts.fail(format!("fuzz {}", target.name));
            Ok(format!("FAILED\n{failure}"))
        })?;
    }
    Ok(counts)
}
