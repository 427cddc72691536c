//! The driver's side of a virtqueue, made to cost little: chains are prepared once, the driver looks
//! at the used entries only, and all memory accesses are plain loads and stores of atomics.
//!
//! `integration/src/driver` has the one that can also do everything wrong; this one shares its
//! definitions of flags and of event suppression. Whatever a device writes into a ring is a
//! [`QueueError`] at worst.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod packed;
pub mod split;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::error::QueueError;
use super::requests::Descriptor;
use super::source::Kind;

/// When the device is to call, and how it says whether it wants kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Ask for calls, as a driver without polling does; nobody waits for them.
    pub calls: bool,
}

/// A request that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub slot: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// What a ring's chains consist of: as many as can be in flight, each in a slot of its own, all alike.
pub trait Chains {
    /// Entries of the ring: a power of two.
    fn ring_size(&self) -> u16;

    /// Slots.
    fn depth(&self) -> u16;

    /// Descriptors of each chain.
    fn chain(&self) -> u16;

    /// Each chain lies in a table of its own.
    fn indirect(&self) -> bool;

    /// Descriptor number `place` of a slot's chain.
    fn descriptor(&self, slot: u16, place: u16, kind: Kind) -> Descriptor;

    /// Where the indirect table of a slot lies.
    fn table(&self, slot: u16) -> usize;

    /// The descriptor of that table.
    fn table_descriptor(&self, slot: u16) -> Descriptor;

    /// Entries of the ring that a chain takes.
    fn slots_of_ring(&self) -> u16 {
        if self.indirect() { 1 } else { self.chain() }
    }
}

/// A virtqueue, split or packed.
pub trait Ring {
    /// Offers a request; the device sees it with [`Ring::publish`] at the latest. The caller offers
    /// no request twice before it was used.
    fn offer(&mut self, requests: &impl Chains, slot: u16, kind: Kind);

    /// Shows the device what was offered; whether it wants a kick for it.
    fn publish(&mut self) -> bool;

    /// The next request that the device has used, if there is one. That it was in flight is for the
    /// caller to check, but for its being one of the queue's.
    ///
    /// # Errors
    /// What the device wrote makes no sense.
    fn poll(&mut self) -> Result<Option<Used>, QueueError>;

    /// Says anew whether calls are wanted, after all that was used has been polled.
    fn rearm(&mut self);
}

/// Writes a descriptor of a split table: address, then length, flags and next in one word.
pub(super) fn write_linked(table: &[AtomicU64], index: usize, part: Descriptor, next: u16) {
    if let Some([addr, rest]) = table.get(2 * index..2 * index + 2) {
        addr.store(part.addr, Relaxed);
        let word = u64::from(part.len) | u64::from(part.flags) << 32 | u64::from(next) << 48;
        rest.store(word, Relaxed);
    }
}

#[cfg(test)]
mod tests;
