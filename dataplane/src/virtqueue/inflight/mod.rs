//! The in-flight region (vhost-user, "Inflight I/O tracking"): what was taken from each queue and not
//! yet shown as used, in memory that outlives this process.
//!
//! The frontend shares it and may write anything there at any time. So it is written here, and what
//! is needed again is kept on our side: nothing of a running queue is read from it.
//!
//! A queue that starts over a region which another process kept reads it once and copies what it needs
//! ([`Past`]). What of it can't be true of the ring as it is now is of another life of that ring: then none of it
//! holds, and nothing is done again. The region is put in order by steps each of which leaves it readable: who
//! dies while it recovers is recovered.
//!
//! | module | owns |
//! | --- | --- |
//! | `field` | accesses to the shared bytes |
//! | `split`, `packed` | what a running queue writes |
//! | `past` | what both formats have in common when a queue goes on |
//! | `past_split`, `past_packed` | what was in flight, and where the ring goes on |
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod field;
mod packed;
mod past;
mod past_packed;
mod past_split;
mod split;

use std::sync::Arc;

pub(super) use packed::PackedRegion;
pub(super) use past::Past;
pub use past::Recovered;
pub(super) use past_packed::{Kept, PackedPast};
pub(super) use past_split::{AvailRing, SplitPast};
pub(super) use split::SplitRegion;

use crate::memory::SharedArea;

/// Regions of queues begin at multiples of this many bytes.
const ALIGN_BYTES: u64 = 64;
/// The only version there is; 0 is a region that nobody has used.
const VERSION: u16 = 1;
/// Where both formats have their features, version and number of descriptors.
const FEATURES: u64 = 0;
const VERSION_AT: u64 = 8;
const DESC_NUM: u64 = 10;

/// The format of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Split virtqueues (virtio 1.2, 2.7).
    Split,
    /// Packed virtqueues (2.8).
    Packed,
}

impl Format {
    fn header_bytes(self) -> u64 {
        match self {
            Self::Split => split::HEADER_BYTES,
            Self::Packed => packed::HEADER_BYTES,
        }
    }

    fn entry_bytes(self) -> u64 {
        match self {
            Self::Split => split::ENTRY_BYTES,
            Self::Packed => packed::ENTRY_BYTES,
        }
    }

    /// Bytes from the region of one queue to the next, for queues of that many descriptors.
    #[must_use]
    pub fn region_bytes(self, queue_size: u16) -> u64 {
        let bytes = self.header_bytes() + self.entry_bytes() * u64::from(queue_size);
        bytes.next_multiple_of(ALIGN_BYTES)
    }
}

/// The region of one queue.
#[derive(Debug, Clone)]
pub struct QueueRegion {
    area: Arc<SharedArea>,
    offset: u64,
    /// Descriptors that it has room for.
    entries: u16,
}

impl QueueRegion {
    /// The region of the queue with this number among queues of `entries` descriptors each; none
    /// if it does not lie in the area, or not at a multiple of 8 bytes: a field is then not written at once.
    #[must_use]
    pub fn new(area: &Arc<SharedArea>, format: Format, index: u16, entries: u16) -> Option<Self> {
        let bytes = format.region_bytes(entries);
        let offset = bytes.checked_mul(u64::from(index))?;
        (area.at(offset, bytes)?.cast::<u64>().is_aligned()).then_some(())?;
        Some(Self {
            area: Arc::clone(area),
            offset,
            entries,
        })
    }

    /// The same with room for fewer descriptors than lie between two regions.
    #[must_use]
    pub fn shortened(self, entries: u16) -> Self {
        Self {
            entries: entries.min(self.entries),
            ..self
        }
    }

    /// Descriptors that it has room for.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Whether somebody has used it.
    #[must_use]
    pub fn was_kept(&self) -> bool {
        self.load_u16(VERSION_AT) != 0
    }

    /// Says that nobody has used it: the device was reset, and no queue of it runs.
    pub fn forget(&self) {
        self.store_u16(VERSION_AT, 0);
    }

    /// Whether the frontend took it away.
    pub(super) fn is_lost(&self) -> bool {
        self.area.is_lost()
    }
}

#[cfg(test)]
mod tests;
