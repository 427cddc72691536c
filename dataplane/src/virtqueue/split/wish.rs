//! When the driver wants to be called, and when it is to kick.
//!
//! UNSAFETY: as of the module above, whose places these are.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU16, Ordering};

use super::SplitQueue;
use crate::memory::{full_fence, shared_u16};
use crate::virtqueue::RingError;
use crate::virtqueue::notify::{NO_INTERRUPT, NO_NOTIFY, passed};

impl SplitQueue {
    /// Shows the driver what was used since the last time; whether it wants to be called for anything that
    /// was shown since this was asked last.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let old = std::mem::replace(&mut self.asked, self.published);
        if old == self.published {
            return false;
        }
        // The index is visible before the driver's wish is read (2.7.7.1).
        full_fence();
        if self.features.event_idx {
            let event = self
                .avail(2 + usize::from(self.layout.size))
                .load(Ordering::Relaxed);
            passed(event, self.published, old)
        } else {
            self.avail(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick for the next entry; whether one came in the meantime, so that
    /// there is no reason to wait.
    ///
    /// # Errors
    /// [`RingError::IndexJump`].
    pub fn arm(&mut self) -> Result<bool, RingError> {
        self.quiet = false;
        if self.features.event_idx {
            self.avail_event().store(self.next_avail, Ordering::Relaxed);
            self.mark(4 + 8 * u64::from(self.layout.size), 2);
        } else {
            self.used(0).store(0, Ordering::Relaxed);
            self.mark(0, 2);
        }
        // The wish is visible before the index is read again (2.7.10.1).
        full_fence();
        self.has_work()
    }

    /// Tells the driver that a kick is not needed: the queue is being polled.
    #[inline]
    pub fn disarm(&mut self) {
        if self.quiet {
            return;
        }
        self.quiet = true;
        // With EVENT_IDX the event stays behind: it is passed once in 2^16 entries, which costs one
        // needless kick; a store per batch would cost more.
        if !self.features.event_idx {
            self.used(0).store(NO_NOTIFY, Ordering::Relaxed);
            self.mark(0, 2);
        }
    }

    fn avail_event(&self) -> &AtomicU16 {
        // SAFETY: the field lies behind the used ring, inside its span; the lease keeps it.
        unsafe { shared_u16(self.parts.avail_event) }
    }
}
