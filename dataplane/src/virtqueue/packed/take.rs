//! Chains that are taken one by one.
//!
//! UNSAFETY: as of the module above: each index is that of a [`Cursor`](super::Cursor), which is below the ring's size.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::PackedQueue;
use crate::memory::read_words;
use crate::virtqueue::RingError;
use crate::virtqueue::chain::{Chain, Descriptor, INDIRECT, NEXT, table};

impl PackedQueue {
    /// Whether the driver has made a descriptor available that was not taken yet.
    #[inline]
    #[must_use]
    pub fn has_work(&self) -> bool {
        // Acquire: the rest of the chain is read after the flags that announce it.
        let flags = self.flags(self.avail.index).load(Ordering::Acquire);
        self.avail.is_available(flags)
    }

    /// Takes the next available chain; its buffer ID, or none if there is none.
    ///
    /// # Errors
    /// See [`RingError`]: the driver broke the ring, nothing was taken.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let flags = self.flags(self.avail.index).load(Ordering::Acquire);
        if !self.avail.is_available(flags) {
            return Ok(None);
        }
        chain.reset(&self.lease);
        let (id, count) = self.walk(flags, chain)?;
        chain.check_bytes()?;
        let size = self.layout.size;
        match self.descriptors_of.get_mut(usize::from(id)) {
            Some(0) if count <= size - self.descriptors => {}
            Some(0) => return Err(RingError::Overcommitted(size)),
            Some(_) => return Err(RingError::HeadInFlight(id)),
            None => {
                return Err(RingError::OutOfTable {
                    index: id,
                    size: u32::from(size),
                });
            }
        }
        if let Some(of) = self.descriptors_of.get_mut(usize::from(id)) {
            *of = count;
        }
        self.descriptors += count;
        self.in_flight_count += 1;
        self.avail = self.avail.advanced(count, size);
        if let Some(order) = &mut self.order {
            order.taken(id);
        }
        if let Some(region) = &mut self.region {
            region.taken(id, &self.taken);
        }
        Ok(Some(id))
    }

    /// Follows the chain that begins at the avail cursor with these flags, which were read already:
    /// its buffer ID, and how many descriptors of the ring it has.
    #[inline]
    pub(super) fn walk(
        &mut self,
        first_flags: u16,
        chain: &mut Chain,
    ) -> Result<(u16, u16), RingError> {
        self.taken.clear();
        let mut at = self.avail;
        for count in 1..=self.layout.size {
            let mut descriptor = self.descriptor(at.index);
            if count == 1 {
                descriptor.flags = first_flags;
            }
            if self.region.is_some() {
                self.taken.push(descriptor);
            }
            if descriptor.has(INDIRECT) {
                table(&self.lease, &descriptor, self.features, self.longest)?.take_all(chain)?;
                return Ok((descriptor.next, count));
            }
            chain.push(descriptor)?;
            if !descriptor.has(NEXT) {
                return Ok((descriptor.next, count));
            }
            if u32::from(count) >= self.longest {
                return Err(RingError::ChainTooLong(self.longest));
            }
            at = at.advanced(1, self.layout.size);
        }
        Err(RingError::ChainTooLong(u32::from(self.layout.size)))
    }

    /// A descriptor's bytes, read once; `index` is below the size.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Descriptor {
        debug_assert!(index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps. Bytes need no alignment.
        Descriptor::of_packed(unsafe { read_words(self.parts.ring.add(usize::from(index)).cast()) })
    }
}
