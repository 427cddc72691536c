//! A packed queue that goes on where another process left it: what that had taken is taken again, from the
//! region's copies, since its descriptors in the ring may be overwritten.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::{PackedQueue, USED};
use crate::virtqueue::chain::{INDIRECT, table};
use crate::virtqueue::inflight::{Kept, PackedPast, Past, QueueRegion, Recovered};
use crate::virtqueue::{Chain, RingError, dying};

impl PackedQueue {
    /// As [`PackedQueue::track`], of a queue that has just been made, in a region where what was in flight may
    /// have been kept: that is in flight again, and the queue goes on behind it. A region that was kept says
    /// where that is, and the base does not count: a frontend can't know it of a ring whose backend has died.
    ///
    /// # Errors
    /// [`RingError::RegionVersion`]; the region is then as it was.
    pub fn recover(&mut self, region: QueueRegion) -> Result<Recovered, RingError> {
        let flags = |index: u16| self.flags(index).load(Ordering::Acquire);
        let past = PackedPast::of(&region, self.layout.size, flags)?;
        let recovered = match past {
            Past::Fresh => Recovered::Fresh,
            Past::Stale(why) => Recovered::Stale { why },
            Past::Kept(past) => return Ok(self.go_on(past)),
        };
        self.track(region);
        Ok(recovered)
    }

    fn go_on(&mut self, past: PackedPast) -> Recovered {
        self.used = past.used;
        self.asked = past.used;
        self.avail = past.used.advanced(past.descriptors, self.layout.size);
        self.hide_unshown(past.descriptors);
        self.taken.reserve(usize::from(self.layout.size));
        self.region = Some(past.region);
        let mut again = past.chains;
        again.reverse();
        self.set_again(again);
        Recovered::Kept {
            chains: self.in_flight_count,
        }
    }

    /// Notes what is in flight, of a queue of which nothing is yet, and to be taken again, the next one last.
    pub(super) fn set_again(&mut self, again: Vec<Kept>) {
        for Kept { id, descriptors } in again.iter().rev() {
            // At most the ring's size.
            let count = u16::try_from(descriptors.len()).unwrap_or(0);
            if let Some(of) = self.descriptors_of.get_mut(usize::from(*id)) {
                *of = count;
            }
            if let Some(order) = &mut self.order {
                order.taken(*id);
            }
            self.descriptors += count;
            self.in_flight_count += 1;
        }
        self.again = again;
    }

    /// Of a batch that was not shown, all but the first are written as used already, at places that may be
    /// others' now: the driver would see them as soon as it comes there.
    fn hide_unshown(&self, descriptors: u16) {
        for step in 1..descriptors {
            let at = self.used.advanced(step, self.layout.size);
            let flags = self.flags(at.index).load(Ordering::Relaxed);
            if !at.is_available(flags) {
                dying::step();
                self.flags(at.index).store(flags ^ USED, Ordering::Relaxed);
                self.mark(at.index);
            }
        }
    }

    /// Chains that are to be taken again.
    #[must_use]
    pub fn left_again(&self) -> usize {
        self.again.len()
    }

    /// Takes the next chain that is to be taken again; its buffer ID, or none if there is none.
    ///
    /// # Errors
    /// As [`PackedQueue::pop`].
    pub fn pop_again(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let Some(Kept { id, descriptors }) = self.again.last() else {
            return Ok(None);
        };
        chain.reset(&self.lease);
        for descriptor in descriptors {
            if descriptor.has(INDIRECT) {
                let (features, longest) = (self.features, self.longest);
                table(&self.lease, descriptor, features, longest)?.take_all(chain)?;
            } else {
                chain.push(*descriptor)?;
            }
        }
        chain.check_bytes()?;
        let id = *id;
        self.again.pop();
        Ok(Some(id))
    }

    /// Leaves what is to be taken again to whoever serves the ring next: the region keeps it.
    pub fn leave_again(&mut self) {
        let left = std::mem::take(&mut self.again);
        if let Some(order) = &mut self.order {
            order.forget_last(left.len());
        }
        for kept in left {
            self.descriptors -= self.end_flight(kept.id);
        }
    }
}
