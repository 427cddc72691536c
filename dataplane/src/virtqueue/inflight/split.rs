//! The region of a split queue: `QueueRegionSplit` and `DescStateSplit`.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{DESC_NUM, FEATURES, QueueRegion, VERSION, VERSION_AT};
use crate::crash_point;

pub(super) const HEADER_BYTES: u64 = 16;
pub(super) const ENTRY_BYTES: u64 = 16;

pub(super) const LAST_BATCH_HEAD: u64 = 12;
pub(super) const USED_IDX: u64 = 14;

pub(super) const ENTRY_INFLIGHT: u64 = 0;
pub(super) const ENTRY_NEXT: u64 = 6;
pub(super) const ENTRY_COUNTER: u64 = 8;

/// What is kept of a running split queue.
#[derive(Debug)]
pub(in crate::virtqueue) struct SplitRegion {
    region: QueueRegion,
    /// Number of the next request.
    counter: u64,
    last_batch_head: u16,
    /// Heads that are shown with the next publish.
    batch: Vec<u16>,
}

/// Where a field of a head's entry lies.
pub(super) fn entry(head: u16, field: u64) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(head) + field
}

impl SplitRegion {
    /// Begins with nothing in flight. Who finds it half done finds that nobody has used it.
    pub(in crate::virtqueue) fn new(region: QueueRegion, size: u16, used_idx: u16) -> Self {
        region.forget();
        for head in 0..region.entries() {
            region.store_u64(entry(head, 0), 0);
            region.store_u64(entry(head, ENTRY_COUNTER), 0);
        }
        region.store_u64(FEATURES, 0);
        region.store_u16(DESC_NUM, size);
        region.store_u16(LAST_BATCH_HEAD, 0);
        region.store_u16(USED_IDX, used_idx);
        region.store_u16(VERSION_AT, VERSION);
        Self::go_on(region, size, 0, 0)
    }

    /// Goes on with what is in it: the next request's number, and the head that was used last.
    pub(super) fn go_on(
        region: QueueRegion,
        size: u16,
        counter: u64,
        last_batch_head: u16,
    ) -> Self {
        Self {
            region,
            counter,
            last_batch_head,
            batch: Vec::with_capacity(usize::from(size)),
        }
    }

    /// A head was taken.
    #[inline]
    pub(in crate::virtqueue) fn taken(&mut self, head: u16) {
        self.region
            .store_u64(entry(head, ENTRY_COUNTER), self.counter);
        self.counter += 1;
        self.region.store_u8(entry(head, ENTRY_INFLIGHT), 1);
    }

    /// The head that was taken last is available again.
    pub(in crate::virtqueue) fn untaken(&mut self, head: u16) {
        self.region.store_u8(entry(head, ENTRY_INFLIGHT), 0);
        self.counter = self.counter.saturating_sub(1);
    }

    /// Its used entry is written.
    #[inline]
    pub(in crate::virtqueue) fn used(&mut self, head: u16) {
        self.region
            .store_u16(entry(head, ENTRY_NEXT), self.last_batch_head);
        self.region.store_u16(LAST_BATCH_HEAD, head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The used index is stored in the ring.
    #[inline]
    pub(in crate::virtqueue) fn published(&mut self, used_idx: u16) {
        for head in self.batch.drain(..) {
            self.region.store_u8(entry(head, ENTRY_INFLIGHT), 0);
            crash_point!("publish.clearing");
        }
        crash_point!("publish.cleared");
        self.region.store_u16(USED_IDX, used_idx);
    }

    /// Whether the frontend took the region away.
    pub(in crate::virtqueue) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }
}
