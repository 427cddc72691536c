//! Whether a device's storage answers: requests that are under way for too long, as the workers find them,
//! and how long requests took.
//!
//! A worker looks at the requests that it has under way about every 100 ms and writes here only where some are
//! too old, or were; what ended is counted on the worker and added here as seldom. So nothing of this is on the
//! way of a request.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Powers of two that times are counted by: the first bucket is for less than 1 us, each other for twice as long
/// as the one before it, the last for 2^26 us (67 s) and more.
pub const LATENCY_BUCKETS: usize = 28;

/// Under this number the rekeyer reports, which is no worker.
pub(crate) const REKEYER: usize = usize::MAX;

/// How long a storage may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A request that is under way for longer is slow, and its device with it.
    pub slow: Duration,
    /// One that is under way for longer hangs.
    pub hung: Duration,
    /// A frontend that is gone or sent away, and a detach, wait no longer for what is under way.
    pub give_up: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            slow: Duration::from_secs(1),
            hung: Duration::from_secs(10),
            give_up: Duration::from_secs(3),
        }
    }
}

/// How a device's storage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    /// Nothing is under way for too long.
    #[default]
    Fine,
    /// Something is under way for longer than [`Patience::slow`].
    Slow,
    /// Something is under way for longer than [`Patience::hung`].
    Hung,
}

/// What a worker has under way of a device for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Found {
    /// Requests older than [`Patience::slow`]; of a device that was given up, all that are left.
    pub old: u32,
    /// When the oldest of them began.
    pub oldest: Option<Instant>,
}

impl Found {
    /// Adds a request that began then.
    pub(crate) fn add(&mut self, began: Instant) {
        self.old += 1;
        self.oldest = Some(self.oldest.map_or(began, |oldest| oldest.min(began)));
    }
}

/// What all workers have under way of a device for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// How its storage does.
    pub level: Level,
    /// Requests older than [`Patience::slow`]; of a device that was given up, all that are left.
    pub old: u32,
    /// Age of the oldest of them.
    pub oldest: Duration,
}

/// How the storage of a device does.
#[derive(Debug, Default)]
pub struct Health {
    slow_ns: AtomicU64,
    hung_ns: AtomicU64,
    give_up_ns: AtomicU64,
    /// Requests that ended after more than [`Patience::slow`].
    pub ended_slow: Count,
    /// How long stored requests took.
    pub latency: Latency,
    /// By number of the worker; empty while nothing is old.
    found: Mutex<Vec<(usize, Found)>>,
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Health {
    pub(super) fn new() -> Self {
        let health = Self::default();
        health.set_patience(Patience::default());
        health
    }

    /// What is too long, from now on.
    pub fn set_patience(&self, patience: Patience) {
        let set = |to: &AtomicU64, from: Duration| to.store(nanoseconds(from), Ordering::Relaxed);
        set(&self.slow_ns, patience.slow);
        set(&self.hung_ns, patience.hung);
        set(&self.give_up_ns, patience.give_up);
    }

    /// What is too long.
    #[must_use]
    pub fn patience(&self) -> Patience {
        let get = |from: &AtomicU64| Duration::from_nanos(from.load(Ordering::Relaxed));
        Patience {
            slow: get(&self.slow_ns),
            hung: get(&self.hung_ns),
            give_up: get(&self.give_up_ns),
        }
    }

    /// [`Patience::slow`] in nanoseconds.
    #[inline]
    pub(crate) fn slow_ns(&self) -> u64 {
        self.slow_ns.load(Ordering::Relaxed)
    }

    /// So many more requests ended slowly.
    pub(crate) fn add_ended_slow(&self, n: u64) {
        self.ended_slow.add(n);
    }

    /// What a worker has found this time; nothing old: it is taken off the list.
    pub(crate) fn report(&self, worker: usize, found: Found) {
        let mut all = self.found();
        all.retain(|(of, _)| *of != worker);
        if found.old > 0 {
            all.push((worker, found));
        }
    }

    /// How the storage does by what was found.
    pub(crate) fn level_of(&self, found: Found) -> Level {
        let patience = self.patience();
        match found.oldest.map(|began| began.elapsed()) {
            Some(age) if age >= patience.hung => Level::Hung,
            Some(age) if age >= patience.slow => Level::Slow,
            // Nothing is under way, or it is left of a device that was given up.
            _ => Level::Fine,
        }
    }

    /// What is old now.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let found = self.found();
        let old = found.iter().map(|(_, found)| found.old).sum();
        let oldest = found.iter().filter_map(|(_, found)| found.oldest).min();
        let level = self.level_of(Found { old, oldest });
        let oldest = oldest.map_or(Duration::ZERO, |began| began.elapsed());
        Summary { level, old, oldest }
    }

    fn found(&self) -> MutexGuard<'_, Vec<(usize, Found)>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number that only grows, and that several workers add to now and then.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    fn add(&self, n: u64) {
        if n > 0 {
            self.0.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often requests took how long.
#[derive(Debug, Default)]
pub struct Latency([Count; LATENCY_BUCKETS]);

/// The bucket of a time.
#[inline]
pub(crate) fn bucket(nanoseconds: u64) -> usize {
    let us = nanoseconds / 1000;
    // At most 64.
    let bits = (u64::BITS - us.leading_zeros()) as usize;
    bits.min(LATENCY_BUCKETS - 1)
}

impl Latency {
    /// Adds what a worker has counted, bucket by bucket.
    pub(crate) fn add(&self, counts: impl Iterator<Item = u32>) {
        for (counter, count) in self.0.iter().zip(counts) {
            counter.add(u64::from(count));
        }
    }

    /// How many requests it has counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().map(Count::get).sum()
    }

    /// The time in microseconds that so many of each thousand requests took at most, rounded up to a power of
    /// two; none before any ended.
    #[must_use]
    pub fn per_mille_us(&self, per_mille: u64) -> Option<u64> {
        let counts = self.0.each_ref().map(Count::get);
        let all: u64 = counts.iter().sum();
        let wanted = all.checked_mul(per_mille)?.div_ceil(1000).max(1);
        let mut seen = 0;
        let at = counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(1 << at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_by_powers_of_two() {
        let cases = [(0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (3999, 2)];
        for (ns, expected) in cases {
            assert_eq!(bucket(ns), expected, "{ns} ns");
        }
        assert_eq!(bucket(u64::MAX), LATENCY_BUCKETS - 1);
        assert_eq!(bucket((1 << 26) * 1000), LATENCY_BUCKETS - 1);
        assert_eq!(bucket((1 << 26) * 1000 - 1), LATENCY_BUCKETS - 2);
    }

    #[test]
    fn quantiles_are_upper_bounds() {
        let latency = Latency::default();
        assert_eq!(latency.per_mille_us(500), None);
        let mut counts = [0u32; LATENCY_BUCKETS];
        (counts[3], counts[10]) = (990, 10);
        latency.add(counts.into_iter());
        let at = |per_mille| latency.per_mille_us(per_mille);
        assert_eq!(
            [at(500), at(990), at(991), at(1000)],
            [8, 8, 1024, 1024].map(Some)
        );
    }

    #[test]
    fn what_workers_found_adds_up_and_goes_away() {
        let health = Health::new();
        assert_eq!(health.summary(), Summary::default());
        let now = Instant::now();
        let ago = |seconds| now - Duration::from_secs(seconds);
        let mut one = Found::default();
        one.add(ago(2));
        one.add(ago(3));
        let mut two = Found::default();
        two.add(ago(11));
        health.report(0, one);
        let summary = health.summary();
        assert_eq!((summary.level, summary.old), (Level::Slow, 2));
        assert!(summary.oldest >= Duration::from_secs(3));
        health.report(1, two);
        let summary = health.summary();
        assert_eq!((summary.level, summary.old), (Level::Hung, 3));
        health.report(1, Found::default());
        assert_eq!(health.summary().level, Level::Slow);
        health.report(0, Found::default());
        assert_eq!(health.summary(), Summary::default());
    }
}
