//! `cargo xtask soak`: the tests that have a full number of rounds beside that of every run, with the full
//! one. It takes hours; its output is shown as it comes.

use std::error::Error;
use std::process::{Command, ExitCode};

use crate::report::step;
use crate::workspace;

/// Tests with full numbers.
struct Suite {
    package: &'static str,
    /// Which of its tests, as cargo takes it.
    target: &'static [&'static str],
    /// What its tests' names contain.
    names: Option<&'static str>,
    /// What asks for the full numbers.
    full: (&'static str, &'static str),
}

const SOAK: (&str, &str) = ("BULKHEAD_SOAK", "1");
/// 500 times the rounds of the storage tests are a million crash images; the short workloads have a step more.
const ROUNDS: (&str, &str) = ("BULKHEAD_ROUNDS", "500");

const SUITES: [Suite; 4] = [
    Suite {
        package: "bulkhead-integration",
        target: &["--test", "endurance"],
        names: None,
        full: SOAK,
    },
    Suite {
        package: "bulkhead-integration",
        target: &["--test", "rekey"],
        names: None,
        full: SOAK,
    },
    Suite {
        package: "bulkhead-dataplane",
        target: &["--test", "storage"],
        names: None,
        full: ROUNDS,
    },
    Suite {
        package: "bulkhead-dataplane",
        target: &["--lib"],
        names: Some("short_workloads"),
        full: ROUNDS,
    },
];

/// Runs those whose name contains `name`, or all; one after the other, so that none slows another down.
///
/// # Errors
/// When nothing is built, or cargo can't be started.
pub fn run(name: Option<&str>) -> Result<ExitCode, Box<dyn Error>> {
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.args(arguments).current_dir(workspace());
        command
    };
    step("build", || {
        let build = [
            "build",
            "--quiet",
            "-p",
            "bulkhead-benches",
            "--bin",
            "serve",
        ];
        let output = cargo(&build).output()?;
        if output.status.success() {
            return Ok("serve".to_owned());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    })?;
    let mut all = true;
    for suite in SUITES {
        let mut tests = cargo(&["test", "-p", suite.package]);
        tests
            .args(suite.target)
            .args(["--", "--test-threads", "1", "--nocapture"])
            .args(name.or(suite.names))
            .env(suite.full.0, suite.full.1);
        all &= tests.status()?.success();
    }
    Ok(if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
