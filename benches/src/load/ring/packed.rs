//! A packed virtqueue (virtio 1.2, section 2.8): an offer writes its descriptors into the ring, the
//! first one last.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU16, AtomicU64, fence};

use bulkhead_integration::driver::packed::{
    EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, START, WRAP, available_bits, is_used, wanted,
};

use super::{Chains, Events, Ring, Used};
use crate::load::LoadError;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::requests::{Descriptor, Layout};
use crate::load::source::Kind;

/// Where flags and id lie in the second word of a descriptor.
const FLAGS: u32 = 48;
const ID: u32 = 32;

/// The driver's side.
#[derive(Debug)]
pub struct Packed<'m> {
    ring: &'m [AtomicU64],
    tables: Vec<&'m [AtomicU64]>,
    direction: Vec<Kind>,
    driver_event: &'m [AtomicU16],
    device_event: &'m [AtomicU16],
    events: Events,
    depth: u16,
    size: u16,
    /// Descriptors that a request takes.
    slots: u16,
    next: u16,
    kicked: u16,
    last_used: u16,
}

impl<'m> Packed<'m> {
    /// An empty ring, at a place in memory that is all zeroes.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(
        memory: &'m Memory,
        layout: &Layout,
        requests: &impl Chains,
        events: Events,
    ) -> Result<Self, LoadError> {
        let mut tables = Vec::new();
        if requests.indirect() {
            for slot in 0..requests.depth() {
                let table =
                    memory.slice(requests.table(slot), 2 * usize::from(requests.chain()))?;
                write_table(table, requests, slot, Kind::Read);
                tables.push(table);
            }
        }
        let mut ring = Self {
            ring: memory.slice(layout.desc, 2 * usize::from(requests.ring_size()))?,
            tables,
            direction: vec![Kind::Read; usize::from(requests.depth())],
            driver_event: memory.slice(layout.driver, 2)?,
            device_event: memory.slice(layout.device, 2)?,
            events,
            depth: requests.depth(),
            size: requests.ring_size(),
            slots: requests.slots_of_ring(),
            next: START,
            kicked: START,
            last_used: START,
        };
        ring.say_event();
        Ok(ring)
    }

    #[inline]
    fn write(&self, place: u16, part: Descriptor, id: u16, order: std::sync::atomic::Ordering) {
        let at = 2 * usize::from(place & !WRAP);
        if let Some([addr, rest]) = self.ring.get(at..at + 2) {
            addr.store(part.addr, Relaxed);
            let flags = part.flags | available_bits(place);
            let word = u64::from(part.len) | u64::from(id) << ID | u64::from(flags) << FLAGS;
            rest.store(word, order);
        }
    }

    fn write_chain(&mut self, requests: &impl Chains, slot: u16, kind: Kind) {
        let first = self.next;
        let mut place = step(first, 1, self.size);
        for number in 1..self.slots {
            self.write(
                place,
                requests.descriptor(slot, number, kind),
                slot,
                Relaxed,
            );
            place = step(place, 1, self.size);
        }
        // With the first one the device sees them all.
        self.write(first, requests.descriptor(slot, 0, kind), slot, Release);
        self.next = place;
    }

    fn say_event(&mut self) {
        if let [place, flags] = self.driver_event {
            place.store(self.last_used, Relaxed);
            let value = match (self.events.calls, self.events.event_idx) {
                (false, _) => EVENT_DISABLE,
                (true, false) => EVENT_ENABLE,
                (true, true) => EVENT_DESC,
            };
            flags.store(value, Release);
        }
    }
}

/// The place `by` descriptors on, less than a round.
#[inline]
fn step(place: u16, by: u16, size: u16) -> u16 {
    let index = (place & !WRAP) + by;
    if index < size {
        place + by
    } else {
        (index - size) | ((place & WRAP) ^ WRAP)
    }
}

fn write_table(table: &[AtomicU64], requests: &impl Chains, slot: u16, kind: Kind) {
    for (place, words) in (0..requests.chain()).zip(table.chunks_exact(2)) {
        let part = requests.descriptor(slot, place, kind);
        if let [addr, rest] = words {
            addr.store(part.addr, Relaxed);
            // In a table the order of the entries is the chain's: no NEXT (2.8.8).
            let flags = part.flags & !bulkhead_integration::driver::desc::NEXT;
            rest.store(u64::from(part.len) | u64::from(flags) << FLAGS, Relaxed);
        }
    }
}

impl Ring for Packed<'_> {
    #[inline]
    fn offer(&mut self, requests: &impl Chains, slot: u16, kind: Kind) {
        let Some(table) = self.tables.get(usize::from(slot)) else {
            self.write_chain(requests, slot, kind);
            return;
        };
        if let Some(direction) = self.direction.get_mut(usize::from(slot))
            && *direction != kind
        {
            *direction = kind;
            write_table(table, requests, slot, kind);
        }
        self.write(self.next, requests.table_descriptor(slot), slot, Release);
        self.next = step(self.next, 1, self.size);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        // The descriptors before the device's wish: else both sides may wait for each other.
        fence(SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next);
        let [event, flags] = self.device_event else {
            return true;
        };
        let flags = flags.load(Acquire);
        wanted(event.load(Relaxed), flags, old, self.next, self.size)
    }

    #[inline]
    fn poll(&mut self) -> Result<Option<Used>, QueueError> {
        let at = 2 * usize::from(self.last_used & !WRAP) + 1;
        let Some(word) = self.ring.get(at) else {
            return Ok(None);
        };
        let flags = word.load(Acquire) >> FLAGS;
        if !is_used(u16::try_from(flags).unwrap_or(0), self.last_used) {
            return Ok(None);
        }
        // Once more: id and length as they are since the flags say so.
        let word = word.load(Relaxed);
        let id = u16::try_from((word >> ID) & 0xffff).unwrap_or(u16::MAX);
        let len = u32::try_from(word & 0xffff_ffff).unwrap_or(u32::MAX);
        if id >= self.depth {
            return Err(QueueError::NotInFlight { id: u32::from(id) });
        }
        self.last_used = step(self.last_used, self.slots, self.size);
        Ok(Some(Used { slot: id, len }))
    }

    #[inline]
    fn rearm(&mut self) {
        if self.events.calls && self.events.event_idx {
            self.say_event();
        }
    }
}
