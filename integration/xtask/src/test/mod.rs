//! `cargo xtask test`: checks, every test of every package, one line at the end.

mod sanitized;
pub mod suites;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::packages::{self, GUEST, TESTS};
use crate::{binaries, previous, report, workspace};
use suites::Suite;

/// The package whose stored state the version before reads and writes.
const DATA_PLANE: &str = "bulkhead-dataplane";

/// What a suite's output says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    /// Names, with the reason where one was given.
    skipped: Vec<String>,
    /// Names.
    failures: Vec<String>,
}

/// Runs everything, or the packages whose name contains the filter.
///
/// # Errors
/// When packages can't be installed or cargo can't be started.
pub fn run(filter: Option<&str>) -> Result<ExitCode, Box<dyn Error>> {
    report::step("packages", || {
        let needs: Vec<_> = GUEST.iter().chain(TESTS).collect();
        packages::ensure(&needs)
    })?;
    let logs = binaries("debug").join("test-logs");
    fs::create_dir_all(&logs)?;
    let mut total = Counts::default();
    if filter.is_none() {
        for (name, arguments) in checks() {
            total.add(check(name, &arguments, &logs)?);
        }
    }
    // Everything first, so that each test finds the binaries of the other packages.
    let (built, built_suites) = build()?;
    let compiles = built.failed == 0;
    total.add(built);
    if compiles {
        total.add(run_suites(filter, &built_suites, &logs)?);
    }
    if !total.skipped.is_empty() {
        println!("\nskipped:");
        total.skipped.iter().for_each(|name| println!("  {name}"));
    }
    if !total.failures.is_empty() {
        println!("\nfailed:");
        total.failures.iter().for_each(|name| println!("  {name}"));
    }
    print!("\n{} passed, {} failed", total.passed, total.failed);
    if !total.skipped.is_empty() {
        print!(", {} skipped", total.skipped.len());
    }
    println!();
    Ok(ExitCode::from(u8::from(total.failed > 0)))
}

/// Checks that are no tests: each counts as one.
fn checks() -> [(&'static str, Vec<String>); 2] {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    [
        ("fmt", words("fmt --all --check")),
        (
            "clippy",
            words("clippy --workspace --all-targets --quiet -- -D warnings"),
        ),
    ]
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
        self.failures.extend(other.failures);
    }

    fn fail(&mut self, name: String) {
        self.failed += 1;
        self.failures.push(name);
    }

    fn line(&self) -> String {
        let mut line = format!("{} passed, {} failed", self.passed, self.failed);
        if !self.skipped.is_empty() {
            line.push_str(&format!(", {} skipped", self.skipped.len()));
        }
        line
    }
}

/// This workspace's cargo.
fn cargo(arguments: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).current_dir(workspace());
    command
}

/// Runs a command with its output in a file; whether it ended well.
fn run_into(command: &mut Command, log: &Path) -> Result<bool, Box<dyn Error>> {
    let file = fs::File::create(log)?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()?;
    Ok(status.success())
}

fn check(name: &str, arguments: &[String], logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let log = logs.join(format!("{name}.log"));
    let mut counts = Counts::default();
    report::step(name, || {
        if run_into(&mut cargo(arguments), &log)? {
            counts.passed += 1;
            return Ok("clean".to_owned());
        }
        counts.fail(format!("{name} (cargo {})", arguments.join(" ")));
        Ok(format!("FAILED\n{}", tail(&fs::read_to_string(&log)?, 40)))
    })?;
    Ok(counts)
}

/// Builds the workspace once, for all that is run: programs, benches and test programs.
fn build() -> Result<(Counts, Vec<Suite>), Box<dyn Error>> {
    let arguments = ["build", "--workspace", "--all-targets"].map(str::to_owned);
    step_of_build("build", "clean", || suites::build(&mut cargo(&arguments)))
}

/// Runs a build that counts as one test; what it made, which is nothing where it failed.
fn step_of_build<T: Default>(
    name: &str,
    evidence: &str,
    build: impl FnOnce() -> Result<T, Box<dyn Error>>,
) -> Result<(Counts, T), Box<dyn Error>> {
    let mut counts = Counts::default();
    let mut made = T::default();
    report::step(name, || match build() {
        Ok(new) => {
            counts.passed += 1;
            made = new;
            Ok(evidence.to_owned())
        }
        Err(error) => {
            counts.fail(name.to_owned());
            Ok(format!("FAILED\n{}", tail(&error.to_string(), 40)))
        }
    })?;
    Ok((counts, made))
}

/// Runs what is built, package by package, while what the nightly compiler checks is built behind it.
fn run_suites(
    filter: Option<&str>,
    built: &[Suite],
    logs: &Path,
) -> Result<Counts, Box<dyn Error>> {
    let wanted = |name: &str| filter.is_none_or(|filter| name.contains(filter));
    let mut total = Counts::default();
    let mut before = Vec::new();
    if wanted("bulkhead-integration") || wanted(DATA_PLANE) {
        // For tests that go from one version to the other.
        let name = "build of the version before";
        let (counts, suites) = step_of_build(name, "its data plane", previous::build)?;
        total.add(counts);
        before = suites;
    }
    let sanitized = sanitized::Build::begin(filter);
    for package in members()?.iter().filter(|package| wanted(package)) {
        total.add(suites::run(package, &suites::of(package, built), logs)?);
    }
    if wanted(DATA_PLANE) {
        let name = format!("{DATA_PLANE}, state of the version before");
        total.add(suites::run(&name, &suites::named("stored", &before), logs)?);
    }
    if wanted("documentation") {
        let arguments = ["test", "--workspace", "--doc", "--no-fail-fast"].map(str::to_owned);
        let mut command = cargo(&arguments);
        total.add(report_suite("documentation", &mut command, logs)?);
    }
    total.add(portable_ciphers(filter, logs)?);
    total.add(sanitized.run(logs)?);
    Ok(total)
}

/// The ciphers' tests with everything left out that is written for one architecture.
fn portable_ciphers(filter: Option<&str>, logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let mut counts = Counts::default();
    for (package, tests) in [
        ("bulkhead-crypto", "--lib --test xts"),
        ("bulkhead-packet-cipher", "--lib --tests"),
    ] {
        if filter.is_some_and(|filter| !package.contains(filter)) {
            continue;
        }
        let arguments = format!(
            "test -p {package} --features portable-only {tests} --no-fail-fast -- --show-output"
        );
        let arguments: Vec<_> = arguments.split_whitespace().map(str::to_owned).collect();
        counts.add(report_suite(
            &format!("{package}, portable"),
            &mut cargo(&arguments),
            logs,
        )?);
    }
    // The kernels left out are named by each test; that they are is the point.
    counts.skipped.clear();
    Ok(counts)
}

/// Runs tests, and says how they went.
fn report_suite(name: &str, command: &mut Command, logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let log = logs.join(format!("{name}.log"));
    let mut counts = Counts::default();
    report::step(name, || {
        let ended_well = run_into(command, &log)?;
        let text = fs::read_to_string(&log)?;
        counts = count(&text);
        if !ended_well && counts.failed == 0 {
            // It did not build, or a test ended its whole process.
            counts.fail(format!("{name}: cargo test failed"));
            return Ok(format!("FAILED\n{}", tail(&text, 40)));
        }
        Ok(counts.line())
    })?;
    if counts.failed > 0 {
        let text = fs::read_to_string(&log)?;
        println!("{}", failures_of(&text));
        println!("  the whole output: {}", shown(&log));
    }
    Ok(counts)
}

/// A path as people at the workspace would type it.
fn shown(path: &Path) -> String {
    let short: PathBuf = path.strip_prefix(workspace()).unwrap_or(path).to_owned();
    short.display().to_string()
}

/// Reads the output of libtest and libtest-mimic.
fn count(text: &str) -> Counts {
    let mut counts = Counts::default();
    let mut reasons = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("skipped: ") {
            reasons.push(rest.to_owned());
            continue;
        }
        let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        else {
            continue;
        };
        let name = name.trim();
        match result.trim() {
            "ok" => counts.passed += 1,
            "FAILED" => {
                counts.failed += 1;
                counts.failures.push(name.to_owned());
            }
            r if r.starts_with("ignored") => counts.skipped.push(name.to_owned()),
            _ => {}
        }
    }
    for reason in reasons {
        let name = reason
            .split(':')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        match counts.skipped.iter_mut().find(|skipped| **skipped == name) {
            Some(skipped) => *skipped = reason,
            None => counts.skipped.push(reason),
        }
    }
    counts
}

/// What libtest printed about failures, without the list of tests that passed.
fn failures_of(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !(line.starts_with("test ") && line.trim_end().ends_with("ok")))
        .collect();
    let start = lines.iter().position(|line| *line == "failures:");
    let relevant = &lines[start.unwrap_or(0)..];
    tail(&relevant.join("\n"), 120)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    let indented: Vec<String> = all[from..]
        .iter()
        .map(|line| format!("    {line}"))
        .collect();
    indented.join("\n")
}

/// The workspace's packages, in the order of its manifest.
fn members() -> Result<Vec<String>, Box<dyn Error>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(workspace())
        .output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let names = packages.iter().filter_map(|p| p["name"].as_str());
    let mut names: Vec<String> = names.map(str::to_owned).collect();
    // The longest last: whoever waits sees the rest first.
    names.sort_by_key(|name| (name == "bulkhead-integration", name.clone()));
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_harnesses_are_counted() {
        let text = "running 3 tests\n\
                    test a::b ... ok\n\
                    test a::c ... FAILED\n\
                    skipped: late: no root here\n\
                    test padded_name      ... ok\n\
                    test late             ... ignored\n\
                    test other ... ignored, needs a token\n\
                    test result: FAILED. 2 passed; 1 failed; 2 ignored\n";
        let counts = count(text);
        assert_eq!((counts.passed, counts.failed), (2, 1));
        assert_eq!(counts.failures, ["a::c"]);
        assert_eq!(counts.skipped, ["late: no root here", "other"]);
    }

    #[test]
    fn a_test_that_says_it_skips_is_named() {
        let counts = count("skipped: proc_mem: no memfd_secret\ntest proc_mem ... ok\n");
        assert_eq!(counts.skipped, ["proc_mem: no memfd_secret"]);
    }
}
