//! Who holds what: guest memory in the data plane only, key bytes in neither agent nor rot nor any
//! file, and what the death of one process means for the others.

use std::error::Error;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use bulkhead_integration::aes_schedule::round_keys;
use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::guest::{BOOT_PATIENCE, value_in};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use bulkhead_integration::workload;

use crate::support::{Outcome, ensure, folder, guest};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_guest_memory_is_mapped_by_the_data_plane_only",
        needs: &[Need::Root],
        run: guest_memory,
    },
    Test {
        name: "system_key_bytes_are_in_no_memory_but_where_they_belong",
        needs: &[Need::Root],
        run: key_bytes_in_memory,
    },
    Test {
        name: "system_key_bytes_are_in_no_file_but_the_recovered_one",
        needs: &[],
        run: key_bytes_in_files,
    },
    Test {
        name: "system_agent_and_keyd_killed_under_a_guests_io",
        needs: &[Need::Guest],
        run: killed_under_io,
    },
    Test {
        name: "system_data_plane_killed_serves_again",
        needs: &[],
        run: data_plane_killed,
    },
];

fn serving(dir: &Path, size: &str) -> Result<Host, Box<dyn Error>> {
    let mut host = Host::create(dir)?;
    host.create_volume(&VolumeSpec::new("disk", size, 4096))?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    Ok(host)
}

/// Inodes of memfds that a process maps.
fn mapped_memfds(pid: u32) -> Result<Vec<u64>, Box<dyn Error>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memfds = maps.lines().filter(|line| line.contains("/memfd:"));
    Ok(memfds
        .filter_map(|line| line.split_whitespace().nth(4)?.parse().ok())
        .collect())
}

fn guest_memory() -> Outcome {
    let dir = folder()?;
    let host = serving(dir.path(), "4MiB")?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[1; 4096])?;
    let ours = mapped_memfds(std::process::id())?;
    let guest: Vec<u64> = {
        let theirs = mapped_memfds(host.process("dataplane")?.0)?;
        ours.into_iter()
            .filter(|inode| theirs.contains(inode))
            .collect()
    };
    ensure(!guest.is_empty(), || {
        "the data plane maps no guest memory".to_owned()
    })?;
    let others = [
        ("rot", host.rot_pid()),
        ("agent", host.process("agent")?.0),
        ("keyd", host.process("keyd")?.0),
    ];
    for (role, pid) in others {
        let maps = mapped_memfds(pid)?;
        ensure(!guest.iter().any(|inode| maps.contains(inode)), || {
            format!("{role} maps guest memory")
        })?;
    }
    Ok(())
}

/// The key of the volume, as an operator with the recovery key gets it.
fn recovered_key(host: &Host) -> Result<Vec<u8>, Box<dyn Error>> {
    host.cli(&[
        "volume",
        "recover",
        "--bundle",
        "bundle-1.cose",
        "--volume",
        "disk",
        "--recovery",
        "keys/recovery.key",
        "--out",
        "disk.key",
    ])?;
    Ok(fs::read(host.path("disk.key"))?)
}

/// What must not be found: each quarter of the key, and every round key of both halves.
pub fn secrets(key: &[u8]) -> Vec<[u8; 16]> {
    let mut all: Vec<[u8; 16]> = key
        .chunks_exact(16)
        .filter_map(|c| c.try_into().ok())
        .collect();
    for half in key.chunks_exact(32) {
        if let Ok(half) = half.try_into() {
            all.extend(round_keys(half));
        }
    }
    all
}

fn first_secret_in(bytes: &[u8], secrets: &[[u8; 16]]) -> Option<usize> {
    bytes
        .windows(16)
        .position(|window| secrets.iter().any(|secret| window == secret))
}

/// Where in the readable memory of a process one of them lies; and how much was read.
pub fn search_memory(pid: u32, secrets: &[[u8; 16]]) -> Result<(Option<u64>, u64), Box<dyn Error>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut read = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(access)) = (words.next(), words.next()) else {
            continue;
        };
        let Some((from, to)) = range.split_once('-') else {
            continue;
        };
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        if !access.starts_with('r') || to - from > 1 << 30 {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(to - from)?];
        // Secret memory and device pages can't be read, by nobody.
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            read += to - from;
            if let Some(at) = first_secret_in(&bytes, secrets) {
                return Ok((Some(from + at as u64), read));
            }
        }
    }
    Ok((None, read))
}

fn key_bytes_in_memory() -> Outcome {
    let dir = folder()?;
    let host = serving(dir.path(), "4MiB")?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[1; 65536])?;
    disk.read(0, 0, 65536)?;
    let key = recovered_key(&host)?;
    let secrets = secrets(&key);
    // The search finds what is there: our own copy.
    let (found, _) = search_memory(std::process::id(), &secrets)?;
    ensure(found.is_some(), || {
        "the search does not find our own copy".to_owned()
    })?;
    let processes = [
        ("rot", host.rot_pid()),
        ("agent", host.process("agent")?.0),
        ("keyd", host.process("keyd")?.0),
    ];
    for (role, pid) in processes {
        let (found, read) = search_memory(pid, &secrets)?;
        ensure(read > 1 << 16, || {
            format!("only {read} bytes of {role} were read")
        })?;
        ensure(found.is_none(), || {
            format!("{role} has key bytes at {found:x?}")
        })?;
    }
    Ok(())
}

fn key_bytes_in_files() -> Outcome {
    let dir = folder()?;
    let host = serving(dir.path(), "4MiB")?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[1; 65536])?;
    drop(disk);
    let key = recovered_key(&host)?;
    let secrets = secrets(&key);
    let mut found = Vec::new();
    search_files(dir.path(), &secrets, &mut found)?;
    ensure(found == [host.path("disk.key")], || {
        format!("key bytes are in {found:?}")
    })
}

fn search_files(
    folder: &Path,
    secrets: &[[u8; 16]],
    found: &mut Vec<std::path::PathBuf>,
) -> Outcome {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            search_files(&path, secrets, found)?;
        } else if kind.is_file() && first_secret_in(&fs::read(&path)?, secrets).is_some() {
            found.push(path);
        }
    }
    Ok(())
}

fn killed_under_io() -> Outcome {
    let dir = folder()?;
    let host = serving(dir.path(), "128MiB")?;
    let script = workload::write_and_read_back();
    let mut guest = guest(dir.path(), host.socket("disk"), 1, &script)?;
    guest.wait_for("phase=write", BOOT_PATIENCE)?;
    host.kill("agent")?;
    host.kill("keyd")?;
    host.kill("agent")?;
    let console = guest.finish(Duration::from_secs(180))?;
    let written = value_in(&console, "written");
    ensure(
        written.is_some() && written == value_in(&console, "read"),
        || format!("the guest read something else:\n{console}\n{}", host.log()),
    )?;
    ensure(host.process("dataplane")?.1 == 1, || {
        "the data plane was restarted".to_owned()
    })
}

fn data_plane_killed() -> Outcome {
    let dir = folder()?;
    let host = serving(dir.path(), "4MiB")?;
    let bytes = vec![0x77; 65536];
    for round in 0..3 {
        let mut disk = Disk::attach(&host.socket("disk"), &Options::default())
            .map_err(|e| format!("round {round}: {e}\n{}", host.log()))?;
        if round > 0 {
            ensure(disk.read(0, 0, 65536)? == bytes, || {
                format!("round {round}: the data is gone")
            })?;
        }
        disk.write(0, 0, &bytes)?;
        disk.flush(0)?;
        host.kill("dataplane")?;
        host.wait_until("the volume is not attached again", |host| {
            host.status()
                .is_ok_and(|s| s["volumes"][0]["state"]["attached"] == true)
        })?;
    }
    Ok(())
}
