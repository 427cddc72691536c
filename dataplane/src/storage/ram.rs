//! A volume in memory of this process, which several workers read and write at once, as they
//! would a file.
//!
//! UNSAFETY: the bytes are shared between threads without any order. They are only ever copied
//! through raw pointers, within bounds that are checked here, and never referenced.
#![expect(unsafe_code, reason = "memory that several threads copy to and from")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::{Action, Begin, Buffer, Done, Storage, Transfer};
use crate::memory::{will_read, will_write};
use crate::worker::ring::Ring;

/// Bytes of a range that are fetched ahead.
const ANNOUNCED_BYTES: usize = 512;

/// Zeroed memory, unmapped when it drops.
#[derive(Debug)]
pub struct RamSpec {
    base: NonNull<u8>,
    bytes: usize,
    _file: Option<File>,
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
            _file: None,
        })
    }

    /// All of a file, shared with whoever else maps it; it must not become shorter. The file stays open,
    /// and a lock on it held.
    ///
    /// # Errors
    /// EINVAL for an empty file, or what `mmap` fails with.
    pub fn of_file(file: File) -> io::Result<Self> {
        let size = usize::try_from(file.metadata()?.len())
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, never referenced.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0)? };
        Ok(Self {
            base: base.cast(),
            bytes: size.get(),
            _file: Some(file),
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Copies from `offset_bytes` on; false, with nothing copied, where that is not inside.
    #[must_use]
    pub fn copy_out(&self, offset_bytes: u64, to: &mut [u8]) -> bool {
        let Some(from) = self.range(offset_bytes, to.len()) else {
            return false;
        };
        // SAFETY: `range` checked it; `to` is memory of its own.
        unsafe { from.copy_to_nonoverlapping(NonNull::from(&mut *to).cast(), to.len()) };
        true
    }

    /// Copies to `offset_bytes`; false, with nothing copied, where that is not inside.
    #[must_use]
    pub fn copy_in(&self, offset_bytes: u64, from: &[u8]) -> bool {
        let Some(to) = self.range(offset_bytes, from.len()) else {
            return false;
        };
        // SAFETY: as above, the other way.
        unsafe { to.copy_from_nonoverlapping(NonNull::from(from).cast(), from.len()) };
        true
    }

    /// Has the CPU fetch the first lines of a range that is going to be read, or written: the rest follows while
    /// these are used.
    #[inline]
    pub(crate) fn announce(&self, offset_bytes: u64, bytes: u64, writes: bool) {
        let bytes = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .min(ANNOUNCED_BYTES);
        let Some(at) = self.range(offset_bytes, bytes) else {
            return;
        };
        for line in (0..bytes).step_by(64) {
            // SAFETY: inside the range.
            let line = unsafe { at.add(line) };
            if writes {
                will_write(line);
            } else {
                will_read(line);
            }
        }
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

/// A worker's way to it: copies, at once.
#[derive(Debug)]
pub(super) struct RamStorage(Arc<RamSpec>);

impl RamStorage {
    pub(super) fn new(ram: &Arc<RamSpec>) -> Self {
        Self(Arc::clone(ram))
    }

    fn run(&self, transfer: &Transfer) -> Done {
        let bytes = usize::try_from(transfer.bytes).map_err(|_| libc::EINVAL)?;
        let ours = self.0.range(transfer.offset_bytes, bytes);
        let ours = ours.ok_or(libc::EINVAL)?.as_ptr();
        let fits = match (transfer.action, &transfer.buffer) {
            // What is discarded may stay as it is.
            (Action::Flush | Action::Discard, _) => true,
            (Action::Zero { .. }, _) => {
                // SAFETY: `range` checked it.
                unsafe { std::ptr::write_bytes(ours, 0, bytes) };
                true
            }
            (_, Buffer::None) => false,
            (action, Buffer::Staging(chunk)) => {
                let theirs = chunk.at().as_ptr();
                let fits = bytes <= chunk.bytes() as usize;
                if fits {
                    // SAFETY: both have that many bytes, and are mappings of their own.
                    unsafe { copy(action, ours, theirs, bytes) };
                }
                fits
            }
            (action, Buffer::Guest(buffer)) => {
                let mut done = 0;
                buffer.each(0, bytes, |theirs, here| {
                    // SAFETY: the runs sum to `bytes`; guest memory is a mapping of its own.
                    unsafe { copy(action, ours.add(done), theirs.as_ptr(), here) };
                    done += here;
                })
            }
        };
        if fits {
            Ok(transfer.bytes)
        } else {
            Err(libc::EFAULT)
        }
    }
}

/// Copies from the storage for a read, else to it.
///
/// # Safety
/// Both have `bytes` bytes and don't overlap.
unsafe fn copy(action: Action, ours: *mut u8, theirs: *mut u8, bytes: usize) {
    let (from, to) = match action {
        Action::Read => (ours, theirs),
        _ => (theirs, ours),
    };
    // SAFETY: passed on to the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}

impl Storage for RamStorage {
    fn begin(&self, _ring: &mut Ring, _token: u64, transfer: Transfer) -> Begin {
        let done = self.run(&transfer);
        Begin::Done(transfer, done)
    }
}

impl Drop for RamSpec {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the value ends here.
        let result = unsafe { munmap(self.base.cast(), self.bytes) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}
