//! Guest memory: what can be mapped, how addresses become buffers, and memory that is taken away.

mod given_up;
mod lost;
mod prepared;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestBuffer, GuestMemory, Lease, MemoryError, RegionSpec};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use proptest::prelude::*;

const PAGE: u64 = 4096;

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("memory", MFdFlags::MFD_CLOEXEC).expect("memfd");
    ftruncate(&fd, i64::try_from(bytes).expect("fits")).expect("length");
    fd
}

fn region(guest_addr: u64, bytes: u64, user_addr: u64, file_offset: u64) -> RegionSpec {
    RegionSpec {
        guest_addr,
        bytes,
        user_addr,
        file_offset,
    }
}

/// Regions of one file, which is as long as the furthest of them needs.
fn map(specs: &[RegionSpec]) -> Result<GuestMemory, MemoryError> {
    let end = specs.iter().map(|s| s.file_offset + s.bytes).max();
    let fd = memfd(end.unwrap_or(0));
    map_from(specs, &fd)
}

fn map_from(specs: &[RegionSpec], fd: &OwnedFd) -> Result<GuestMemory, MemoryError> {
    let regions: Vec<_> = specs.iter().map(|spec| (*spec, fd.as_fd())).collect();
    GuestMemory::map(&regions)
}

fn lease(memory: GuestMemory) -> Lease {
    Lease::new(Arc::new(memory))
}

fn buffer(memory: &Lease, ranges: &[(u64, u32)]) -> Option<GuestBuffer> {
    let mut buffer = GuestBuffer::with_capacity(4);
    buffer.reset(memory);
    for &(addr, bytes) in ranges {
        buffer.push(addr, bytes).ok()?;
    }
    Some(buffer)
}

fn read(memory: &Lease, addr: u64, bytes: u32) -> Option<Vec<u8>> {
    let buffer = buffer(memory, &[(addr, bytes)])?;
    let mut out = vec![0xee; bytes as usize];
    buffer.copy_out(0, &mut out).then_some(out)
}

#[test]
fn a_region_begins_at_its_offset_even_within_a_page() {
    let fd = memfd(4 * PAGE);
    nix::sys::uio::pwrite(&fd, b"here", 0x1234).expect("write");
    let memory = map_from(&[region(0x10_0000, PAGE, 0x7000, 0x1234)], &fd).expect("map");
    let memory = lease(memory);
    assert_eq!(read(&memory, 0x10_0000, 4).as_deref(), Some(&b"here"[..]));
    let last = buffer(&memory, &[(0x10_0000 + PAGE - 4, 4)]).expect("inside");
    assert!(last.copy_in(0, b"last"));
    let mut bytes = [0; 4];
    nix::sys::uio::pread(&fd, &mut bytes, 0x1234 + 0x1000 - 4).expect("read");
    assert_eq!(&bytes, b"last");
}

#[test]
fn a_buffer_goes_on_in_the_next_region_and_no_further() {
    let specs = [
        region(0x2000, 0x1000, 0, 0),
        // Elsewhere in the file and in the frontend.
        region(0x1000, 0x1000, 0x9000, 0x3000),
        region(0x4000, 0x1000, 0x20_0000, 0x1000),
    ];
    let memory = lease(map(&specs).expect("map"));
    let across = buffer(&memory, &[(0x1ffe, 4)]).expect("adjacent");
    assert_eq!(across.pieces().len(), 2);
    assert!(across.copy_in(0, b"abcd"));
    assert_eq!(read(&memory, 0x1ffe, 2).as_deref(), Some(&b"ab"[..]));
    assert_eq!(read(&memory, 0x2000, 2).as_deref(), Some(&b"cd"[..]));
    for (addr, bytes) in [
        (0x2fff, 2),
        (0x3000, 1),
        (0xfff, 1),
        (0x4fff, 2),
        (u64::MAX, 1),
        (0x4000, u32::MAX),
    ] {
        assert!(
            buffer(&memory, &[(addr, bytes)]).is_none(),
            "{bytes} bytes at {addr:#x}"
        );
    }
    assert!(buffer(&memory, &[(0x9999_9999, 0)]).is_some(), "no bytes");
}

/// A lease looks where it found an address last: that must change nothing, whatever that was.
#[test]
fn an_address_is_found_whatever_was_found_before() {
    let specs = [
        region(0x1000, 0x1000, 0, 0),
        region(0x2000, 0x1000, 0x9000, 0x1000),
        region(0x8000, 0x2000, 0x20_0000, 0x2000),
    ];
    let memory = lease(map(&specs).expect("map"));
    let ends = [0x1000, 0x1fff, 0x2000, 0x2fff, 0x8000, 0x9fff];
    let near = ends.iter().flat_map(|end: &u64| [end - 1, *end, end + 1]);
    let addrs: Vec<u64> = near.chain([0, u64::MAX]).collect();
    for before in [0x1000, 0x2000, 0x8000] {
        for addr in &addrs {
            for bytes in [0, 1, 2, 0x1000, 0x1001, u32::MAX] {
                let fresh = Lease::new(Arc::clone(&memory));
                let expected = buffer(&fresh, &[(*addr, bytes)]);
                buffer(&memory, &[(before, 1)]).expect("inside");
                let found = buffer(&memory, &[(*addr, bytes)]);
                let places = |buffer: GuestBuffer| -> Vec<_> {
                    let pieces = buffer.pieces().iter();
                    pieces.map(|piece| (piece.host(), piece.bytes())).collect()
                };
                assert_eq!(
                    found.map(places),
                    expected.map(places),
                    "{bytes} bytes at {addr:#x} after {before:#x}"
                );
            }
        }
    }
}

#[test]
fn frontend_addresses_are_looked_up_by_their_own_range() {
    let specs = [
        region(0x1000, 0x1000, 0x7f00_0000_0000, 0),
        region(0x10_0000, 0x2000, 0x5500_0000_0000, 0x1000),
    ];
    let memory = map(&specs).expect("map");
    for (user, guest) in [
        (0x7f00_0000_0000, Some(0x1000)),
        (0x7f00_0000_0fff, Some(0x1fff)),
        (0x7f00_0000_1000, None),
        (0x5500_0000_1fff, Some(0x10_1fff)),
        (0x54ff_ffff_ffff, None),
        (0, None),
        (u64::MAX, None),
    ] {
        assert_eq!(memory.guest_addr_of(user), guest, "{user:#x}");
    }
}

#[test]
fn what_can_not_be_is_refused() {
    let fd = memfd(4 * PAGE);
    for (what, spec) in [
        ("empty", region(0, 0, 0, 0)),
        ("wraps for the guest", region(u64::MAX - 1, PAGE, 0, 0)),
        ("wraps for the frontend", region(0, PAGE, u64::MAX - 1, 0)),
        ("offset wraps", region(0, PAGE, 0, u64::MAX - 1)),
        ("longer than the file", region(0, 5 * PAGE, 0, 0)),
        ("behind the file", region(0, PAGE, 0, 4 * PAGE)),
        ("all there is", region(0, u64::MAX, 0, 0)),
    ] {
        let refused = map_from(&[spec], &fd);
        assert!(matches!(refused, Err(MemoryError::Region { .. })), "{what}");
    }
    let overlapping = [
        region(0x1000, 0x1000, 0, 0),
        region(0x1fff, 0x1000, 0x9000, 0),
    ];
    assert!(matches!(
        map_from(&overlapping, &fd),
        Err(MemoryError::Overlap(0x1fff))
    ));
}

#[test]
fn what_is_no_memory_is_refused() {
    let on_disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("file");
    on_disk.set_len(PAGE).expect("length");
    let folder = std::fs::File::open("/").expect("folder");
    let device = std::fs::File::open("/dev/zero").expect("device");
    let pipe = nix::unistd::pipe().expect("pipe").0;
    let event = nix::sys::eventfd::EventFd::new().expect("eventfd");
    let read_only = {
        use std::os::fd::AsRawFd;
        let fd = memfd(PAGE);
        std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("again")
    };
    for (what, fd) in [
        ("a file on a disk", on_disk.as_fd()),
        ("a folder", folder.as_fd()),
        ("a device", device.as_fd()),
        ("a pipe", pipe.as_fd()),
        ("an eventfd", event.as_fd()),
        ("a memfd that is read-only", read_only.as_fd()),
    ] {
        let mapped = GuestMemory::map(&[(region(0, PAGE, 0, 0), fd)]);
        assert!(matches!(mapped, Err(MemoryError::Region { .. })), "{what}");
    }
}

#[test]
fn regions_come_and_go_one_by_one() {
    let fd = memfd(4 * PAGE);
    let low = region(0, PAGE, 0x1_0000, 0);
    let high = region(2 * PAGE, PAGE, 0x3_0000, 2 * PAGE);
    let one = map_from(&[low], &fd).expect("map");
    let two = one.with_region(&high, fd.as_fd()).expect("one more");
    assert_eq!((one.len(), two.len()), (1, 2));
    assert!(matches!(
        two.with_region(&region(PAGE - 1, 2, 0, 0), fd.as_fd()),
        Err(MemoryError::Overlap(_))
    ));
    // The offset in the file is not part of a region's name.
    let named = RegionSpec {
        file_offset: 0,
        ..high
    };
    let left = two.without_region(&named).expect("it is there");
    assert_eq!(left.guest_addr_of(0x3_0000), None);
    assert_eq!(left.guest_addr_of(0x1_0000), Some(0));
    for other in [
        region(2 * PAGE, PAGE, 0x3_0001, 0),
        region(2 * PAGE, PAGE - 1, 0x3_0000, 0),
        region(PAGE, PAGE, 0x3_0000, 0),
    ] {
        assert!(two.without_region(&other).is_none(), "{other:?}");
    }
    // What is gone from one memory is still there for who uses the other.
    let two = lease(two);
    drop(left);
    assert!(read(&two, 2 * PAGE, 16).is_some());
}

#[test]
fn a_buffer_is_cut_at_its_front_and_its_end() {
    let memory = lease(map(&[region(0, PAGE, 0, 0)]).expect("map"));
    let whole = buffer(&memory, &[(0, 26)]).expect("inside");
    assert!(whole.copy_in(0, b"abcdefghijklmnopqrstuvwxyz"));
    let mut parts = buffer(&memory, &[(0, 1), (1, 2), (3, 1), (10, 3)]).expect("inside");
    assert_eq!(parts.take_front::<3>(), Some(*b"abc"));
    assert_eq!(parts.bytes(), 4);
    assert!(parts.split_last_byte());
    let mut rest = [0; 3];
    assert!(parts.copy_out(0, &mut rest));
    assert_eq!(&rest, b"dkl");
    parts.write_last_byte(b'!');
    assert_eq!(read(&memory, 10, 3).as_deref(), Some(&b"kl!"[..]));
    assert_eq!(parts.take_front::<4>(), None, "there are three");
    assert!(!parts.copy_out(1, &mut [0; 3]));
    assert!(!parts.copy_in(u64::MAX, &[0]));
    assert!(parts.zero(1, 2));
    assert_eq!(read(&memory, 10, 2).as_deref(), Some(&[0, 0][..]));
}

#[test]
fn two_parts_go_to_the_front_if_one_range_has_room_for_both() {
    let memory = lease(map(&[region(0, PAGE, 0, 0)]).expect("map"));
    let target = buffer(&memory, &[(100, 20), (200, 20)]).expect("inside");
    let header = *b"twelve bytes";
    assert!(target.copy_front(&header, b"and more"));
    assert_eq!(
        read(&memory, 100, 20).as_deref(),
        Some(&b"twelve bytesand more"[..])
    );
    assert!(!target.copy_front(&header, b"too long!"), "21 bytes");
    assert!(target.copy_front(b"ten bytes.", b""));
    assert_eq!(
        read(&memory, 100, 20).as_deref(),
        Some(&b"ten bytes.esand more"[..])
    );
    let nothing = buffer(&memory, &[]).expect("empty");
    assert!(!nothing.copy_front(&header, b""));
}

proptest! {
    /// Every byte of a buffer over random regions is the byte that the regions say, whatever way it is
    /// asked for; and what is not in them is refused.
    #[test]
    fn bytes_are_where_the_regions_say(
        gaps in prop::collection::vec((0u64..3, 1u64..0x1800, 0u64..0x900), 1..6),
        at in 0u64..0x6000,
        bytes in 0u32..0x3000,
    ) {
        let mut specs = Vec::new();
        let (mut guest, mut file) = (0, 0);
        for (gap, bytes, skip) in gaps {
            guest += gap * 0x777;
            file += skip;
            specs.push(region(guest, bytes, 0x7000_0000 + guest * 3, file));
            guest += bytes;
            file += bytes;
        }
        let fd = memfd(file);
        let contents: Vec<u8> = (0..file).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        nix::sys::uio::pwrite(&fd, &contents, 0).expect("fill");
        let memory = lease(map_from(&specs, &fd).expect("map"));
        let byte_at = |addr: u64| {
            let spec = specs.iter().find(|s| (s.guest_addr..s.guest_addr + s.bytes).contains(&addr))?;
            let offset = usize::try_from(spec.file_offset + addr - spec.guest_addr).ok()?;
            contents.get(offset).copied()
        };
        let expected: Option<Vec<u8>> = (at..at + u64::from(bytes)).map(byte_at).collect();
        prop_assert_eq!(read(&memory, at, bytes), expected);
    }
}
