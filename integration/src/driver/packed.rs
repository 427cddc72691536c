//! A packed virtqueue as a driver sees it (virtio 1.2, section 2.8), with every field open to
//! be written wrongly.
//!
//! A place in the ring is an index with the wrap counter in bit 15, as in event suppression
//! (2.8.10) and in the vhost-user messages about bases.

use super::DriverError;
use super::desc::{AVAIL, DESC_BYTES, Desc, NEXT, USED};
use super::memory::{GuestMemory, OutOfMemory};
use super::ring::{Ring, Used};

/// The first place: index 0, wrap counter 1.
pub const START: u16 = 1 << 15;
/// The wrap counter of a place.
pub const WRAP: u16 = 1 << 15;
/// Event suppression: always notify.
pub const EVENT_ENABLE: u16 = 0;
/// Event suppression: never notify.
pub const EVENT_DISABLE: u16 = 1;
/// Event suppression: notify at a place (with EVENT_IDX).
pub const EVENT_DESC: u16 = 2;
/// Where a descriptor's flags lie in it.
const FLAGS: u64 = 14;

/// The place `by` descriptors on, in a ring of `size`.
#[must_use]
pub fn advance(place: u16, by: u16, size: u16) -> u16 {
    let index = u32::from(place & !WRAP) + u32::from(by);
    let rounds = index / u32::from(size.max(1));
    let rest = u16::try_from(index % u32::from(size.max(1))).unwrap_or(0);
    let flip = if rounds % 2 == 1 { WRAP } else { 0 };
    rest | ((place & WRAP) ^ flip)
}

/// How many descriptors lie from `from` to `to`, below two rounds.
fn distance(from: u16, to: u16, size: u16) -> u32 {
    let round = 2 * u32::from(size);
    let linear = |place: u16| {
        let index = u32::from(place & !WRAP);
        index + if place & WRAP == 0 { round / 2 } else { 0 }
    };
    (linear(to) + round - linear(from) % round) % round.max(1)
}

/// Whether the descriptor at `place` is available in its round.
#[must_use]
pub fn is_available(flags: u16, place: u16) -> bool {
    let wrap = place & WRAP != 0;
    (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
}

/// Whether the descriptor at `place` was used in its round.
#[must_use]
pub fn is_used(flags: u16, place: u16) -> bool {
    let wrap = place & WRAP != 0;
    (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
}

/// The bits that make a descriptor available at `place`.
#[must_use]
pub fn available_bits(place: u16) -> u16 {
    if place & WRAP != 0 { AVAIL } else { USED }
}

/// The bits that make a descriptor used at `place`.
#[must_use]
pub fn used_bits(place: u16) -> u16 {
    if place & WRAP != 0 { AVAIL | USED } else { 0 }
}

/// Whether a notification for the descriptors from `old` to `new` is wanted by who wrote this
/// event suppression structure (2.8.10); both places, `event` and `flags` as they stand there.
#[must_use]
pub fn wanted(event: u16, flags: u16, old: u16, new: u16, size: u16) -> bool {
    match flags & 3 {
        EVENT_DISABLE => false,
        EVENT_DESC => distance(old, event, size) < distance(old, new, size),
        _ => true,
    }
}

impl Ring {
    /// Guest address of the descriptor at a place.
    #[must_use]
    pub fn slot_addr(&self, place: u16) -> u64 {
        self.desc + u64::from(place & !WRAP) * DESC_BYTES
    }

    /// Writes a descriptor as it is, its flags last: id, AVAIL and USED are the caller's.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn write_slot(
        &self,
        memory: &GuestMemory,
        place: u16,
        desc: &Desc,
    ) -> Result<(), OutOfMemory> {
        let at = self.slot_addr(place);
        memory.write(at, &desc.packed_bytes()[..14])?;
        memory.store_u16(at + FLAGS, desc.flags)
    }

    /// Notes that `slots` descriptors under this id are in flight, of which the device may write
    /// so many bytes: for descriptors that were written by hand.
    pub fn expect(&mut self, id: u16, slots: u16, writable_bytes: u32) {
        self.in_flight.push_back(super::ring::InFlight {
            id,
            slots,
            writable_bytes,
        });
        self.next_avail = advance(self.next_avail, slots, self.size);
    }

    /// Writes a chain at the next place. The first descriptor of a batch becomes available with
    /// [`Ring::publish`], and all that follow with it.
    pub(super) fn packed_push(
        &mut self,
        memory: &GuestMemory,
        id: u16,
        descs: &[Desc],
    ) -> Result<(), DriverError> {
        let taken: usize = self.in_flight.iter().map(|f| usize::from(f.slots)).sum();
        if taken + descs.len() > usize::from(self.size) {
            return Err(DriverError::Full);
        }
        let mut place = self.next_avail;
        for (i, desc) in descs.iter().enumerate() {
            let more = if i + 1 < descs.len() { NEXT } else { 0 };
            let flags = (desc.flags & !(AVAIL | USED)) | more | available_bits(place);
            let at = self.slot_addr(place);
            let whole = Desc { next: id, ..*desc }.packed_bytes();
            memory.write(at, &whole[..14])?;
            if self.held.is_none() {
                self.held = Some((at + FLAGS, flags));
            } else {
                memory.store_u16(at + FLAGS, flags)?;
            }
            place = advance(place, 1, self.size);
        }
        self.next_avail = place;
        Ok(())
    }

    pub(super) fn packed_publish(&mut self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        match self.held.take() {
            Some((at, flags)) => memory.store_u16(at, flags),
            None => Ok(()),
        }
    }

    pub(super) fn packed_wants_kick(&self, memory: &GuestMemory) -> Result<bool, OutOfMemory> {
        let flags = memory.load_u16(self.used + 2)?;
        let event = memory.load_u16(self.used)?;
        Ok(wanted(
            event,
            flags,
            self.kicked,
            self.next_avail,
            self.size,
        ))
    }

    pub(super) fn packed_used(&self, memory: &GuestMemory) -> Result<Option<Used>, OutOfMemory> {
        let at = self.slot_addr(self.last_used);
        if !is_used(memory.load_u16(at + FLAGS)?, self.last_used) {
            return Ok(None);
        }
        let bytes = memory.read(at, 16)?.try_into().unwrap_or_default();
        let desc = Desc::from_packed(bytes);
        Ok(Some(Used {
            id: u32::from(desc.next),
            len: desc.len,
        }))
    }

    pub(super) fn packed_ask_for_call(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        if !self.event_idx {
            return memory.store_u16(self.avail + 2, EVENT_ENABLE);
        }
        memory.store_u16(self.avail, self.last_used)?;
        memory.store_u16(self.avail + 2, EVENT_DESC)
    }

    pub(super) fn packed_suppress_calls(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        memory.store_u16(self.avail + 2, EVENT_DISABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_wrap_and_flip_their_counter() {
        assert_eq!(advance(START, 3, 4), START | 3);
        assert_eq!(advance(START | 3, 1, 4), 0);
        assert_eq!(advance(3, 2, 4), START | 1);
        assert_eq!(advance(START, 8, 4), START, "two rounds");
        assert_eq!(advance(2, 5, 3), 1, "no power of two, two rounds");
    }

    #[test]
    fn a_descriptor_is_available_or_used_in_its_own_round_only() {
        for place in [START, 0] {
            let (available, used) = (available_bits(place), used_bits(place));
            assert!(is_available(available, place) && !is_used(available, place));
            assert!(is_used(used, place) && !is_available(used, place));
            let other = place ^ WRAP;
            assert!(!is_available(available, other) && !is_used(available, other));
            assert!(!is_used(used, other));
        }
        assert!(!is_used(0, START), "a fresh ring has nothing used");
    }

    #[test]
    fn an_event_is_wanted_once_per_round() {
        let old = START | 6;
        let new = advance(old, 4, 8);
        for ahead in 0..4 {
            let event = advance(old, ahead, 8);
            assert!(wanted(event, EVENT_DESC, old, new, 8), "{ahead}");
        }
        for ahead in 4..16 {
            let event = advance(old, ahead, 8);
            assert!(!wanted(event, EVENT_DESC, old, new, 8), "{ahead}");
        }
        assert!(wanted(0, EVENT_ENABLE, old, new, 8) && !wanted(0, EVENT_DISABLE, old, new, 8));
    }
}
