//! Full file systems: under the state of agent and keyd, and under volumes. What is served is served, what can't be
//! written is refused with the reason, and it goes on where there is room again.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_integration::disk::{Disk, DiskError, Options};
use bulkhead_integration::driver::DriverError;
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec, uid_of};

use crate::support::{Outcome, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_full_disk_under_the_state",
        needs: &[Need::Root],
        run: under_the_state,
    },
    Test {
        name: "system_full_disk_under_volumes",
        needs: &[Need::Root],
        run: under_volumes,
    },
    Test {
        name: "system_full_disk_under_a_block_device",
        needs: &[Need::Root],
        run: thin,
    },
];

const PAGE: usize = 4096;

/// A small file system of its own.
struct Small {
    path: PathBuf,
}

impl Small {
    /// Of so many bytes, a user's, with what was there before.
    fn in_memory(path: &Path, bytes: usize, uid: u32) -> Result<Self, Box<dyn Error>> {
        fs::create_dir_all(path)?;
        let kept = tempfile::tempdir()?;
        copy(path, kept.path())?;
        let options = format!("size={bytes},mode=700,uid={uid},gid={uid}");
        let small = Self::mount(path, &["-t", "tmpfs", "-o", &options, "none"])?;
        copy(kept.path(), path)?;
        Ok(small)
    }

    /// ext4 in a file with holes.
    fn on_disk(image: &Path, path: &Path) -> Result<Self, Box<dyn Error>> {
        File::create(image)?.set_len(24 << 20)?;
        let mut mkfs = Command::new("mkfs.ext4");
        // Nothing is kept back for root, and nothing written later by itself.
        mkfs.args(["-q", "-m", "0", "-O", "^has_journal"]);
        mkfs.args(["-E", "lazy_itable_init=0"]);
        succeeds(mkfs.arg(image))?;
        let image = image.display().to_string();
        Self::mount(path, &["-o", "loop", &image])
    }

    fn mount(path: &Path, arguments: &[&str]) -> Result<Self, Box<dyn Error>> {
        succeeds(Command::new("mount").args(arguments).arg(path))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Fills it up to so many free pages.
    fn fill(&self, free: usize) -> Outcome {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.filler())?;
        while file.write_all(&[0xff; PAGE]).is_ok() {}
        let bytes = file.metadata()?.len();
        file.set_len(bytes.saturating_sub((free * PAGE) as u64))?;
        Ok(())
    }

    /// Gives its room back.
    fn empty(&self) -> Outcome {
        Ok(fs::remove_file(self.filler())?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Whoever has it open ends a little later.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn succeeds(command: &mut Command) -> Outcome {
    let output = command.output()?;
    ensure(output.status.success(), || format!("{output:?}"))
}

/// What is in a folder, with its owners.
fn copy(from: &Path, to: &Path) -> Outcome {
    succeeds(Command::new("cp").arg("-a").arg(from.join(".")).arg(to))
}

/// Verified I/O.
fn works(disk: &mut Disk, byte: u8) -> Outcome {
    disk.write(0, 8, &[byte; PAGE])?;
    ensure(disk.read(0, 8, 4096)? == [byte; PAGE], || {
        "another byte was read than was written".to_owned()
    })
}

fn epoch(host: &Host) -> Result<u64, HostError> {
    Ok(host.status()?["epoch"].as_u64().unwrap_or(0))
}

/// A host with two volumes whose first bundle has one of them, and a small file system under a process's state.
fn host_on_small(dir: &Path, role: &str) -> Result<(Small, Host), Box<dyn Error>> {
    let mut host = Host::create(dir)?;
    let state = dir.join("state").join(role);
    let small = Small::in_memory(&state, 64 * PAGE, uid_of(role))?;
    for name in ["a", "b"] {
        host.create_volume(&VolumeSpec::new(name, "4MiB", 4096))?;
    }
    host.start()?;
    let first = host.sign(&BundleSpec::new(1, &["a"]))?;
    host.apply(&first)?;
    Ok((small, host))
}

/// What became of the second bundle.
#[derive(Debug, PartialEq, Eq)]
enum Became {
    /// It is in force.
    Applied,
    /// It is refused, and the first is in force.
    Refused,
    /// It has been accepted, and is in force once it can be written.
    Pending,
}

fn apply(host: &Host, envelope: &str) -> Result<Became, Box<dyn Error>> {
    let reason = match host.apply(envelope) {
        Ok(_) => {
            ensure(epoch(host)? == 2, || "it is not in force".to_owned())?;
            return Ok(Became::Applied);
        }
        Err(HostError::Command { reason, .. }) => reason,
        Err(other) => return Err(other.into()),
    };
    ensure(epoch(host)? == 1, || {
        format!("{reason}, and it is in force")
    })?;
    if reason.contains("the bundle was accepted") {
        return Ok(Became::Pending);
    }
    ensure(reason.contains("No space left on device"), || reason)?;
    Ok(Became::Refused)
}

/// Page by page more room, until all of a commit is written: each time everything or nothing of it is done, and
/// what is served is served.
fn under_the_state() -> Outcome {
    for (role, wanted) in [
        ("keyd", &[Became::Refused, Became::Applied][..]),
        ("agent", &[Became::Refused, Became::Pending]),
    ] {
        let dir = folder()?;
        let (small, host) = host_on_small(dir.path(), role)?;
        let second = host.sign(&BundleSpec::new(2, &["a", "b"]))?;
        let mut disk = Disk::attach(&host.socket("a"), &Options::default())?;
        let mut seen = Vec::new();
        for free in 0..16 {
            small.fill(free)?;
            works(&mut disk, u8::try_from(free)?)?;
            let became = apply(&host, &second)?;
            let ends = became != Became::Refused;
            if !seen.contains(&became) {
                seen.push(became);
            }
            if ends {
                break;
            }
        }
        ensure(seen == wanted, || {
            format!("{role}: {seen:?}\n{}", host.log())
        })?;
        survives(&host, &small, &mut disk)?;
    }
    Ok(())
}

/// Each process is started again while nothing can be written; then there is room, and everything is done that was
/// accepted, without anybody asking for it again.
fn survives(host: &Host, small: &Small, disk: &mut Disk) -> Outcome {
    small.fill(0)?;
    for role in ["agent", "keyd", "agent"] {
        host.kill(role)?;
        host.wait_until(&format!("{role} is of no use"), |host| {
            host.status().is_ok_and(|status| connected(&status, 0))
        })?;
        works(disk, 0x66)?;
    }
    small.empty()?;
    host.wait_until("what was accepted was not done", |host| {
        host.status()
            .is_ok_and(|status| status["epoch"] == 2 && status["pending"] == serde_json::json!([]))
    })?;
    let mut other = Disk::attach(&host.socket("b"), &Options::default())?;
    works(&mut other, 0x55)?;
    works(disk, 0x77)
}

fn connected(status: &serde_json::Value, volume: usize) -> bool {
    status["volumes"][volume]["state"]["connected"] == true
}

/// Volumes with holes, in a file system that has no room for what is written into them. Those who write there are told;
/// who writes where there are blocks is not bothered, and it ends when there is room.
fn under_volumes() -> Outcome {
    let dir = folder()?;
    let host = Host::create(dir.path())?;
    let volumes = dir.path().join("volumes");
    let small = Small::in_memory(&volumes, 24 << 20, 0)?;
    under(host, &small, &small)?;
    drop(small);
    let dir = folder()?;
    let host = Host::create(dir.path())?;
    let volumes = dir.path().join("volumes");
    let small = match Small::on_disk(&volumes.with_extension("ext4"), &volumes) {
        Ok(small) => small,
        Err(error) => {
            println!("skipped: system_full_disk_under_volumes: no ext4 here: {error}");
            return Ok(());
        }
    };
    under(host, &small, &small)
}

/// As a LUN that was promised more room than there is: the block device fails.
fn thin() -> Outcome {
    let dir = folder()?;
    let host = Host::create(dir.path())?;
    let below = Small::in_memory(&dir.path().join("below"), 8 << 20, 0)?;
    let image = below.path.join("image");
    let volumes = Small::on_disk(&image, &dir.path().join("volumes"))?;
    under(host, &volumes, &below)
}

/// Where there are no blocks, the guest has an error.
fn no_room(disk: &mut Disk) -> Outcome {
    let written = disk.write(0, 4096, &[2; PAGE]);
    ensure(
        matches!(written, Err(DiskError::Driver(DriverError::Status(1)))),
        || format!("{written:?}"),
    )
}

fn under(mut host: Host, volumes: &Small, small: &Small) -> Outcome {
    fs::set_permissions(&volumes.path, fs::Permissions::from_mode(0o755))?;
    for (name, unit) in [("a", Some(4096)), ("b", None)] {
        host.create_volume(&VolumeSpec {
            data_unit: unit,
            ..VolumeSpec::new(name, "4MiB", 4096)
        })?;
        // It was reserved.
        let file = File::options().write(true).open(host.image(name))?;
        file.set_len(0)?;
        file.set_len(4 << 20)?;
    }
    host.start()?;
    host.apply(&host.sign(&BundleSpec::new(1, &["a", "b"]))?)?;
    let attach = |name| Disk::attach(&host.socket(name), &Options::default());
    let mut disks = [attach("a")?, attach("b")?];
    for disk in &mut disks {
        works(disk, 1)?;
    }
    // What the file system itself has to write has its place.
    succeeds(Command::new("sync").arg("-f").arg(&volumes.path))?;
    small.fill(0)?;
    let failed = |volume: usize| -> Result<u64, HostError> {
        let status = host.status()?;
        let count = &status["volumes"][volume]["state"]["requests_failed"];
        Ok(count.as_u64().unwrap_or_default())
    };
    for (index, disk) in disks.iter_mut().enumerate() {
        let before = failed(index)?;
        no_room(disk)?;
        works(disk, 3)?;
        disk.flush(0)?;
        let count = failed(index)? - before;
        ensure(count == 1, || {
            format!("{count} requests are said to have failed")
        })?;
    }
    // A successor finds them as they are.
    host.kill("dataplane")?;
    for disk in &mut disks {
        works(disk, 4)?;
        no_room(disk)?;
    }
    small.empty()?;
    for disk in &mut disks {
        disk.write(0, 4096, &[4; PAGE])?;
        ensure(disk.read(0, 4096, 4096)? == [4; PAGE], || {
            "it reads as something else".to_owned()
        })?;
        works(disk, 5)?;
        disk.flush(0)?;
    }
    Ok(())
}
