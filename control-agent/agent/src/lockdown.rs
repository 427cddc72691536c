//! The agent locks itself in before it takes its first message: it keeps its state directory and
//! the volume directories, and the device that TAPs are opened by, and nothing else of the file system, no capability,
//! no network.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::path::Path;

use bulkhead_interfaces::tap;
use bulkhead_protocol::process;
use caps::Capability;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope, make_bitflags,
};

use crate::mirror_file::MirrorDirectory;
use crate::volume_file::VolumeDirectories;

/// The kernel's rules as of Linux 6.12; what an older kernel lacks is left out.
const RULES: ABI = ABI::V6;

/// Locks the process in. It has one thread and has everything open that lies elsewhere. `xdp`: interfaces are prepared
/// for AF_XDP, and it may go on to make sockets of that family, for which it keeps CAP_NET_RAW. It can't bind one: what it
/// makes is of use to the data plane only.
///
/// # Errors
/// Which step failed, and with what.
pub(crate) fn lock_in(
    state_dir: &Path,
    volumes: &VolumeDirectories,
    mirrors: Option<&MirrorDirectory>,
    xdp: bool,
) -> Result<(), process::StartError> {
    process::no_dump_no_privileges()?;
    restrict_files(state_dir, volumes, mirrors)
        .map_err(|e| failed("Landlock", io::Error::other(e)))?;
    let kept: &[Capability] = if xdp { &[Capability::CAP_NET_RAW] } else { &[] };
    process::keep_capabilities(kept)?;
    process::refuse_network_and_exec(xdp)
}

fn failed(step: &'static str, source: io::Error) -> process::StartError {
    process::StartError::Lockdown { step, source }
}

fn restrict_files(
    state_dir: &Path,
    volumes: &VolumeDirectories,
    mirrors: Option<&MirrorDirectory>,
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
    // A file is made and never opened again: nothing of an earlier mirror can be read or changed.
    let mirror: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ WriteFile | MakeReg });
    if let Some(directory) = mirrors {
        rules = rules.add_rule(PathBeneath::new(directory.descriptor(), mirror))?;
    }
    // An operator makes the TAPs and gives them to the agent's user; what it may do here is opening those.
    match PathFd::new(tap::DEVICE) {
        Ok(device) => rules = rules.add_rule(PathBeneath::new(device, volume))?,
        Err(error) => tracing::info!("no NIC can be connected to a TAP: {error}"),
    }
    let status = rules.restrict_self()?;
    if status.ruleset == landlock::RulesetStatus::NotEnforced {
        tracing::warn!("this kernel has no Landlock: the agent may open any file its uid may");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};

    use bulkhead_integration::network::{enter_namespace, ip};
    use bulkhead_interfaces::xdp::Prepared;

    use super::*;

    #[test]
    fn nothing_but_state_and_volumes_can_be_opened() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name);
        for name in ["state", "volumes"] {
            fs::create_dir(path(name)).expect("mkdir");
        }
        fs::write(path("volumes/disk"), "disk").expect("write");
        fs::write(path("secret"), "secret").expect("write");
        let volumes = VolumeDirectories::open(&[path("volumes")]).expect("open");
        let has_taps = OpenOptions::new()
            .read(true)
            .write(true)
            .open(tap::DEVICE)
            .is_ok();
        // The rules bind the thread that takes them, and this one ends.
        let tries = std::thread::scope(|scope| {
            let restricted = scope.spawn(|| {
                restrict_files(&path("state"), &volumes, None).expect("restricted");
                let denied = |tried: io::Result<File>| {
                    tried.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
                };
                let both = OpenOptions::new().read(true).write(true).clone();
                [
                    ("write state", fs::write(path("state/floor"), "1").is_ok()),
                    (
                        "replace state",
                        fs::rename(path("state/floor"), path("state/f")).is_ok(),
                    ),
                    ("open a volume", both.open(path("volumes/disk")).is_ok()),
                    ("no other file", denied(File::open(path("secret")))),
                    ("no /proc", denied(File::open("/proc/self/maps"))),
                    ("no other device", denied(File::open("/dev/null"))),
                    ("no new volume", denied(File::create(path("volumes/new")))),
                    ("no cut", denied(File::create(path("volumes/disk")))),
                    ("no removal", fs::remove_file(path("volumes/disk")).is_err()),
                    (
                        "a TAP's device as before",
                        both.open(tap::DEVICE).is_ok() == has_taps,
                    ),
                ]
            });
            restricted.join().expect("joined")
        });
        assert_eq!(tries.iter().find(|(_, as_expected)| !as_expected), None);
    }

    /// What is left of the network, if interfaces are prepared: sockets of one family, for a map that is there.
    #[test]
    fn sockets_for_prepared_interfaces_can_be_made_behind_the_filter() {
        let test = "sockets_for_prepared_interfaces_can_be_made_behind_the_filter";
        if !enter_namespace(test) {
            return;
        }
        ip("link add v0 type veth peer name v1");
        let prepared = Prepared::new(&"v0".parse().expect("a name")).expect("prepared");
        let made = std::thread::scope(|scope| {
            let restricted = scope.spawn(|| {
                process::keep_capabilities(&[Capability::CAP_NET_RAW])?;
                process::refuse_network_and_exec(true)?;
                Ok::<_, process::StartError>(prepared.socket(0))
            });
            restricted.join().expect("joined")
        });
        assert_eq!(made.expect("restricted").expect("a socket").queue, 0);
    }
}
