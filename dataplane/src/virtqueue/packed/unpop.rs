//! Chains of a packed queue that are put back.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::PackedQueue;

impl PackedQueue {
    /// Puts back the chain that was taken last, as if it had not been taken. Of several the last one first.
    pub fn unpop(&mut self, id: u16) {
        let count = self.end_flight(id);
        if count == 0 {
            return;
        }
        self.descriptors -= count;
        self.avail = self.avail.retreated(count, self.layout.size);
        if let Some(order) = &mut self.order {
            order.forget_last(1);
        }
        if let Some(region) = &mut self.region {
            region.untaken(id);
        }
    }
}
