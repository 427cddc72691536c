//! `cargo xtask coverage`: which lines of the data plane its tests run, measured by kcov.
//!
//! Two things are measured and put together, line by line: the data plane's own tests, each binary under
//! kcov; and every `serve` that the tests of whole disks start, to which a kcov of its own attaches
//! before it serves. kcov places breakpoints by address, so what is measured is built for fixed
//! addresses, unoptimised, and with functions that nobody calls left in, in a target folder of its own.

mod lines;

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::packages::{self, Need};
use crate::report::step;
use crate::{TARGET, target, workspace};
use lines::Lines;

/// Measures.
const KCOV: Need = Need {
    program: "kcov",
    package: "kcov",
    why: "measures which lines the tests run",
    // Debian 12's own does not read what this compiler writes.
    at_least: Some((43, 0)),
};
/// Parts of the data plane that have to reach [`LEAST_PERCENT`].
const MEASURED: [&str; 3] = ["virtqueue", "vhost_user", "blk"];
/// The share of their lines that tests have to run.
const LEAST_PERCENT: f64 = 95.0;
/// Tests of whole disks whose `serve` is measured.
const DISK_TESTS: [&str; 3] = ["block", "frontends", "hostile"];
/// Longest that kcov may take to write what it found after the last test.
const WRITING: Duration = Duration::from_secs(60);

/// Runs it. With `uncovered`, the lines that no test ran are listed: of one part (`blk`) or, if it is
/// empty, of the three that are held to a share. Fails where one of them has less than its share, or a
/// test failed.
///
/// # Errors
/// When something can't be built or measured.
pub fn run(uncovered: Option<&str>) -> Result<ExitCode, Box<dyn Error>> {
    step("packages", || packages::ensure(&[&KCOV]))?;
    let dir = folder()?;
    let mut binaries = Vec::new();
    step("build", || {
        binaries = build()?;
        Ok(format!("{} test binaries and serve", binaries.len()))
    })?;
    let failures = measure_all(binaries, &dir)?;
    let lines = Lines::read(&dir, &source())?;
    let low = lines.print(&MEASURED, LEAST_PERCENT);
    if let Some(part) = uncovered {
        let parts = if part.is_empty() {
            &MEASURED[..]
        } else {
            &[part]
        };
        lines.print_uncovered(parts);
    } else if low {
        println!("what is missing: cargo xtask coverage --uncovered");
    }
    for failure in &failures {
        println!("{failure}");
    }
    Ok(ExitCode::from(u8::from(low || !failures.is_empty())))
}

/// Runs the tests, measured; what failed. A failed test runs fewer lines than it should.
fn measure_all(binaries: Vec<Test>, dir: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let wrapped = wrap_serve(dir)?;
    let mut failures = Vec::new();
    let (disk, own): (Vec<_>, Vec<_>) = binaries.into_iter().partition(Test::is_of_disks);
    for test in own.iter().chain(&disk) {
        step(&test.label(), || {
            let tested = if test.is_of_disks() {
                serve_for(test, &wrapped)?
            } else {
                measure(test, dir)?
            };
            failures.extend(tested.failures);
            Ok(tested.line)
        })?;
    }
    wait_for_all(dir)?;
    Ok(failures)
}

/// How tests went.
struct Tested {
    /// For people.
    line: String,
    /// What failed, with what the tests printed.
    failures: Option<String>,
}

/// A test binary.
#[derive(Debug)]
struct Test {
    /// `block`, `bulkhead_dataplane`, ...
    name: String,
    /// Its crate's folder, in which it runs.
    package_dir: PathBuf,
    path: PathBuf,
}

impl Test {
    fn is_of_disks(&self) -> bool {
        DISK_TESTS.contains(&self.name.as_str())
    }

    fn label(&self) -> String {
        if self.is_of_disks() {
            format!("serve, under {}", self.name)
        } else {
            self.name.clone()
        }
    }
}

fn source() -> PathBuf {
    workspace().join("dataplane/src")
}

/// The flavour's target folder.
fn flavour() -> PathBuf {
    target().join("coverage")
}

/// A fresh folder for what kcov finds.
fn folder() -> Result<PathBuf, Box<dyn Error>> {
    let dir = flavour().join("kcov");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn cargo() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .env("CARGO_TARGET_DIR", flavour())
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "0")
        // The cipher alone stays quick: it is not measured, and hundreds of disks are read through it.
        .args([
            "--config",
            "profile.dev.package.bulkhead-crypto.opt-level=3",
        ])
        .env(
            "RUSTFLAGS",
            "-Ctarget-feature=+crt-static -Crelocation-model=static -Clink-dead-code=yes",
        );
    command
}

/// Builds everything that is measured; the test binaries.
fn build() -> Result<Vec<Test>, Box<dyn Error>> {
    let json = ["--message-format", "json", "--quiet"];
    let mut tests = built(
        cargo()
            .args(["test", "--no-run", "-p", "bulkhead-dataplane"])
            .args(json),
    )?;
    let mut disks = cargo();
    disks.args(["test", "--no-run", "-p", "bulkhead-integration"]);
    for test in DISK_TESTS {
        disks.args(["--test", test]);
    }
    tests.extend(built(disks.args(json))?);
    built(
        cargo()
            .args(["build", "-p", "bulkhead-benches", "--bin", "serve"])
            .args(json),
    )?;
    Ok(tests)
}

/// Runs cargo; the test binaries that it names.
fn built(command: &mut Command) -> Result<Vec<Test>, Box<dyn Error>> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let mut tests = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let is_test = message["profile"]["test"].as_bool() == Some(true);
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let found = (
            text(&message["target"]["name"]),
            text(&message["manifest_path"]),
            text(&message["executable"]),
        );
        if let (true, (Some(name), Some(manifest), Some(path))) = (is_test, found) {
            tests.push(Test {
                name,
                package_dir: Path::new(&manifest)
                    .parent()
                    .unwrap_or(Path::new("/"))
                    .to_owned(),
                path: path.into(),
            });
        }
    }
    Ok(tests)
}

/// The options of every kcov: plain output, once, of the data plane's sources.
fn kcov_options() -> Vec<String> {
    let source = source().display().to_string();
    vec![
        "--cobertura-only".to_owned(),
        "--skip-solibs".to_owned(),
        "--output-interval=0".to_owned(),
        format!("--include-path={source}"),
    ]
}

/// Runs a test binary under kcov.
fn measure(test: &Test, dir: &Path) -> Result<Tested, Box<dyn Error>> {
    let out = dir.join(test.path.file_name().unwrap_or_default());
    let mut command = Command::new("kcov");
    command.args(kcov_options()).arg(&out).arg(&test.path);
    let tested = finish(command, test)?;
    fs::write(out.join(DONE), "")?;
    Ok(tested)
}

/// Runs a test binary whose `serve` is the one in `bin`.
fn serve_for(test: &Test, bin: &Path) -> Result<Tested, Box<dyn Error>> {
    let mut command = Command::new(&test.path);
    command.env(bulkhead_integration::processes::BIN_DIR_ENV, bin);
    finish(command, test)
}

/// Runs tests to their end.
fn finish(mut command: Command, test: &Test) -> Result<Tested, Box<dyn Error>> {
    let output = command
        .current_dir(&test.package_dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("can't start {}: {e}", command.get_program().display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let ending = |with: &str| text.lines().filter(|line| line.ends_with(with)).count();
    let line = format!(
        "{} passed, {} failed",
        ending("... ok"),
        ending("... FAILED")
    );
    let failures = (!output.status.success()).then(|| {
        let from = text.find("failures:").unwrap_or(0);
        let errors = String::from_utf8_lossy(&output.stderr);
        format!("{}:\n{}\n{errors}", test.name, &text[from..])
    });
    Ok(Tested { line, failures })
}

/// A file in each output folder, once kcov has written it.
const DONE: &str = "done";

/// A `serve` that stops at its start until a kcov has attached to it; it stays the process that a test
/// starts, signals and looks into. The folder that it lies in.
///
/// kcov has to find it stopped: else it asks to be told of new threads before the process is ready to be
/// asked, and a thread that nobody follows dies of its first breakpoint. Then the stop has to be undone
/// for the process as a whole, or the kernel's threads for its ring, which nobody traces, are born stopped.
fn wrap_serve(dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    let real = flavour().join(TARGET).join("debug/serve");
    let script = format!(
        r#"#!/bin/sh
out=$(mktemp -d -p '{dir}')
(
    until grep -q '^State:.T' /proc/$$/status; do sleep 0.01; done
    kcov {options} --pid=$$ "$out" '{real}' &
    until grep -q '^TracerPid:.[1-9]' /proc/$$/status; do sleep 0.01; done
    kill -CONT $$
    wait
    : >"$out/{DONE}"
) </dev/null >"$out/kcov.log" 2>&1 &
BULKHEAD_STOP_FIRST=1 exec '{real}' "$@"
"#,
        dir = dir.display(),
        options = kcov_options().join(" "),
        real = real.display(),
    );
    let path = bin.join("serve");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(bin)
}

/// Waits until every kcov has written what it found.
fn wait_for_all(dir: &Path) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + WRITING;
    loop {
        let folders = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
        let writes = |path: &PathBuf| !path.ends_with("bin") && !path.join(DONE).exists();
        let Some(late) = folders.into_iter().find(writes) else {
            return Ok(());
        };
        if Instant::now() > deadline {
            return Err(format!("kcov has not finished {}", late.display()).into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
