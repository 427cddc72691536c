//! Runs: plain chains that are taken together and given back together.
//!
//! A chain is **plain** if it is one descriptor of the direction that is wanted (neither continued nor a table), of one
//! byte at least, in one region of guest memory: what drivers of network cards give nearly always. A run of them costs a
//! fraction of what the same chains cost one by one: the ring is read and written cache line by cache line, memory is
//! looked up once, and nothing is allocated or counted for each.
//!
//! ```text
//! let mut run = Run::to_write();             // once: it is room, to be used again and again
//! let count = queue.pop_run(&mut run, 32);   // as many as are plain; 0: none is there, or the next is not plain
//! run.get(0).copy_in(0, &bytes);             // ... and so on for each
//! queue.push_run(&mut run, &lengths);        // the first of those that are out end (push_read: of a run to read) ...
//! queue.unpop_run(&mut run);                 // ... and the others are put back, as if they had not been taken
//! queue.publish();
//! ```
//!
//! Whatever is not plain (also: whatever the driver broke) is left in the ring and is for [`Virtqueue::pop`], which says
//! what is wrong with it: all checks of `pop` hold for each chain of a run, and no error comes from here. Chains that are
//! taken by `pop` behind a run are given back, or put back, on their own; of what is put back the last one taken comes
//! first, so that the run's come after them.
//!
//! [`Virtqueue::pop`]: super::Virtqueue::pop
//!
//! UNSAFETY: places are found by a queue in the memory that it holds a lease on, and the run holds the same lease for as
//! long as it has them.
#![expect(unsafe_code, reason = "places in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;

use super::chain::{Descriptor, WRITE};
use crate::memory::{GuestSlice, Lease, Window};

/// Chains of a run at most.
pub const MOST_CHAINS: usize = 64;

/// A plain chain that was taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taken {
    pub(super) host: NonNull<u8>,
    pub(super) bytes: u32,
    /// Its head, or buffer ID.
    pub(super) id: u16,
}

const NOTHING: Taken = Taken {
    host: NonNull::dangling(),
    bytes: 0,
    id: 0,
};

/// Plain chains that were taken together from a queue.
///
/// Those that were taken and neither given back nor put back are **out**: from [`Run::first_out`] to [`Run::len`].
#[derive(Debug)]
pub struct Run {
    /// What the flags of each descriptor say of its direction.
    pub(super) direction: u16,
    lease: Option<Lease>,
    taken: Box<[Taken; MOST_CHAINS]>,
    count: usize,
    /// Chains before this one were given back.
    first_out: usize,
    /// With VIRTIO_F_IN_ORDER: nothing was in flight when it was taken, so that its chains come first.
    pub(super) leads: bool,
}

impl Run {
    /// Room for chains that the device reads.
    #[must_use]
    pub fn to_read() -> Self {
        Self::of(0)
    }

    /// Room for chains that the device writes.
    #[must_use]
    pub fn to_write() -> Self {
        Self::of(WRITE)
    }

    fn of(direction: u16) -> Self {
        Self {
            direction,
            lease: None,
            taken: Box::new([NOTHING; MOST_CHAINS]),
            count: 0,
            first_out: 0,
            leads: false,
        }
    }

    /// Chains of it, those that were given back since among them.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has none.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The first chain that is out.
    #[must_use]
    #[inline]
    pub fn first_out(&self) -> usize {
        self.first_out
    }

    /// Chains that are out.
    #[must_use]
    #[inline]
    pub fn out(&self) -> usize {
        self.count - self.first_out
    }

    /// The memory of a chain, from 0 on; empty if there is no such chain.
    #[must_use]
    #[inline(always)]
    pub fn get(&self, index: usize) -> GuestSlice<'_> {
        let taken = self.chains().get(index).unwrap_or(&NOTHING);
        // SAFETY: found by the queue, in memory that the lease holds.
        unsafe { GuestSlice::new(self, taken.host, taken.bytes) }
    }

    /// Bytes of a chain, from 0 on; 0 if there is no such chain.
    #[must_use]
    #[inline(always)]
    pub fn bytes(&self, index: usize) -> usize {
        let taken = self.chains().get(index).unwrap_or(&NOTHING);
        taken.bytes as usize
    }

    /// Whether what is written to its memory has to be marked ([`Run::mark`]): asked once, it need not be for each chain.
    #[must_use]
    #[inline]
    pub fn is_logged(&self) -> bool {
        let lease = self.lease.as_ref();
        lease.is_some_and(|memory| memory.log().is_enabled())
    }

    /// Marks the first `bytes` bytes of a chain, which were written, in the memory's dirty log, where one is kept.
    #[inline]
    pub fn mark(&self, index: usize, bytes: usize) {
        if let Some(memory) = &self.lease {
            memory.mark_slice(self.get(index), bytes);
        }
    }

    /// Lets go of the memory. None of its chains is out.
    pub fn release(&mut self) {
        debug_assert!(self.out() == 0, "{} chains are out", self.out());
        (self.count, self.first_out) = (0, 0);
        self.lease = None;
    }

    #[inline(always)]
    fn chains(&self) -> &[Taken] {
        self.taken.get(..self.count).unwrap_or_default()
    }

    /// Those that are out.
    #[inline(always)]
    pub(super) fn all_out(&self) -> &[Taken] {
        self.taken
            .get(self.first_out..self.count)
            .unwrap_or_default()
    }

    /// Begins anew, with chains of this memory.
    #[inline(always)]
    pub(super) fn begin(&mut self, lease: &Lease) {
        debug_assert!(self.out() == 0, "{} chains are out", self.out());
        (self.count, self.first_out) = (0, 0);
        self.leads = false;
        match &self.lease {
            Some(held) if held.is_same(lease) => {}
            _ => self.lease = Some(lease.clone()),
        }
    }

    /// A chain was taken, which lies in memory of the lease that it began with.
    #[inline(always)]
    pub(super) fn add(&mut self, taken: Taken) {
        if let Some(place) = self.taken.get_mut(self.count) {
            *place = taken;
            self.count += 1;
        }
    }

    /// The first `count` of those that are out are given back.
    #[inline(always)]
    pub(super) fn given(&mut self, count: usize) {
        self.first_out = self.count.min(self.first_out + count);
    }

    /// All that are out are put back.
    #[inline(always)]
    pub(super) fn put_back(&mut self) {
        self.count = self.first_out;
    }
}

/// Where a plain chain lies; none if it lies in no region as a whole.
#[inline(always)]
pub(super) fn place(
    lease: &Lease,
    window: &mut Window,
    guest_addr: u64,
    bytes: u32,
) -> Option<NonNull<u8>> {
    let here = window.find(guest_addr, bytes);
    here.or_else(|| lease.find_elsewhere(window, guest_addr, bytes))
}

/// Has the CPU fetch what a plain chain is going to be written to, as [`GuestSlice::will_put`] does.
#[inline(always)]
pub(super) fn announce(lease: &Lease, descriptor: Descriptor, front: usize, most: usize) {
    if let Some(host) = lease.window().find(descriptor.addr, descriptor.len) {
        // SAFETY: just found, in memory that the lease holds.
        unsafe { GuestSlice::new(lease, host, descriptor.len) }.will_put(front, most);
    }
}
