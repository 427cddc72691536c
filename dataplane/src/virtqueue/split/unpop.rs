//! Chains of a split queue that are put back.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::SplitQueue;

impl SplitQueue {
    /// Puts back the chain that was taken last, as if it had not been taken. Of several the last one first.
    pub fn unpop(&mut self, head: u16) {
        if !self.end_flight(head) {
            return;
        }
        self.go_back(1);
        if let Some(order) = &mut self.order {
            order.forget_last(1);
        }
        if let Some(region) = &mut self.region {
            region.untaken(head);
        }
    }

    /// So many entries are the next ones again.
    pub(super) fn go_back(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
        // They are read again when they are taken again: what was read ahead may lie where they were.
        self.ahead_end = self.next_avail;
        // The index was compared with where the queue stood when it was read.
        if self.seen_avail.wrapping_sub(self.next_avail) > self.layout.size {
            self.seen_avail = self.next_avail;
        }
    }
}
