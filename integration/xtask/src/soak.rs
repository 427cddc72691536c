//! `cargo xtask soak`: the tests that have a full number of rounds beside that of every run, with the full
//! one. It takes hours; its output is shown as it comes. `soak survive` is a program of its own.

use std::error::Error;
use std::process::{Command, ExitCode};

use crate::report::step;
use crate::{binaries, workspace};

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

impl Suite {
    /// Whether it may have tests with this in their names.
    fn may_have(&self, name: Option<&str>) -> bool {
        match (self.names, name) {
            (Some(own), Some(name)) => own.contains(name) || name.contains(own),
            _ => true,
        }
    }
}

const SOAK: (&str, &str) = ("BULKHEAD_SOAK", "1");
/// 500 times the rounds of the storage tests are a million crash images; the short workloads have a step more.
const ROUNDS: (&str, &str) = ("BULKHEAD_ROUNDS", "500");

const SUITES: [Suite; 6] = [
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
        package: "bulkhead-integration",
        target: &["--test", "nics"],
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
    Suite {
        package: "bulkhead-dataplane",
        target: &["--lib"],
        names: Some("inflight"),
        full: ROUNDS,
    },
];

/// How often processes are killed and upgraded under a verified load.
#[derive(Debug, clap::Args)]
pub struct Survive {
    /// With `survive`: kills of the data plane
    #[arg(long, value_name = "N", default_value_t = 1000)]
    kills: u32,
    /// With `survive`: live upgrades of the data plane
    #[arg(long, value_name = "N", default_value_t = 200)]
    upgrades: u32,
    /// With `survive`: kills, upgrades, configurations and nonsense at once, for so long
    #[arg(long, value_name = "N", default_value_t = 6)]
    minutes: u64,
    /// With `survive`: memory of the guest meanwhile, in GiB
    #[arg(long, value_name = "N", default_value_t = 1)]
    memory_gib: u64,
    /// With `survive`: only scenarios with this in their name
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Kills and upgrades, one table: builds what that needs, and runs it.
fn survive(options: &Survive) -> Result<ExitCode, Box<dyn Error>> {
    build()?;
    let folder = binaries("debug");
    let mut command = Command::new(folder.join("survive"));
    command
        .env("BULKHEAD_BIN_DIR", &folder)
        .args(["--kills", &options.kills.to_string()])
        .args(["--upgrades", &options.upgrades.to_string()])
        .args(["--minutes", &options.minutes.to_string()])
        .args(["--memory-gib", &options.memory_gib.to_string()]);
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    Ok(if command.status()?.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All programs.
fn build() -> Result<(), Box<dyn Error>> {
    step("build", || {
        let build = ["build", "--quiet", "--workspace", "--bins"];
        let output = cargo(&build).output()?;
        if output.status.success() {
            return Ok("everything".to_owned());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    })
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(workspace());
    command
}

/// Runs those whose name contains `name`, or all; one after the other, so that none slows another down.
///
/// # Errors
/// When nothing is built, or cargo can't be started.
pub fn run(name: Option<&str>, options: &Survive) -> Result<ExitCode, Box<dyn Error>> {
    if name == Some("survive") {
        return survive(options);
    }
    build()?;
    let mut all = true;
    for suite in SUITES.iter().filter(|suite| suite.may_have(name)) {
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
