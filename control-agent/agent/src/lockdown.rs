//! The agent locks itself in before it takes its first message: it keeps its state directory and
//! the volume directories, and nothing else of the file system, no capability, no network.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::path::Path;

use bulkhead_protocol::process;
use caps::{CapSet, Capability};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope, make_bitflags,
};

use crate::volume_file::VolumeDirectories;

/// The kernel's rules as of Linux 6.12; what an older kernel lacks is left out.
const RULES: ABI = ABI::V6;

/// Locks the process in. It has one thread and has everything open that lies elsewhere.
///
/// # Errors
/// Which step failed, and with what.
pub(crate) fn lock_in(
    state_dir: &Path,
    volumes: &VolumeDirectories,
) -> Result<(), process::StartError> {
    process::no_dump_no_privileges()?;
    restrict_files(state_dir, volumes).map_err(|e| failed("Landlock", io::Error::other(e)))?;
    drop_capabilities().map_err(|e| failed("capabilities", io::Error::other(e)))?;
    process::refuse_network_and_exec()
}

fn failed(step: &'static str, source: io::Error) -> process::StartError {
    process::StartError::Lockdown { step, source }
}

fn restrict_files(
    state_dir: &Path,
    volumes: &VolumeDirectories,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Files of the state are replaced in place; nothing is made, removed or cut among the volumes.
    let state: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
        ReadFile | WriteFile | ReadDir | MakeReg | RemoveFile | Truncate
    });
    // What a descriptor may do is settled where it is opened: the data plane needs the block
    // devices' ioctl calls on those that the agent gives it.
    let volume: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ ReadFile | WriteFile | IoctlDev });
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(RULES))?
        .handle_access(AccessNet::from_all(RULES))?
        .scope(Scope::from_all(RULES))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new(state_dir)?, state))?;
    for directory in volumes.descriptors() {
        rules = rules.add_rule(PathBeneath::new(directory, volume))?;
    }
    let status = rules.restrict_self()?;
    if status.ruleset == landlock::RulesetStatus::NotEnforced {
        tracing::warn!("this kernel has no Landlock: the agent may open any file its uid may");
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    // Without CAP_SETPCAP the bounding set stays; without exec it has no effect.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set)?;
    }
    Ok(())
}
