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
mod give;
mod run;
mod take;
mod unpop;
mod wish;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::chain::{Descriptor, longest};
use super::inflight::{QueueRegion, SplitRegion};
use super::order::Order;
use super::park::Parked;
use super::{QueueFeatures, RingError};
use crate::memory::{GuestMemory, Lease, shared_u16};
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
}
