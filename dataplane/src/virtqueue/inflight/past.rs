//! What a region says about its queue's past, as both formats have it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{DESC_NUM, FEATURES, QueueRegion, VERSION, VERSION_AT};
use crate::virtqueue::RingError;

/// What a queue found in its in-flight region when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// Nobody has used it: nothing was in flight.
    Fresh,
    /// Where the queue goes on, and how many chains were in flight, which are taken again first.
    Kept {
        /// Chains.
        chains: u16,
    },
    /// It can't be of the ring as it is now: the queue begins anew, and nothing is taken again.
    Stale {
        /// What contradicts what.
        why: &'static str,
    },
}

/// As [`Recovered`], with what was found.
#[derive(Debug)]
pub(in crate::virtqueue) enum Past<T> {
    Fresh,
    Kept(T),
    Stale(&'static str),
}

/// A chain in flight: when it was taken, and where its entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::virtqueue) struct Submitted {
    pub(in crate::virtqueue) counter: u64,
    pub(in crate::virtqueue) entry: u16,
}

/// A head of a region that somebody has used; none: nobody has. Whether it is of a ring of `size` descriptors.
///
/// # Errors
/// [`RingError::RegionVersion`]: what is in flight can't be known here.
pub(super) fn is_of(region: &QueueRegion, size: u16) -> Result<Option<bool>, RingError> {
    let (version, features) = (region.load_u16(VERSION_AT), region.load_u64(FEATURES));
    match (version, features) {
        (0, _) => Ok(None),
        (VERSION, 0) => Ok(Some(region.load_u16(DESC_NUM) == size)),
        _ => Err(RingError::RegionVersion { version, features }),
    }
}

/// Whether an entry says that a chain is in flight; none if it says something else.
pub(super) fn flag(region: &QueueRegion, at: u64) -> Option<bool> {
    match region.load_u8(at) {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Numbers chains in flight anew, from 0 on; they come in the order in which they were taken. No chain is ever
/// numbered higher than one that was taken after it, whoever looks: who dies meanwhile leaves the same order.
pub(super) fn renumber(
    region: &QueueRegion,
    chains: impl Iterator<Item = Submitted>,
    counter_at: impl Fn(u16) -> u64,
) {
    for (number, chain) in (0..).zip(chains) {
        if chain.counter != number {
            region.store_u64(counter_at(chain.entry), number);
        }
    }
}
