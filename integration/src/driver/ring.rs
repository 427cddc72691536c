//! A split virtqueue as a driver sees it (virtio 1.3, section 2.7), with every field open to
//! be written wrongly.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::DriverError;
use super::memory::{GuestMemory, OutOfMemory};
use crate::frontend::wait_readable;

/// The chain goes on in `next`.
pub const NEXT: u16 = 1;
/// The device writes to this buffer.
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub const DESC_BYTES: u64 = 16;
/// Avail ring: no call wanted.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Used ring: no kick wanted.
const USED_NO_NOTIFY: u16 = 1;

/// A descriptor as it stands in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl Desc {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: 0,
            next: 0,
        }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            flags: WRITE,
            ..Self::readable(addr, len)
        }
    }

    /// A table of descriptors.
    #[must_use]
    pub fn indirect(addr: u64, len: u32) -> Self {
        Self {
            flags: INDIRECT,
            ..Self::readable(addr, len)
        }
    }

    /// Its 16 bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The chain of `descs` as table entries from index `first` on: each but the last gets [`NEXT`].
#[must_use]
pub fn linked(descs: &[Desc], first: u16) -> Vec<Desc> {
    let mut table = descs.to_vec();
    let last = table.len().saturating_sub(1);
    for ((i, desc), next) in table.iter_mut().enumerate().zip(first.wrapping_add(1)..) {
        if i < last {
            desc.flags |= NEXT;
            desc.next = next;
        }
    }
    table
}

/// An entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that is done.
    pub id: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// A virtqueue: where it lies and how far the driver is.
#[derive(Debug)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the avail ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver.
    pub call: EventFd,
    /// Device to driver: the queue failed.
    pub err: EventFd,
    /// Index that the next chain is published under.
    pub next_avail: u16,
    /// Index of the next used entry to look at.
    pub last_used: u16,
    kicked: u16,
}

impl Ring {
    /// Bytes that a ring of up to 1024 entries takes from its base address on.
    pub const SPAN_BYTES: u64 = 0x8000;

    /// A ring at `base`, all zeroes.
    ///
    /// # Errors
    /// [`DriverError`] if it is not in memory or an eventfd can't be made.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Result<Self, DriverError> {
        memory.fill(base, 0x8000, 0)?;
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            size,
            desc: base,
            avail: base + 0x4000,
            used: base + 0x5000,
            event_idx: false,
            kick: event()?,
            call: event()?,
            err: event()?,
            next_avail: 0,
            last_used: 0,
            kicked: 0,
        })
    }

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

    /// Shows the device what was pushed, and kicks it if it wants that.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn publish(&mut self, memory: &GuestMemory) -> Result<(), DriverError> {
        self.publish_index(memory, self.next_avail)?;
        if self.wants_kick(memory)? {
            self.kick.write(1)?;
        }
        self.kicked = self.next_avail;
        Ok(())
    }

    /// Shows the device any avail index, without a kick.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn publish_index(&self, memory: &GuestMemory, index: u16) -> Result<(), OutOfMemory> {
        memory.store_u16(self.avail + 2, index)
    }

    fn wants_kick(&self, memory: &GuestMemory) -> Result<bool, OutOfMemory> {
        if !self.event_idx {
            return Ok(memory.load_u16(self.used)? & USED_NO_NOTIFY == 0);
        }
        let event = memory.load_u16(self.used + 4 + 8 * u64::from(self.size))?;
        Ok(passed(event, self.next_avail, self.kicked))
    }

    /// The next used entry, if there is one; no waiting.
    ///
    /// # Errors
    /// [`DriverError::UsedJumped`] if the device published more than was ever offered.
    pub fn poll_used(&mut self, memory: &GuestMemory) -> Result<Option<Used>, DriverError> {
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
        self.last_used = self.last_used.wrapping_add(1);
        let field = |at: usize| {
            let bytes: [u8; 4] = entry[at..at + 4].try_into().unwrap_or_default();
            u32::from_le_bytes(bytes)
        };
        Ok(Some(Used {
            id: field(0),
            len: field(4),
        }))
    }

    /// The next used entry, after waiting for a call where there is none yet.
    ///
    /// # Errors
    /// [`DriverError::NothingUsed`] after `patience`; [`DriverError::CallLost`] if the entry came
    /// without the call that was asked for.
    pub fn wait_used(
        &mut self,
        memory: &GuestMemory,
        patience: Duration,
    ) -> Result<Used, DriverError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(used) = self.poll_used(memory)? {
                return Ok(used);
            }
            self.ask_for_call(memory)?;
            // The device may have used it between the look and the wish.
            if let Some(used) = self.poll_used(memory)? {
                return Ok(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let called = wait_readable(self.call.as_fd(), left);
            if called {
                let _ = self.call.read();
            } else if self.poll_used(memory)?.is_some() {
                return Err(DriverError::CallLost);
            } else {
                return Err(DriverError::NothingUsed);
            }
        }
    }

    fn ask_for_call(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        if self.event_idx {
            let used_event = self.avail + 4 + 2 * u64::from(self.size);
            return memory.store_u16(used_event, self.last_used);
        }
        memory.store_u16(self.avail, 0)
    }

    /// Tells the device that no call is wanted (without EVENT_IDX).
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn suppress_calls(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        memory.store_u16(self.avail, AVAIL_NO_INTERRUPT)
    }

    /// Whether the device signalled that the queue failed, within `patience`.
    #[must_use]
    pub fn has_failed(&self, patience: Duration) -> bool {
        wait_readable(self.err.as_fd(), patience)
    }

    /// Numbers of the three eventfds, for messages of tests.
    #[must_use]
    pub fn event_numbers(&self) -> [i32; 3] {
        [
            self.kick.as_fd().as_raw_fd(),
            self.call.as_fd().as_raw_fd(),
            self.err.as_fd().as_raw_fd(),
        ]
    }
}

/// Whether `event` lies in the entries published since `old` (virtio 1.3, section 2.7.10).
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

    #[test]
    fn a_chain_is_linked_but_for_its_last() {
        let table = linked(&[Desc::readable(1, 2), Desc::writable(3, 4)], 7);
        assert_eq!((table[0].flags, table[0].next), (NEXT, 8));
        assert_eq!((table[1].flags, table[1].next), (WRITE, 0));
        assert_eq!(table[0].bytes()[12..], [1, 0, 8, 0]);
    }
}
