//! A file that a frontend and we share beside guest memory: a dirty log, an in-flight region.
//!
//! UNSAFETY: as of guest memory: the bytes are foreign, are never referenced, and stay mapped for as
//! long as the value.
#![expect(unsafe_code, reason = "addresses inside a mapping")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::mapping::Mapping;

/// A mapped range of a shared file.
#[derive(Debug)]
pub struct SharedArea {
    host: NonNull<u8>,
    bytes: u64,
    mapping: Arc<Mapping>,
}

// SAFETY: the address names the mapping that the value owns; it is only used for raw accesses.
unsafe impl Send for SharedArea {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for SharedArea {}

impl SharedArea {
    /// Maps `bytes` bytes at `offset` of a memfd, or of a file on tmpfs or hugetlbfs.
    ///
    /// # Errors
    /// InvalidInput for any other file, one that ends before, or no bytes at all; what `mmap`
    /// fails with.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<Self> {
        let (mapping, host) = Mapping::new(fd, offset, bytes)?;
        Ok(Self {
            host,
            bytes,
            mapping,
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the frontend took pages of it away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Where `bytes` bytes at `offset` lie in this process; none if they don't lie inside.
    #[must_use]
    pub(crate) fn at(&self, offset: u64, bytes: u64) -> Option<NonNull<u8>> {
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: inside the mapping.
        Some(unsafe { self.host.add(offset) })
    }
}
