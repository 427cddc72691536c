//! Memory that is mapped ahead: whoever maps it then gets the same mapping, its pages are entered, and none is made
//! that was not there.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_dataplane::memory::{GuestMemory, Prepared, RegionSpec};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::uio::pwrite;

const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(600);
/// So many that the kernel enters no neighbours with them.
const PAGES: u64 = 4096;

fn file() -> OwnedFd {
    let fd = memfd_create("memory", MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&fd, (PAGES * PAGE).cast_signed()).expect("length");
    fd
}

fn spec(guest_addr: u64) -> RegionSpec {
    RegionSpec {
        guest_addr,
        bytes: PAGES * PAGE,
        user_addr: 1 << 40,
        file_offset: 0,
    }
}

/// Mappings of this file in this process, and how many of their kilobytes are entered.
fn mapped(fd: &OwnedFd) -> (usize, u64) {
    let inode = format!(" {} ", fstat(fd).expect("stat").st_ino);
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (mut count, mut kib, mut ours) = (0, 0, false);
    for line in text.lines() {
        if line.contains("-") && line.split_whitespace().count() >= 5 && !line.contains(" kB") {
            ours = line.contains(&inode);
            count += usize::from(ours);
        } else if let Some(rss) = line.strip_prefix("Rss:").filter(|_| ours) {
            kib += rss
                .trim_end_matches("kB")
                .trim()
                .parse::<u64>()
                .expect("a number");
        }
    }
    (count, kib)
}

fn allocated_bytes(fd: &OwnedFd) -> i64 {
    fstat(fd).expect("stat").st_blocks * 512
}

#[test]
fn what_is_mapped_ahead_is_mapped_once_and_entered() {
    let fd = file();
    // Every second page.
    for page in (0..PAGES).step_by(2) {
        pwrite(&fd, &[1], (page * PAGE).cast_signed()).expect("written");
    }
    let before = allocated_bytes(&fd);
    let mut prepared = Prepared::default();
    prepared
        .add(&spec(0), fd.as_fd(), Instant::now() + LONG)
        .expect("mapped");
    assert_eq!(mapped(&fd), (1, PAGES / 2 * PAGE / 1024));
    assert_eq!(allocated_bytes(&fd), before, "no page was made");
    // Another descriptor of it, at another guest address.
    let other = fd.try_clone().expect("dup");
    let memory = GuestMemory::map(&[(spec(1 << 40), other.as_fd())]).expect("mapped");
    assert_eq!(mapped(&fd).0, 1);
    drop(prepared);
    assert_eq!(mapped(&fd), (1, PAGES / 2 * PAGE / 1024), "it is in use");
    drop(memory);
    assert_eq!(mapped(&fd).0, 0);
}

#[test]
fn other_bytes_and_other_files_have_mappings_of_their_own() {
    let (one, two) = (file(), file());
    let first = GuestMemory::map(&[(spec(0), one.as_fd()), (spec(1 << 40), two.as_fd())]);
    let first = first.expect("mapped");
    let half = RegionSpec {
        bytes: PAGES / 2 * PAGE,
        ..spec(0)
    };
    let second = GuestMemory::map(&[(half, one.as_fd())]).expect("mapped");
    assert_eq!((mapped(&one).0, mapped(&two).0), (2, 1));
    drop((first, second));
    assert_eq!((mapped(&one).0, mapped(&two).0), (0, 0));
}

#[test]
fn what_is_no_memory_is_refused() {
    let mut prepared = Prepared::default();
    let file = std::fs::File::open("/proc/self/exe").expect("open");
    assert!(
        prepared
            .add(&spec(0), file.as_fd(), Instant::now() + LONG)
            .is_err()
    );
    let short = RegionSpec {
        bytes: (PAGES + 1) * PAGE,
        ..spec(0)
    };
    assert!(
        prepared
            .add(&short, self::file().as_fd(), Instant::now() + LONG)
            .is_err()
    );
}

/// A mapping that somebody else may write to says nothing of a descriptor of the same file that may not.
#[test]
fn who_may_only_read_a_file_does_not_get_a_mapping_that_is_written() {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let writable = memfd_create("memory", flags).expect("memfd");
    nix::unistd::ftruncate(&writable, (PAGES * PAGE).cast_signed()).expect("length");
    let mapped = GuestMemory::map(&[(spec(0), writable.as_fd())]).expect("mapped");
    let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
    let readable = std::fs::File::open(path).expect("opened for reading");
    assert!(GuestMemory::map(&[(spec(0), readable.as_fd())]).is_err());
    // Nor of one that was sealed since.
    fcntl(
        &writable,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE),
    )
    .expect("sealed");
    assert!(GuestMemory::map(&[(spec(0), writable.as_fd())]).is_err());
    drop(mapped);
}

/// Time that is over enters nothing, and is no failure.
#[test]
fn no_more_time_is_spent_than_there_is() {
    let fd = file();
    pwrite(&fd, &[1], 0).expect("a page");
    Prepared::default()
        .add(&spec(0), fd.as_fd(), Instant::now())
        .expect("mapped");
}
