//! Memory that the load generator shares with a back-end: one sealed memfd, of huge pages where
//! the machine has some to give.
//!
//! UNSAFETY: another process writes to the mapping at any time, so its bytes are only ever seen
//! through atomics: [`Memory::slice`] checks range and alignment once and hands out atomics that
//! live no longer than the mapping. Seals keep the file at its size: no back-end, which gets the
//! descriptor, can make an access here fail.
#![expect(unsafe_code, reason = "mapping memory that is shared with a back-end")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use bulkhead_integration::frontend::message::RegionEntry;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

use super::LoadError;

/// Guest address of the first byte. No identity with offsets or with [`USER_BASE`], so that a
/// back-end that takes one kind of address for another fails at once.
pub const GUEST_BASE: u64 = 0x1_0000_0000;
/// The frontend's address of the first byte, which ring addresses are given in. Made up.
const USER_BASE: u64 = 0x7e00_0000_0000;
/// Huge pages are of 2 MiB; without them the size is rounded up likewise.
const PAGE_BYTES: usize = 2 << 20;

/// What shared memory may be seen as. Sealed by the unsafe trait: only atomics without padding.
///
/// # Safety
/// Every bit pattern must be a value, and all access through a shared reference atomic.
pub unsafe trait Shared {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU8 {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU16 {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU32 {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU64 {}

/// The mapping and its file.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    huge: bool,
}

// SAFETY: the pointer is to a mapping that no thread owns; it is seen through atomics only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping, and slices of it borrow from this value.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

impl Memory {
    /// At least so many bytes, all zero and present: of huge pages if there are enough, else of
    /// ordinary ones.
    ///
    /// # Errors
    /// [`LoadError::Memory`].
    pub fn new(bytes: usize) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Memory { bytes, source };
        let len = bytes.max(1).checked_next_multiple_of(PAGE_BYTES);
        let len = len.ok_or_else(|| failed(io::Error::other("too large")))?;
        Self::mapped(len, true)
            .or_else(|_| Self::mapped(len, false))
            .map_err(failed)
    }

    fn mapped(len: usize, huge: bool) -> io::Result<Self> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if huge {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let file = memfd_create("load-memory", flags)?;
        ftruncate(&file, i64::try_from(len).map_err(io::Error::other)?)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let length = NonZeroUsize::new(len).ok_or_else(|| io::Error::other("empty"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                &file,
                0,
            )
        }?;
        Ok(Self {
            file,
            base: base.cast(),
            len,
            huge,
        })
    }

    /// Whether it lies in huge pages.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Its file, for a back-end to map.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its line in a memory table.
    #[must_use]
    pub fn region(&self) -> RegionEntry {
        RegionEntry {
            guest_addr: GUEST_BASE,
            size_bytes: self.len as u64,
            user_addr: USER_BASE,
            mmap_offset: 0,
        }
    }

    /// Where in it a guest address lies, if it does.
    #[must_use]
    pub fn offset_of(&self, guest_addr: u64) -> Option<usize> {
        let offset = usize::try_from(guest_addr.checked_sub(GUEST_BASE)?).ok()?;
        (offset < self.len).then_some(offset)
    }

    /// `count` atomics from byte `at` on.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`] if they aren't all inside, or `at` isn't aligned for them.
    pub fn slice<T: Shared>(&self, at: usize, count: usize) -> Result<&[T], LoadError> {
        let bytes = count.checked_mul(size_of::<T>());
        let end = bytes.and_then(|bytes| at.checked_add(bytes));
        if end.is_none_or(|end| end > self.len) || !at.is_multiple_of(align_of::<T>()) {
            return Err(LoadError::OutOfMemory { at, count });
        }
        // SAFETY: inside the mapping and aligned (its start is aligned to a page); `Shared` types
        // are atomics that take any bits; the mapping lives as long as the borrow of `self`.
        Ok(unsafe { std::slice::from_raw_parts(self.base.add(at).cast::<T>().as_ptr(), count) })
    }
}

/// The guest's address for an offset in the memory.
#[must_use]
pub fn guest_addr(offset: usize) -> u64 {
    GUEST_BASE + offset as u64
}

/// The frontend's address for an offset in the memory.
#[must_use]
pub fn user_addr(offset: usize) -> u64 {
    USER_BASE + offset as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn slices_lie_inside_and_are_aligned() {
        let memory = Memory::new(4096).expect("maps");
        let len = usize::try_from(memory.region().size_bytes).expect("small");
        let words = memory.slice::<AtomicU64>(8, 2).expect("inside");
        words[0].store(0x0102_0304_0506_0708, Relaxed);
        let bytes = memory.slice::<AtomicU8>(8, 8).expect("inside");
        assert_eq!(bytes[0].load(Relaxed), 8, "the same memory");
        assert_eq!(memory.slice::<AtomicU8>(len, 0).expect("empty").len(), 0);
        for (at, count) in [
            (4, 1),
            (len - 8, 2),
            (len, 1),
            (8, usize::MAX),
            (usize::MAX - 7, 1),
        ] {
            let error = memory.slice::<AtomicU64>(at, count).expect_err("outside");
            assert!(
                matches!(error, LoadError::OutOfMemory { .. }),
                "{at} {count}"
            );
        }
    }

    #[test]
    fn whoever_has_the_file_can_not_shrink_it() {
        let memory = Memory::new(4096).expect("maps");
        assert_eq!(ftruncate(memory.file(), 0), Err(nix::Error::EPERM));
    }

    #[test]
    fn guest_addresses_outside_have_no_offset() {
        let memory = Memory::new(4096).expect("maps");
        assert_eq!(memory.offset_of(guest_addr(77)), Some(77));
        let end = GUEST_BASE + memory.region().size_bytes;
        for outside in [0, GUEST_BASE - 1, end, u64::MAX, user_addr(77)] {
            assert_eq!(memory.offset_of(outside), None, "{outside:#x}");
        }
    }
}
