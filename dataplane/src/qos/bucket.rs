//! A token bucket in one word: when it will be full again.
//!
//! Instead of tokens it keeps a time (virtual scheduling, as ATM's generic cell rate algorithm does): each
//! token taken moves the moment at which the bucket is full a little further away, and time itself refills it.
//! So a bucket needs no thread that fills it and no lock: several workers take from it with one atomic update
//! a batch.
//!
//! It may be overdrawn, since how many bytes a request has is known only once it was taken. The rate holds
//! nevertheless: nothing more passes until the debt is paid.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_protocol::limits::Rate;

use super::Moment;

/// Parts of a nanosecond that times are kept in: a token of a fast bucket takes less than one. A word of
/// them lasts for nine years of a process.
const PARTS: u64 = 64;
const PARTS_PER_SECOND: u128 = PARTS as u128 * 1_000_000_000;
/// A bucket holds at least what its rate lets pass in this part of a second (5 ms): a worker that sleeps
/// until there are tokens may come late by a little, and is not to lose any by it.
const LEAST_DEPTH: u64 = 200;

/// Tokens that a bucket holds at this rate and burst.
pub(super) fn depth(rate: Rate) -> u64 {
    rate.burst.max(rate.per_second / LEAST_DEPTH).max(1)
}

/// A bucket. Without a rate it is never empty.
#[derive(Debug, Default)]
pub struct Bucket {
    /// Tokens a second; 0: no limit.
    per_second: AtomicU64,
    /// How long it takes to fill, in parts of a nanosecond.
    fill: AtomicU64,
    /// When it is full, in parts of a nanosecond.
    full_at: AtomicU64,
}

impl Bucket {
    /// Another rate, or none. Tokens that are there stay, as far as the new bucket holds them, and so does
    /// a debt; a bucket that had no rate begins full. Takes that happen at the same moment may be counted
    /// by the old rate.
    pub fn set(&self, rate: Option<Rate>, now: Moment) {
        let had = self.tokens(now);
        let Some(rate) = rate else {
            return self.per_second.store(0, Ordering::Relaxed);
        };
        let depth = depth(rate);
        let most = i64::try_from(depth).unwrap_or(i64::MAX);
        let missing = u64::try_from(most.saturating_sub(had.min(most))).unwrap_or(0);
        let span = |tokens| span(tokens, rate.per_second);
        self.fill.store(span(depth), Ordering::Relaxed);
        self.full_at
            .store(parts(now).saturating_add(span(missing)), Ordering::Relaxed);
        self.per_second.store(rate.per_second, Ordering::Relaxed);
    }

    /// Tokens that are there; below 0: overdrawn by as many. Without a rate `i64::MAX`.
    #[must_use]
    pub fn tokens(&self, now: Moment) -> i64 {
        let per_second = self.per_second.load(Ordering::Relaxed);
        if per_second == 0 {
            return i64::MAX;
        }
        let missing = self
            .full_at
            .load(Ordering::Relaxed)
            .saturating_sub(parts(now));
        let there = i128::from(self.fill.load(Ordering::Relaxed)) - i128::from(missing);
        // Rounded down, also below 0: a token that is not there wholly is not there.
        let tokens = (there * i128::from(per_second)).div_euclid(PARTS_PER_SECOND.cast_signed());
        i64::try_from(tokens).unwrap_or(if tokens < 0 { i64::MIN } else { i64::MAX })
    }

    /// Takes tokens, whether they are there or not.
    pub fn take(&self, tokens: u64, now: Moment) {
        let per_second = self.per_second.load(Ordering::Relaxed);
        if per_second == 0 || tokens == 0 {
            return;
        }
        let cost = span(tokens, per_second);
        let taken = |full_at: u64| Some(full_at.max(parts(now)).saturating_add(cost));
        let order = Ordering::Relaxed;
        // The update always gives a value, so it can't fail.
        let _ = self.full_at.fetch_update(order, order, taken);
    }

    /// Nanoseconds until there is a token.
    #[must_use]
    pub fn wait_ns(&self, now: Moment) -> u64 {
        let per_second = self.per_second.load(Ordering::Relaxed);
        if per_second == 0 {
            return 0;
        }
        let missing = self
            .full_at
            .load(Ordering::Relaxed)
            .saturating_sub(parts(now));
        let one = span(1, per_second).max(1);
        let spare = self.fill.load(Ordering::Relaxed).saturating_sub(one);
        missing.saturating_sub(spare).div_ceil(PARTS)
    }
}

fn parts(now: Moment) -> u64 {
    now.ns().saturating_mul(PARTS)
}

/// How long it takes until so many tokens have come, in parts of a nanosecond.
fn span(tokens: u64, per_second: u64) -> u64 {
    let parts = u128::from(tokens) * PARTS_PER_SECOND / u128::from(per_second.max(1));
    u64::try_from(parts).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn bucket(per_second: u64, burst: u64) -> Bucket {
        let bucket = Bucket::default();
        let rate = Rate { per_second, burst };
        bucket.set(Some(rate), Moment::from_ns(SECOND));
        bucket
    }

    /// Takes whatever is there, every `step` ns from the first to the tenth second: how many tokens.
    fn drain(bucket: &Bucket, step: u64) -> u64 {
        let mut taken = 0;
        for ns in (SECOND..10 * SECOND).step_by(usize::try_from(step).expect("small")) {
            let now = Moment::from_ns(ns);
            let there = u64::try_from(bucket.tokens(now)).unwrap_or(0).min(16);
            bucket.take(there, now);
            taken += there;
        }
        taken
    }

    #[test]
    fn it_gives_its_burst_and_then_its_rate() {
        for (per_second, burst) in [(10_000, 100), (333_333, 5000), (7, 3), (1_000_000, 1)] {
            let expected = per_second * 9 + depth(Rate { per_second, burst });
            let taken = drain(&bucket(per_second, burst), 10_000);
            let off = taken.abs_diff(expected);
            assert!(
                off <= 16 + expected / 1000,
                "{per_second}: {taken}, not {expected}"
            );
        }
    }

    #[test]
    fn who_comes_seldom_loses_nothing_that_fits() {
        // Every 4 ms, of a bucket that holds 5: all of it, 16 at a time, as often as there are any.
        let bucket = bucket(10_000, 1);
        let mut taken = 0;
        for ns in (SECOND..2 * SECOND).step_by(4_000_000) {
            let now = Moment::from_ns(ns);
            let there = u64::try_from(bucket.tokens(now)).unwrap_or(0);
            bucket.take(there, now);
            taken += there;
        }
        assert!((10_000..=10_050).contains(&taken), "{taken}");
    }

    #[test]
    fn a_debt_is_paid_before_anything_passes() {
        let bucket = bucket(1000, 10);
        let now = Moment::from_ns(SECOND);
        bucket.take(1010, now);
        assert_eq!(bucket.tokens(now), -1000);
        assert_eq!(bucket.wait_ns(now), SECOND + SECOND / 1000);
        let later = Moment::from_ns(2 * SECOND);
        assert_eq!(bucket.tokens(later), 0);
        let then = Moment::from_ns(2 * SECOND + SECOND / 1000);
        assert_eq!((bucket.tokens(then), bucket.wait_ns(then)), (1, 0));
    }

    #[test]
    fn another_rate_keeps_tokens_and_debts_in_tokens() {
        let bucket = bucket(1000, 100);
        let now = Moment::from_ns(SECOND);
        bucket.take(50, now);
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        bucket.set(rate(10, 200), now);
        assert_eq!(bucket.tokens(now), 50);
        bucket.set(rate(10, 20), now);
        assert_eq!(bucket.tokens(now), 20);
        // A debt of a slow rate is not a wait of hours at a fast one.
        bucket.take(1020, now);
        bucket.set(rate(1_000_000, 5), now);
        assert_eq!(bucket.tokens(now), -1000);
        assert_eq!(bucket.wait_ns(now), 1_001_000);
        bucket.set(None, now);
        assert_eq!((bucket.tokens(now), bucket.wait_ns(now)), (i64::MAX, 0));
        bucket.take(u64::MAX, now);
        bucket.set(rate(10, 20), now);
        assert_eq!(bucket.tokens(now), 20, "begins full");
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let bucket = bucket(1 << 40, (1 << 40) * 3600);
        let now = Moment::from_ns(SECOND);
        assert!(bucket.tokens(now) > (1 << 51));
        bucket.take(u64::MAX, now);
        assert!(bucket.tokens(now) < 0);
        bucket.set(
            Some(Rate {
                per_second: 1,
                burst: 1,
            }),
            now,
        );
        assert!(bucket.wait_ns(now) > SECOND);
        assert!(bucket.tokens(Moment::from_ns(u64::MAX)) <= 1);
    }
}
