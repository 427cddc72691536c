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
        self.next_avail = self.next_avail.wrapping_sub(1);
        // The entry is read again when it is taken again, and the index before it: what was read ahead may lie where
        // this entry was, and the index was compared with where the queue stood then.
        self.ahead_end = self.next_avail;
        self.seen_avail = self.next_avail;
        if let Some(order) = &mut self.order {
            order.forget_last(1);
        }
        if let Some(region) = &mut self.region {
            region.untaken(head);
        }
    }
}
