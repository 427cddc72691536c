//! `cargo xtask fuzz`: fuzz targets under libFuzzer and AddressSanitizer, for as long as one likes.
//!
//! Corpora stand in `integration/fuzz/corpus`. What a run finds beyond them lies in `target/fuzz`, and goes
//! into the corpus, both cut down to what reaches something of its own, with `--keep`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::report::step;
use crate::{TARGET, nightly, target, workspace};

/// Seconds for one input: a target that takes longer hangs.
const LONGEST_INPUT: u32 = 20;
/// Bytes of an input at most: longer ones reach nothing that shorter ones don't.
const LONGEST_BYTES: u32 = 2048;
/// Names a target to the engine.
const TARGET_ENV: &str = "BULKHEAD_FUZZ_TARGET";

/// Runs a target for some seconds, or lists them.
///
/// # Errors
/// When there is no nightly compiler, nothing is built, or there is no such target.
pub fn run(name: Option<&str>, seconds: u32, keep: bool) -> Result<ExitCode, Box<dyn Error>> {
    let Some(name) = name else {
        for target in bulkhead_fuzz::TARGETS {
            println!("{:<18} {}", target.name, target.about);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let target = bulkhead_fuzz::TARGETS.iter().find(|t| t.name == name);
    let target = target
        .ok_or_else(|| format!("there is no target {name}: `cargo xtask fuzz` lists them"))?;
    if let Some(reason) = nightly::missing() {
        return Err(reason.into());
    }
    step("build", || {
        build().map(|()| "libFuzzer with AddressSanitizer".to_owned())
    })?;
    let mut found = None;
    step(target.name, || {
        let run = fuzz(target.name, seconds)?;
        let line = run.line.clone();
        found = run.failure;
        Ok(line)
    })?;
    if let Some(failure) = found {
        println!("{failure}");
        return Ok(ExitCode::FAILURE);
    }
    if keep {
        step("corpus", || keep_found(target.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How a run went.
#[derive(Debug)]
pub struct Run {
    /// For people.
    pub line: String,
    /// What it found, and how to see it again; none: nothing.
    pub failure: Option<String>,
}

/// Builds the engine with all targets in it.
///
/// # Errors
/// What the compiler says.
pub fn build() -> Result<(), Box<dyn Error>> {
    let output = build_command().output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}

/// What builds it.
pub fn build_command() -> Command {
    let mut command = nightly::cargo();
    command
        .current_dir(workspace().join("integration/fuzz/engine"))
        .args(["build", "--quiet"]);
    command
}

fn engine() -> PathBuf {
    nightly::flavour()
        .join(TARGET)
        .join("debug/bulkhead-fuzz-engine")
}

fn corpus(name: &str) -> PathBuf {
    workspace().join("integration/fuzz/corpus").join(name)
}

/// Where a target's finds lie.
fn work(name: &str) -> PathBuf {
    target().join("fuzz").join(name)
}

fn command(name: &str) -> Command {
    let mut command = Command::new(engine());
    command
        .current_dir(work(name))
        .stdin(Stdio::null())
        .env(TARGET_ENV, name)
        .env("ASAN_OPTIONS", nightly::ASAN_OPTIONS)
        .arg(format!("-timeout={LONGEST_INPUT}"))
        .arg(format!("-max_len={LONGEST_BYTES}"));
    command
}

/// Runs the whole corpus, then goes on from it for some seconds.
///
/// # Errors
/// When the engine can't be started.
pub fn fuzz(name: &str, seconds: u32) -> Result<Run, Box<dyn Error>> {
    let found = work(name).join("found");
    fs::create_dir_all(&found)?;
    fs::create_dir_all(corpus(name))?;
    let output = command(name)
        .arg(format!("-max_total_time={seconds}"))
        .args(["-print_final_stats=1", "-reload=0"])
        .args([&found, &corpus(name)])
        .output()
        .map_err(|e| format!("can't start {}: {e}", engine().display()))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    fs::write(work(name).join("log"), &text)?;
    let line = format!(
        "{} inputs, {} places reached, {} inputs in the corpus",
        number(&text, "stat::number_of_executed_units:"),
        number(&text, "cov:"),
        fs::read_dir(corpus(name))?.count()
    );
    let failure = (!output.status.success()).then(|| explain(name, &text));
    Ok(Run { line, failure })
}

/// The number behind the last place where a text has this name.
fn number(text: &str, name: &str) -> String {
    let rest = text.rsplit_once(name).map(|(_, rest)| rest.trim_start());
    let digits = rest.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect());
    digits.unwrap_or_else(|| "?".to_owned())
}

/// What failed, with the command that shows it again.
fn explain(name: &str, text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let is_about = |line: &&str| {
        line.contains("panicked at") || line.contains("ERROR:") || line.contains("SUMMARY:")
    };
    let from = lines
        .iter()
        .position(is_about)
        .unwrap_or(lines.len().saturating_sub(20));
    let shown: Vec<&str> = lines[from..].iter().take(25).copied().collect();
    let input = text
        .lines()
        .find_map(|line| line.split_once("Test unit written to ").map(|(_, p)| p));
    let input = work(name).join(
        input
            .unwrap_or("the input named above")
            .trim_start_matches("./"),
    );
    format!(
        "{}\n  the input: {input}\n  again: ASAN_OPTIONS={} {TARGET_ENV}={name} {} {input}",
        shown.join("\n"),
        nightly::ASAN_OPTIONS,
        engine().display(),
        input = input.display()
    )
}

/// Makes the corpus what is left of it and of the finds when each input has to reach something of its own.
fn keep_found(name: &str) -> Result<String, Box<dyn Error>> {
    let merged = work(name).join("merged");
    if merged.exists() {
        fs::remove_dir_all(&merged)?;
    }
    fs::create_dir_all(&merged)?;
    let output = command(name)
        .arg("-merge=1")
        .args([&merged, &corpus(name), &work(name).join("found")])
        .output()?;
    if !output.status.success() {
        return Err(explain(name, &String::from_utf8_lossy(&output.stderr)).into());
    }
    fs::remove_dir_all(corpus(name))?;
    fs::create_dir_all(corpus(name))?;
    let mut bytes = 0;
    let mut count = 0;
    for entry in fs::read_dir(&merged)?.flatten() {
        bytes += fs::copy(entry.path(), corpus(name).join(entry.file_name()))?;
        count += 1;
    }
    Ok(format!(
        "{count} inputs, {bytes} bytes in {}",
        shown(&corpus(name))
    ))
}

/// A path as people at the workspace would type it.
fn shown(path: &Path) -> String {
    path.strip_prefix(workspace())
        .unwrap_or(path)
        .display()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_report_are_read() {
        let text = "#2 INITED cov: 12 ft: 3\n#9 DONE   cov: 345 ft: 1\nstat::number_of_executed_units: 99\n";
        assert_eq!(number(text, "cov:"), "345");
        assert_eq!(number(text, "stat::number_of_executed_units:"), "99");
        assert_eq!(number(text, "none:"), "?");
    }

    #[test]
    fn a_failure_names_its_input() {
        let text = "thread '<unnamed>' panicked at a.rs:1:\nboom\nartifact_prefix='./'; Test unit written to ./crash-1\n";
        let explained = explain("split_walk", text);
        assert!(explained.starts_with("thread"), "{explained}");
        assert!(explained.contains("fuzz/split_walk/crash-1"), "{explained}");
    }
}
