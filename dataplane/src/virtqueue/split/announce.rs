//! What the chains that come next are going to be written to.
#![expect(
    unsafe_code,
    reason = "descriptors in guest memory, which the module above has looked up"
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::SplitQueue;
use crate::memory::read_words;
use crate::virtqueue::chain::{Descriptor, INDIRECT};

impl SplitQueue {
    /// Has the CPU fetch the first bytes of some chains that come next, to be written: how many there were. A hint: what
    /// is read of the ring here counts for nothing else.
    pub fn announce_next(&mut self, bytes: u32) -> u16 {
        // What is wrong with the ring is told when the chain is taken.
        if self.next_avail == self.ahead_end && !self.look_ahead().unwrap_or(false) {
            return 0;
        }
        let mask = self.layout.size - 1;
        let count = self.ahead_end.wrapping_sub(self.next_avail);
        for step in 0..count {
            let index = self.next_avail.wrapping_add(step) % super::AHEAD;
            let head = self.ahead.get(usize::from(index)).copied().unwrap_or(0);
            // SAFETY: masked to the table's length; the lease keeps the table.
            let words = unsafe { read_words(self.parts.desc.add(usize::from(head & mask)).cast()) };
            let descriptor = Descriptor::of_split(words);
            if !descriptor.has(INDIRECT) {
                self.lease.announce(descriptor.addr, descriptor.len, bytes);
            }
        }
        count
    }
}
