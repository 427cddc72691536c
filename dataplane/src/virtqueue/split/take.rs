//! Chains that are taken one by one.
//!
//! UNSAFETY: as of the module above, whose places these are: each index into them is masked or compared first.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::{AHEAD, SplitQueue};
use crate::memory::{read_words, will_read};
use crate::virtqueue::RingError;
use crate::virtqueue::chain::{Chain, Descriptor, INDIRECT, NEXT, table};

impl SplitQueue {
    /// Whether the driver has made entries available that were not taken yet. Reads the index.
    ///
    /// # Errors
    /// [`RingError::IndexJump`].
    #[inline]
    pub fn has_work(&mut self) -> Result<bool, RingError> {
        if self.seen_avail != self.next_avail {
            return Ok(true);
        }
        // Acquire: entries and descriptors are read after the index that announced them.
        let given = self.avail(1).load(Ordering::Acquire);
        if given.wrapping_sub(self.next_avail) > self.layout.size {
            return Err(RingError::IndexJump {
                given,
                expected: self.next_avail,
                size: self.layout.size,
            });
        }
        self.seen_avail = given;
        Ok(given != self.next_avail)
    }

    /// Reads the avail entries that come next, each once, and has the CPU fetch the descriptors that they
    /// name: the driver's CPU wrote these, and they come together rather than one after the other. Whether
    /// there is one.
    ///
    /// # Errors
    /// [`RingError::IndexJump`].
    #[inline]
    pub(super) fn look_ahead(&mut self) -> Result<bool, RingError> {
        if !self.has_work()? {
            return Ok(false);
        }
        let mask = self.layout.size - 1;
        let count = self.seen_avail.wrapping_sub(self.next_avail).min(AHEAD);
        for step in 0..count {
            let index = self.next_avail.wrapping_add(step);
            let head = self
                .avail(2 + usize::from(index & mask))
                .load(Ordering::Relaxed);
            if let Some(place) = self.ahead.get_mut(usize::from(index % AHEAD)) {
                *place = head;
            }
            // SAFETY: masked to the table's length. (A head that is not below it is refused in its turn.)
            will_read(unsafe { self.parts.desc.add(usize::from(head & mask)) });
        }
        self.ahead_end = self.next_avail.wrapping_add(count);
        Ok(true)
    }

    /// Takes the next available chain; its head, or none if there is none.
    ///
    /// # Errors
    /// See [`RingError`]: the driver broke the ring, nothing was taken.
    #[inline(always)]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        if self.next_avail == self.ahead_end && !self.look_ahead()? {
            return Ok(None);
        }
        let place = self.ahead.get(usize::from(self.next_avail % AHEAD));
        // There always is one.
        let head = place.copied().unwrap_or(u16::MAX);
        match self.in_flight.get(usize::from(head)) {
            Some(false) => {}
            Some(true) => return Err(RingError::HeadInFlight(head)),
            None => {
                return Err(RingError::OutOfTable {
                    index: head,
                    size: u32::from(self.layout.size),
                });
            }
        }
        self.walk(head, chain)?;
        chain.check_bytes()?;
        if let Some(in_flight) = self.in_flight.get_mut(usize::from(head)) {
            *in_flight = true;
        }
        self.in_flight_count += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(order) = &mut self.order {
            order.taken(head);
        }
        if let Some(region) = &mut self.region {
            region.taken(head);
        }
        Ok(Some(head))
    }

    /// Follows a chain through the queue's table, and an indirect one at its end.
    #[inline(always)]
    pub(super) fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.reset(&self.lease);
        let size = u32::from(self.layout.size);
        let mut index = head;
        for _ in 0..self.longest {
            if u32::from(index) >= size {
                return Err(RingError::OutOfTable { index, size });
            }
            // SAFETY: index is below the table's length; the lease keeps the table.
            let words = unsafe { read_words(self.parts.desc.add(usize::from(index)).cast()) };
            let descriptor = Descriptor::of_split(words);
            if descriptor.has(INDIRECT) {
                return table(&self.lease, &descriptor, self.features, self.longest)?.walk(chain);
            }
            chain.push(descriptor)?;
            if !descriptor.has(NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingError::ChainTooLong(self.longest))
    }
}
