//! Test programs: built once for the whole workspace, run package by package.
//!
//! `cargo test -p PACKAGE` would choose features for that package alone, and with each package build much of the
//! workspace, and of what it depends on, once more: half as many compilations again as there are. So everything
//! is built in one go, and what cargo says it built is run as `cargo test` runs it: in the package's folder.

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Counts, count, failures_of, shown, tail};
use crate::{report, workspace};

/// What every test program is told. Tests that passed print what they left out: `skipped: ...`.
const ARGUMENTS: &str = "--show-output";

/// A test program.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Suite {
    /// Its package.
    package: String,
    /// Its place in that: the library's tests first, then those of programs, then the others.
    rank: usize,
    /// What the package calls it.
    name: String,
    /// Where it was built to.
    program: PathBuf,
    /// The package's folder.
    folder: PathBuf,
}

/// The test programs that cargo built, by package, in the order in which they are run.
///
/// # Errors
/// What the compiler says.
pub fn build(command: &mut Command) -> Result<Vec<Suite>, Box<dyn Error>> {
    let output = command
        .args(["--quiet", "--message-format=json-render-diagnostics"])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(built(&String::from_utf8_lossy(&output.stdout)))
}

/// The test programs among cargo's messages.
fn built(messages: &str) -> Vec<Suite> {
    let messages = messages
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok());
    let mut suites: Vec<Suite> = messages.filter_map(|message| suite(&message)).collect();
    suites.sort();
    suites
}

/// The test program that a message of cargo's is about, if it is about one that `cargo test` runs.
fn suite(message: &serde_json::Value) -> Option<Suite> {
    let target = &message["target"];
    let is_run = target["test"] == true && message["profile"]["test"] == true;
    let kind = target["kind"][0].as_str()?;
    let rank = ["lib", "bin", "test"].iter().position(|k| *k == kind)?;
    let program = PathBuf::from(message["executable"].as_str()?);
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    // `path+file:///.../FOLDER#PACKAGE@VERSION`; without the name where the folder has it.
    let id = message["package_id"].as_str()?.split_once('#')?.1;
    let package = id.split_once('@').map(|(name, _)| name.to_owned());
    let package = package.or_else(|| Some(folder.file_name()?.to_string_lossy().into_owned()))?;
    is_run.then(|| Suite {
        package,
        rank,
        name: target["name"].as_str().unwrap_or_default().to_owned(),
        program,
        folder: folder.to_owned(),
    })
}

/// Runs the test programs of a package, one behind the other, and says how they went.
///
/// # Errors
/// When one can't be started, or the log can't be written.
pub(super) fn run(name: &str, suites: &[&Suite], logs: &Path) -> Result<Counts, Box<dyn Error>> {
    let log = logs.join(format!("{name}.log"));
    let mut total = Counts::default();
    let mut seen = String::new();
    report::step(name, || {
        let file = File::create(&log)?;
        for suite in suites {
            let before = fs::metadata(&log)?.len();
            let ended_well = suite.command(&file)?.status()?.success();
            let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
            let text = text.get(usize::try_from(before)?..).unwrap_or_default();
            let mut counts = count(text);
            if !ended_well && counts.failed == 0 {
                // A test ended its whole process.
                counts.fail(format!("{name}: {} ended early", suite.name));
                seen.push_str(&format!("{}\n", tail(text, 40)));
            } else if counts.failed > 0 {
                seen.push_str(&format!("{}\n", failures_of(text)));
            }
            total.add(counts);
        }
        Ok(total.line())
    })?;
    if total.failed > 0 {
        println!("{seen}  the whole output: {}", shown(&log));
    }
    Ok(total)
}

/// Those of a package.
pub(super) fn of<'a>(package: &str, suites: &'a [Suite]) -> Vec<&'a Suite> {
    let own = suites.iter().filter(|suite| suite.package == package);
    own.collect()
}

/// Those of that name.
pub(super) fn named<'a>(name: &str, suites: &'a [Suite]) -> Vec<&'a Suite> {
    let own = suites.iter().filter(|suite| suite.name == name);
    own.collect()
}

impl Suite {
    fn command(&self, log: &File) -> Result<Command, Box<dyn Error>> {
        let mut command = Command::new(&self.program);
        command
            .arg(ARGUMENTS)
            .current_dir(&self.folder)
            // As cargo would have it.
            .env("CARGO", env!("CARGO"))
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .env("CARGO_PKG_NAME", &self.package)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?);
        Ok(command)
    }
}

/// A command that takes only what time of the processors nobody else wants.
pub(super) fn behind(command: &Command) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"])
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(command.get_current_dir().unwrap_or(&workspace()))
        .stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => nice.env(name, value),
            None => nice.env_remove(name),
        };
    }
    nice
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "path+file:///w/a#bulkhead-a@0.1.0";

    fn message(kind: &str, name: &str, tested: bool, id: &str) -> String {
        let executable = format!("/t/{name}-1");
        serde_json::json!({
            "reason": "compiler-artifact", "package_id": id, "manifest_path": "/w/a/Cargo.toml",
            "target": {"kind": [kind], "name": name, "test": kind != "bench"},
            "profile": {"test": tested}, "executable": executable,
        })
        .to_string()
    }

    #[test]
    fn what_cargo_test_would_run_is_run_in_its_order() {
        let messages = [
            message("test", "walk", true, ID),
            message("bin", "a", true, ID),
            // The program itself, and what only `cargo bench` runs.
            message("bin", "a", false, ID),
            message("bench", "speed", true, ID),
            message("lib", "bulkhead_a", true, ID),
            "{\"reason\":\"build-finished\",\"success\":true}".to_owned(),
        ];
        let suites = built(&messages.join("\n"));
        let names: Vec<_> = suites.iter().map(|suite| suite.name.as_str()).collect();
        assert_eq!(names, ["bulkhead_a", "a", "walk"]);
        assert_eq!(of("bulkhead-a", &suites).len(), 3);
        assert_eq!(named("walk", &suites)[0].folder, Path::new("/w/a"));
    }

    #[test]
    fn a_package_that_is_called_as_its_folder_has_its_name() {
        let suites = built(&message("lib", "a", true, "path+file:///w/a#0.1.0"));
        assert_eq!(suites[0].package, "a");
    }
}
