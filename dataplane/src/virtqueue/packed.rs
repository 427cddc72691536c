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
mod run;
mod unpop;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::chain::{Chain, DESCRIPTOR_BYTES, Descriptor, INDIRECT, NEXT, WRITE, longest, table};
use super::dying;
use super::inflight::{Kept, PackedRegion, QueueRegion};
use super::notify::{EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, passed_packed};
use super::order::Order;
use super::park::Parked;
use super::{QueueFeatures, RingError};
use crate::crash_point;
use crate::memory::{
    GuestMemory, Lease, full_fence, read_words, shared_u16, shared_u32, will_write,
};
use crate::worker::message::RingLayout;

/// Largest queue (2.8).
const MAX_SIZE: u16 = 32768;
/// Available, where it is the driver's wrap counter (2.8.1).
const AVAIL: u16 = 1 << 7;
/// Used, where it is the device's wrap counter.
const USED: u16 = 1 << 15;
/// Of a descriptor: where its length, buffer ID and flags are.
const LEN_AT: usize = 8;
const ID_AT: usize = 12;
const FLAGS_AT: usize = 14;

/// A place in the ring, with the wrap counter that holds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Cursor {
    /// From half of a vring base: 15 bits of index, and the wrap counter.
    fn from_base(base: u16) -> Self {
        Self {
            index: base & 0x7fff,
            wrap: base & 0x8000 != 0,
        }
    }

    pub(super) fn base(self) -> u16 {
        self.index | (u16::from(self.wrap) << 15)
    }

    /// `by` places further in a ring of `size`; at most once around.
    #[inline]
    pub(super) fn advanced(self, by: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(by);
        match u16::try_from(index) {
            Ok(index) if index < size => Self { index, ..self },
            _ => Self {
                // Below the size: the index was, and at most a size was added.
                index: u16::try_from(index - u32::from(size)).unwrap_or(0),
                wrap: !self.wrap,
            },
        }
    }

    /// `by` places back in a ring of `size`; at most once around.
    pub(super) fn retreated(self, by: u16, size: u16) -> Self {
        let wrap = self.wrap ^ (by > self.index);
        let index = if by > self.index {
            // Below the size: a size at most was taken off.
            (size - by).saturating_add(self.index)
        } else {
            self.index - by
        };
        Self { index, wrap }
    }

    /// Whether flags say that the driver has made the descriptor here available.
    #[inline]
    pub(super) fn is_available(self, flags: u16) -> bool {
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == self.wrap && used != self.wrap
    }

    /// Whether flags say that the driver has made it available in this turn: it may be used since.
    pub(super) fn was_made_available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap
    }

    /// What shows a descriptor here as used.
    #[inline]
    fn used_flags(self, len: u32) -> u16 {
        let bits = if self.wrap { AVAIL | USED } else { 0 };
        bits | if len > 0 { WRITE } else { 0 }
    }
}

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

    /// Whether the driver has made a descriptor available that was not taken yet.
    #[inline]
    #[must_use]
    pub fn has_work(&self) -> bool {
        // Acquire: the rest of the chain is read after the flags that announce it.
        let flags = self.flags(self.avail.index).load(Ordering::Acquire);
        self.avail.is_available(flags)
    }

    /// Takes the next available chain; its buffer ID, or none if there is none.
    ///
    /// # Errors
    /// See [`RingError`]: the driver broke the ring, nothing was taken.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let flags = self.flags(self.avail.index).load(Ordering::Acquire);
        if !self.avail.is_available(flags) {
            return Ok(None);
        }
        chain.reset(&self.lease);
        let (id, count) = self.walk(flags, chain)?;
        chain.check_bytes()?;
        let size = self.layout.size;
        match self.descriptors_of.get_mut(usize::from(id)) {
            Some(0) if count <= size - self.descriptors => {}
            Some(0) => return Err(RingError::Overcommitted(size)),
            Some(_) => return Err(RingError::HeadInFlight(id)),
            None => {
                return Err(RingError::OutOfTable {
                    index: id,
                    size: u32::from(size),
                });
            }
        }
        if let Some(of) = self.descriptors_of.get_mut(usize::from(id)) {
            *of = count;
        }
        self.descriptors += count;
        self.in_flight_count += 1;
        self.avail = self.avail.advanced(count, size);
        if let Some(order) = &mut self.order {
            order.taken(id);
        }
        if let Some(region) = &mut self.region {
            region.taken(id, &self.taken);
        }
        Ok(Some(id))
    }

    /// Follows the chain that begins at the avail cursor with these flags, which were read already:
    /// its buffer ID, and how many descriptors of the ring it has.
    #[inline]
    fn walk(&mut self, first_flags: u16, chain: &mut Chain) -> Result<(u16, u16), RingError> {
        self.taken.clear();
        let mut at = self.avail;
        for count in 1..=self.layout.size {
            let mut descriptor = self.descriptor(at.index);
            if count == 1 {
                descriptor.flags = first_flags;
            }
            if self.region.is_some() {
                self.taken.push(descriptor);
            }
            if descriptor.has(INDIRECT) {
                table(&self.lease, &descriptor, self.features, self.longest)?.take_all(chain)?;
                return Ok((descriptor.next, count));
            }
            chain.push(descriptor)?;
            if !descriptor.has(NEXT) {
                return Ok((descriptor.next, count));
            }
            if u32::from(count) >= self.longest {
                return Err(RingError::ChainTooLong(self.longest));
            }
            at = at.advanced(1, self.layout.size);
        }
        Err(RingError::ChainTooLong(u32::from(self.layout.size)))
    }

    /// A descriptor's bytes, read once; `index` is below the size.
    #[inline]
    fn descriptor(&self, index: u16) -> Descriptor {
        debug_assert!(index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps. Bytes need no alignment.
        Descriptor::of_packed(unsafe { read_words(self.parts.ring.add(usize::from(index)).cast()) })
    }

    /// Has the CPU fetch the place of the next used descriptor.
    #[inline]
    pub fn announce_used(&self) {
        debug_assert!(self.used.index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps.
        will_write(unsafe { self.parts.ring.add(usize::from(self.used.index)) });
    }

    /// Gives up a chain that can't be given back: its queue retires, and shows nothing any more.
    pub fn abandon(&mut self, id: u16) {
        self.end_flight(id);
        if let Some(mut order) = self.order.take() {
            while let Some(ended) = order.dissolve() {
                self.end_flight(ended);
            }
        }
    }

    /// Notes that a buffer ID is no longer in flight: how many descriptors it had; 0: it was not.
    #[inline]
    fn end_flight(&mut self, id: u16) -> u16 {
        let Some(of) = self
            .descriptors_of
            .get_mut(usize::from(id))
            .filter(|of| **of > 0)
        else {
            debug_assert!(false, "buffer {id} was not in flight");
            return 0;
        };
        self.in_flight_count -= 1;
        std::mem::take(of)
    }

    /// Gives a chain back: `len` bytes of its writable part were written, from its front on.
    /// The driver sees it after the next [`PackedQueue::publish`], in order behind what was taken
    /// before it where that was negotiated.
    #[inline]
    pub fn push_used(&mut self, id: u16, len: u32) {
        let Some(order) = &mut self.order else {
            return self.write_used(id, len);
        };
        if !order.ended_first(id) {
            return order.ended(id, len);
        }
        let more = order.has_next();
        self.write_used(id, len);
        if more {
            self.push_ended();
        }
    }

    /// Gives those back that have ended and waited for the one before them.
    #[inline(never)]
    fn push_ended(&mut self) {
        while let Some((id, len)) = self.order.as_mut().and_then(Order::next) {
            self.write_used(id, len);
        }
    }

    #[inline(always)]
    fn write_used(&mut self, id: u16, len: u32) {
        let count = self.end_flight(id);
        if count == 0 {
            return;
        }
        let at = self.used;
        debug_assert!(at.index < self.layout.size);
        dying::step();
        // SAFETY: the descriptor lies in the ring, which the lease keeps, and is aligned to 16.
        unsafe {
            let descriptor = self.parts.ring.add(usize::from(at.index)).cast::<u8>();
            descriptor.add(LEN_AT).cast::<u32>().write_volatile(len);
            descriptor.add(ID_AT).cast::<u16>().write_volatile(id);
        }
        let flags = at.used_flags(len);
        if self.held_back.is_none() {
            self.held_back = Some((at.index, flags));
        } else {
            dying::step();
            // The driver looks here after it has seen the batch's first.
            self.flags(at.index).store(flags, Ordering::Relaxed);
            self.mark(at.index);
        }
        if let Some(region) = &mut self.region {
            region.used(id);
        }
        self.unpublished += count;
        self.used = at.advanced(count, self.layout.size);
    }

    /// Marks a descriptor of the ring that was written.
    #[inline]
    fn mark(&self, index: u16) {
        if self.log {
            let bytes = u64::from(DESCRIPTOR_BYTES);
            let at = self.layout.desc + u64::from(index) * bytes;
            self.lease.log().mark(at, bytes);
        }
    }

    /// Shows the driver what was used since the last time. Whether it wants to be called is asked later
    /// ([`PackedQueue::publish`]): a driver that polls goes on meanwhile.
    #[inline]
    pub fn show(&mut self) {
        let Some((index, flags)) = self.held_back.take() else {
            return;
        };
        if let Some(region) = &mut self.region {
            region.publishes(self.used);
        }
        crash_point!("publish.noted");
        dying::step();
        // Release: the other descriptors and everything that the requests wrote come before.
        self.flags(index).store(flags, Ordering::Release);
        crash_point!("publish.shown");
        self.mark(index);
        if let Some(region) = &mut self.region {
            region.published();
        }
        self.descriptors -= std::mem::take(&mut self.unpublished);
    }

    /// Shows the driver what was used since the last time; whether it wants to be called for anything that
    /// was shown since this was asked last: no more than is in flight at once, and so once around at most.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.show();
        let old = std::mem::replace(&mut self.asked, self.used);
        if old == self.used {
            return false;
        }
        // The flags are visible before the driver's wish is read (2.8.10).
        full_fence();
        // SAFETY: the area is aligned and in memory that the lease keeps.
        let wish = unsafe { shared_u32(self.parts.driver) }.load(Ordering::Relaxed);
        match (wish >> 16) & 0x3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.features.event_idx => {
                let event = u16::try_from(wish & 0xffff).unwrap_or(0);
                passed_packed(event, self.used.base(), old.base(), self.layout.size)
            }
            _ => true,
        }
    }

    /// Asks the driver to kick for the next descriptor; whether one came in the meantime, so that
    /// there is no reason to wait.
    pub fn arm(&mut self) -> bool {
        self.quiet = false;
        self.wish(if self.features.event_idx {
            u32::from(self.avail.base()) | (EVENT_DESC << 16)
        } else {
            EVENT_ENABLE << 16
        });
        // The wish is visible before the flags are read again.
        full_fence();
        self.has_work()
    }

    /// Tells the driver that a kick is not needed: the queue is being polled.
    #[inline]
    pub fn disarm(&mut self) {
        if !self.quiet {
            self.quiet = true;
            self.wish(EVENT_DISABLE << 16);
        }
    }

    fn wish(&self, wish: u32) {
        let device: &AtomicU32 =
            // SAFETY: the area is aligned and in memory that the lease keeps.
            unsafe { shared_u32(self.parts.device) };
        device.store(wish, Ordering::Relaxed);
        self.mark_wish();
    }

    /// Marks the device event area.
    fn mark_wish(&self) {
        if self.log {
            self.lease.log().mark(self.layout.used, 4);
        }
    }
}
