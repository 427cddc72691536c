//! Virtqueues: from what a driver wrote into shared memory to checked guest buffers, and back.
//!
//! Everything a driver can write is hostile, at any time. What breaks a ring's own rules is a
//! [`RingError`]: the queue retires. What only a request got wrong is left to the device.
//!
//! | module | owns |
//! | --- | --- |
//! | [`split`], [`packed`] | the two formats of a ring |
//! | `chain` | a descriptor chain, and indirect tables |
//! | [`run`] | plain chains that are taken and given back together |
//! | `notify` | when a driver wants to be called |
//! | `order` | VIRTIO_F_IN_ORDER |
//! | [`inflight`] | the in-flight region, and what a queue finds in it when it starts |
//! | `dying` | deaths between two stores, for tests |
//! | `park` | a queue on its way from one worker to another |
//! | [`queue`] | a queue of either format |
//!
//! UNSAFETY: see [`split`] and [`packed`].

mod chain;
mod dying;
pub mod inflight;
mod notify;
mod order;
pub mod packed;
mod park;
pub mod queue;
pub mod run;
pub mod split;

pub use chain::{Chain, Descriptor};
pub use inflight::{Format, QueueRegion, Recovered};
pub use packed::PackedQueue;
pub use park::ParkedQueue;
pub use queue::Virtqueue;
pub use run::Run;
pub use split::SplitQueue;

/// What was negotiated about a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueFeatures {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
}

impl QueueFeatures {
    /// Of negotiated virtio features.
    #[must_use]
    pub fn of(features: u64) -> Self {
        use crate::vhost_user::feature;
        Self {
            packed: features & feature::RING_PACKED != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            in_order: features & feature::IN_ORDER != 0,
        }
    }

    /// The format of the ring.
    #[must_use]
    pub fn format(self) -> Format {
        if self.packed {
            Format::Packed
        } else {
            Format::Split
        }
    }
}

/// How a driver broke its ring. The queue takes no more requests until it is started anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is no power of two from 1 to 32768 (virtio 1.2, 2.7).
    #[error("the queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
    /// The size of a packed ring is not one from 1 to 32768 (virtio 1.2, 2.8).
    #[error("the queue size {0} is not one from 1 to 32768")]
    PackedSize(u16),
    /// A packed ring can't go on there.
    #[error("the ring can't go on at {base:#x}: an index in it is not below the queue size {size}")]
    Base {
        /// As SET_VRING_BASE gave it.
        base: u32,
        /// Descriptors.
        size: u16,
    },
    /// The in-flight region of the queue has no room for it.
    #[error("the in-flight region has room for {entries} descriptors, and the queue has {size}")]
    Region {
        /// Of the region.
        entries: u16,
        /// Of the queue.
        size: u16,
    },
    /// The in-flight region was kept in a way that is not known here: what is in flight in it can't be told.
    #[error(
        "the in-flight region has version {version} and features {features:#x}, and only version 1 without features \
         is known: start a backend that knows them, or reset the device with a fresh region"
    )]
    RegionVersion {
        /// Of the region.
        version: u16,
        /// Of the region.
        features: u64,
    },
    /// More descriptors of a packed ring were made available than it has.
    #[error("more descriptors were made available than the ring's {0}")]
    Overcommitted(u16),
    /// A part of the ring is not in guest memory, or not aligned as 2.7 demands.
    #[error("the {part} at guest address {guest_addr:#x} is not in guest memory, or not aligned")]
    Place {
        /// Which part.
        part: &'static str,
        /// Where it was said to be.
        guest_addr: u64,
    },
    /// The avail index is further ahead than the queue has entries.
    #[error("the avail index jumped to {given} with {expected} next, in a queue of {size}")]
    IndexJump {
        /// What the driver wrote.
        given: u16,
        /// The entry that is next.
        expected: u16,
        /// Entries.
        size: u16,
    },
    /// A descriptor index outside its table.
    #[error("descriptor {index} is outside a table of {size}")]
    OutOfTable {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A head that is still in flight was made available again.
    #[error("head {0} was made available again before it was used")]
    HeadInFlight(u16),
    /// A chain that is longer than any that is allowed: it loops.
    #[error("a chain has more than {0} descriptors")]
    ChainTooLong(u32),
    /// An indirect table that can't be.
    #[error("an indirect table is not valid: {0}")]
    Indirect(&'static str),
    /// A device-readable descriptor behind a device-writable one (2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// A buffer outside guest memory.
    #[error("{bytes} bytes at guest address {guest_addr:#x} are not in guest memory")]
    OutsideMemory {
        /// First address.
        guest_addr: u64,
        /// Length.
        bytes: u32,
    },
    /// A chain whose lengths sum to more than 2^32 bytes (2.7.5.2).
    #[error("the lengths of a chain sum to more than 2^32 bytes")]
    TooManyBytes,
    /// A chain without a writable byte: no place for a status.
    #[error("a request has no writable byte for its status")]
    NoStatus,
    /// The frontend took guest memory away.
    #[error("guest memory went away while it was used")]
    MemoryLost,
}
