//! Chains that are given back one by one, and what was given back is shown.
//!
//! UNSAFETY: as of the module above, whose places these are: each index into them is masked or compared first.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::{SplitQueue, UsedEntry};
use crate::crash_point;
use crate::virtqueue::dying;
use crate::virtqueue::order::Order;

impl SplitQueue {
    /// Gives up a chain that can't be given back: its queue retires, and shows nothing any more.
    pub fn abandon(&mut self, head: u16) {
        self.end_flight(head);
        if let Some(mut order) = self.order.take() {
            while let Some(ended) = order.dissolve() {
                self.end_flight(ended);
            }
        }
    }

    /// Notes that a head is no longer in flight; false if it was not.
    #[inline]
    pub(super) fn end_flight(&mut self, head: u16) -> bool {
        let in_flight = self.in_flight.get_mut(usize::from(head));
        let Some(in_flight) = in_flight.filter(|in_flight| **in_flight) else {
            debug_assert!(false, "head {head} was not in flight");
            return false;
        };
        *in_flight = false;
        self.in_flight_count -= 1;
        true
    }

    /// Gives a chain back: `len` bytes of its writable part were written, from its front on.
    /// The driver sees it after the next [`SplitQueue::publish`], in order behind what was taken
    /// before it.
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let Some(order) = &mut self.order else {
            return self.write_used(head, len);
        };
        if !order.ended_first(head) {
            return order.ended(head, len);
        }
        let more = order.has_next();
        self.write_used(head, len);
        if more {
            self.push_ended();
        }
    }

    /// Gives those back that have ended and waited for the one before them.
    #[inline(never)]
    pub(super) fn push_ended(&mut self) {
        while let Some((head, len)) = self.order.as_mut().and_then(Order::next) {
            self.write_used(head, len);
        }
    }

    #[inline(always)]
    pub(super) fn write_used(&mut self, head: u16, len: u32) {
        if !self.end_flight(head) {
            return;
        }
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        let entry = UsedEntry {
            id: u32::from(head),
            len,
        };
        dying::step();
        // SAFETY: the slot is masked to the ring's length; the lease keeps it.
        unsafe { self.parts.used_ring.add(slot).write_volatile(entry) };
        self.mark(4 + 8 * slot as u64, 8);
        if let Some(region) = &mut self.region {
            region.used(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Marks bytes of the used ring that were written.
    #[inline]
    pub(super) fn mark(&self, offset: u64, bytes: u64) {
        if let Some(used) = self.log {
            self.lease.log().mark(used.saturating_add(offset), bytes);
        }
    }

    /// Shows the driver what was used since the last time. Whether it wants to be called is asked later
    /// ([`SplitQueue::publish`]): a driver that polls goes on meanwhile.
    #[inline]
    pub fn show(&mut self) {
        if self.next_used == self.published {
            return;
        }
        self.published = self.next_used;
        crash_point!("publish.noted");
        dying::step();
        // Release: the entries and everything that the requests wrote come before the index.
        self.used(1).store(self.published, Ordering::Release);
        crash_point!("publish.shown");
        self.mark(2, 2);
        if let Some(region) = &mut self.region {
            region.published(self.published);
        }
    }
}
