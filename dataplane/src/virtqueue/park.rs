//! A queue on its way from one worker to another: all of its state and none of its addresses, so that it
//! can change threads.
//!
//! It goes on exactly where it was left: the used index is ours and not read from guest memory again, and
//! the in-flight region is not begun anew: it says "nothing in flight" all the time, but for what is to be taken
//! again, which travels along.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::inflight::{Kept, PackedRegion, SplitRegion};
use super::{PackedQueue, QueueFeatures, RingError, SplitQueue, Virtqueue};
use crate::memory::GuestMemory;
use crate::worker::message::RingLayout;

/// What both formats have.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) layout: RingLayout,
    pub(super) features: QueueFeatures,
    /// Where the driver goes on; packed: with its wrap counter in bit 15.
    pub(super) avail: u16,
    /// Where we do.
    pub(super) used: u16,
    pub(super) log: Option<u64>,
}

/// A queue of which nothing is in flight but what is to be taken again, without its addresses.
#[derive(Debug)]
pub struct ParkedQueue(Format);

#[derive(Debug)]
enum Format {
    Split(Parked, Option<SplitRegion>, Vec<u16>),
    Packed(Parked, Option<PackedRegion>, Vec<Kept>),
}

impl ParkedQueue {
    /// Where it goes on, as GET_VRING_BASE has it.
    #[must_use]
    pub fn base(&self) -> u32 {
        match &self.0 {
            Format::Split(parked, ..) => u32::from(parked.avail),
            Format::Packed(parked, ..) => u32::from(parked.avail) | (u32::from(parked.used) << 16),
        }
    }

    /// The queue, to be served by the calling thread.
    ///
    /// # Errors
    /// [`RingError::Place`]: its ring does not lie in its memory.
    pub fn resume(self) -> Result<Virtqueue, RingError> {
        match self.0 {
            Format::Split(parked, region, again) => {
                SplitQueue::resume(parked, region, again).map(Virtqueue::Split)
            }
            Format::Packed(parked, region, again) => {
                PackedQueue::resume(parked, region, again).map(Virtqueue::Packed)
            }
        }
    }
}

impl Virtqueue {
    /// Takes the queue off this thread. Nothing of it is in flight but what is to be taken again, and everything that
    /// ended is published.
    #[must_use]
    pub fn park(self) -> ParkedQueue {
        ParkedQueue(match self {
            Self::Split(queue) => {
                let (parked, region, again) = queue.park();
                Format::Split(parked, region, again)
            }
            Self::Packed(queue) => {
                let (parked, region, again) = queue.park();
                Format::Packed(parked, region, again)
            }
        })
    }
}
