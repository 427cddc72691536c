//! The device side of a packed virtqueue, slow and plain, written from the specification
//! (virtio 1.2, section 2.8): what drivers here are tried against, and what a fast device is
//! compared with.
//!
//! Strict: whatever a driver must not do breaks the ring. Chains are returned as ranges; nothing is
//! copied and nothing remembered but places and ids.

use super::desc::{Desc, INDIRECT, NEXT, WRITE};
use super::memory::{GuestMemory, OutOfMemory};
use super::packed::{
    EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, START, advance, is_available, used_bits, wanted,
};

/// A chain that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelChain {
    /// Its id.
    pub id: u16,
    /// Descriptors of the ring that it took.
    pub slots: u16,
    /// Guest address and bytes of what the device reads, in order.
    pub readable: Vec<(u64, u32)>,
    /// Guest address and bytes of what the device writes, in order.
    pub writable: Vec<(u64, u32)>,
}

/// How a driver broke its ring.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A part of the ring, or an indirect table, is not in memory.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// What the driver did.
    #[error("{0}")]
    Rule(&'static str),
}

/// A device's end of a packed ring.
#[derive(Debug, Clone)]
pub struct Model {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor ring.
    pub desc: u64,
    /// Guest address of the driver event suppression structure.
    pub driver_event: u64,
    /// Guest address of the device event suppression structure.
    pub device_event: u64,
    /// INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Place of the next descriptor to take.
    pub next_avail: u16,
    /// Place of the next descriptor to use.
    pub next_used: u16,
    /// `next_used` when the driver was last thought of.
    signalled: u16,
    in_flight: Vec<u16>,
}

impl Model {
    /// A ring at its start.
    #[must_use]
    pub fn new(size: u16, desc: u64, driver_event: u64, device_event: u64) -> Self {
        Self {
            size,
            desc,
            driver_event,
            device_event,
            indirect: true,
            event_idx: false,
            next_avail: START,
            next_used: START,
            signalled: START,
            in_flight: Vec::new(),
        }
    }

    /// Chains that were taken and not used.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn slot(&self, memory: &GuestMemory, place: u16) -> Result<Desc, OutOfMemory> {
        let at = self.desc + u64::from(place & !START) * 16;
        // Flags first: what they announce is read after them (2.8.22).
        let flags = memory.load_u16(at + 14)?;
        let bytes = memory.read(at, 16)?.try_into().unwrap_or_default();
        Ok(Desc {
            flags,
            ..Desc::from_packed(bytes)
        })
    }

    /// Takes the next chain, if there is one.
    ///
    /// # Errors
    /// [`Broken`]; nothing was taken.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<ModelChain>, Broken> {
        let first = self.slot(memory, self.next_avail)?;
        if !is_available(first.flags, self.next_avail) {
            return Ok(None);
        }
        let mut chain = ModelChain {
            id: first.next,
            slots: 0,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let (mut place, mut desc) = (self.next_avail, first);
        loop {
            chain.slots += 1;
            // 2.8.6: the id stands in the last descriptor of a chain.
            chain.id = desc.next;
            if desc.flags & INDIRECT != 0 {
                if desc.flags & NEXT != 0 || chain.slots > 1 {
                    return Err(Broken::Rule("a table in a chain of several descriptors"));
                }
                self.table(memory, desc, &mut chain)?;
            } else {
                add(&mut chain, desc)?;
            }
            if desc.flags & NEXT == 0 {
                break;
            }
            if chain.slots == self.size {
                return Err(Broken::Rule("a chain longer than its ring"));
            }
            place = advance(place, 1, self.size);
            desc = self.slot(memory, place)?;
            if !is_available(desc.flags, place) {
                return Err(Broken::Rule(
                    "a chain that goes on where nothing is available",
                ));
            }
        }
        if chain.id >= self.size {
            return Err(Broken::Rule("an id outside the ring"));
        }
        if self.in_flight.contains(&chain.id) {
            return Err(Broken::Rule("an id that is in flight"));
        }
        self.in_flight.push(chain.id);
        self.next_avail = advance(self.next_avail, chain.slots, self.size);
        Ok(Some(chain))
    }

    /// A table's descriptors in their order: NEXT, AVAIL, USED and the ids mean nothing in it
    /// (2.8.8).
    fn table(
        &self,
        memory: &GuestMemory,
        outer: Desc,
        chain: &mut ModelChain,
    ) -> Result<(), Broken> {
        if !self.indirect {
            return Err(Broken::Rule("a table that was not negotiated"));
        }
        if outer.len == 0 || !outer.len.is_multiple_of(16) {
            return Err(Broken::Rule("a table that is not whole descriptors"));
        }
        for i in 0..u64::from(outer.len / 16) {
            let at = outer.addr.checked_add(i * 16);
            let at = at.ok_or(Broken::Rule("a table that wraps"))?;
            let bytes = memory.read(at, 16)?.try_into().unwrap_or_default();
            let desc = Desc::from_packed(bytes);
            if desc.flags & INDIRECT != 0 {
                return Err(Broken::Rule("a table in a table"));
            }
            add(chain, desc)?;
        }
        Ok(())
    }

    /// Gives a chain back: one used descriptor, whose flags come last.
    ///
    /// # Errors
    /// [`Broken`] if the ring is not in memory any more.
    pub fn push_used(
        &mut self,
        memory: &GuestMemory,
        chain: &ModelChain,
        len: u32,
    ) -> Result<(), Broken> {
        self.in_flight.retain(|id| *id != chain.id);
        let write = if len > 0 { WRITE } else { 0 };
        let desc = Desc {
            addr: 0,
            len,
            flags: used_bits(self.next_used) | write,
            next: chain.id,
        };
        let at = self.desc + u64::from(self.next_used & !START) * 16;
        // The address is reserved in a used descriptor (2.8.4): it stays as it is.
        memory.write(at + 8, &desc.packed_bytes()[8..14])?;
        memory.store_u16(at + 14, desc.flags)?;
        self.next_used = advance(self.next_used, chain.slots, self.size);
        Ok(())
    }

    /// Whether the driver wants to be called for what was used since this was last asked.
    ///
    /// # Errors
    /// [`Broken`] if its structure is not in memory any more.
    pub fn call_wanted(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        let old = std::mem::replace(&mut self.signalled, self.next_used);
        if old == self.next_used {
            return Ok(false);
        }
        let event = memory.load_u16(self.driver_event)?;
        let flags = memory.load_u16(self.driver_event + 2)?;
        // 2.8.10: places are for EVENT_IDX alone; without it the value is reserved.
        if flags & 3 == EVENT_DESC && !self.event_idx {
            return Ok(true);
        }
        Ok(wanted(event, flags, old, self.next_used, self.size))
    }

    /// Asks for a kick at the next chain.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn arm(&self, memory: &GuestMemory) -> Result<(), Broken> {
        memory.store_u16(self.device_event, self.next_avail)?;
        let how = if self.event_idx {
            EVENT_DESC
        } else {
            EVENT_ENABLE
        };
        Ok(memory.store_u16(self.device_event + 2, how)?)
    }

    /// Asks for no kicks.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn disarm(&self, memory: &GuestMemory) -> Result<(), Broken> {
        Ok(memory.store_u16(self.device_event + 2, EVENT_DISABLE)?)
    }
}

fn add(chain: &mut ModelChain, desc: Desc) -> Result<(), Broken> {
    let range = (desc.addr, desc.len);
    if desc.flags & WRITE != 0 {
        chain.writable.push(range);
    } else if chain.writable.is_empty() {
        chain.readable.push(range);
    } else {
        return Err(Broken::Rule("a readable descriptor behind a writable one"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
