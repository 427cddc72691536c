//! The workers' clock: cheap enough to be read once a turn, and the same on every CPU.
//!
//! On x86-64 it is the time stamp counter, which current CPUs keep in step across cores and in every state
//! of their power management; where it is not, a reader may see the difference of two cores' counters, so
//! that differences are taken with `saturating_sub`. Elsewhere it is the system's monotonic clock.
//!
//! UNSAFETY: an instruction that reads a counter and touches nothing else.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "reading the time stamp counter")
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the first call of [`ticks_in`] measures.
const CALIBRATION: Duration = Duration::from_millis(5);

/// Ticks since some moment before the start of this process.
#[must_use]
#[inline]
pub fn now() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction reads a counter; it has no operands and touches no memory.
    return unsafe { core::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: OnceLock<Instant> = OnceLock::new();
        let since = START.get_or_init(Instant::now).elapsed();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Ticks per second, measured once against the monotonic clock: the first call takes 5 ms.
fn ticks_per_second() -> u64 {
    static TICKS: OnceLock<u64> = OnceLock::new();
    *TICKS.get_or_init(|| {
        let (since, from) = (Instant::now(), now());
        while since.elapsed() < CALIBRATION {
            std::hint::spin_loop();
        }
        let (ticks, elapsed) = (now().saturating_sub(from), since.elapsed());
        let per_second = u128::from(ticks) * 1_000_000_000 / elapsed.as_nanos().max(1);
        u64::try_from(per_second).unwrap_or(u64::MAX).max(1)
    })
}

/// How many ticks a duration has. The first call in a process measures for 5 ms: not for the middle of a
/// worker's work, but for its start.
#[must_use]
pub fn ticks_in(duration: Duration) -> u64 {
    let ticks = u128::from(ticks_per_second()) * duration.as_nanos() / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The duration of so many ticks; see [`ticks_in`].
#[must_use]
pub fn duration_of(ticks: u64) -> Duration {
    let nanos = u128::from(ticks) * 1_000_000_000 / u128::from(ticks_per_second());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the monotonic clock, around the same sleep: whatever the machine does in between, the ticks
    /// read inside are at most those of the time read outside.
    #[test]
    fn ticks_are_time() {
        let outside = Instant::now();
        let from = now();
        std::thread::sleep(Duration::from_millis(20));
        let ticks = now().saturating_sub(from);
        let outside = outside.elapsed();
        assert!(ticks > 0);
        let inside = duration_of(ticks);
        assert!(inside >= Duration::from_millis(18), "{inside:?}");
        assert!(inside <= outside * 2, "{inside:?} in {outside:?}");
        let again = duration_of(ticks_in(Duration::from_millis(10)));
        assert!(again.abs_diff(Duration::from_millis(10)) < Duration::from_micros(10));
    }
}
