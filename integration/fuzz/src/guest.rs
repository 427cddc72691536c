//! Guest memory whose bytes a target writes and reads as a guest does, and what a buffer of it covers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestBuffer, GuestMemory, GuestSlice, Lease, RegionSpec};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

/// Bytes of a region.
pub const REGION: u64 = 0x8000;
/// Where regions begin: two that touch each other, and one apart.
const REGIONS: [u64; 3] = [0, REGION, 0x2_0000];
/// Where the last one ends, for targets that want addresses near it.
pub const END: u64 = 0x2_8000;

/// A range of guest addresses: first address, bytes.
pub type Run = (u64, u64);

/// Guest memory.
pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub lease: Lease,
    file: OwnedFd,
    /// Where each region begins in this process.
    hosts: Vec<usize>,
}

impl Guest {
    /// All zeroes.
    pub fn new() -> Self {
        let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let bytes = REGION * REGIONS.len() as u64;
        ftruncate(&file, i64::try_from(bytes).expect("small")).expect("its length");
        let spec = |(index, guest_addr): (usize, &u64)| RegionSpec {
            guest_addr: *guest_addr,
            bytes: REGION,
            user_addr: *guest_addr,
            file_offset: REGION * index as u64,
        };
        let specs: Vec<_> = REGIONS.iter().enumerate().map(spec).collect();
        let regions: Vec<_> = specs.iter().map(|spec| (*spec, file.as_fd())).collect();
        let memory = Arc::new(GuestMemory::map(&regions).expect("mapped"));
        let lease = Lease::new(Arc::clone(&memory));
        let host = |at: &u64| {
            let mut buffer = GuestBuffer::default();
            buffer.reset(&lease);
            buffer.push(*at, 1).expect("a region's first byte");
            buffer.pieces()[0].host().addr().get()
        };
        let hosts = REGIONS.iter().map(host).collect();
        Self {
            memory,
            lease,
            file,
            hosts,
        }
    }

    /// All zeroes again.
    pub fn clear(&self) {
        ftruncate(&self.file, 0).expect("cut");
        let bytes = REGION * REGIONS.len() as u64;
        ftruncate(&self.file, i64::try_from(bytes).expect("small")).expect("its length");
    }

    /// The whole memory as it is now.
    pub fn copy(&self) -> Copy {
        let mut bytes = vec![0; usize::try_from(REGION).expect("small") * REGIONS.len()];
        let read = pread(&self.file, &mut bytes, 0).expect("read");
        assert_eq!(read, bytes.len());
        Copy(bytes)
    }

    /// Writes bytes, as far as they lie in one region.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        if let Some((offset, room)) = place(at) {
            let room = usize::try_from(room).expect("small");
            let bytes = &bytes[..bytes.len().min(room)];
            let offset = i64::try_from(offset).expect("small");
            assert_eq!(pwrite(&self.file, bytes, offset), Ok(bytes.len()));
        }
    }

    /// The guest addresses that a buffer covers, adjacent ones as one; panics where a byte is outside.
    pub fn runs(&self, buffer: &GuestBuffer) -> Vec<Run> {
        let mut runs = Vec::new();
        for piece in buffer.pieces() {
            let host = piece.host().addr().get();
            let bytes = u64::from(piece.bytes());
            let region = REGIONS.iter().zip(&self.hosts).find_map(|(guest, first)| {
                let offset = u64::try_from(host.checked_sub(*first)?).ok()?;
                (offset < REGION).then_some((guest + offset, REGION - offset))
            });
            let (guest, room) = region.expect("a piece outside guest memory");
            assert!(bytes <= room, "a piece that leaves its region");
            push_run(&mut runs, guest, bytes);
        }
        runs
    }
}

/// Where a slice lies, found by what its first and last byte are in guest memory: guest addresses of both.
pub fn ends(guest: &Guest, slice: GuestSlice<'_>) -> Vec<u64> {
    let before = guest.copy();
    let last = slice.bytes() - 1;
    let flip = || {
        for at in [0, last].into_iter().take(slice.bytes()) {
            let mut byte = [0];
            assert!(slice.copy_out(at, &mut byte));
            assert!(slice.copy_in(at, &[!byte[0]]));
        }
    };
    flip();
    let changed = guest.copy().differences(&before);
    flip();
    changed
}

/// Adds a range to a list, to the last one's end if it goes on there; an empty one is nothing.
pub fn push_run(runs: &mut Vec<Run>, at: u64, bytes: u64) {
    match runs.last_mut() {
        _ if bytes == 0 => {}
        Some((last, length)) if *last + *length == at => *length += bytes,
        _ => runs.push((at, bytes)),
    }
}

/// Offset in the file of a guest address, and the bytes from there to its region's end.
fn place(at: u64) -> Option<(u64, u64)> {
    REGIONS.iter().zip(0u64..).find_map(|(first, index)| {
        let offset = at.checked_sub(*first).filter(|offset| *offset < REGION)?;
        Some((index * REGION + offset, REGION - offset))
    })
}

/// A copy of guest memory, for models.
pub struct Copy(Vec<u8>);

impl Copy {
    /// Bytes that lie in one region.
    pub fn in_one_region(&self, at: u64, bytes: u64) -> Option<&[u8]> {
        let (offset, room) = place(at)?;
        let from = usize::try_from(offset).ok()?;
        let length = usize::try_from(bytes).ok()?;
        (bytes <= room).then(|| &self.0[from..from + length])
    }

    /// Guest addresses of the bytes that are others than in another copy.
    fn differences(&self, other: &Self) -> Vec<u64> {
        let offsets = (0..self.0.len()).filter(|at| self.0[*at] != other.0[*at]);
        let guest = |at: usize| {
            let (region, offset) = (at as u64 / REGION, at as u64 % REGION);
            REGIONS[usize::try_from(region).expect("few")] + offset
        };
        offsets.map(guest).collect()
    }

    /// Whether every byte of a range is in memory.
    pub fn has(&self, at: u64, bytes: u64) -> bool {
        let mut at = at;
        let mut left = bytes;
        while left > 0 {
            let Some((_, room)) = place(at) else {
                return false;
            };
            let here = room.min(left);
            left -= here;
            at += here;
        }
        true
    }

    pub fn u16(&self, at: u64) -> u16 {
        let bytes = self
            .in_one_region(at, 2)
            .expect("a place of the model's own");
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from(self.u16(at)) | (u32::from(self.u16(at + 2)) << 16)
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) | (u64::from(self.u32(at + 4)) << 32)
    }
}
