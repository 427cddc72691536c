//! The `bulkhead` binary as an operator uses it: whole flows, every refusal with its message and
//! exit code, and what is left behind in files.

mod admin;
mod export;
mod flow;
mod half_rekeyed;
mod keys;
mod networks;
mod refusals;
mod rekey;
mod releases;
mod reseal;
mod shred;
mod volumes;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of its own, in which the commands run.
struct Folder(tempfile::TempDir);

/// How a command ended.
#[derive(Debug)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("not killed"),
            stdout: String::from_utf8(output.stdout).expect("text"),
            stderr: String::from_utf8(output.stderr).expect("text"),
        }
    }
}

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `bulkhead` with the words of a line, then more arguments.
    fn run(&self, line: &str, more: &[&str]) -> Ended {
        Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .current_dir(self.0.path())
            .args(line.split_whitespace())
            .args(more)
            .output()
            .expect("run")
            .into()
    }

    /// Runs it and expects exit code 0. Returns standard output.
    fn ok(&self, line: &str) -> String {
        let ended = self.run(line, &[]);
        assert_eq!(ended.code, 0, "{line}: {}", ended.stderr);
        ended.stdout
    }

    /// Runs it and expects exit code 1, a reason that says each of these, and nothing of a usage
    /// text or a panic.
    fn refused(&self, line: &str, says: &[&str]) {
        let ended = self.run(line, &[]);
        assert_eq!(ended.code, 1, "{line}: {ended:?}");
        assert!(ended.stderr.starts_with("bulkhead: "), "{line}: {ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{line}: {ended:?}");
        for part in says {
            assert!(
                ended.stderr.contains(part),
                "{line}: {part:?} is not in {}",
                ended.stderr
            );
        }
    }

    /// Runs it and expects exit code 2, a mistake in the command line.
    fn usage(&self, line: &str, says: &str) {
        let ended = self.run(line, &[]);
        assert_eq!(ended.code, 2, "{line}: {ended:?}");
        assert!(ended.stderr.contains(says), "{line}: {ended:?}");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect(name);
    }

    fn mode(&self, name: &str) -> u32 {
        let metadata = fs::metadata(self.path(name)).expect(name);
        metadata.permissions().mode() & 0o7777
    }

    fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    /// Every regular file below, with its bytes.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(directory: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in fs::read_dir(directory).expect("list") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    walk(&path, found);
                } else {
                    let bytes = fs::read(&path).expect("read");
                    found.push((path, bytes));
                }
            }
        }
        let mut found = Vec::new();
        walk(self.0.path(), &mut found);
        found
    }

    /// Operator alice, a trust root, a recovery key and host-a, all by the program itself.
    fn with_keys() -> Self {
        let folder = Self::new();
        folder.ok("operator new --name alice --out alice.key");
        folder.ok("trust new --operator alice.key.pub --out trust.toml");
        folder.ok("recovery new --out recovery.key");
        folder.ok("host init --name host-a --state-dir state");
        folder
    }

    /// A bundle's source with these included files.
    fn write_bundle(&self, includes: &[&str]) {
        self.write(
            "bundle.toml",
            &format!(
                "host = \"host-a\"\nepoch = 7\nnot_before = 2026-01-31T12:00:00Z\n\
                 expires = 2199-03-01T00:00:00Z\ninclude = {includes:?}\n"
            ),
        );
    }
}

/// The options that every encrypted volume of these tests has.
const SEALED: &str =
    "--host state/host.pub --recovery recovery.key.pub --socket vm1 --allowed-uid 1000";
