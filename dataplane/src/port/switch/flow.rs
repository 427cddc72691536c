//! The flow cache: what the switch decided about the first frame of a flow, for those that follow.
//!
//! A flow is what the decision looks at: who sent it (each member has a cache of its own, so that a guest can push
//! out nothing but its own flows), its source and its destination. What is remembered is where in the [`Table`] the
//! two stations are; a look there, which the age of the source needs anyway, finds whether they still are, so that
//! a station that moves, grows old or makes way for another takes its flows with it. Everything else that decisions
//! depend on has a [generation](Flows::find): when it changes, all flows end at once.
//!
//! A later policy belongs before [`Flows::remember`]: it decides about a first frame, and what it looks at beyond
//! the stations joins the key.
//!
//! The size is fixed; a set of two entries is one cache line, and the one that was used longer ago makes way.
//!
//! [`Table`]: super::table::Table
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::station::{Seeds, Station};
use super::table::Place;

/// A flow without a frame for longer is forgotten, in seconds.
pub const AGE_SECONDS: u32 = 30;
/// Flows of a NIC.
pub const NIC_FLOWS: usize = 512;
/// Flows of the uplink.
pub const UPLINK_FLOWS: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Entry {
    destination: Station,
    source: Station,
    places: Places,
    seen: u32,
    generation: u32,
}

/// Where the two stations of a flow are in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Of the destination.
    pub destination: Place,
    /// Of the source.
    pub source: Place,
}

const EMPTY: Entry = Entry {
    destination: Station::NONE,
    source: Station::NONE,
    places: Places {
        destination: 0,
        source: 0,
    },
    seen: 0,
    generation: 0,
};

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Set([Entry; 2]);

const _: () = assert!(size_of::<Set>() == 64);

/// When it is: flows of another generation, or too old ones, are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Seconds since the start.
    pub second: u32,
    /// Of everything that decisions depend on and the table doesn't know. Never 0.
    pub generation: u32,
}

impl Entry {
    #[inline]
    fn is(&self, destination: Station, source: Station, now: Now) -> bool {
        self.destination == destination
            && self.source == source
            && self.generation == now.generation
            && now.second.wrapping_sub(self.seen) <= AGE_SECONDS
    }

    fn is_alive(&self, now: Now) -> bool {
        self.generation == now.generation && now.second.wrapping_sub(self.seen) <= AGE_SECONDS
    }
}

/// The flows of a member.
#[derive(Debug)]
pub struct Flows {
    sets: Box<[Set]>,
    seeds: Seeds,
}

impl Flows {
    /// A cache for so many flows, rounded up to a power of two.
    #[must_use]
    pub fn new(flows: usize, seeds: Seeds) -> Self {
        let sets = flows.div_ceil(2).next_power_of_two();
        Self {
            sets: vec![Set([EMPTY; 2]); sets].into_boxed_slice(),
            seeds,
        }
    }

    /// What was decided about a flow; none: nothing, or too long ago, or under another generation.
    #[inline]
    pub fn find(&mut self, destination: Station, source: Station, now: Now) -> Option<Places> {
        let set = self.set(destination, source)?;
        let entry = set
            .0
            .iter_mut()
            .find(|one| one.is(destination, source, now))?;
        // Written once a second only.
        if entry.seen != now.second {
            entry.seen = now.second;
        }
        Some(entry.places)
    }

    /// Remembers a decision.
    pub fn remember(&mut self, destination: Station, source: Station, places: Places, now: Now) {
        let Some(Set([first, second])) = self.set(destination, source) else {
            return;
        };
        let is_first = first.destination == destination && first.source == source;
        let is_second = second.destination == destination && second.source == source;
        let age = |entry: &Entry| match entry.is_alive(now) {
            true => now.second.wrapping_sub(entry.seen),
            false => u32::MAX,
        };
        let entry = if is_first || (!is_second && age(first) >= age(second)) {
            first
        } else {
            second
        };
        *entry = Entry {
            destination,
            source,
            places,
            seen: now.second,
            generation: now.generation,
        };
    }

    /// Flows that are alive.
    #[must_use]
    pub fn len(&self, now: Now) -> usize {
        let entries = self.sets.iter().flat_map(|set| &set.0);
        entries.filter(|entry| entry.is_alive(now)).count()
    }

    #[inline]
    fn set(&mut self, destination: Station, source: Station) -> Option<&mut Set> {
        let at = destination.hash_with(source, self.seeds) & (self.sets.len() - 1);
        self.sets.get_mut(at)
    }
}
