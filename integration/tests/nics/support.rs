//! What these tests share: the kernel, programs of the guests, and words for what went wrong.

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use bulkhead_integration::guest::QEMU;
use bulkhead_integration::guest::boot::Boot;
use bulkhead_integration::processes::{binary, binary_dir, installed};
use tempfile::TempDir;

/// How a test ends.
pub type Outcome = Result<(), Box<dyn Error>>;

/// The number for every run, or the full one.
pub fn rounds(few: u32, full: u32) -> u32 {
    let soak = std::env::var_os("BULKHEAD_SOAK").is_some_and(|value| value != "0");
    if soak { full } else { few }
}

/// Why no guest can be had here, if so.
pub fn missing() -> Option<String> {
    let needed = [QEMU, "busybox", "iperf3", "ethtool"];
    let missing = needed.into_iter().find(|name| {
        let sbin = ["/usr/sbin", "/sbin"].map(|dir| PathBuf::from(dir).join(name));
        installed(name).is_none() && !sbin.iter().any(|path| path.is_file())
    });
    if let Some(name) = missing {
        return Some(format!("{name} is not installed"));
    }
    boot().err().map(|error| error.to_string())
}

/// The kernel of all guests, unpacked once, beside the folders of the profiles.
pub fn boot() -> Result<Boot, Box<dyn Error>> {
    let dir = binary_dir();
    Ok(Boot::prepare(&dir.parent().unwrap_or(&dir).join("guest"))?)
}

/// A folder that other users can come through.
pub fn folder() -> Result<TempDir, Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// The program that transfers, for the guests' root.
pub fn guest_net() -> Result<(&'static str, Vec<u8>), Box<dyn Error>> {
    let program = fs::read(binary("guest-net", "bulkhead-integration")?)?;
    Ok(("/bin/guest-net", program))
}

/// Fails with this, unless it holds.
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds {
        return Ok(());
    }
    Err(what().into())
}
