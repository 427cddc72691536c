//! The split virtqueue (virtio 1.2, 2.7), device side.
//!
//! Geometry is fixed when the queue starts. An avail entry is read once, a descriptor is read
//! once; what is checked is the copy. Used entries are written as requests end and made visible by
//! one store per batch ([`SplitQueue::publish`]).
//!
//! UNSAFETY: the parts of a ring are raw addresses in guest memory. They are looked up, aligned and
//! with their whole length, when the queue starts or gets other memory, and the queue holds a
//! lease on that memory for as long as it has them. Indexes into them are masked or compared first.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod again;
mod announce;
mod run;
mod unpop;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::chain::{Chain, Descriptor, INDIRECT, NEXT, longest, table};
use super::dying;
use super::inflight::{QueueRegion, SplitRegion};
use super::notify::{NO_INTERRUPT, NO_NOTIFY, passed};
use super::order::Order;
use super::park::Parked;
use super::{QueueFeatures, RingError};
use crate::crash_point;
use crate::memory::{
    GuestMemory, Lease, full_fence, read_words, shared_u16, will_read, will_write,
};
use crate::worker::message::RingLayout;

/// Largest queue (2.7).
const MAX_SIZE: u16 = 32768;

/// Avail entries that are read together at most; a power of two.
const AHEAD: u16 = 16;

/// An entry of the used ring (2.7.8).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct UsedEntry {
    id: u32,
    len: u32,
}

/// Where the parts of a ring lie in this process.
#[derive(Debug, Clone, Copy)]
struct Parts {
    desc: NonNull<Descriptor>,
    /// flags, idx, ring[size], used_event
    avail: NonNull<u16>,
    /// flags, idx
    used: NonNull<u16>,
    used_ring: NonNull<UsedEntry>,
    avail_event: NonNull<u16>,
}

/// A running split queue.
#[derive(Debug)]
pub struct SplitQueue {
    lease: Lease,
    parts: Parts,
    layout: RingLayout,
    features: QueueFeatures,
    /// Longest chain that is followed.
    longest: u32,
    /// The avail entry that is next.
    next_avail: u16,
    /// The avail index as it was read last.
    seen_avail: u16,
    /// Entries from the next one on, as they were read, each where its index falls.
    ahead: [u16; AHEAD as usize],
    /// The index behind them.
    ahead_end: u16,
    /// The used entry that is written next.
    next_used: u16,
    /// The used index as the driver sees it.
    published: u16,
    /// The used index when the driver's wish to be called was looked at last.
    asked: u16,
    /// For each head whether it was taken and not yet used. (A bit for each would make those of a batch wait for each
    /// other's store.)
    in_flight: Box<[bool]>,
    in_flight_count: u16,
    /// The driver was told not to kick.
    quiet: bool,
    /// With VIRTIO_F_IN_ORDER: what has to be shown in which order.
    order: Option<Order>,
    /// Where what is in flight is kept for a successor.
    region: Option<SplitRegion>,
    /// Where writes to the used ring are marked: its guest address.
    log: Option<u64>,
    /// Heads in flight that whoever served the ring before had taken, and that are to be taken again: the next
    /// one is the last.
    again: Vec<u16>,
}

fn locate(memory: &GuestMemory, layout: &RingLayout) -> Result<Parts, RingError> {
    let place = |part: &'static str, guest_addr: u64| move || RingError::Place { part, guest_addr };
    let size = usize::from(layout.size);
    let desc = memory
        .aligned_span(layout.desc, size)
        .ok_or_else(place("descriptor table", layout.desc))?;
    // flags, idx, the ring, and the event field behind it (2.7: also without EVENT_IDX).
    let avail = memory
        .aligned_span(layout.avail, size + 3)
        .ok_or_else(place("avail ring", layout.avail))?;
    let at_used = place("used ring", layout.used);
    let used_bytes = 4 + 8 * size + 2;
    let used = memory
        .span(layout.used, used_bytes as u64)
        .filter(|at| at.cast::<u32>().is_aligned())
        .ok_or_else(at_used)?;
    // SAFETY: both lie inside the span just looked up.
    let (used_ring, avail_event) = unsafe { (used.add(4), used.add(4 + 8 * size)) };
    Ok(Parts {
        desc,
        avail,
        used: used.cast(),
        used_ring: used_ring.cast(),
        avail_event: avail_event.cast(),
    })
}

impl SplitQueue {
    /// Whether a ring can lie there, in this memory.
    ///
    /// # Errors
    /// [`RingError::Place`].
    pub fn check_place(memory: &GuestMemory, layout: &RingLayout) -> Result<(), RingError> {
        locate(memory, layout).map(drop)
    }

    /// A queue over a ring in guest memory.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Place`].
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: RingLayout,
        next_avail: u16,
        features: QueueFeatures,
    ) -> Result<Self, RingError> {
        if !layout.size.is_power_of_two() || layout.size > MAX_SIZE {
            return Err(RingError::Size(layout.size));
        }
        let parts = locate(memory, &layout)?;
        let mut queue = Self {
            lease: Lease::new(Arc::clone(memory)),
            parts,
            layout,
            features,
            longest: longest(layout.size),
            next_avail,
            seen_avail: next_avail,
            ahead: [0; AHEAD as usize],
            ahead_end: next_avail,
            next_used: 0,
            published: 0,
            asked: 0,
            in_flight: vec![false; usize::from(layout.size)].into_boxed_slice(),
            in_flight_count: 0,
            quiet: false,
            order: features.in_order.then(|| Order::new(layout.size)),
            region: None,
            log: None,
            again: Vec::new(),
        };
        // The driver's view of the used ring is the truth about it (a restart goes on there).
        queue.published = queue.used(1).load(Ordering::Relaxed);
        queue.next_used = queue.published;
        queue.asked = queue.published;
        queue.disarm();
        Ok(queue)
    }

    /// Serves the same ring from other memory from now on. Chains that are in flight keep theirs.
    ///
    /// # Errors
    /// [`RingError::Place`]; the queue is then as before.
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        self.parts = locate(memory, &self.layout)?;
        self.lease = Lease::new(Arc::clone(memory));
        Ok(())
    }

    /// Keeps what is in flight there, from now on; nothing is in flight yet.
    pub fn track(&mut self, region: QueueRegion) {
        self.region = Some(SplitRegion::new(region, self.layout.size, self.published));
    }

    /// Its state, for whoever serves it next; nothing is in flight but what is to be taken again, the next one last,
    /// and everything that ended is published.
    pub(super) fn park(self) -> (Parked, Option<SplitRegion>, Vec<u16>) {
        debug_assert!(usize::from(self.in_flight_count) == self.again.len());
        debug_assert!(self.next_used == self.asked);
        let parked = Parked {
            memory: Arc::clone(&self.lease),
            layout: self.layout,
            features: self.features,
            avail: self.next_avail,
            used: self.published,
            log: self.log,
        };
        (parked, self.region, self.again)
    }

    /// Goes on where [`SplitQueue::park`] left it, whatever the guest has written to its used index since.
    ///
    /// # Errors
    /// As [`SplitQueue::new`].
    pub(super) fn resume(
        parked: Parked,
        region: Option<SplitRegion>,
        again: Vec<u16>,
    ) -> Result<Self, RingError> {
        let (layout, features) = (parked.layout, parked.features);
        let mut queue = Self::new(&parked.memory, layout, parked.avail, features)?;
        (queue.next_used, queue.published) = (parked.used, parked.used);
        queue.asked = parked.used;
        queue.region = region;
        queue.set_again(again);
        queue.set_log(parked.log);
        Ok(queue)
    }

    /// Marks writes to the used ring in the memory's dirty log, as of a used ring at this address.
    pub fn set_log(&mut self, used_guest_addr: Option<u64>) {
        self.log = used_guest_addr;
        // What it said about kicks when it started was written before this was known.
        if !self.features.event_idx {
            self.mark(0, 2);
        }
    }

    /// As [`Virtqueue::limit_chains`](super::Virtqueue::limit_chains).
    pub fn limit_chains(&mut self, most: u32) {
        self.longest = self.longest.min(most);
    }

    /// Whether memory that it needs went away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lease.is_lost() || self.region.as_ref().is_some_and(SplitRegion::is_lost)
    }

    /// Index of the next avail entry, as GET_VRING_BASE has it.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Chains that were taken and not used yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    #[inline]
    fn avail(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < usize::from(self.layout.size) + 3);
        // SAFETY: the avail ring has size + 3 fields; the lease keeps it.
        unsafe { shared_u16(self.parts.avail.add(index)) }
    }

    /// flags (0) or idx (1) of the used ring.
    #[inline]
    fn used(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 2);
        // SAFETY: both fields lie at the front of the used ring; the lease keeps it.
        unsafe { shared_u16(self.parts.used.add(index)) }
    }

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
    fn look_ahead(&mut self) -> Result<bool, RingError> {
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
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
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

    /// Has the CPU fetch the place of the next used entry: the driver has read its line, if it has seen the
    /// entry before.
    #[inline]
    pub fn announce_used(&self) {
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        // SAFETY: the slot is masked to the ring's length; the lease keeps it.
        will_write(unsafe { self.parts.used_ring.add(slot) });
    }

    /// Gives up a chain that can't be given back: its queue retires, and shows nothing any more.
    pub fn abandon(&mut self, head: u16) {
        self.end_flight(head);
        if let Some(mut order) = self.order.take() {
            while let Some(ended) = order.dissolve() {
                self.end_flight(ended);
            }
        }
    }

    /// Notes that a head is no longer in flight; false if it was not.
    #[inline]
    fn end_flight(&mut self, head: u16) -> bool {
        let in_flight = self.in_flight.get_mut(usize::from(head));
        let Some(in_flight) = in_flight.filter(|in_flight| **in_flight) else {
            debug_assert!(false, "head {head} was not in flight");
            return false;
        };
        *in_flight = false;
        self.in_flight_count -= 1;
        true
    }

    /// Gives a chain back: `len` bytes of its writable part were written, from its front on.
    /// The driver sees it after the next [`SplitQueue::publish`], in order behind what was taken
    /// before it.
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let Some(order) = &mut self.order else {
            return self.write_used(head, len);
        };
        if !order.ended_first(head) {
            return order.ended(head, len);
        }
        let more = order.has_next();
        self.write_used(head, len);
        if more {
            self.push_ended();
        }
    }

    /// Gives those back that have ended and waited for the one before them.
    #[inline(never)]
    fn push_ended(&mut self) {
        while let Some((head, len)) = self.order.as_mut().and_then(Order::next) {
            self.write_used(head, len);
        }
    }

    #[inline(always)]
    fn write_used(&mut self, head: u16, len: u32) {
        if !self.end_flight(head) {
            return;
        }
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        let entry = UsedEntry {
            id: u32::from(head),
            len,
        };
        dying::step();
        // SAFETY: the slot is masked to the ring's length; the lease keeps it.
        unsafe { self.parts.used_ring.add(slot).write_volatile(entry) };
        self.mark(4 + 8 * slot as u64, 8);
        if let Some(region) = &mut self.region {
            region.used(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Marks bytes of the used ring that were written.
    #[inline]
    fn mark(&self, offset: u64, bytes: u64) {
        if let Some(used) = self.log {
            self.lease.log().mark(used.saturating_add(offset), bytes);
        }
    }

    /// Shows the driver what was used since the last time. Whether it wants to be called is asked later
    /// ([`SplitQueue::publish`]): a driver that polls goes on meanwhile.
    #[inline]
    pub fn show(&mut self) {
        if self.next_used == self.published {
            return;
        }
        self.published = self.next_used;
        crash_point!("publish.noted");
        dying::step();
        // Release: the entries and everything that the requests wrote come before the index.
        self.used(1).store(self.published, Ordering::Release);
        crash_point!("publish.shown");
        self.mark(2, 2);
        if let Some(region) = &mut self.region {
            region.published(self.published);
        }
    }

    /// Shows the driver what was used since the last time; whether it wants to be called for anything that
    /// was shown since this was asked last.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let old = std::mem::replace(&mut self.asked, self.published);
        if old == self.published {
            return false;
        }
        // The index is visible before the driver's wish is read (2.7.7.1).
        full_fence();
        if self.features.event_idx {
            let event = self
                .avail(2 + usize::from(self.layout.size))
                .load(Ordering::Relaxed);
            passed(event, self.published, old)
        } else {
            self.avail(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick for the next entry; whether one came in the meantime, so that
    /// there is no reason to wait.
    ///
    /// # Errors
    /// [`RingError::IndexJump`].
    pub fn arm(&mut self) -> Result<bool, RingError> {
        self.quiet = false;
        if self.features.event_idx {
            self.avail_event().store(self.next_avail, Ordering::Relaxed);
            self.mark(4 + 8 * u64::from(self.layout.size), 2);
        } else {
            self.used(0).store(0, Ordering::Relaxed);
            self.mark(0, 2);
        }
        // The wish is visible before the index is read again (2.7.10.1).
        full_fence();
        self.has_work()
    }

    /// Tells the driver that a kick is not needed: the queue is being polled.
    #[inline]
    pub fn disarm(&mut self) {
        if self.quiet {
            return;
        }
        self.quiet = true;
        // With EVENT_IDX the event stays behind: it is passed once in 2^16 entries, which costs one
        // needless kick; a store per batch would cost more.
        if !self.features.event_idx {
            self.used(0).store(NO_NOTIFY, Ordering::Relaxed);
            self.mark(0, 2);
        }
    }

    fn avail_event(&self) -> &AtomicU16 {
        // SAFETY: the field lies behind the used ring, inside its span; the lease keeps it.
        unsafe { shared_u16(self.parts.avail_event) }
    }
}
