//! `cargo xtask soak`: the tests that have a full number of rounds beside that of every run, with the full
//! one. It takes hours; its output is shown as it comes.

use std::error::Error;
use std::process::{Command, ExitCode};

use crate::report::step;
use crate::workspace;

/// Suites, each with what asks it for its full numbers. (500 times the rounds of the storage tests are
/// a million crash images.)
const SUITES: [(&str, &str, (&str, &str)); 3] = [
    ("bulkhead-integration", "endurance", ("BULKHEAD_SOAK", "1")),
    ("bulkhead-integration", "rekey", ("BULKHEAD_SOAK", "1")),
    ("bulkhead-dataplane", "storage", ("BULKHEAD_ROUNDS", "500")),
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
    for (package, test, full) in SUITES {
        let mut tests = cargo(&["test", "-p", package, "--test", test, "--"]);
        tests
            .args(["--test-threads", "1", "--nocapture"])
            .args(name)
            .env(full.0, full.1);
        all &= tests.status()?.success();
    }
    Ok(if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
