//! The dirty log of a live migration (vhost-user, "Migration"): a bitmap shared with the frontend, one
//! bit for each 4096-byte page of guest memory that was written.
//!
//! It belongs to a connection, not to a table of regions: a request in flight marks what it wrote
//! even if it began before logging did.
//!
//! UNSAFETY: the bitmap is foreign memory; bytes of it are reached by atomic operations, at
//! offsets that the area checks.
#![expect(unsafe_code, reason = "atomic operations on shared memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{PoisonError, RwLock};

use super::SharedArea;

/// `VHOST_LOG_PAGE`: bytes of a page, whatever the host's are.
const PAGE_BYTES: u64 = 4096;

/// The log of a connection.
#[derive(Debug, Default)]
pub struct DirtyLog {
    enabled: AtomicBool,
    area: RwLock<Option<SharedArea>>,
}

impl DirtyLog {
    /// Where marks go from now on.
    pub fn set_area(&self, area: Option<SharedArea>) {
        *self.area.write().unwrap_or_else(PoisonError::into_inner) = area;
    }

    /// Whether writes are marked from now on (VHOST_F_LOG_ALL).
    pub fn enable(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Whether writes are marked. Outside of a migration this is all that a request costs.
    #[inline]
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Marks the pages of a range of guest addresses that was written. Pages that the frontend has
    /// left no room for in its log are not marked.
    pub fn mark(&self, guest_addr: u64, bytes: u64) {
        if bytes == 0 || !self.is_enabled() {
            return;
        }
        let area = self.area.read().unwrap_or_else(PoisonError::into_inner);
        let Some(area) = area.as_ref() else {
            return;
        };
        let last = guest_addr.saturating_add(bytes - 1) / PAGE_BYTES;
        for page in guest_addr / PAGE_BYTES..=last {
            let Some(at) = area.at(page / 8, 1) else {
                return;
            };
            // SAFETY: a byte inside the area, which the lock's guard keeps; others change it atomically.
            let byte = unsafe { AtomicU8::from_ptr(at.as_ptr()) };
            byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn log(bytes: u64) -> (DirtyLog, File) {
        let fd = nix::sys::memfd::memfd_create("log", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let fd = fd.expect("memfd");
        nix::unistd::ftruncate(&fd, i64::try_from(bytes).expect("small")).expect("length");
        let log = DirtyLog::default();
        log.set_area(Some(SharedArea::map(fd.as_fd(), 0, bytes).expect("mapped")));
        (log, File::from(fd))
    }

    fn marked(file: &File) -> Vec<u64> {
        let mut bytes =
            vec![0; usize::try_from(file.metadata().expect("stat").len()).expect("small")];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let pages = 0..bytes.len() as u64 * 8;
        let is_set =
            |page: &u64| bytes[usize::try_from(page / 8).expect("small")] & (1 << (page % 8)) != 0;
        pages.filter(is_set).collect()
    }

    #[test]
    fn exactly_the_pages_that_were_written_are_marked() {
        let (log, file) = log(16);
        log.mark(0, 4096);
        assert_eq!(marked(&file), [0u64; 0], "it is not enabled");
        log.enable(true);
        log.mark(4096, 0);
        log.mark(8191, 1);
        log.mark(3 * 4096 - 1, 2);
        log.mark(9 * 4096, 2 * 4096);
        assert_eq!(marked(&file), [1, 2, 3, 9, 10]);
        log.enable(false);
        log.mark(0, 1);
        assert_eq!(marked(&file), [1, 2, 3, 9, 10]);
    }

    #[test]
    fn pages_behind_the_log_are_left_out() {
        let (log, file) = log(1);
        log.enable(true);
        log.mark(7 * 4096, 1 << 20);
        log.mark(u64::MAX - 1, 100);
        assert_eq!(marked(&file), [7]);
        log.set_area(None);
        log.mark(0, 1);
        assert_eq!(marked(&file), [7]);
    }
}
