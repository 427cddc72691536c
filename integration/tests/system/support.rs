//! What the tests of whole systems share.

use std::error::Error;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bulkhead_integration::guest::boot::Boot;
use bulkhead_integration::guest::{Guest, GuestDisk, GuestSpec, Machine, QEMU};
use bulkhead_integration::host::own_uid;
use bulkhead_integration::processes::{binary, binary_dir, installed};
use tempfile::TempDir;

use crate::Need;

/// How a test ends.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Why a need is not met, if it is not.
pub fn missing(need: Need) -> Option<String> {
    match need {
        Need::Guest => [QEMU, "busybox", "lz4"]
            .iter()
            .find(|program| installed(program).is_none())
            .map(|program| format!("{program} is not installed: `cargo xtask test` installs it")),
        Need::Root => (own_uid() != 0).then(|| "it needs root".to_owned()),
    }
}

/// A folder that other users can come through.
pub fn folder() -> Result<TempDir, Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// The kernel of all guests, unpacked once.
pub fn boot() -> Result<Boot, Box<dyn Error>> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    Ok(Boot::prepare(&cache())?)
}

/// Beside the folders of the profiles.
fn cache() -> PathBuf {
    let dir = binary_dir();
    dir.parent().unwrap_or(&dir).join("guest")
}

/// A guest with one vhost-user disk.
pub fn guest(
    dir: &Path,
    socket: PathBuf,
    queues: u16,
    script: &str,
) -> Result<Guest, Box<dyn Error>> {
    let disks = [GuestDisk::VhostUser {
        socket,
        queues,
        packed: false,
        platform: false,
    }];
    guest_with(dir, &disks, script)
}

/// A guest with these disks.
pub fn guest_with(dir: &Path, disks: &[GuestDisk], script: &str) -> Result<Guest, Box<dyn Error>> {
    let spec = GuestSpec {
        dir,
        disks,
        script,
        programs: &["mkfs.ext4"],
        files: &[],
        modules: &[],
        uid: None,
        machine: Machine::default(),
    };
    Ok(Guest::start(&boot()?, &spec)?)
}

/// The program that works on a guest's disk, as one of the guest's files.
pub fn guest_io() -> Result<(&'static str, Vec<u8>), Box<dyn Error>> {
    let path = binary("guest-io", "bulkhead-integration")?;
    Ok(("/bin/guest-io", std::fs::read(path)?))
}

/// An error unless something holds.
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}
