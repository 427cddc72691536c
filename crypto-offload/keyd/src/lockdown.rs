//! keyd locks itself in before it says hello: it keeps its state directory and nothing else of the
//! file system, no capability, no network, no way to execute, and its memory stays out of core
//! files and off the swap.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::path::Path;

use bulkhead_protocol::process::{self, StartError};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// The kernel's rules as of Linux 6.12; what an older kernel lacks is left out.
const RULES: ABI = ABI::V6;

/// First, before any secret is read: no core file, no tracing, no swap.
///
/// # Errors
/// Which step failed, and with what.
pub(crate) fn hide_memory() -> Result<(), StartError> {
    process::no_dump_no_privileges()?;
    if let Err(error) = lock_memory() {
        tracing::warn!(
            "memory can't be locked ({error}): the host's key may reach the swap; \
             raise RLIMIT_MEMLOCK or turn swap off"
        );
    }
    Ok(())
}

/// Everything mapped now and later. Only without a limit: under one, what is mapped later would
/// fail to be mapped.
fn lock_memory() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    let unlimited = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if hard != RLIM_INFINITY {
        unlimited?;
    }
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
}

/// Last, with everything read that lies elsewhere. The process has one thread.
///
/// # Errors
/// Which step failed, and with what.
pub(crate) fn lock_in(state_dir: &Path) -> Result<(), StartError> {
    restrict_files(state_dir).map_err(|e| failed("Landlock", io::Error::other(e)))?;
    process::keep_capabilities(&[])?;
    process::refuse_network_and_exec(false)
}

fn failed(step: &'static str, source: io::Error) -> StartError {
    StartError::Lockdown { step, source }
}

fn restrict_files(state_dir: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The state is replaced: a file is made beside it and renamed over it.
    let state: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
        ReadFile | WriteFile | ReadDir | MakeReg | RemoveFile | Truncate
    });
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(RULES))?
        .handle_access(AccessNet::from_all(RULES))?
        .scope(Scope::from_all(RULES))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new(state_dir)?, state))?
        .restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!("this kernel has no Landlock: keyd may open any file its uid may");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn nothing_but_the_state_can_be_opened() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("state")).expect("mkdir");
        fs::write(path("secret"), "secret").expect("write");
        // The rules bind the thread that takes them, and this one ends.
        let tries = std::thread::scope(|scope| {
            let restricted = scope.spawn(|| {
                restrict_files(&path("state")).expect("restricted");
                let denied = |tried: io::Result<File>| {
                    tried.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
                };
                let (old, new) = (path("state/accepted"), path("state/accepted.new"));
                [
                    ("write", fs::write(&new, "1").is_ok()),
                    ("write again", fs::write(&new, "2").is_ok()),
                    ("replace", fs::rename(&new, &old).is_ok()),
                    ("read", fs::read(&old).is_ok()),
                    ("no other file", denied(File::open(path("secret")))),
                    ("no /proc", denied(File::open("/proc/self/mem"))),
                    ("nothing beside", denied(File::create(path("new")))),
                ]
            });
            restricted.join().expect("joined")
        });
        assert_eq!(tries.iter().find(|(_, as_expected)| !as_expected), None);
    }
}
