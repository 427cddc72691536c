//! The region of a split queue: `QueueRegionSplit` and `DescStateSplit`.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{QueueRegion, VERSION};
use crate::crash_point;

pub(super) const HEADER_BYTES: u64 = 16;
pub(super) const ENTRY_BYTES: u64 = 16;

const FEATURES: u64 = 0;
const VERSION_AT: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;

const ENTRY_INFLIGHT: u64 = 0;
const ENTRY_NEXT: u64 = 6;
const ENTRY_COUNTER: u64 = 8;

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

fn entry(head: u16, field: u64) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(head) + field
}

impl SplitRegion {
    /// Whether a backend has kept this region for such a queue, and left nothing in flight: what was
    /// taken is used, so that the used index says where the queue goes on.
    pub(in crate::virtqueue) fn was_left_idle(region: &QueueRegion, size: u16) -> bool {
        let half = |at: u64| u16::from_le_bytes(region.load(at));
        let idle = |head: u16| region.load::<1>(entry(head, ENTRY_INFLIGHT)) == [0];
        half(VERSION_AT) == VERSION && half(DESC_NUM) == size && (0..size).all(idle)
    }

    /// Begins with nothing in flight.
    pub(in crate::virtqueue) fn new(region: QueueRegion, size: u16, used_idx: u16) -> Self {
        for head in 0..region.entries() {
            region.store(entry(head, 0), [0; 16]);
        }
        region.store_u64(FEATURES, 0);
        region.store_u16(DESC_NUM, size);
        region.store_u16(LAST_BATCH_HEAD, 0);
        region.store_u16(USED_IDX, used_idx);
        region.store_u16(VERSION_AT, VERSION);
        Self {
            region,
            counter: 0,
            last_batch_head: 0,
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
