//! What a nightly compiler checks: tests of the data plane and its cipher under AddressSanitizer (which looks
//! for leaks at their end, too), and every fuzz target over its corpus and for a little longer.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use super::suites::behind;
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

/// What is to be run, being built behind everything else: the time it takes is what the tests that wait leave.
#[derive(Debug)]
pub struct Build {
    tests: bool,
    targets: bool,
    /// Why nothing can be.
    missing: Option<String>,
    builder: Option<JoinHandle<Result<(), String>>>,
}

impl Build {
    /// Begins to build both, as far as the filter has them.
    pub fn begin(filter: Option<&str>) -> Self {
        let wanted = |name: &str| filter.is_none_or(|filter| name.contains(filter));
        let (tests, targets) = (wanted("asan"), wanted("fuzz"));
        let missing = nightly::missing();
        let is_built = missing.is_none() && (tests || targets);
        Self {
            tests,
            targets,
            missing,
            builder: is_built.then(|| std::thread::spawn(move || build(tests, targets))),
        }
    }

    /// Waits for what is built, and runs it.
    ///
    /// # Errors
    /// When cargo or a target can't be started.
    pub fn run(mut self, logs: &Path) -> Result<Counts, Box<dyn Error>> {
        let mut counts = Counts::default();
        if let Some(reason) = &self.missing {
            let both = [("asan", self.tests), ("fuzz", self.targets)];
            let skipped = both.iter().filter(|(_, wanted)| *wanted);
            let skipped = skipped.map(|(name, _)| format!("{name}: {reason}"));
            counts.skipped.extend(skipped);
            return Ok(counts);
        }
        if let Some(builder) = self.builder.take() {
            report::step("asan build", || match builder.join() {
                Ok(Ok(())) => Ok("waited for".to_owned()),
                // It is said again by what needs it, with what the compiler says.
                Ok(Err(error)) => Ok(format!("FAILED\n{error}")),
                Err(_) => Err("the builder panicked".into()),
            })?;
        }
        if self.tests {
            counts.add(tests(logs)?);
        }
        if self.targets {
            counts.add(targets()?);
        }
        Ok(counts)
    }
}

/// Builds tests and targets; what the compiler says.
fn build(tests: bool, targets: bool) -> Result<(), String> {
    let run = |command: &Command| {
        let output = behind(command).output().map_err(|e| e.to_string())?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    if tests {
        run(tests_command().args(["--no-run", "--quiet"]))?;
    }
    if targets {
        run(&fuzz::build_command())?;
    }
    Ok(())
}

/// Cargo, with the tests that are run.
fn tests_command() -> Command {
    let mut command = nightly::cargo();
    let packages = ["test", "-p", "bulkhead-dataplane", "-p", "bulkhead-crypto"];
    command.args(packages).args(["--lib", "--no-fail-fast"]);
    for target in TARGETS {
        command.args(["--test", target]);
    }
    command
}

fn tests(logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let mut command = tests_command();
    command.args(["--", "--show-output"]);
    for name in LEFT_OUT {
        command.args(["--skip", name]);
    }
    let mut counts = report_suite("asan", &mut command, logs)?;
    counts.skipped.extend(LOCKED_IN.map(str::to_owned));
    Ok(counts)
}

/// Runs every fuzz target, as many at once as there are processors: each runs on one.
fn targets() -> Result<Counts, Box<dyn Error>> {
    let mut counts = Counts::default();
    report::step("fuzz", || {
        if let Err(error) = fuzz::build() {
            counts.fail("fuzz: the targets are not built".to_owned());
            return Ok(format!("FAILED\n{error}"));
        }
        let mut lines = String::new();
        for (name, run) in run_all() {
            let run = run?;
            lines.push_str(&format!("\n    {name}: {}", run.line));
            match run.failure {
                None => counts.passed += 1,
                Some(failure) => {
                    counts.fail(format!("fuzz {name}"));
                    lines.push_str(&format!(" FAILED\n{failure}"));
                }
            }
        }
        Ok(format!("{}{lines}\n   ", counts.line()))
    })?;
    Ok(counts)
}

/// How each target's run went, in their order.
fn run_all() -> Vec<(&'static str, Result<fuzz::Run, String>)> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let runs = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(target) = bulkhead_fuzz::TARGETS.get(index) else {
                        return;
                    };
                    let run = fuzz::fuzz(target.name, FUZZ_SECONDS).map_err(|e| e.to_string());
                    let mut runs = runs.lock().unwrap_or_else(PoisonError::into_inner);
                    runs.push((index, target.name, run));
                }
            });
        }
    });
    let mut runs = runs.into_inner().unwrap_or_else(PoisonError::into_inner);
    runs.sort_by_key(|(index, _, _)| *index);
    let in_order = runs.into_iter().map(|(_, name, run)| (name, run));
    in_order.collect()
}
