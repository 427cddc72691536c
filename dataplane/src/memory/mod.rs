//! Guest memory: the regions that a frontend shares, and the only ways to its bytes.
//!
//! A [`GuestMemory`] never changes: another memory table is another value, which takes over the
//! mappings of the regions that stay. It lives for as long as a queue or a buffer uses it.
//! [`GuestBuffer`] is what a descriptor chain becomes: ranges that were checked once, together with
//! the memory that they lie in.
//!
//! UNSAFETY: regions are foreign memory: guest and frontend change it at any time, and the
//! frontend may take it away ([`sigbus`] puts zeroed pages there instead of ending the process).
//! The module must never make a reference to it, must copy each byte at most once per call, and must
//! keep every mapping alive for as long as a [`GuestMemory`] or [`GuestBuffer`] that names it.
#![expect(unsafe_code, reason = "mapping and copying guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod area;
mod buffer;
mod copy;
mod dirty;
mod flag;
mod lease;
mod mapping;
mod prefetch;
mod prepared;
pub mod sigbus;
mod slice;
mod words;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

pub use area::SharedArea;
pub use buffer::{GuestBuffer, OutsideMemory, Piece, Runs, USUAL_MOST_PIECES};
pub use dirty::DirtyLog;
pub use flag::SharedFlag;
pub use lease::Lease;
pub(crate) use lease::Window;
use mapping::Mapping;
pub(crate) use prefetch::{will_read, will_write};
pub use prepared::Prepared;
pub use slice::GuestSlice;
pub use words::SharedWords;

/// A region as a frontend describes it (vhost-user, "Memory region description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// First address in the frontend, which SET_VRING_ADDR uses.
    pub user_addr: u64,
    /// Where the region begins in its file, in bytes.
    pub file_offset: u64,
}

/// Why memory was refused. Nothing stays mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region that can't be.
    #[error("region {index} (guest address {guest_addr:#x}, {bytes} bytes): {problem}")]
    Region {
        /// Which, from 0.
        index: usize,
        /// Its guest address.
        guest_addr: u64,
        /// Its length.
        bytes: u64,
        /// What is wrong.
        problem: String,
    },
    /// Two regions claim the same guest addresses.
    #[error("regions overlap at guest address {0:#x}")]
    Overlap(u64),
}

#[derive(Debug, Clone)]
struct Region {
    spec: RegionSpec,
    /// Where the region begins in this process.
    host: NonNull<u8>,
    mapping: Arc<Mapping>,
}

/// All memory that a frontend shares, looked up by guest address.
#[derive(Debug)]
pub struct GuestMemory {
    /// Sorted by guest address, not overlapping.
    regions: Vec<Region>,
    /// Where writes to it are marked.
    log: Arc<DirtyLog>,
}

// SAFETY: the pointers name mappings that the value keeps alive; every access goes through raw
// copies, which any thread may make.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for GuestMemory {}

/// The value at a place that others may change meanwhile, read once.
///
/// # Safety
/// `at` comes from a [`GuestMemory::span`] that covers a `T`, of memory that is held, is aligned for
/// `T`, and every bit pattern is a `T`.
#[inline]
pub(crate) unsafe fn read_once<T: Copy>(at: NonNull<T>) -> T {
    // SAFETY: passed on to the caller.
    unsafe { at.read_volatile() }
}

/// A word at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word(u64);

/// 16 bytes as two little-endian words, each byte read once, by two loads.
///
/// # Safety
/// `at` comes from a [`GuestMemory::span`] of 16 bytes at least, of memory that is held.
#[inline]
pub(crate) unsafe fn read_words(at: NonNull<u8>) -> [u64; 2] {
    // SAFETY: passed on to the caller; a word needs no alignment.
    let (low, high) = unsafe {
        let at = at.cast::<Word>();
        (read_once(at), read_once(at.add(1)))
    };
    [u64::from_le(low.0), u64::from_le(high.0)]
}

impl GuestMemory {
    /// No memory.
    #[must_use]
    pub fn none() -> Self {
        Self {
            regions: Vec::new(),
            log: Arc::default(),
        }
    }

    /// The same memory, whose writes are marked there.
    #[must_use]
    pub fn with_log(mut self, log: &Arc<DirtyLog>) -> Self {
        self.log = Arc::clone(log);
        self
    }

    /// Where writes to it are marked.
    #[must_use]
    #[inline]
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Marks a range that was written and is known by where it lies in this process.
    fn mark_host(&self, at: NonNull<u8>, bytes: u64) {
        let found = self.regions.iter().find_map(|r| {
            let offset = (at.addr().get() as u64).wrapping_sub(r.host.addr().get() as u64);
            (offset < r.spec.bytes).then(|| r.spec.guest_addr + offset)
        });
        if let Some(guest_addr) = found {
            self.log.mark(guest_addr, bytes);
        }
    }

    /// Maps every region from its file.
    ///
    /// # Errors
    /// See [`MemoryError`]: an empty or wrapping region, regions that overlap, a file that is not
    /// a regular file (memfd, hugetlbfs and tmpfs are) or ends before the region does.
    pub fn map(regions: &[(RegionSpec, BorrowedFd<'_>)]) -> Result<Self, MemoryError> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (index, (spec, fd)) in regions.iter().enumerate() {
            mapped.push(map_region(index, spec, *fd)?);
        }
        Self::sorted(mapped)
    }

    /// This memory and one region more.
    ///
    /// # Errors
    /// As [`GuestMemory::map`].
    pub fn with_region(&self, spec: &RegionSpec, fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(map_region(regions.len(), spec, fd)?);
        Ok(Self::sorted(regions)?.with_log(&self.log))
    }

    /// This memory without the region that has this guest address, frontend address and length.
    #[must_use]
    pub fn without_region(&self, spec: &RegionSpec) -> Option<Self> {
        let same = |r: &Region| {
            (r.spec.guest_addr, r.spec.user_addr, r.spec.bytes)
                == (spec.guest_addr, spec.user_addr, spec.bytes)
        };
        let regions: Vec<_> = self.regions.iter().filter(|r| !same(r)).cloned().collect();
        let log = Arc::clone(&self.log);
        (regions.len() + 1 == self.regions.len()).then_some(Self { regions, log })
    }

    fn sorted(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        regions.sort_by_key(|r| r.spec.guest_addr);
        for (a, b) in regions.iter().zip(regions.iter().skip(1)) {
            // No wrap: map_region has checked the end of each.
            if a.spec.guest_addr + a.spec.bytes > b.spec.guest_addr {
                return Err(MemoryError::Overlap(b.spec.guest_addr));
            }
        }
        Ok(Self {
            regions,
            log: Arc::default(),
        })
    }

    /// How many regions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Guest address of a frontend address (SET_VRING_ADDR names rings that way).
    #[must_use]
    pub fn guest_addr_of(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = user_addr.checked_sub(r.spec.user_addr)?;
            (offset < r.spec.bytes).then(|| r.spec.guest_addr + offset)
        })
    }

    /// Whether pages of it went away and were replaced by zeroes ([`sigbus`]): whoever uses it
    /// has to stop.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.is_lost())
    }

    /// The region that has this guest address: its index, and the bytes from there to its end.
    #[inline]
    fn find(&self, guest_addr: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|r| {
            let offset = guest_addr.wrapping_sub(r.spec.guest_addr);
            (offset < r.spec.bytes).then_some((r, offset))
        })
    }

    /// The region that has this guest address.
    fn window(&self, guest_addr: u64) -> Option<Window> {
        let (region, _) = self.find(guest_addr)?;
        Some(Window {
            guest_addr: region.spec.guest_addr,
            bytes: region.spec.bytes,
            host: region.host,
        })
    }

    /// Where `bytes` bytes at a guest address lie in this process, if they lie in one region.
    #[inline]
    pub(crate) fn span(&self, guest_addr: u64, bytes: u64) -> Option<NonNull<u8>> {
        let (region, offset) = self.find(guest_addr)?;
        if bytes > region.spec.bytes - offset {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset lies inside the region, which its mapping covers.
        Some(unsafe { region.host.add(offset) })
    }

    /// As [`GuestMemory::span`], for a value of type `T` at an address aligned for it.
    pub(crate) fn aligned_span<T>(&self, guest_addr: u64, count: usize) -> Option<NonNull<T>> {
        let bytes = u64::try_from(size_of::<T>().checked_mul(count)?).ok()?;
        let at = self.span(guest_addr, bytes)?.cast::<T>();
        at.is_aligned().then_some(at)
    }

    /// The longest run of bytes at a guest address that lies in one region, at most `most`.
    #[inline]
    fn run(&self, guest_addr: u64, most: u32) -> Option<(NonNull<u8>, u32)> {
        let (region, offset) = self.find(guest_addr)?;
        let here = u32::try_from(region.spec.bytes - offset).unwrap_or(u32::MAX);
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset lies inside the region, which its mapping covers.
        Some((unsafe { region.host.add(offset) }, here.min(most)))
    }
}

/// A 16-bit field that driver and device both use, in memory that `memory` keeps alive.
///
/// # Safety
/// `at` is aligned, and from a [`GuestMemory::span`] of memory that outlives the reference.
pub(crate) unsafe fn shared_u16<'a>(at: NonNull<u16>) -> &'a AtomicU16 {
    // SAFETY: passed on to the caller; atomics may be changed by others at any time.
    unsafe { AtomicU16::from_ptr(at.as_ptr()) }
}

/// As [`shared_u16`], 32 bits.
///
/// # Safety
/// As [`shared_u16`].
pub(crate) unsafe fn shared_u32<'a>(at: NonNull<u32>) -> &'a AtomicU32 {
    // SAFETY: as above.
    unsafe { AtomicU32::from_ptr(at.as_ptr()) }
}

/// As [`shared_u16`], 64 bits.
///
/// # Safety
/// As [`shared_u16`].
pub(crate) unsafe fn shared_u64<'a>(at: NonNull<u64>) -> &'a AtomicU64 {
    // SAFETY: as above.
    unsafe { AtomicU64::from_ptr(at.as_ptr()) }
}

/// Orders ring accesses as virtio demands where an atomic's own ordering is not enough: a store
/// before a load (2.7.7.1).
pub(crate) fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

fn map_region(index: usize, spec: &RegionSpec, fd: BorrowedFd<'_>) -> Result<Region, MemoryError> {
    let refused = |problem: String| MemoryError::Region {
        index,
        guest_addr: spec.guest_addr,
        bytes: spec.bytes,
        problem,
    };
    if spec.bytes == 0 {
        return Err(refused("it is empty".to_owned()));
    }
    if spec.guest_addr.checked_add(spec.bytes).is_none()
        || spec.user_addr.checked_add(spec.bytes).is_none()
        || spec.file_offset.checked_add(spec.bytes).is_none()
    {
        return Err(refused("its end is past 2^64".to_owned()));
    }
    let (mapping, host) =
        Mapping::new(fd, spec.file_offset, spec.bytes).map_err(|e| refused(e.to_string()))?;
    Ok(Region {
        spec: *spec,
        host,
        mapping,
    })
}

/// Memory of this process as guest memory, for tests and in-process use: one region at guest
/// address 0 (and at frontend address 0) of a memfd.
///
/// # Errors
/// What making the memfd fails with.
pub fn anonymous(bytes: u64) -> std::io::Result<(GuestMemory, OwnedFd)> {
    let fd = nix::sys::memfd::memfd_create("guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(
        &fd,
        i64::try_from(bytes).map_err(|_| std::io::ErrorKind::InvalidInput)?,
    )?;
    let spec = RegionSpec {
        guest_addr: 0,
        bytes,
        user_addr: 0,
        file_offset: 0,
    };
    let memory = GuestMemory::map(&[(spec, std::os::fd::AsFd::as_fd(&fd))])
        .map_err(std::io::Error::other)?;
    Ok((memory, fd))
}
