//! What a switch has done, for whoever asks: the worker that serves it adds at the end of each batch.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::bridge::Counts;

/// Counters of a switch since it was attached. They outlive the worker's side of it, which comes with its first queue
/// and goes with its last.
#[derive(Debug, Default)]
pub struct SwitchCounters([AtomicU64; 6]);

impl SwitchCounters {
    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let Self(all) = self;
        let [flow_hits, flow_misses, floods, learned, moved, uplink_drops] =
            all.each_ref().map(|count| count.load(Ordering::Relaxed));
        Counts {
            flow_hits,
            flow_misses,
            floods,
            learned,
            moved,
            uplink_drops,
        }
    }

    /// Adds what was counted from `before` to `now`.
    #[inline]
    pub(super) fn add(&self, before: &Counts, now: &Counts) {
        for ((count, before), now) in self.0.iter().zip(list(before)).zip(list(now)) {
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
