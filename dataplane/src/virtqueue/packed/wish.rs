//! When the driver wants to be called, and when it is to kick.
//!
//! UNSAFETY: as of the module above, whose event areas these are.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU32, Ordering};

use super::PackedQueue;
use crate::memory::{full_fence, shared_u32};
use crate::virtqueue::notify::{EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, passed_packed};

impl PackedQueue {
    /// Shows the driver what was used since the last time; whether it wants to be called for anything that
    /// was shown since this was asked last: no more than is in flight at once, and so once around at most.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let old = std::mem::replace(&mut self.asked, self.used);
        if old == self.used {
            return false;
        }
        // The flags are visible before the driver's wish is read (2.8.10).
        full_fence();
        // SAFETY: the area is aligned and in memory that the lease keeps.
        let wish = unsafe { shared_u32(self.parts.driver) }.load(Ordering::Relaxed);
        match (wish >> 16) & 0x3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.features.event_idx => {
                let event = u16::try_from(wish & 0xffff).unwrap_or(0);
                passed_packed(event, self.used.base(), old.base(), self.layout.size)
            }
            _ => true,
        }
    }

    /// Asks the driver to kick for the next descriptor; whether one came in the meantime, so that
    /// there is no reason to wait.
    pub fn arm(&mut self) -> bool {
        self.quiet = false;
        self.wish(if self.features.event_idx {
            u32::from(self.avail.base()) | (EVENT_DESC << 16)
        } else {
            EVENT_ENABLE << 16
        });
        // The wish is visible before the flags are read again.
        full_fence();
        self.has_work()
    }

    /// Tells the driver that a kick is not needed: the queue is being polled.
    #[inline]
    pub fn disarm(&mut self) {
        if !self.quiet {
            self.quiet = true;
            self.wish(EVENT_DISABLE << 16);
        }
    }

    pub(super) fn wish(&self, wish: u32) {
        let device: &AtomicU32 =
            // SAFETY: the area is aligned and in memory that the lease keeps.
            unsafe { shared_u32(self.parts.device) };
        device.store(wish, Ordering::Relaxed);
        self.mark_wish();
    }

    /// Marks the device event area.
    pub(super) fn mark_wish(&self) {
        if self.log {
            self.lease.log().mark(self.layout.used, 4);
        }
    }
}
