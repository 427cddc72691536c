//! What a port that leads to an interface of the host's counts beside its queues' own counters.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Counters of one port, or of all queues of one: they only grow. One worker writes, anybody reads.
#[derive(Debug, Default)]
pub struct InterfaceCounters {
    /// Frames that were taken from a guest and that the interface then refused, because it is down or gone or had no
    /// memory.
    pub refused: AtomicU64,
    /// Frames from the interface that were none, or whose header contradicts them.
    pub malformed: AtomicU64,
    /// Times that the interface could not be read.
    pub unreadable: AtomicU64,
    /// The errno of the last refusal or failure; 0 before the first.
    pub last_errno: AtomicI32,
}

impl InterfaceCounters {
    #[inline]
    pub(super) fn count_malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_refused(&self, frames: u64, errno: i32) {
        self.refused.fetch_add(frames, Ordering::Relaxed);
        self.last_errno.store(errno, Ordering::Relaxed);
    }

    pub(super) fn count_unreadable(&self, errno: i32) {
        self.unreadable.fetch_add(1, Ordering::Relaxed);
        self.last_errno.store(errno, Ordering::Relaxed);
    }
}
