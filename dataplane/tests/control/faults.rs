//! Faults under the data plane's own process: they are contained to what they touch, reported, and over when their
//! cause is.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_integration::disk::{Disk, DiskError, Options};
use bulkhead_integration::driver::DriverError;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::RegionEntry;
use bulkhead_protocol::keys::DataplaneToKeyd;

use super::harness::{Host, VOLUME_BYTES, features, grant, key, key_page};
use super::stuck::{Asked, Stuck, Wrong};

const BLOCK: usize = 4096;
/// How long anything here may take, however slow the machine is.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn attach(host: &Host, n: u8) -> Disk {
    Disk::attach(&host.socket_path(n), &Options::default()).expect("a disk")
}

/// Verified I/O.
#[track_caller]
pub fn works(disk: &mut Disk, byte: u8) {
    disk.write(0, 8, &[byte; BLOCK]).expect("write");
    assert_eq!(disk.read(0, 8, 4096).expect("read"), [byte; BLOCK]);
}

/// A request that failed as the disk's, and nothing else.
#[track_caller]
fn is_io_error<T>(result: Result<T, DiskError>) {
    let error = result.err().expect("it fails");
    assert!(
        matches!(error, DiskError::Driver(DriverError::Status(1))),
        "{error}"
    );
}

fn mounted(test: &str) -> Option<Stuck> {
    let stuck = Stuck::mount(VOLUME_BYTES);
    if stuck.is_none() {
        println!("skipped: {test}: no file system can be mounted here");
    }
    stuck
}

#[test]
fn a_disk_that_fails_is_reported_and_nobody_elses() {
    let Some(stuck) = mounted("a_disk_that_fails_is_reported_and_nobody_elses") else {
        return;
    };
    let mut host = Host::start();
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    host.served(2);
    let (mut disk, mut neighbour) = (attach(&host, 1), attach(&host, 2));
    works(&mut disk, 1);
    let wrongs = [
        Wrong::Errno(libc::EIO),
        Wrong::Errno(libc::ENOSPC),
        Wrong::Half,
    ];
    for (failed, wrong) in (1..).zip(wrongs) {
        stuck.go_wrong(Some((Asked::Write, wrong)));
        is_io_error(disk.write(0, 8, &[2; BLOCK]));
        works(&mut neighbour, 2);
        let status = host.status_of(1).expect("granted");
        assert_eq!((status.requests_failed, status.fault), (failed, None));
        stuck.go_wrong(None);
        works(&mut disk, 3);
    }
    stuck.go_wrong(Some((Asked::Flush, Wrong::Errno(libc::EIO))));
    is_io_error(disk.flush(0));
    stuck.go_wrong(None);
    is_io_error(disk.flush(0));
    let fault = host.status_of(1).and_then(|status| status.fault);
    assert!(
        fault.is_some_and(|fault| fault.contains("a flush failed")),
        "it is said for how long it lasts"
    );
    // A frontend that comes back finds no other truth, ...
    drop(disk);
    let mut disk = attach(&host, 1);
    works(&mut disk, 4);
    is_io_error(disk.flush(0));
    works(&mut neighbour, 4);
    assert_eq!(neighbour.flush(0).map_err(|e| e.to_string()), Ok(()));
    let other = host.status_of(2).expect("granted");
    assert_eq!((other.requests_failed, other.fault), (0, None));
    // ... and whoever attaches the volume anew, having seen to it, does.
    drop(disk);
    assert_eq!(host.detach(1), Ok(()));
    host.granted(1);
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    let mut disk = attach(&host, 1);
    works(&mut disk, 5);
    disk.flush(0)
        .expect("nothing is lost that was written since");
    drop((disk, neighbour));
    assert!(host.stop().success());
}

#[test]
fn a_disk_that_goes_can_be_taken_away_and_another_one_attached() {
    let name = "a_disk_that_goes_can_be_taken_away_and_another_one_attached";
    let Some(stuck) = mounted(name) else { return };
    let mut host = Host::start();
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    host.served(2);
    let (mut disk, mut neighbour) = (attach(&host, 1), attach(&host, 2));
    works(&mut disk, 1);
    stuck.go_away();
    is_io_error(disk.write(0, 8, &[2; BLOCK]));
    is_io_error(disk.read(0, 8, 4096));
    is_io_error(disk.flush(0));
    works(&mut neighbour, 2);
    let status = host.status_of(1).expect("granted");
    assert_eq!(status.requests_failed, 3);
    drop(disk);
    host.wait_connected(1, false);
    assert_eq!(host.detach(1), Ok(()));
    host.granted(1);
    assert_eq!(host.attach(1), Ok(()), "a new disk in its place");
    let mut disk = attach(&host, 1);
    works(&mut disk, 3);
    disk.flush(0).expect("flush");
    drop((disk, neighbour));
    assert!(host.stop().success());
}

/// Numbers of the descriptors that a process has open.
pub fn descriptors(pid: u32) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let number = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.expect("an entry").file_name();
        name.to_str().and_then(|name| name.parse().ok())
    };
    entries.filter_map(number).collect()
}

/// Gives a running process another limit.
fn limit(host: &Host, what: &str, to: &str) {
    let pid = host.pid().to_string();
    let arguments = ["--pid", &pid, &format!("--{what}={to}:")];
    let output = Command::new("prlimit").args(arguments).output();
    let output = output.expect("prlimit, of util-linux");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

/// No descriptor is free any more.
#[test]
fn without_descriptors_the_served_are_served_and_the_others_wait() {
    let mut host = Host::start();
    for n in [1, 2, 3] {
        host.served(n);
    }
    // Whatever is made once is made.
    works(&mut attach(&host, 3), 1);
    host.wait_connected(3, false);
    let mut disk = attach(&host, 1);
    let loud = attach(&host, 3);
    let before = descriptors(host.pid());
    let free = (0..).find(|number| !before.contains(number));
    limit(&host, "nofile", &free.expect("some number").to_string());
    works(&mut disk, 1);
    // There is nothing to accept it with.
    let mut waits = host.frontend(2);
    waits
        .set_read_timeout(Some(Duration::from_millis(300)))
        .expect("timeout");
    assert_eq!(features(&mut waits), None, "nobody is there to answer");
    assert!(!host.status_of(2).expect("granted").connected);
    // One who sends descriptors that can't be taken is sent away: what he wanted would be a guess.
    let sent = loud.share_memory();
    assert!(
        matches!(sent, Err(DiskError::Frontend(FrontendError::Closed))),
        "{sent:?}"
    );
    // keyd is heard, and has an answer.
    let page = key_page(&key(4)).into_fd();
    let answer = host.grant(&grant(4), &[page.as_fd()]);
    assert!(
        matches!(
            answer,
            DataplaneToKeyd::Granted { .. } | DataplaneToKeyd::GrantRefused { .. }
        ),
        "{answer:?}"
    );
    works(&mut disk, 2);
    limit(&host, "nofile", "1024");
    host.revoke(4);
    waits.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut answer = [0; 20];
    std::io::Read::read_exact(&mut waits, &mut answer).expect("it is answered now");
    drop(waits);
    works(&mut attach(&host, 2), 3);
    drop(loud);
    works(&mut attach(&host, 3), 3);
    works(&mut disk, 3);
    host.wait_connected(2, false);
    host.wait_connected(3, false);
    // One frontend less than before.
    settles(&host, before.len() - 1);
    drop(disk);
    assert!(host.stop().success());
}

/// A guest's memory does not fit any more.
#[test]
fn without_memory_a_new_guest_is_refused_and_the_served_are_served() {
    let mut host = Host::start();
    host.served(1);
    host.served(2);
    let mut disk = attach(&host, 1);
    let status = fs::read_to_string(format!("/proc/{}/status", host.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let line = line.expect("VmSize").trim().trim_end_matches(" kB");
    let now: u64 = line.parse::<u64>().expect("a number") * 1024;
    // Enough for what it does all the time, and not for a guest of 1 GiB.
    limit(&host, "as", &(now + (64 << 20)).to_string());
    let large = Options {
        extra_region: Some((0x2_0000_0000, 1 << 30)),
        ..Options::default()
    };
    for byte in 1..4 {
        let refused = Disk::attach(&host.socket_path(2), &large);
        assert!(
            matches!(
                refused,
                Err(DiskError::Frontend(
                    FrontendError::Closed | FrontendError::Refused { .. }
                ))
            ),
            "{refused:?}"
        );
        works(&mut disk, byte);
    }
    // Another one fits.
    works(&mut attach(&host, 2), 4);
    host.wait_connected(2, false);
    limit(&host, "as", "unlimited");
    let mut disk = Disk::attach(&host.socket_path(2), &large).expect("it fits now");
    works(&mut disk, 5);
    drop(disk);
    assert!(host.stop().success());
}

/// More memory than there are addresses for.
#[test]
fn memory_that_can_not_be_mapped_is_refused() {
    let mut host = Host::start();
    host.served(1);
    host.served(2);
    let mut neighbour = attach(&host, 2);
    let before = descriptors(host.pid()).len();
    for shift in [47, 52, 62] {
        let options = Options::default();
        let disk = Disk::negotiate(&host.socket_path(1), &options).expect("negotiated");
        let bytes: u64 = 1 << shift;
        let file = fs::File::from(memfd());
        // As long as a file can be; what ends before its region is refused for that.
        let _ = file.set_len(bytes.min(1 << 50));
        let region = RegionEntry {
            guest_addr: 0,
            size_bytes: bytes,
            user_addr: 0x1000,
            mmap_offset: 0,
        };
        let said = disk.frontend.set_memory_table(&[region], &[file.as_fd()]);
        assert!(
            matches!(
                said,
                Err(FrontendError::Closed | FrontendError::Refused { .. })
            ),
            "2^{shift} bytes: {said:?}"
        );
        works(&mut neighbour, u8::try_from(shift).expect("small"));
    }
    works(&mut attach(&host, 1), 1);
    host.wait_connected(1, false);
    settles(&host, before);
}

fn memfd() -> std::os::fd::OwnedFd {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    nix::sys::memfd::memfd_create("memory", flags).expect("memfd")
}

/// Waits until no more descriptors are open than before.
#[track_caller]
pub fn settles(host: &Host, before: usize) {
    let deadline = Instant::now() + PATIENCE;
    while descriptors(host.pid()).len() > before {
        assert!(Instant::now() < deadline, "descriptors are left behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}
