//! The region of a packed queue: `QueueRegionPacked` and `DescStatePacked`. It has a copy of every
//! descriptor in flight, since the ring's own may be overwritten by used ones.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{DESC_NUM, FEATURES, QueueRegion, VERSION, VERSION_AT};
use crate::crash_point;
use crate::virtqueue::chain::Descriptor;
use crate::virtqueue::packed::Cursor;

pub(super) const HEADER_BYTES: u64 = 32;
pub(super) const ENTRY_BYTES: u64 = 32;

/// `free_head`, and behind it `old_free_head`.
pub(super) const FREE_HEAD: u64 = 12;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter`.
pub(super) const USED: u64 = 16;

pub(super) const ENTRY_INFLIGHT: u64 = 0;
pub(super) const ENTRY_NEXT: u64 = 2;
pub(super) const ENTRY_LAST: u64 = 4;
pub(super) const ENTRY_NUM: u64 = 6;
pub(super) const ENTRY_COUNTER: u64 = 8;
pub(super) const ENTRY_ID: u64 = 16;
pub(super) const ENTRY_FLAGS: u64 = 18;
pub(super) const ENTRY_LEN: u64 = 20;
pub(super) const ENTRY_ADDR: u64 = 24;

/// What is kept of a running packed queue.
#[derive(Debug)]
pub(in crate::virtqueue) struct PackedRegion {
    pub(super) region: QueueRegion,
    /// Number of the next request.
    pub(super) counter: u64,
    pub(super) free_head: u16,
    /// Where the next used descriptor is, as the driver sees it.
    pub(super) used: Cursor,
    /// For each entry the one that follows it in its chain, or on the free list.
    pub(super) next: Box<[u16]>,
    /// For each buffer ID in flight the first and the last entry of its chain.
    pub(super) ends: Box<[(u16, u16)]>,
    /// First and last entries of chains that are shown with the next publish. They are not free before:
    /// a successor that finds the batch unfinished takes it back.
    pub(super) batch: Vec<(u16, u16)>,
}

/// Where a field of an entry lies.
pub(super) fn entry(index: u16, field: u64) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(index) + field
}

/// Both used cursors, stored at once: who finds the index of one finds its wrap counter.
pub(super) fn store_used(region: &QueueRegion, used: Cursor, old: Cursor) {
    let word = u64::from(used.index)
        | u64::from(old.index) << 16
        | u64::from(used.wrap) << 32
        | u64::from(old.wrap) << 40;
    region.store_u64(USED, word);
}

/// Both heads of the free list, stored at once.
pub(super) fn store_free(region: &QueueRegion, head: u16, old: u16) {
    region.store_u32(FREE_HEAD, u32::from(head) | u32::from(old) << 16);
}

impl PackedRegion {
    /// Begins with nothing in flight. Who finds it half done finds that nobody has used it.
    pub(in crate::virtqueue) fn new(region: QueueRegion, size: u16, used: Cursor) -> Self {
        region.forget();
        for index in 0..region.entries() {
            for word in (0..ENTRY_BYTES).step_by(8) {
                region.store_u64(entry(index, word), 0);
            }
            region.store_u16(entry(index, ENTRY_NEXT), index.wrapping_add(1));
        }
        region.store_u64(FEATURES, 0);
        region.store_u16(DESC_NUM, size);
        store_free(&region, 0, 0);
        store_used(&region, used, used);
        region.store_u16(VERSION_AT, VERSION);
        Self {
            region,
            counter: 0,
            free_head: 0,
            used,
            next: (1..=size).collect(),
            ends: vec![(0, 0); usize::from(size)].into_boxed_slice(),
            batch: Vec::with_capacity(usize::from(size)),
        }
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
                .store_u64(entry(at, ENTRY_ADDR), descriptor.addr);
            self.region.store_u32(entry(at, ENTRY_LEN), descriptor.len);
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
        store_free(&self.region, at, at);
    }

    /// The chain that was taken last is available again: the stores of [`PackedRegion::taken`] that say otherwise, in
    /// the opposite order.
    pub(in crate::virtqueue) fn untaken(&mut self, id: u16) {
        let Some(&(first, last)) = self.ends.get(usize::from(id)) else {
            return;
        };
        // A batch that was shown since has put its entries in front of what followed.
        if self.follower(last) != self.free_head {
            self.region
                .store_u16(entry(last, ENTRY_NEXT), self.free_head);
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free_head;
            }
        }
        self.free_head = first;
        store_free(&self.region, first, first);
        self.region.store_u8(entry(first, ENTRY_INFLIGHT), 0);
        self.counter = self.counter.saturating_sub(1);
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
        let old = self.free_head;
        for &(first, last) in &self.batch {
            self.region
                .store_u16(entry(last, ENTRY_NEXT), self.free_head);
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free_head;
            }
            self.free_head = first;
        }
        store_free(&self.region, self.free_head, old);
        store_used(&self.region, used, self.used);
        self.used = used;
    }

    /// The batch is shown.
    #[inline]
    pub(in crate::virtqueue) fn published(&mut self) {
        for (first, _) in self.batch.drain(..) {
            self.region.store_u8(entry(first, ENTRY_INFLIGHT), 0);
            crash_point!("publish.clearing");
        }
        crash_point!("publish.cleared");
        store_free(&self.region, self.free_head, self.free_head);
        store_used(&self.region, self.used, self.used);
    }

    /// Whether the frontend took the region away.
    pub(in crate::virtqueue) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }
}
