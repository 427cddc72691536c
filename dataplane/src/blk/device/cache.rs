//! The cache mode of a disk as its driver chose it, and its flushes: whose turn it is, what one has made stable, and that one failed.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::BlkDevice;
use crate::blk::config_space::feature;
use crate::memory::SharedFlag;
use crate::stored::StoredCache;

impl BlkDevice {
    /// The cache mode that the driver chose (virtio 1.2, 5.2.5.2): completed writes may be volatile
    /// until a flush. Without FLUSH negotiated they never are, whatever this says.
    #[must_use]
    #[inline]
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// The driver chooses the cache mode. After a change to write-through, the first write that is
    /// completed makes stable what was written before, too.
    ///
    /// It holds until it chooses another, or [`BlkDevice::reset`]: a frontend that stops and starts its
    /// queues, or connects anew, does not say it again.
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback_chosen.store(true, Ordering::Release);
        self.change_writeback(writeback);
    }

    fn change_writeback(&self, writeback: bool) {
        if !writeback && self.writeback() {
            self.settle_wanted.fetch_add(1, Ordering::AcqRel);
        }
        self.writeback.store(writeback, Ordering::Release);
    }

    /// A driver negotiated these features: unless it has chosen the cache mode, it begins with write-back,
    /// or with write-through if it has no way to flush (virtio 1.2, 5.2.5.2).
    pub fn negotiated(&self, features: u64) {
        if !self.writeback_chosen.load(Ordering::Acquire) {
            let bare = features & feature::CONFIG_WCE != 0 && features & feature::FLUSH == 0;
            self.change_writeback(!bare);
        }
    }

    /// The cache mode, for a successor.
    #[must_use]
    pub fn cache_mode(&self) -> StoredCache {
        StoredCache {
            writeback: self.writeback(),
            chosen: self.writeback_chosen.load(Ordering::Acquire),
        }
    }

    /// The cache mode that a predecessor left. In write-through the first write makes stable what was written
    /// before: nobody knows whether the predecessor did.
    pub fn resume_cache_mode(&self, left: StoredCache) {
        self.writeback_chosen.store(left.chosen, Ordering::Release);
        self.change_writeback(left.writeback);
    }

    /// Has a failed flush known to whoever comes after this process, and takes over that one failed before. To
    /// be called once, before it is served.
    pub fn keep_flush_failure(&self, flag: Arc<SharedFlag>) {
        if flag.is_raised() {
            self.flush_failed.store(true, Ordering::Release);
        }
        let _ = self.kept_flush_failure.set(flag);
    }

    /// Whether what was written before a change to write-through may still be volatile.
    #[inline]
    pub(in crate::blk) fn is_unsettled(&self) -> bool {
        self.settled.load(Ordering::Acquire) != self.settle_wanted()
    }

    /// What a flush that begins now settles.
    pub(crate) fn settle_wanted(&self) -> u64 {
        self.settle_wanted.load(Ordering::Acquire)
    }

    /// A flush that began when so much was wanted has succeeded.
    pub(crate) fn settle(&self, wanted: u64) {
        self.settled.fetch_max(wanted, Ordering::AcqRel);
    }

    /// Takes the right to flush; false while another worker has it.
    pub(crate) fn take_flush_turn(&self) -> bool {
        !self.flushing.swap(true, Ordering::AcqRel)
    }

    /// Gives it back, once a failure is latched.
    pub(crate) fn give_flush_turn(&self) {
        self.flushing.store(false, Ordering::Release);
    }

    /// How many flushes were begun until now: a later one is for everything that was completed before.
    pub(crate) fn flushes_begun(&self) -> u64 {
        self.flushes_begun.load(Ordering::Acquire)
    }

    /// One begins; its number. To be called by whoever has the turn.
    pub(crate) fn begin_flush(&self) -> u64 {
        self.flushes_begun.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The one with this number has succeeded.
    pub(crate) fn flush_succeeded(&self, number: u64) {
        self.flushes_done.fetch_max(number, Ordering::AcqRel);
    }

    /// Whether one that began when so many had been begun, or later, has succeeded.
    pub(crate) fn flushed_since(&self, begun: u64) -> bool {
        self.flushes_done.load(Ordering::Acquire) > begun
    }

    /// What a reset of the device puts back: the cache mode is write-back until the driver says
    /// otherwise. A failed flush stays failed: what it lost stays lost.
    pub fn reset(&self) {
        self.writeback_chosen.store(false, Ordering::Release);
        self.change_writeback(true);
    }

    /// Whether a flush failed since it was attached.
    #[must_use]
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    /// From now on every flush fails, until the volume is attached anew.
    pub fn latch_flush_failure(&self) {
        // First: before any worker answers a flush by it.
        if let Some(flag) = self.kept_flush_failure.get() {
            flag.raise();
        }
        self.flush_failed.store(true, Ordering::Release);
    }
}
