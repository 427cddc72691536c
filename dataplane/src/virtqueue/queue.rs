//! A running queue of either format.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::{
    Chain, PackedQueue, QueueFeatures, QueueRegion, Recovered, RingError, Run, SplitQueue,
};
use crate::memory::GuestMemory;
use crate::worker::message::RingLayout;

/// A queue. Which format it has was negotiated, and never changes while it runs.
#[derive(Debug)]
pub enum Virtqueue {
    /// Split (virtio 1.2, 2.7).
    Split(SplitQueue),
    /// Packed (2.8).
    Packed(PackedQueue),
}

/// Calls a method of whichever format it is.
macro_rules! either {
    ($self:expr, $queue:ident => $call:expr) => {
        match $self {
            Virtqueue::Split($queue) => $call,
            Virtqueue::Packed($queue) => $call,
        }
    };
}

impl Virtqueue {
    /// Whether a ring can lie there, in this memory.
    ///
    /// # Errors
    /// [`RingError::Place`].
    pub fn check_place(
        memory: &GuestMemory,
        layout: &RingLayout,
        features: QueueFeatures,
    ) -> Result<(), RingError> {
        if features.packed {
            PackedQueue::check_place(memory, layout)
        } else {
            SplitQueue::check_place(memory, layout)
        }
    }

    /// A queue over a ring in guest memory that goes on at `base`, as SET_VRING_BASE has it.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::PackedSize`], [`RingError::Place`], [`RingError::Base`].
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: RingLayout,
        base: u32,
        features: QueueFeatures,
    ) -> Result<Self, RingError> {
        if features.packed {
            return PackedQueue::new(memory, layout, base, features).map(Self::Packed);
        }
        let next_avail = u16::try_from(base).map_err(|_| RingError::Base {
            base,
            size: layout.size,
        })?;
        SplitQueue::new(memory, layout, next_avail, features).map(Self::Split)
    }

    /// Keeps what is in flight there, from now on; nothing is in flight yet, and what the region has of
    /// another time is forgotten.
    ///
    /// # Errors
    /// [`RingError::Region`].
    pub fn track(&mut self, region: QueueRegion) -> Result<(), RingError> {
        self.fits(&region)?;
        either!(self, queue => queue.track(region));
        Ok(())
    }

    /// As [`Virtqueue::track`], of a queue that has just been made, in a region where what was in flight may
    /// have been kept by whoever served the ring before: that is in flight again, to be taken by
    /// [`Virtqueue::pop_again`], and the queue goes on behind it, whatever base it was given.
    ///
    /// # Errors
    /// [`RingError::Region`], [`RingError::RegionVersion`]; the region is then as it was.
    pub fn recover(&mut self, region: QueueRegion) -> Result<Recovered, RingError> {
        self.fits(&region)?;
        either!(self, queue => queue.recover(region))
    }

    fn fits(&self, region: &QueueRegion) -> Result<(), RingError> {
        let (entries, size) = (region.entries(), self.size());
        if entries < size {
            return Err(RingError::Region { entries, size });
        }
        Ok(())
    }

    /// Follows no chain of more than so many descriptors from now on: whoever walks long ones at another's expense must not.
    /// (It is none of what goes with the queue to another worker.)
    pub fn limit_chains(&mut self, most: u32) {
        either!(self, queue => queue.limit_chains(most));
    }

    /// Chains that are to be taken again. They are in flight.
    #[must_use]
    pub fn left_again(&self) -> usize {
        either!(self, queue => queue.left_again())
    }

    /// Takes the next chain that is to be taken again, in the order in which they were taken first; its head
    /// (of a packed ring, its buffer ID), or none if there is none. All the checks of [`Virtqueue::pop`] hold:
    /// the driver may have changed it since.
    ///
    /// # Errors
    /// As of [`Virtqueue::pop`].
    pub fn pop_again(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        either!(self, queue => queue.pop_again(chain))
    }

    /// Leaves what is to be taken again to whoever serves the ring next: it is not in flight here any more, and
    /// the region keeps it.
    pub fn leave_again(&mut self) {
        either!(self, queue => queue.leave_again());
    }

    /// Marks writes to the ring in the memory's dirty log, or no longer. `used_guest_addr` is the used
    /// ring's address in the log (a packed queue marks its ring and event area where they lie).
    pub fn set_log(&mut self, used_guest_addr: Option<u64>) {
        match self {
            Self::Split(queue) => queue.set_log(used_guest_addr),
            Self::Packed(queue) => queue.set_log(used_guest_addr.is_some()),
        }
    }

    /// Serves the same ring from other memory from now on. Chains that are in flight keep theirs.
    ///
    /// # Errors
    /// [`RingError::Place`]; the queue is then as before.
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingError> {
        either!(self, queue => queue.set_memory(memory))
    }

    /// Whether memory that it needs went away.
    #[must_use]
    #[inline]
    pub fn is_lost(&self) -> bool {
        either!(self, queue => queue.is_lost())
    }

    /// Where it goes on, as GET_VRING_BASE has it.
    #[must_use]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(queue) => u32::from(queue.next_avail()),
            Self::Packed(queue) => queue.base(),
        }
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(self, queue => queue.size())
    }

    /// Chains that were taken and not used yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        either!(self, queue => queue.in_flight())
    }

    /// Takes the next available chain; its head (of a packed ring, its buffer ID), or none if there
    /// is none.
    ///
    /// # Errors
    /// See [`RingError`]: the driver broke the ring, nothing was taken.
    #[inline(always)]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        either!(self, queue => queue.pop(chain))
    }

    /// Puts back the chain that was taken last and that has not ended, as if it had not been taken: it is the next
    /// one again. Of several the last one first.
    pub fn unpop(&mut self, head: u16) {
        either!(self, queue => queue.unpop(head));
    }

    /// Takes as many plain chains of the run's direction as come next, at most `most` and
    /// [`MOST_CHAINS`](super::run::MOST_CHAINS), into a run of which none is out: how many. None: there is none, or the next
    /// one is not plain, or not good. Who wants to know takes it by [`Virtqueue::pop`].
    #[inline]
    pub fn pop_run(&mut self, run: &mut Run, most: usize) -> usize {
        either!(self, queue => queue.pop_run(run, most))
    }

    /// Gives back the first chains that are out of a run to write, in order: so many bytes of each were written, from its
    /// front on. As [`Virtqueue::push_used`] for each.
    #[inline]
    pub fn push_run(&mut self, run: &mut Run, lengths: &[u32]) {
        either!(self, queue => queue.push_run(run, lengths));
    }

    /// Gives back the first `count` chains that are out of a run to read, in order. With VIRTIO_F_IN_ORDER one used entry
    /// stands for all of them, where nothing else was in flight when they were taken.
    #[inline]
    pub fn push_read(&mut self, run: &mut Run, count: usize) {
        either!(self, queue => queue.push_read(run, count));
    }

    /// Puts back all chains of a run that are out: they are the next ones again. None was taken from the queue since, or it
    /// was put back before.
    #[inline]
    pub fn unpop_run(&mut self, run: &mut Run) {
        either!(self, queue => queue.unpop_run(run));
    }

    /// Has the CPU fetch the first bytes of the chain that comes next but so many, to be written; false if there is none
    /// yet. Nothing is taken.
    #[inline]
    pub fn announce_next(&mut self, but: u16, bytes: u32) -> bool {
        either!(self, queue => queue.announce_next(but, bytes))
    }

    /// Has the CPU fetch what the next `count` plain chains are going to be written to, as
    /// [`GuestSlice::will_put`](crate::memory::GuestSlice::will_put) does, as far as the driver is known to have made them
    /// available. Nothing is taken, and what is read of the ring here counts for nothing else.
    #[inline]
    pub fn announce_run(&self, count: usize, front: usize, most: usize) {
        either!(self, queue => queue.announce_run(count, front, most));
    }

    /// Has the CPU fetch what the next chain that is given back will be written to.
    #[inline]
    pub fn announce_used(&self) {
        either!(self, queue => queue.announce_used());
    }

    /// As [`Virtqueue::announce_used`], of so many chains.
    #[inline]
    pub fn announce_used_of(&self, count: u16) {
        either!(self, queue => queue.announce_used_of(count));
    }

    /// Gives up a chain that can't be given back: the queue retires.
    pub fn abandon(&mut self, head: u16) {
        either!(self, queue => queue.abandon(head));
    }

    /// Gives a chain back: `len` bytes of its writable part were written, from its front on. The
    /// driver sees it after the next [`Virtqueue::publish`].
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, len: u32) {
        either!(self, queue => queue.push_used(head, len));
    }

    /// Shows the driver what was used since the last time, within a batch that [`Virtqueue::publish`] ends.
    #[inline]
    pub fn show(&mut self) {
        either!(self, queue => queue.show());
    }

    /// Shows the driver what was used since the last time; whether it wants to be called for what was shown
    /// since this was asked last.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, queue => queue.publish())
    }

    /// Asks the driver to kick for the next entry; whether one came in the meantime, so that
    /// there is no reason to wait.
    ///
    /// # Errors
    /// [`RingError::IndexJump`].
    pub fn arm(&mut self) -> Result<bool, RingError> {
        match self {
            Self::Split(queue) => queue.arm(),
            Self::Packed(queue) => Ok(queue.arm()),
        }
    }

    /// Tells the driver that a kick is not needed: the queue is being polled.
    #[inline]
    pub fn disarm(&mut self) {
        either!(self, queue => queue.disarm());
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::{DirtyLog, SharedArea, anonymous};

    /// What a queue writes when it starts, before anything is said to it.
    #[test]
    fn a_queue_that_starts_while_its_writes_are_logged_marks_its_first() {
        for packed in [false, true] {
            let log = Arc::new(DirtyLog::default());
            let (_, file) = anonymous(4096).expect("memory");
            log.set_area(Some(SharedArea::map(file.as_fd(), 0, 1).expect("mapped")));
            log.enable(true);
            let (memory, _) = anonymous(0x4000).expect("memory");
            let layout = RingLayout {
                size: 8,
                desc: 0,
                avail: 0x1000,
                used: 0x2000,
            };
            let features = QueueFeatures {
                packed,
                ..QueueFeatures::default()
            };
            let memory = Arc::new(memory.with_log(&log));
            let queue = Virtqueue::new(&memory, layout, 0, features);
            queue.expect("a queue").set_log(Some(layout.used));
            let mut marked = [0];
            let read = File::from(file).read_exact_at(&mut marked, 0);
            read.expect("read");
            assert_eq!(marked, [1 << 2], "packed: {packed}");
        }
    }
}
