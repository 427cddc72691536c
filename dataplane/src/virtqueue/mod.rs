//! Virtqueues: from what a driver wrote into shared memory to checked guest buffers, and back.
//!
//! Everything a driver can write is hostile, at any time. What breaks a ring's own rules is a
//! [`RingError`]: the queue retires. What only a request got wrong is left to the device.
//!
//! UNSAFETY: see [`split`].

mod chain;
mod notify;
pub mod split;

pub use chain::{Chain, Descriptor};
pub use split::SplitQueue;

/// How a driver broke its ring. The queue takes no more requests until it is started anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is no power of two from 1 to 32768 (virtio 1.2, 2.7).
    #[error("the queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
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
