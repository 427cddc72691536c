//! Upgrades of a host: binaries of its own, releases of them, and `bulkhead upgrade`.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::{Host, HostError};
use crate::processes::binary_dir;

/// The programs of a host and the command line.
const PROGRAMS: [&str; 5] = [
    "bulkhead",
    "bulkhead-rot",
    "bulkhead-keyd",
    "bulkhead-agent",
    "bulkhead-dataplane",
];

/// A folder below `dir` with the programs of the running test, in which they can be replaced.
///
/// # Errors
/// A program is not built, or can't be copied.
pub fn own_binaries(dir: &Path) -> io::Result<PathBuf> {
    let own = dir.join("bin");
    fs::create_dir_all(&own)?;
    for program in PROGRAMS {
        let (from, to) = (binary_dir().join(program), own.join(program));
        // A link where it can be: nothing writes into it, what is installed takes its place.
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to)?;
        }
    }
    Ok(own)
}

impl Host {
    /// Installs another binary of a program: the same with this version behind its end. The host was
    /// made with [`own_binaries`].
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn install(&self, program: &str, version: u64) -> Result<(), HostError> {
        let built = binary_dir().join(format!("bulkhead-{program}"));
        self.install_from(program, &built, version)
    }

    /// The same of this binary.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn install_from(
        &self,
        program: &str,
        binary: &Path,
        version: u64,
    ) -> Result<(), HostError> {
        let name = format!("bulkhead-{program}");
        let aside = self.bin_dir.join("aside");
        fs::copy(binary, &aside)?;
        let mut file = fs::File::options().append(true).open(&aside)?;
        write!(file, "version {version}")?;
        drop(file);
        fs::rename(aside, self.bin_dir.join(name))?;
        Ok(())
    }

    /// Signs that the installed binary of a program is this version; the statement's name.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn release(&self, program: &str, version: u64) -> Result<String, HostError> {
        let binary = self.bin_dir.join(format!("bulkhead-{program}"));
        let statement = format!("{program}-{version}.release");
        let (binary, number) = (binary.display().to_string(), version.to_string());
        self.cli(&[
            "release",
            "sign",
            "--binary",
            &binary,
            "--program",
            program,
            "--version",
            &number,
            "--name",
            &format!("test-{number}"),
            "--key",
            "keys/alice.key",
            "--out",
            &statement,
        ])?;
        Ok(statement)
    }

    /// Hands a statement to the agent; what the command line printed.
    ///
    /// # Errors
    /// [`HostError::Command`] with the reason of a refusal.
    pub fn upgrade_to(&self, statement: &str) -> Result<String, HostError> {
        self.cli(&["upgrade", statement, "--admin", "run/admin.sock"])
    }

    /// Installs, signs and upgrades.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn upgrade(&self, program: &str, version: u64) -> Result<String, HostError> {
        self.install(program, version)?;
        let statement = self.release(program, version)?;
        self.upgrade_to(&statement)
    }
}
