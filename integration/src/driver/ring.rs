//! A virtqueue as a driver sees it, split or packed behind one interface: offer, publish, wait.
//!
//! What only one format has, and what attacks write by hand, lies in [`super::split`] and
//! [`super::packed`].

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

pub use super::desc::{DESC_BYTES, Desc, INDIRECT, NEXT, WRITE, linked};

use super::DriverError;
use super::memory::{GuestMemory, OutOfMemory};
use super::packed::{START, advance};
use crate::frontend::{Events, wait_readable};

/// What the device gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head (split) or id (packed) of the chain that is done.
    pub id: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// How a ring is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// virtio 1.2, section 2.7.
    Split,
    /// virtio 1.2, section 2.8.
    Packed,
}

/// A chain that the device has.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFlight {
    pub(super) id: u16,
    /// Descriptors of the ring that it takes.
    pub(super) slots: u16,
    pub(super) writable_bytes: u32,
}

/// A virtqueue: where it lies and how far the driver is.
#[derive(Debug)]
pub struct Ring {
    /// Split or packed.
    pub format: Format,
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table; packed: of the descriptor ring.
    pub desc: u64,
    /// Guest address of the avail ring; packed: of the driver event suppression structure.
    pub avail: u64,
    /// Guest address of the used ring; packed: of the device event suppression structure.
    pub used: u64,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Whether IN_ORDER was negotiated: chains are used in the order in which they were offered.
    pub in_order: bool,
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver.
    pub call: EventFd,
    /// Device to driver: the queue failed.
    pub err: EventFd,
    /// Split: index that the next chain is published under. Packed: place of its first descriptor.
    pub next_avail: u16,
    /// Split: index of the next used entry to look at. Packed: its place.
    pub last_used: u16,
    /// `next_avail` as it was at the last publication.
    pub(super) kicked: u16,
    /// Packed: where the flags that make a batch available belong.
    pub(super) held: Option<(u64, u16)>,
    /// Chains offered and not used yet, in the order of their offers.
    pub(super) in_flight: VecDeque<InFlight>,
    /// Chains that the device skipped or used, in order, and that were not fetched yet.
    done: VecDeque<Used>,
}

impl Ring {
    /// Bytes that a ring of up to 1024 entries takes from its base address on.
    pub const SPAN_BYTES: u64 = 0x8000;

    /// A split ring at `base`, all zeroes.
    ///
    /// # Errors
    /// [`DriverError`] if it is not in memory or an eventfd can't be made.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Result<Self, DriverError> {
        Self::with_format(memory, base, size, Format::Split)
    }

    /// A ring at `base`, all zeroes.
    ///
    /// # Errors
    /// [`DriverError`] if it is not in memory or an eventfd can't be made.
    pub fn with_format(
        memory: &GuestMemory,
        base: u64,
        size: u16,
        format: Format,
    ) -> Result<Self, DriverError> {
        memory.fill(base, 0x8000, 0)?;
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let start = if format == Format::Packed { START } else { 0 };
        Ok(Self {
            format,
            size,
            desc: base,
            avail: base + 0x4000,
            used: base + 0x5000,
            event_idx: false,
            in_order: false,
            kick: event()?,
            call: event()?,
            err: event()?,
            next_avail: start,
            last_used: start,
            kicked: start,
            held: None,
            in_flight: VecDeque::new(),
            done: VecDeque::new(),
        })
    }

    /// A ring with nothing in it and all indexes as at first: after a reset of the device.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn restart(&mut self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        for part in self.parts() {
            let len = usize::try_from(part.end - part.start).unwrap_or(0);
            memory.fill(part.start, len, 0)?;
        }
        let start = if self.is_packed() { START } else { 0 };
        (self.next_avail, self.last_used, self.kicked) = (start, start, start);
        self.held = None;
        self.in_flight.clear();
        self.done.clear();
        Ok(())
    }

    /// Where its parts lie: the one with descriptors, the driver's, the device's.
    #[must_use]
    pub fn parts(&self) -> [Range<u64>; 3] {
        let size = u64::from(self.size);
        let bytes = match self.format {
            Format::Split => [DESC_BYTES * size, 2 * size + 6, 8 * size + 6],
            Format::Packed => [DESC_BYTES * size, 4, 4],
        };
        let at = [self.desc, self.avail, self.used];
        [0, 1, 2].map(|i| at[i]..at[i] + bytes[i])
    }

    /// Takes everything that was offered for used, without looking: for rings that others rewrite.
    pub fn forget(&mut self) {
        self.last_used = self.next_avail;
        self.held = None;
        self.in_flight.clear();
        self.done.clear();
    }

    /// Whether it is a packed ring.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.format == Format::Packed
    }

    /// Its eventfds.
    #[must_use]
    pub fn events(&self) -> Events<'_> {
        Events {
            err: &self.err,
            call: &self.call,
            kick: &self.kick,
        }
    }

    /// What SET_VRING_BASE says of a ring from which everything that was taken is used: the next
    /// entry, for a packed ring twice (avail in the low half, used in the high one).
    #[must_use]
    pub fn base(&self) -> u32 {
        match self.format {
            Format::Split => u32::from(self.last_used),
            Format::Packed => u32::from(self.last_used) << 16 | u32::from(self.last_used),
        }
    }

    /// Offers a chain under `id`; the device sees it with [`Ring::publish`]. Split: `id` is the
    /// head, and the chain lies in the table from there on.
    ///
    /// # Errors
    /// [`DriverError::Full`] for a packed ring without room for it.
    pub fn offer(
        &mut self,
        memory: &GuestMemory,
        id: u16,
        descs: &[Desc],
    ) -> Result<(), DriverError> {
        let slots = u16::try_from(descs.len()).unwrap_or(u16::MAX);
        match self.format {
            Format::Split => {
                self.write_chain(memory, id, descs)?;
                self.push(memory, id)?;
            }
            Format::Packed => self.packed_push(memory, id, descs)?,
        }
        self.note(id, slots, descs);
        Ok(())
    }

    /// As [`Ring::offer`], with the chain in an indirect table at guest address `at`.
    ///
    /// # Errors
    /// As [`Ring::offer`].
    pub fn offer_table(
        &mut self,
        memory: &GuestMemory,
        id: u16,
        at: u64,
        descs: &[Desc],
    ) -> Result<(), DriverError> {
        let bytes = self.write_table(memory, at, descs)?;
        let outer = [Desc::indirect(at, bytes)];
        match self.format {
            Format::Split => {
                self.write_chain(memory, id, &outer)?;
                self.push(memory, id)?;
            }
            Format::Packed => self.packed_push(memory, id, &outer)?,
        }
        self.note(id, 1, descs);
        Ok(())
    }

    /// Writes an indirect table in this ring's format: linked where it is split, in order where it
    /// is packed. Its bytes.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn write_table(
        &self,
        memory: &GuestMemory,
        at: u64,
        descs: &[Desc],
    ) -> Result<u32, OutOfMemory> {
        let table: Vec<u8> = match self.format {
            Format::Split => linked(descs, 0).iter().flat_map(Desc::bytes).collect(),
            Format::Packed => descs.iter().flat_map(Desc::packed_bytes).collect(),
        };
        memory.write(at, &table)?;
        Ok(u32::try_from(table.len()).unwrap_or(u32::MAX))
    }

    fn note(&mut self, id: u16, slots: u16, descs: &[Desc]) {
        if !self.is_packed() && !self.in_order {
            return;
        }
        let writable = descs.iter().filter(|d| d.flags & WRITE != 0);
        let writable_bytes = writable.fold(0u32, |sum, d| sum.wrapping_add(d.len));
        self.in_flight.push_back(InFlight {
            id,
            slots,
            writable_bytes,
        });
    }

    /// Shows the device what was offered, and kicks it if it wants that.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn publish(&mut self, memory: &GuestMemory) -> Result<(), DriverError> {
        if self.publish_quietly(memory)? {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// Shows the device what was offered, without a kick; whether it wants one.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn publish_quietly(&mut self, memory: &GuestMemory) -> Result<bool, DriverError> {
        let wanted = match self.format {
            Format::Split => {
                self.publish_index(memory, self.next_avail)?;
                self.split_wants_kick(memory)?
            }
            Format::Packed => {
                self.packed_publish(memory)?;
                self.packed_wants_kick(memory)?
            }
        };
        self.kicked = self.next_avail;
        Ok(wanted)
    }

    /// The next used chain, if there is one; no waiting.
    ///
    /// # Errors
    /// [`DriverError::UsedJumped`] if the device published more than was ever offered,
    /// [`DriverError::NotInFlight`] if it used what it does not have.
    pub fn poll_used(&mut self, memory: &GuestMemory) -> Result<Option<Used>, DriverError> {
        if let Some(used) = self.done.pop_front() {
            return Ok(Some(used));
        }
        let found = match self.format {
            Format::Split => self.split_used(memory)?,
            Format::Packed => self.packed_used(memory)?.map(|used| (used, u16::MAX)),
        };
        let Some((used, most)) = found else {
            return Ok(None);
        };
        if self.in_order {
            self.use_in_order(used, most)?;
            return Ok(self.done.pop_front());
        }
        match self.format {
            Format::Split => self.last_used = self.last_used.wrapping_add(1),
            Format::Packed => {
                let known = self.in_flight.iter();
                let at = known.clone().position(|f| u32::from(f.id) == used.id);
                let flight = at.and_then(|at| self.in_flight.remove(at));
                let flight = flight.ok_or(DriverError::NotInFlight(used))?;
                self.last_used = advance(self.last_used, flight.slots, self.size);
            }
        }
        Ok(Some(used))
    }

    /// With IN_ORDER one entry may stand for a batch: it names the batch's last chain, and those
    /// before it count as used wholly (2.7.9, 2.8.14). At most `most` can be meant.
    fn use_in_order(&mut self, used: Used, most: u16) -> Result<(), DriverError> {
        let count = self.in_flight.iter().take(usize::from(most));
        let last = count.map(|f| u32::from(f.id)).position(|id| id == used.id);
        let last = last.ok_or(DriverError::NotInFlight(used))?;
        for (i, flight) in self.in_flight.drain(..=last).enumerate() {
            self.last_used = match self.format {
                Format::Split => self.last_used.wrapping_add(1),
                Format::Packed => advance(self.last_used, flight.slots, self.size),
            };
            let whole = Used {
                id: u32::from(flight.id),
                len: flight.writable_bytes,
            };
            self.done.push_back(if i == last { used } else { whole });
        }
        Ok(())
    }

    /// The next used chain, after waiting for a call where there is none yet.
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

    /// Asks the device for a call with the next chain that it uses.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn ask_for_call(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        match self.format {
            Format::Split => self.split_ask_for_call(memory),
            Format::Packed => self.packed_ask_for_call(memory),
        }
    }

    /// Tells the device that no call is wanted (split: without EVENT_IDX).
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn suppress_calls(&self, memory: &GuestMemory) -> Result<(), OutOfMemory> {
        match self.format {
            Format::Split => self.split_suppress_calls(memory),
            Format::Packed => self.packed_suppress_calls(memory),
        }
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
