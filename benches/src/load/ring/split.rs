//! A split virtqueue (virtio 1.2, section 2.7): the descriptors of a request stay where they are,
//! an offer writes the avail ring only, and the data descriptors when a request changes direction.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};

use super::{Chains, Events, Ring, Used, write_linked};
use crate::load::LoadError;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::requests::Layout;
use crate::load::source::Kind;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// No request begins at this head.
const NONE: u16 = u16::MAX;
/// Where the entries begin in the avail ring, in 16-bit words.
const ENTRIES: usize = 2;
/// With EVENT_IDX the device calls when it passes `used_event`: renewed this often, never.
const REARM_EVERY: u16 = 1 << 14;

/// The driver's side.
#[derive(Debug)]
pub struct Split<'m> {
    /// Each request's own descriptors: of the ring's table, or of the indirect tables.
    chains: Tables<'m>,
    avail: &'m [AtomicU16],
    used_head: &'m [AtomicU16],
    used: &'m [AtomicU32],
    avail_event: &'m AtomicU16,
    heads: Vec<u16>,
    slot_of_head: Vec<u16>,
    direction: Vec<Kind>,
    events: Events,
    mask: u16,
    next: u16,
    published: u16,
    pub(super) last_used: u16,
    seen: u16,
    rearmed: u16,
}

#[derive(Debug)]
enum Tables<'m> {
    Direct(&'m [AtomicU64]),
    Indirect(Vec<&'m [AtomicU64]>),
}

impl<'m> Split<'m> {
    /// An empty ring, at a place in memory that is all zeroes, with every request's chain written.
    /// The ring's size is a power of two.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(
        memory: &'m Memory,
        layout: &Layout,
        requests: &impl Chains,
        events: Events,
    ) -> Result<Self, LoadError> {
        let size = usize::from(requests.ring_size());
        let table = memory.slice::<AtomicU64>(layout.desc, 2 * size)?;
        let event = memory.slice(layout.device + 4 + 8 * size, 1)?;
        let [avail_event] = event else {
            return Err(LoadError::OutOfMemory {
                at: layout.device,
                count: size,
            });
        };
        let heads: Vec<u16> = (0..requests.depth())
            .map(|slot| slot * requests.slots_of_ring())
            .collect();
        let mut slot_of_head = vec![NONE; size];
        for (slot, head) in (0u16..).zip(&heads) {
            if let Some(entry) = slot_of_head.get_mut(usize::from(*head)) {
                *entry = slot;
            }
        }
        let mut ring = Self {
            chains: Tables::new(memory, table, requests, &heads)?,
            avail: memory.slice(layout.driver, ENTRIES + size + 1)?,
            used_head: memory.slice(layout.device, 2)?,
            used: memory.slice(layout.device + 4, 2 * size)?,
            avail_event,
            heads,
            slot_of_head,
            direction: vec![Kind::Read; usize::from(requests.depth())],
            events,
            mask: requests.ring_size().wrapping_sub(1),
            next: 0,
            published: 0,
            last_used: 0,
            seen: 0,
            rearmed: 0,
        };
        for slot in 0..requests.depth() {
            ring.write_chain(requests, slot, Kind::Read);
        }
        ring.suppress_or_ask();
        Ok(ring)
    }

    fn write_chain(&mut self, requests: &impl Chains, slot: u16, kind: Kind) {
        let (table, first) = match &self.chains {
            Tables::Direct(table) => {
                let head = self.heads.get(usize::from(slot)).copied();
                (*table, head.unwrap_or(0))
            }
            Tables::Indirect(tables) => {
                let table = tables.get(usize::from(slot)).copied();
                (table.unwrap_or_default(), 0)
            }
        };
        for (place, index) in (0..requests.chain()).zip(first..) {
            let part = requests.descriptor(slot, place, kind);
            write_linked(table, usize::from(index), part, index + 1);
        }
    }

    fn suppress_or_ask(&self) {
        let Some(flags) = self.avail.first() else {
            return;
        };
        if !self.events.event_idx {
            let value = if self.events.calls { 0 } else { NO_INTERRUPT };
            flags.store(value, Relaxed);
        } else if let Some(used_event) = self.avail.last() {
            // The device calls when it passes this index: the next one, or one that it has passed.
            let offset = u16::from(!self.events.calls);
            used_event.store(self.last_used.wrapping_sub(offset), Relaxed);
        }
    }

    fn load_used_index(&mut self) -> Result<bool, QueueError> {
        let Some(index) = self.used_head.get(1).map(|index| index.load(Acquire)) else {
            return Ok(false);
        };
        if index == self.last_used {
            return Ok(false);
        }
        let in_flight = self.published.wrapping_sub(self.last_used);
        if index.wrapping_sub(self.last_used) > in_flight {
            return Err(QueueError::UsedJumped {
                last: self.last_used,
                now: index,
                in_flight,
            });
        }
        self.seen = index;
        Ok(true)
    }
}

impl<'m> Tables<'m> {
    fn new(
        memory: &'m Memory,
        table: &'m [AtomicU64],
        requests: &impl Chains,
        heads: &[u16],
    ) -> Result<Self, LoadError> {
        if !requests.indirect() {
            return Ok(Self::Direct(table));
        }
        let mut tables = Vec::new();
        for (slot, head) in (0..requests.depth()).zip(heads) {
            write_linked(
                table,
                usize::from(*head),
                requests.table_descriptor(slot),
                0,
            );
            tables.push(memory.slice(requests.table(slot), 2 * usize::from(requests.chain()))?);
        }
        Ok(Self::Indirect(tables))
    }
}

impl Ring for Split<'_> {
    #[inline]
    fn offer(&mut self, requests: &impl Chains, slot: u16, kind: Kind) {
        let index = usize::from(slot);
        let (Some(head), Some(direction)) = (self.heads.get(index), self.direction.get_mut(index))
        else {
            return;
        };
        let entry = self.avail.get(ENTRIES + usize::from(self.next & self.mask));
        if let Some(entry) = entry {
            entry.store(*head, Relaxed);
        }
        self.next = self.next.wrapping_add(1);
        if *direction != kind {
            *direction = kind;
            self.write_chain(requests, slot, kind);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.next;
        if let Some(index) = self.avail.get(1) {
            index.store(self.next, Release);
        }
        // The index before the device's wish: else both sides may wait for each other.
        fence(SeqCst);
        if self.events.event_idx {
            let event = self.avail_event.load(Relaxed);
            let passed = self.next.wrapping_sub(event).wrapping_sub(1);
            passed < self.next.wrapping_sub(old)
        } else {
            let flags = self
                .used_head
                .first()
                .map_or(0, |flags| flags.load(Relaxed));
            flags & NO_NOTIFY == 0
        }
    }

    #[inline]
    fn poll(&mut self) -> Result<Option<Used>, QueueError> {
        if self.last_used == self.seen && !self.load_used_index()? {
            return Ok(None);
        }
        let at = 2 * usize::from(self.last_used & self.mask);
        let Some([id, len]) = self.used.get(at..at + 2) else {
            return Ok(None);
        };
        let (id, len) = (id.load(Relaxed), len.load(Relaxed));
        let slot = usize::try_from(id)
            .ok()
            .and_then(|id| self.slot_of_head.get(id));
        let slot = slot.copied().filter(|slot| *slot != NONE);
        let slot = slot.ok_or(QueueError::NotInFlight { id })?;
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(Used { slot, len }))
    }

    #[inline]
    fn rearm(&mut self) {
        let renew = self.events.calls || self.last_used.wrapping_sub(self.rearmed) >= REARM_EVERY;
        if self.events.event_idx && renew {
            self.rearmed = self.last_used;
            self.suppress_or_ask();
        }
    }
}
