//! The packed virtqueue (virtio 1.2, 2.8), device side.
//!
//! One ring for both directions: the driver makes descriptors available in it, the device writes
//! used ones over them. Who owns a descriptor is said by two bits of its flags and a wrap counter
//! on each side. A descriptor is read once; of a batch, the flags that show its first used
//! descriptor are stored last, and with them all of it.
//!
//! A buffer ID is taken only below the ring's size, and once at a time.
//!
//! UNSAFETY: as of the split queue: ring and event areas are raw addresses, looked up with their
//! whole length when the queue starts or gets other memory, on which it holds a lease. Every index
//! into the ring is that of a [`Cursor`], which is below its size.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod again;
mod announce;
mod cursor;
mod give;
mod run;
mod take;
mod unpop;
mod wish;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU16;

use super::chain::{DESCRIPTOR_BYTES, Descriptor, longest};
use super::inflight::{Kept, PackedRegion, QueueRegion};
use super::order::Order;
use super::park::Parked;
use super::{QueueFeatures, RingError};
use crate::memory::{GuestMemory, Lease, shared_u16};
use crate::worker::message::RingLayout;
pub(super) use cursor::Cursor;
use cursor::{AVAIL, USED};

/// Largest queue (2.8).
const MAX_SIZE: u16 = 32768;
/// Of a descriptor: where its length, buffer ID and flags are.
const LEN_AT: usize = 8;
const ID_AT: usize = 12;
const FLAGS_AT: usize = 14;

/// Where the parts of a ring lie in this process.
#[derive(Debug, Clone, Copy)]
struct Parts {
    ring: NonNull<[u8; DESCRIPTOR_BYTES as usize]>,
    /// How the driver wants to be called.
    driver: NonNull<u32>,
    /// How we want to be kicked.
    device: NonNull<u32>,
}

/// A running packed queue.
#[derive(Debug)]
pub struct PackedQueue {
    lease: Lease,
    parts: Parts,
    layout: RingLayout,
    features: QueueFeatures,
    /// Longest chain that is followed.
    longest: u32,
    /// The descriptor that the driver makes available next.
    avail: Cursor,
    /// The descriptor that is written as used next.
    used: Cursor,
    /// Where used descriptors ended when the driver's wish to be called was looked at last.
    asked: Cursor,
    /// For each buffer ID in flight, how many descriptors of the ring it has; else 0.
    descriptors_of: Box<[u16]>,
    /// Descriptors of the ring that were taken and are not shown as used.
    descriptors: u16,
    /// Of these, those that the next publish shows.
    unpublished: u16,
    in_flight_count: u16,
    /// Flags that show the batch, and where they belong.
    held_back: Option<(u16, u16)>,
    /// The driver was told not to kick.
    quiet: bool,
    order: Option<Order>,
    region: Option<PackedRegion>,
    /// A chain's descriptors in the ring, for the region.
    taken: Vec<Descriptor>,
    /// Writes to the ring are marked in the memory's dirty log.
    log: bool,
    /// Chains in flight that whoever served the ring before had taken, and that are to be taken again: the next
    /// one is the last.
    again: Vec<Kept>,
}

fn locate(memory: &GuestMemory, layout: &RingLayout) -> Result<Parts, RingError> {
    let place = |part: &'static str, guest_addr: u64| move || RingError::Place { part, guest_addr };
    let ring_bytes = u64::from(layout.size) * u64::from(DESCRIPTOR_BYTES);
    let ring = memory
        .span(layout.desc, ring_bytes)
        .filter(|at| at.addr().get().is_multiple_of(DESCRIPTOR_BYTES as usize))
        .ok_or_else(place("descriptor ring", layout.desc))?;
    let driver = memory
        .aligned_span(layout.avail, 1)
        .ok_or_else(place("driver event area", layout.avail))?;
    let device = memory
        .aligned_span(layout.used, 1)
        .ok_or_else(place("device event area", layout.used))?;
    Ok(Parts {
        ring: ring.cast(),
        driver,
        device,
    })
}

impl PackedQueue {
    /// Whether a ring can lie there, in this memory.
    ///
    /// # Errors
    /// [`RingError::Place`].
    pub fn check_place(memory: &GuestMemory, layout: &RingLayout) -> Result<(), RingError> {
        locate(memory, layout).map(drop)
    }

    /// A queue over a ring in guest memory, which goes on at `base` as SET_VRING_BASE has it: avail
    /// index and wrap counter in the low half, used ones in the high half.
    ///
    /// # Errors
    /// [`RingError::PackedSize`], [`RingError::Place`], [`RingError::Base`].
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: RingLayout,
        base: u32,
        features: QueueFeatures,
    ) -> Result<Self, RingError> {
        if layout.size == 0 || layout.size > MAX_SIZE {
            return Err(RingError::PackedSize(layout.size));
        }
        let half = |shift: u32| u16::try_from((base >> shift) & 0xffff).unwrap_or(0);
        let avail = Cursor::from_base(half(0));
        // DPDK's frontends fill the low half only: nothing is in flight at a start, so both are the same.
        let used = match half(16) {
            0 => avail,
            used => Cursor::from_base(used),
        };
        if avail.index >= layout.size || used.index >= layout.size {
            return Err(RingError::Base {
                base,
                size: layout.size,
            });
        }
        let size = usize::from(layout.size);
        let mut queue = Self {
            lease: Lease::new(Arc::clone(memory)),
            parts: locate(memory, &layout)?,
            layout,
            features,
            longest: longest(layout.size),
            avail,
            used,
            asked: used,
            descriptors_of: vec![0; size].into_boxed_slice(),
            descriptors: 0,
            unpublished: 0,
            in_flight_count: 0,
            held_back: None,
            quiet: false,
            order: features.in_order.then(|| Order::new(layout.size)),
            region: None,
            taken: Vec::new(),
            log: false,
            again: Vec::new(),
        };
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
        self.taken.reserve(usize::from(self.layout.size));
        self.region = Some(PackedRegion::new(region, self.layout.size, self.used));
    }

    /// Its state, for whoever serves it next; nothing is in flight but what is to be taken again, the next one last,
    /// and everything that ended is published.
    pub(super) fn park(self) -> (Parked, Option<PackedRegion>, Vec<Kept>) {
        debug_assert!(usize::from(self.in_flight_count) == self.again.len());
        debug_assert!(self.used == self.asked);
        let parked = Parked {
            memory: Arc::clone(&self.lease),
            layout: self.layout,
            features: self.features,
            avail: self.avail.base(),
            used: self.used.base(),
            log: self.log.then_some(self.layout.used),
        };
        (parked, self.region, self.again)
    }

    /// Goes on where [`PackedQueue::park`] left it.
    ///
    /// # Errors
    /// As [`PackedQueue::new`].
    pub(super) fn resume(
        parked: Parked,
        region: Option<PackedRegion>,
        again: Vec<Kept>,
    ) -> Result<Self, RingError> {
        let (layout, features) = (parked.layout, parked.features);
        let mut queue = Self::new(&parked.memory, layout, u32::from(parked.avail), features)?;
        // Not by the base: there a used half of zero means that none was given.
        queue.used = Cursor::from_base(parked.used);
        queue.asked = queue.used;
        if region.is_some() {
            queue.taken.reserve(usize::from(layout.size));
        }
        queue.region = region;
        queue.set_again(again);
        queue.set_log(parked.log.is_some());
        Ok(queue)
    }

    /// Whether writes to the ring are marked in the memory's dirty log.
    pub fn set_log(&mut self, log: bool) {
        self.log = log;
        // What it said about kicks when it started was written before this was known.
        self.mark_wish();
    }

    /// As [`Virtqueue::limit_chains`](super::Virtqueue::limit_chains).
    pub fn limit_chains(&mut self, most: u32) {
        self.longest = self.longest.min(most);
    }

    /// Whether memory that it needs went away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lease.is_lost() || self.region.as_ref().is_some_and(PackedRegion::is_lost)
    }

    /// Where it goes on, as GET_VRING_BASE has it.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.avail.base()) | (u32::from(self.used.base()) << 16)
    }

    /// Descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Chains that were taken and not used yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    /// Flags of a descriptor; `index` is below the size.
    #[inline]
    fn flags(&self, index: u16) -> &AtomicU16 {
        debug_assert!(index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps, and is aligned to 16.
        unsafe {
            let descriptor = self.parts.ring.add(usize::from(index)).cast::<u8>();
            shared_u16(descriptor.add(FLAGS_AT).cast())
        }
    }
}
