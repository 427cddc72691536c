//! A split queue that goes on where another process left it: what that had taken is taken again.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::SplitQueue;
use crate::virtqueue::inflight::{AvailRing, Past, QueueRegion, Recovered, SplitPast};
use crate::virtqueue::{Chain, RingError};

impl SplitQueue {
    /// As [`SplitQueue::track`], of a queue that has just been made, in a region where what was in flight may
    /// have been kept: that is in flight again, and the queue goes on behind it, whatever base it was given.
    ///
    /// The used index is the truth about a ring: QEMU gives it as the base when its backend has died,
    /// cloud-hypervisor the avail index. So it is where nothing was kept yet, too.
    ///
    /// # Errors
    /// [`RingError::RegionVersion`]; the region is then as it was.
    pub fn recover(&mut self, region: QueueRegion) -> Result<Recovered, RingError> {
        let used_idx = self.published;
        // Acquire: the entries are read after it.
        let avail_idx = self.avail(1).load(Ordering::Acquire);
        let mask = self.layout.size - 1;
        let entry = |index: u16| self.avail(2 + usize::from(index & mask));
        let ring = AvailRing {
            used_idx,
            avail_idx,
            head: |index| entry(index).load(Ordering::Relaxed),
        };
        let past = SplitPast::of(&region, self.layout.size, &ring)?;
        self.go_on_at(used_idx);
        let recovered = match past {
            Past::Fresh => Recovered::Fresh,
            Past::Stale(why) => Recovered::Stale { why },
            Past::Kept(past) => return Ok(self.go_on(past)),
        };
        self.track(region);
        Ok(recovered)
    }

    fn go_on_at(&mut self, avail: u16) {
        self.next_avail = avail;
        self.seen_avail = avail;
        self.ahead_end = avail;
    }

    fn go_on(&mut self, past: SplitPast) -> Recovered {
        let mut again = past.heads;
        again.reverse();
        self.set_again(again);
        let chains = self.in_flight_count;
        self.go_on_at(self.published.wrapping_add(chains));
        self.region = Some(past.region);
        Recovered::Kept { chains }
    }

    /// Notes what is in flight, of a queue of which nothing is yet, and to be taken again, the next one last.
    pub(super) fn set_again(&mut self, again: Vec<u16>) {
        for head in again.iter().rev() {
            if let Some(in_flight) = self.in_flight.get_mut(usize::from(*head)) {
                *in_flight = true;
            }
            if let Some(order) = &mut self.order {
                order.taken(*head);
            }
            self.in_flight_count += 1;
        }
        self.again = again;
    }

    /// Chains that are to be taken again.
    #[must_use]
    pub fn left_again(&self) -> usize {
        self.again.len()
    }

    /// Takes the next chain that is to be taken again; its head, or none if there is none.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    pub fn pop_again(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let Some(head) = self.again.last().copied() else {
            return Ok(None);
        };
        self.walk(head, chain)?;
        chain.check_bytes()?;
        self.again.pop();
        Ok(Some(head))
    }

    /// Leaves what is to be taken again to whoever serves the ring next: the region keeps it.
    pub fn leave_again(&mut self) {
        let left = std::mem::take(&mut self.again);
        if let Some(order) = &mut self.order {
            order.forget_last(left.len());
        }
        for head in left {
            self.end_flight(head);
        }
    }
}
