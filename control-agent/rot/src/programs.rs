//! The three programs: their measured binaries, command lines, environment and users.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ffi::{CString, NulError, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use bulkhead_protocol::fd_store::STORE_ENV;
use bulkhead_protocol::process::ROT_ENV;
use bulkhead_protocol::rot::{Measurement, Role};

use crate::arguments::Arguments;
use crate::binary::{self, BinaryError, MeasuredBinary};
use crate::execute::Kept;
use crate::lockdown::{self, Limits};
use crate::stores;

/// The log filter, passed on to the children.
const LOG_ENV: &str = "BULKHEAD_LOG";

/// Why a program is not ready to start.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Its binary.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// Its command line.
    #[error("an argument for {role} has a zero byte: {source}")]
    Argument {
        /// Whose.
        role: Role,
        /// Where.
        source: NulError,
    },
}

/// What is needed to start a role, as often as it dies.
#[derive(Debug, Clone)]
pub struct Program {
    /// Which.
    pub role: Role,
    /// Its sealed binary.
    pub binary: Rc<MeasuredBinary>,
    /// Its command line, the name first.
    pub arguments: Vec<CString>,
    /// Its whole environment.
    pub environment: Vec<CString>,
    /// The uid to take; none keeps rot's own.
    pub uid: Option<u32>,
    /// What it keeps under its own user, until it locks itself in.
    pub keeps: Option<Kept>,
}

impl Program {
    /// Loads and measures a role's binary and makes its command line. `stored`: how many
    /// descriptors rot stores for it at most.
    ///
    /// # Errors
    /// See [`ProgramError`].
    pub fn load(role: Role, arguments: &Arguments, stored: usize) -> Result<Self, ProgramError> {
        let name = format!("bulkhead-{role}");
        let binary = MeasuredBinary::load(&arguments.bin_dir.join(&name), &name)?;
        Self::of(binary, role, arguments, stored)
    }

    fn of(
        binary: MeasuredBinary,
        role: Role,
        arguments: &Arguments,
        stored: usize,
    ) -> Result<Self, ProgramError> {
        let name = format!("bulkhead-{role}");
        let named = std::iter::once(name.into());
        let line: Result<_, _> = named
            .chain(command_line(role, arguments))
            .map(|word: Vec<u8>| CString::new(word))
            .collect();
        let own = nix::unistd::geteuid().as_raw();
        Ok(Self {
            role,
            binary: Rc::new(binary),
            arguments: line.map_err(|source| ProgramError::Argument { role, source })?,
            environment: environment(stored)
                .map_err(|source| ProgramError::Argument { role, source })?,
            uid: arguments.uid(role).filter(|&uid| uid != own),
            keeps: None,
        })
    }

    /// The measurement as hex digits.
    #[must_use]
    pub fn measurement_text(&self) -> String {
        hex(&self.binary.measurement())
    }
}

/// A measurement as hex digits.
#[must_use]
pub fn hex(measurement: &Measurement) -> String {
    let bytes = measurement.iter();
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

/// Loads programs, at the start and again for an upgrade.
#[derive(Debug)]
pub struct Loader {
    arguments: Arguments,
    limits: Limits,
    own: Measurement,
}

impl Loader {
    /// A loader for this command line and these limits.
    ///
    /// # Errors
    /// rot's own binary can't be measured.
    pub fn new(arguments: Arguments, limits: Limits) -> io::Result<Self> {
        Ok(Self {
            arguments,
            limits,
            own: binary::measure_own()?,
        })
    }

    /// What rot itself measures: it executes what nobody measured before, unless it was upgraded.
    #[must_use]
    pub fn own(&self) -> Measurement {
        self.own
    }

    /// rot's command line, to be executed anew with.
    #[must_use]
    pub fn arguments(&self) -> &Arguments {
        &self.arguments
    }

    /// The rot that lies in the directory of the binaries now.
    ///
    /// # Errors
    /// See [`BinaryError`].
    pub fn load_rot(&self) -> Result<MeasuredBinary, BinaryError> {
        let name = "bulkhead-rot";
        MeasuredBinary::load(&self.arguments.bin_dir.join(name), name)
    }

    /// A program of which the rot before this one left the binary.
    ///
    /// # Errors
    /// See [`ProgramError`].
    pub fn with_binary(&self, role: Role, binary: MeasuredBinary) -> Result<Program, ProgramError> {
        let stored = stores::limit(role, self.limits.files);
        let program = Program::of(binary, role, &self.arguments, stored)?;
        Ok(self.with_capability(program))
    }

    /// How many files rot may have open.
    #[must_use]
    pub fn files(&self) -> u64 {
        self.limits.files
    }

    fn with_capability(&self, mut program: Program) -> Program {
        program.keeps = self.kept(program.role);
        program
    }

    /// The data plane needs room for guest memory where the limit can't be lifted, the agent makes AF_XDP sockets if there
    /// are interfaces for these.
    fn kept(&self, role: Role) -> Option<Kept> {
        let kept = match role {
            Role::Dataplane if !self.limits.memory_unlimited => Kept::IpcLock,
            Role::Agent if !self.arguments.xdp.is_empty() => Kept::NetRaw,
            _ => return None,
        };
        lockdown::holds(kept.capability()).then_some(kept)
    }

    /// The program that lies in the directory of the binaries now.
    ///
    /// # Errors
    /// See [`ProgramError`].
    pub fn load(&self, role: Role) -> Result<Program, ProgramError> {
        let stored = stores::limit(role, self.limits.files);
        let mut program = Program::load(role, &self.arguments, stored)?;
        program.keeps = self.kept(role);
        tracing::info!(%role, sha384 = program.measurement_text(), "measured");
        Ok(program)
    }
}

fn environment(stored: usize) -> Result<Vec<CString>, NulError> {
    let mut environment = vec![
        CString::new(format!("{ROT_ENV}=1"))?,
        CString::new(format!("{STORE_ENV}={stored}"))?,
    ];
    if let Some(filter) = std::env::var_os(LOG_ENV) {
        let entry = [LOG_ENV.as_bytes(), b"=", filter.as_bytes()].concat();
        environment.push(CString::new(entry)?);
    }
    Ok(environment)
}

fn command_line(role: Role, arguments: &Arguments) -> Vec<Vec<u8>> {
    let mut line = Vec::new();
    let mut option = |name: &str, value: &OsStr| {
        line.push(name.as_bytes().to_vec());
        line.push(value.as_bytes().to_vec());
    };
    let a = arguments;
    match role {
        Role::Keyd => {
            let trust = a.keyd_trust.as_ref().unwrap_or(&a.trust);
            option("--host", a.host.as_ref());
            option("--state-dir", a.state_dir.join(role.name()).as_ref());
            option("--trust", trust.as_ref());
        }
        Role::Agent => {
            option("--host", a.host.as_ref());
            option("--state-dir", a.state_dir.join(role.name()).as_ref());
            option("--trust", a.trust.as_ref());
            option("--vhost-dir", a.run_dir.join("vhost").as_ref());
            for directory in &a.volume_dirs {
                option("--volume-dir", directory.as_ref());
            }
            if let Some(directory) = &a.mirror_dir {
                option("--mirror-dir", directory.as_ref());
            }
        }
        Role::Dataplane => {
            if let Some(workers) = a.workers {
                option("--workers", workers.to_string().as_ref());
            }
            if let Some(cpus) = &a.cpus {
                option("--cpus", cpus.as_ref());
            }
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn line(role: Role, more: &str) -> String {
        let fixed =
            "rot --host h --bin-dir /b --state-dir /s --run-dir /r --trust /t --volume-dir /v";
        let all = format!("{fixed}{more}");
        let arguments = Arguments::try_parse_from(all.split(' ')).unwrap();
        let words = command_line(role, &arguments);
        String::from_utf8(words.join(&b' ')).unwrap()
    }

    #[test]
    fn each_role_gets_its_command_line() {
        assert_eq!(
            line(Role::Keyd, ""),
            "--host h --state-dir /s/keyd --trust /t"
        );
        assert_eq!(
            line(Role::Keyd, " --keyd-trust /k"),
            "--host h --state-dir /s/keyd --trust /k"
        );
        assert_eq!(
            line(
                Role::Agent,
                " --volume-dir /w --keyd-trust /k --mirror-dir /m"
            ),
            "--host h --state-dir /s/agent --trust /t --vhost-dir /r/vhost --volume-dir /v --volume-dir /w \
             --mirror-dir /m"
        );
        assert_eq!(line(Role::Dataplane, ""), "");
        assert_eq!(
            line(Role::Dataplane, " --workers 2 --cpus 1,3"),
            "--workers 2 --cpus 1,3"
        );
    }
}
