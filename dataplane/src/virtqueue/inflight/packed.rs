//! The region of a packed queue: `QueueRegionPacked` and `DescStatePacked`. It has a copy of every
//! descriptor in flight, since the ring's own may be overwritten by used ones.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{QueueRegion, VERSION};
use crate::crash_point;
use crate::virtqueue::chain::Descriptor;
use crate::virtqueue::packed::Cursor;

pub(super) const HEADER_BYTES: u64 = 32;
pub(super) const ENTRY_BYTES: u64 = 32;

const FEATURES: u64 = 0;
const VERSION_AT: u64 = 8;
const DESC_NUM: u64 = 10;
const FREE_HEAD: u64 = 12;
const OLD_FREE_HEAD: u64 = 14;
const USED_IDX: u64 = 16;
const OLD_USED_IDX: u64 = 18;
const USED_WRAP: u64 = 20;
const OLD_USED_WRAP: u64 = 21;

const ENTRY_INFLIGHT: u64 = 0;
const ENTRY_NEXT: u64 = 2;
const ENTRY_LAST: u64 = 4;
const ENTRY_NUM: u64 = 6;
const ENTRY_COUNTER: u64 = 8;
const ENTRY_ID: u64 = 16;
const ENTRY_FLAGS: u64 = 18;
const ENTRY_LEN: u64 = 20;
const ENTRY_ADDR: u64 = 24;

/// What is kept of a running packed queue.
#[derive(Debug)]
pub(in crate::virtqueue) struct PackedRegion {
    region: QueueRegion,
    /// Number of the next request.
    counter: u64,
    free_head: u16,
    /// For each entry the one that follows it in its chain, or on the free list.
    next: Box<[u16]>,
    /// For each buffer ID in flight the first and the last entry of its chain.
    ends: Box<[(u16, u16)]>,
    /// First and last entries of chains that are shown with the next publish. They are not free before:
    /// a successor that finds the batch unfinished takes it back.
    batch: Vec<(u16, u16)>,
}

fn entry(index: u16, field: u64) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(index) + field
}

impl PackedRegion {
    /// Begins with nothing in flight.
    pub(in crate::virtqueue) fn new(region: QueueRegion, size: u16, used: Cursor) -> Self {
        for index in 0..region.entries() {
            region.store(entry(index, 0), [0; 32]);
            region.store_u16(entry(index, ENTRY_NEXT), index.wrapping_add(1));
        }
        region.store_u64(FEATURES, 0);
        region.store_u16(DESC_NUM, size);
        let mut this = Self {
            region,
            counter: 0,
            free_head: 0,
            next: (1..=size).collect(),
            ends: vec![(0, 0); usize::from(size)].into_boxed_slice(),
            batch: Vec::with_capacity(usize::from(size)),
        };
        this.region.store_u16(FREE_HEAD, 0);
        this.store_used(used);
        this.published(used);
        this.region.store_u16(VERSION_AT, VERSION);
        this
    }

    fn store_used(&self, used: Cursor) {
        self.region.store_u16(USED_IDX, used.index);
        self.region.store_u8(USED_WRAP, u8::from(used.wrap));
    }

    fn follower(&self, index: u16) -> u16 {
        self.next.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// A chain was taken, whose descriptors in the ring are these.
    #[inline]
    pub(in crate::virtqueue) fn taken(&mut self, id: u16, descriptors: &[Descriptor]) {
        let first = self.free_head;
        // It never has more descriptors than the ring, which has as many entries as the free list.
        let num = u16::try_from(descriptors.len()).unwrap_or(0);
        let (mut last, mut at) = (first, first);
        for descriptor in descriptors {
            self.region
                .store(entry(at, ENTRY_ADDR), descriptor.addr.to_le_bytes());
            self.region
                .store(entry(at, ENTRY_LEN), descriptor.len.to_le_bytes());
            self.region
                .store_u16(entry(at, ENTRY_FLAGS), descriptor.flags);
            // Of a packed descriptor, what follows is its buffer ID.
            self.region.store_u16(entry(at, ENTRY_ID), descriptor.next);
            last = at;
            at = self.follower(at);
        }
        self.region.store_u16(entry(first, ENTRY_NUM), num);
        self.region.store_u16(entry(first, ENTRY_LAST), last);
        self.region
            .store_u64(entry(first, ENTRY_COUNTER), self.counter);
        self.counter += 1;
        if let Some(ends) = self.ends.get_mut(usize::from(id)) {
            *ends = (first, last);
        }
        self.region.store_u8(entry(first, ENTRY_INFLIGHT), 1);
        self.free_head = at;
        self.region.store_u16(FREE_HEAD, at);
        self.region.store_u16(OLD_FREE_HEAD, at);
    }

    /// Its used descriptor is written, all but what shows it.
    #[inline]
    pub(in crate::virtqueue) fn used(&mut self, id: u16) {
        if let Some(ends) = self.ends.get(usize::from(id)) {
            self.batch.push(*ends);
        }
    }

    /// The batch is about to be shown: where the next used descriptor will be.
    #[inline]
    pub(in crate::virtqueue) fn publishes(&mut self, used: Cursor) {
        for &(first, last) in &self.batch {
            self.region
                .store_u16(entry(last, ENTRY_NEXT), self.free_head);
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free_head;
            }
            self.free_head = first;
            self.region.store_u16(FREE_HEAD, first);
        }
        self.store_used(used);
    }

    /// The batch is shown.
    #[inline]
    pub(in crate::virtqueue) fn published(&mut self, used: Cursor) {
        for (first, _) in self.batch.drain(..) {
            self.region.store_u8(entry(first, ENTRY_INFLIGHT), 0);
            crash_point!("publish.clearing");
        }
        crash_point!("publish.cleared");
        self.region.store_u16(OLD_FREE_HEAD, self.free_head);
        self.region.store_u16(OLD_USED_IDX, used.index);
        self.region.store_u8(OLD_USED_WRAP, u8::from(used.wrap));
    }

    /// Whether the frontend took the region away.
    pub(in crate::virtqueue) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }
}
