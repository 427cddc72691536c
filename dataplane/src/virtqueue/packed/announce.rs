//! What the chains that come next are going to be written to.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::PackedQueue;
use crate::virtqueue::chain::INDIRECT;

/// Descriptors that are looked at together at most.
const AHEAD: u16 = 16;

impl PackedQueue {
    /// Has the CPU fetch the first bytes of some chains that come next, to be written: how many descriptors there were.
    /// A hint: what is read of the ring here counts for nothing else.
    pub fn announce_next(&self, bytes: u32) -> u16 {
        let size = self.layout.size;
        let mut at = self.avail;
        for count in 0..AHEAD.min(size) {
            let flags = self.flags(at.index).load(Ordering::Relaxed);
            if !at.is_available(flags) {
                return count;
            }
            let descriptor = self.descriptor(at.index);
            if !descriptor.has(INDIRECT) {
                self.lease.announce(descriptor.addr, descriptor.len, bytes);
            }
            at = at.advanced(1, size);
        }
        AHEAD.min(size)
    }
}
