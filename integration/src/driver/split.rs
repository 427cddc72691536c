//! A split virtqueue as a driver sees it (virtio 1.2, section 2.7), with every field open to
//! be written wrongly.

use super::DriverError;
use super::desc::{DESC_BYTES, Desc, linked};
use super::memory::{GuestMemory, OutOfMemory};
use super::ring::{Ring, Used};

/// Avail ring: no call wanted.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Used ring: no kick wanted.
const USED_NO_NOTIFY: u16 = 1;

impl Ring {
    /// Sets both indexes, as after GET_VRING_BASE or for a start in the middle.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn rebase(&mut self, memory: &GuestMemory, index: u16) -> Result<(), OutOfMemory> {
        self.next_avail = index;
        self.last_used = index;
        self.kicked = index;
        memory.store_u16(self.avail + 2, index)?;
        memory.store_u16(self.used + 2, index)
    }

    /// Writes one entry of the descriptor table.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn write_desc(
        &self,
        memory: &GuestMemory,
        index: u16,
        desc: &Desc,
    ) -> Result<(), OutOfMemory> {
        memory.write(self.desc + u64::from(index) * DESC_BYTES, &desc.bytes())
    }

    /// Writes a chain into the table from index `first` on, linked in order.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn write_chain(
        &self,
        memory: &GuestMemory,
        first: u16,
        descs: &[Desc],
    ) -> Result<(), OutOfMemory> {
        for (desc, index) in linked(descs, first).iter().zip(first..) {
            self.write_desc(memory, index, desc)?;
        }
        Ok(())
    }

    /// Puts a head into the avail ring; the device sees it with [`Ring::publish`].
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn push(&mut self, memory: &GuestMemory, head: u16) -> Result<(), OutOfMemory> {
        let slot = u64::from(self.next_avail % self.size.max(1));
        memory.write(self.avail + 4 + 2 * slot, &head.to_le_bytes())?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Shows the device any avail index, without a kick.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn publish_index(&self, memory: &GuestMemory, index: u16) -> Result<(), OutOfMemory> {
        memory.store_u16(self.avail + 2, index)
    }

    pub(super) fn split_wants_kick(&self, memory: &GuestMemory) -> Result<bool, OutOfMemory> {
        if !self.event_idx {
            return Ok(memory.load_u16(self.used)? & USED_NO_NOTIFY == 0);
        }
        let event = memory.load_u16(self.used + 4 + 8 * u64::from(self.size))?;
        Ok(passed(event, self.next_avail, self.kicked))
    }

    /// The entry that the used index has passed, and how many it has.
    pub(super) fn split_used(
        &self,
        memory: &GuestMemory,
    ) -> Result<Option<(Used, u16)>, DriverError> {
        let index = memory.load_u16(self.used + 2)?;
        let done = index.wrapping_sub(self.last_used);
        if done == 0 {
            return Ok(None);
        }
        if done > self.size {
            return Err(DriverError::UsedJumped {
                last: self.last_used,
                now: index,
            });
        }
        let slot = u64::from(self.last_used % self.size);
        let entry = memory.read(self.used + 4 + 8 * slot, 8)?;
        let field = |at: usize| {
            let bytes: [u8; 4] = entry[at..at + 4].try_into().unwrap_or_default();
            u32::from_le_bytes(bytes)
        };
        let used = Used {
            id: field(0),
            len: field(4),
        };
        Ok(Some((used, done)))
    }

    pub(super) fn split_ask_for_call(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        if self.event_idx {
            let used_event = self.avail + 4 + 2 * u64::from(self.size);
            return memory.store_u16(used_event, self.last_used);
        }
        memory.store_u16(self.avail, 0)
    }

    pub(super) fn split_suppress_calls(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        memory.store_u16(self.avail, AVAIL_NO_INTERRUPT)
    }
}

/// Whether `event` lies in the entries published since `old` (virtio 1.2, section 2.7.10).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_index_wraps() {
        assert!(passed(5, 6, 5));
        assert!(!passed(6, 6, 5));
        assert!(passed(0xffff, 0, 0xffff));
        assert!(!passed(0, 0, 0xffff));
    }
}
