//! What the chains that come next are going to be written to.
#![expect(
    unsafe_code,
    reason = "places in a ring that the module above has looked up"
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::PackedQueue;
use crate::memory::will_write;
use crate::virtqueue::chain::INDIRECT;
use crate::virtqueue::run;

/// Descriptors of a cache line.
pub(super) const DESCRIPTORS_OF_LINE: u16 = 4;

impl PackedQueue {
    /// Has the CPU fetch the first bytes of a descriptor that comes next but so many, to be written; false if the driver
    /// has not made it available. A hint: what is read of the ring here counts for nothing else.
    #[inline]
    pub fn announce_next(&self, but: u16, bytes: u32) -> bool {
        let size = self.layout.size;
        if but >= size {
            return false;
        }
        let at = self.avail.advanced(but, size);
        let flags = self.flags(at.index).load(Ordering::Relaxed);
        if !at.is_available(flags) {
            return false;
        }
        let descriptor = self.descriptor(at.index);
        if !descriptor.has(INDIRECT) {
            self.lease.announce(descriptor.addr, descriptor.len, bytes);
        }
        true
    }

    /// As [`Virtqueue::announce_run`](super::super::Virtqueue::announce_run).
    #[inline]
    pub fn announce_run(&self, count: usize, front: usize, most: usize) {
        let (mut at, size) = (self.avail, self.layout.size);
        let count = u16::try_from(count).unwrap_or(size).min(size);
        // Their own lines are going to be written as well.
        self.announce_used_of(count);
        for _ in 0..count {
            let descriptor = self.descriptor_if_there(at);
            if !at.is_available(descriptor.flags) {
                return;
            }
            run::announce(&self.lease, descriptor, front, most);
            at = at.advanced(1, size);
        }
    }

    /// Has the CPU fetch the place of the next used descriptor.
    #[inline]
    pub fn announce_used(&self) {
        debug_assert!(self.used.index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps.
        will_write(unsafe { self.parts.ring.add(usize::from(self.used.index)) });
    }

    /// Has the CPU fetch the places of so many used descriptors that are written next.
    #[inline]
    pub fn announce_used_of(&self, count: u16) {
        let (mut at, size) = (self.used, self.layout.size);
        if size < DESCRIPTORS_OF_LINE {
            return;
        }
        for _ in (0..count).step_by(usize::from(DESCRIPTORS_OF_LINE)) {
            // SAFETY: the descriptor lies in the ring, which the lease keeps.
            will_write(unsafe { self.parts.ring.add(usize::from(at.index)) });
            at = at.advanced(DESCRIPTORS_OF_LINE, size);
        }
    }
}
