//! What the chains that come next are going to be written to.
#![expect(
    unsafe_code,
    reason = "descriptors in guest memory, which the module above has looked up"
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::SplitQueue;
use crate::memory::{read_words, will_write};
use crate::virtqueue::chain::{Descriptor, INDIRECT};
use crate::virtqueue::run;

/// Used entries of a cache line.
const ENTRIES_OF_LINE: usize = 8;

impl SplitQueue {
    /// Has the CPU fetch the first bytes of a chain that comes next but so many, to be written; false if the driver is
    /// not known to have made it available. A hint: what is read of the ring here counts for nothing else.
    #[inline]
    pub fn announce_next(&mut self, but: u16, bytes: u32) -> bool {
        // What is wrong with the ring is told when the chain is taken.
        if but >= self.seen_avail.wrapping_sub(self.next_avail) && !(but == 0 && self.has_any()) {
            return false;
        }
        let mask = self.layout.size - 1;
        let index = self.next_avail.wrapping_add(but) & mask;
        let head = self.avail(2 + usize::from(index)).load(Ordering::Relaxed);
        // SAFETY: masked to the table's length; the lease keeps the table.
        let words = unsafe { read_words(self.parts.desc.add(usize::from(head & mask)).cast()) };
        let descriptor = Descriptor::of_split(words);
        if !descriptor.has(INDIRECT) {
            self.lease.announce(descriptor.addr, descriptor.len, bytes);
        }
        true
    }

    /// As [`Virtqueue::announce_run`](super::super::Virtqueue::announce_run).
    #[inline]
    pub fn announce_run(&self, count: usize, front: usize, most: usize) {
        let mask = self.layout.size - 1;
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        for step in (0..known).take(count) {
            let index = self.next_avail.wrapping_add(step) & mask;
            let head = self.avail(2 + usize::from(index)).load(Ordering::Relaxed);
            // SAFETY: masked to the table's length; the lease keeps the table.
            let words = unsafe { read_words(self.parts.desc.add(usize::from(head & mask)).cast()) };
            run::announce(&self.lease, Descriptor::of_split(words), front, most);
        }
    }

    /// Has the CPU fetch the place of the next used entry: the driver has read its line, if it has seen the
    /// entry before.
    #[inline]
    pub fn announce_used(&self) {
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        // SAFETY: the slot is masked to the ring's length; the lease keeps it.
        will_write(unsafe { self.parts.used_ring.add(slot) });
    }

    /// Has the CPU fetch the places of so many used entries that are written next: the driver has read their lines.
    #[inline]
    pub fn announce_used_of(&self, count: u16) {
        let mask = self.layout.size - 1;
        for step in (0..count).step_by(ENTRIES_OF_LINE) {
            let slot = usize::from(self.next_used.wrapping_add(step) & mask);
            // SAFETY: the slot is masked to the ring's length; the lease keeps it.
            will_write(unsafe { self.parts.used_ring.add(slot) });
        }
    }

    fn has_any(&mut self) -> bool {
        self.has_work().unwrap_or(false)
    }
}
