//! A volume in memory of this process, which several workers read and write at once, as they
//! would a file.
//!
//! UNSAFETY: the bytes are shared between threads without any order. They are only ever copied
//! through raw pointers, within bounds that are checked here, and never referenced.
#![expect(unsafe_code, reason = "memory that several threads copy to and from")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Zeroed memory, unmapped when it drops.
#[derive(Debug)]
pub struct RamSpec {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is reached through bounds-checked raw pointers only, by any thread.
unsafe impl Send for RamSpec {}
// SAFETY: as above.
unsafe impl Sync for RamSpec {}

impl RamSpec {
    /// `bytes` bytes, in huge pages where the kernel has them.
    ///
    /// # Errors
    /// EINVAL for none, ENOMEM for too many.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let size = usize::try_from(bytes)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: fresh anonymous memory at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, size, protection, flags)? };
        // SAFETY: a hint about our own mapping; without effect where it is not supported.
        let _ = unsafe { madvise(base, size.get(), MmapAdvise::MADV_HUGEPAGE) };
        Ok(Self {
            base: base.cast(),
            bytes: size.get(),
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Where a range begins; none if it does not lie inside.
    #[inline]
    pub(crate) fn range(&self, offset_bytes: u64, bytes: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(offset_bytes).ok()?;
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        // SAFETY: inside the mapping.
        Some(unsafe { self.base.add(offset) })
    }
}

impl Drop for RamSpec {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the value ends here.
        let result = unsafe { munmap(self.base.cast(), self.bytes) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}
