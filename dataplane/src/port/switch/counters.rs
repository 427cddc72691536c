//! What a switch has done, for whoever asks: the worker that serves it adds at the end of each batch.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::bridge::Counts;

/// Counters of a switch since it was attached. They outlive the worker's side of it, which comes with its first queue
/// and goes with its last.
#[derive(Debug, Default)]
pub struct SwitchCounters {
    counts: [AtomicU64; 6],
    stations: AtomicU64,
}

impl SwitchCounters {
    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let [flow_hits, flow_misses, floods, learned, moved, uplink_drops] = self
            .counts
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed));
        Counts {
            flow_hits,
            flow_misses,
            floods,
            learned,
            moved,
            uplink_drops,
        }
    }

    /// Stations that it knew when they were last counted: once a second while it works.
    #[must_use]
    pub fn stations(&self) -> u64 {
        self.stations.load(Ordering::Relaxed)
    }

    /// It knows this many now.
    pub(super) fn set_stations(&self, stations: usize) {
        self.stations.store(stations as u64, Ordering::Relaxed);
    }

    /// Adds what was counted from `before` to `now`.
    #[inline]
    pub(super) fn add(&self, before: &Counts, now: &Counts) {
        for ((count, before), now) in self.counts.iter().zip(list(before)).zip(list(now)) {
            if now != before {
                count.fetch_add(now - before, Ordering::Relaxed);
            }
        }
    }
}

/// In the order of the counters.
#[inline]
fn list(counts: &Counts) -> [u64; 6] {
    [
        counts.flow_hits,
        counts.flow_misses,
        counts.floods,
        counts.learned,
        counts.moved,
        counts.uplink_drops,
    ]
}
