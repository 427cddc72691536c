//! Chains that are given back one by one, and what was given back is shown.
//!
//! UNSAFETY: as of the module above: each index is that of a [`Cursor`](super::Cursor), which is below the ring's size.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::{ID_AT, LEN_AT, PackedQueue};
use crate::crash_point;
use crate::virtqueue::chain::DESCRIPTOR_BYTES;
use crate::virtqueue::dying;
use crate::virtqueue::order::Order;

impl PackedQueue {
    /// Gives up a chain that can't be given back: its queue retires, and shows nothing any more.
    pub fn abandon(&mut self, id: u16) {
        self.end_flight(id);
        if let Some(mut order) = self.order.take() {
            while let Some(ended) = order.dissolve() {
                self.end_flight(ended);
            }
        }
    }

    /// Notes that a buffer ID is no longer in flight: how many descriptors it had; 0: it was not.
    #[inline]
    pub(super) fn end_flight(&mut self, id: u16) -> u16 {
        let Some(of) = self
            .descriptors_of
            .get_mut(usize::from(id))
            .filter(|of| **of > 0)
        else {
            debug_assert!(false, "buffer {id} was not in flight");
            return 0;
        };
        self.in_flight_count -= 1;
        std::mem::take(of)
    }

    /// Gives a chain back: `len` bytes of its writable part were written, from its front on.
    /// The driver sees it after the next [`PackedQueue::publish`], in order behind what was taken
    /// before it where that was negotiated.
    #[inline]
    pub fn push_used(&mut self, id: u16, len: u32) {
        let Some(order) = &mut self.order else {
            return self.write_used(id, len);
        };
        if !order.ended_first(id) {
            return order.ended(id, len);
        }
        let more = order.has_next();
        self.write_used(id, len);
        if more {
            self.push_ended();
        }
    }

    /// Gives those back that have ended and waited for the one before them.
    #[inline(never)]
    pub(super) fn push_ended(&mut self) {
        while let Some((id, len)) = self.order.as_mut().and_then(Order::next) {
            self.write_used(id, len);
        }
    }

    #[inline(always)]
    pub(super) fn write_used(&mut self, id: u16, len: u32) {
        let count = self.end_flight(id);
        if count == 0 {
            return;
        }
        let at = self.used;
        debug_assert!(at.index < self.layout.size);
        dying::step();
        // SAFETY: the descriptor lies in the ring, which the lease keeps, and is aligned to 16.
        unsafe {
            let descriptor = self.parts.ring.add(usize::from(at.index)).cast::<u8>();
            descriptor.add(LEN_AT).cast::<u32>().write_volatile(len);
            descriptor.add(ID_AT).cast::<u16>().write_volatile(id);
        }
        let flags = at.used_flags(len);
        if self.held_back.is_none() {
            self.held_back = Some((at.index, flags));
        } else {
            dying::step();
            // The driver looks here after it has seen the batch's first.
            self.flags(at.index).store(flags, Ordering::Relaxed);
            self.mark(at.index);
        }
        if let Some(region) = &mut self.region {
            region.used(id);
        }
        self.unpublished += count;
        self.used = at.advanced(count, self.layout.size);
    }

    /// Marks a descriptor of the ring that was written.
    #[inline]
    pub(super) fn mark(&self, index: u16) {
        if self.log {
            let bytes = u64::from(DESCRIPTOR_BYTES);
            let at = self.layout.desc + u64::from(index) * bytes;
            self.lease.log().mark(at, bytes);
        }
    }

    /// Shows the driver what was used since the last time. Whether it wants to be called is asked later
    /// ([`PackedQueue::publish`]): a driver that polls goes on meanwhile.
    #[inline]
    pub fn show(&mut self) {
        let Some((index, flags)) = self.held_back.take() else {
            return;
        };
        if let Some(region) = &mut self.region {
            region.publishes(self.used);
        }
        crash_point!("publish.noted");
        dying::step();
        // Release: the other descriptors and everything that the requests wrote come before.
        self.flags(index).store(flags, Ordering::Release);
        crash_point!("publish.shown");
        self.mark(index);
        if let Some(region) = &mut self.region {
            region.published();
        }
        self.descriptors -= std::mem::take(&mut self.unpublished);
    }
}
