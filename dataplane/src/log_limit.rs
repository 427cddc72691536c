//! A limit on log lines, and on other things that go out, that a guest or a frontend can cause.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Lines per second and place.
const LINES: u64 = 5;

/// One place in the code that logs.
#[derive(Debug)]
pub struct LogLimit {
    /// Second of the process's life, and lines in it: high and low half.
    state: AtomicU64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl LogLimit {
    /// Nothing logged yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
        }
    }

    /// Whether another line may be written now.
    pub fn allows(&self) -> bool {
        self.allows_at(since_start().as_secs())
    }

    fn allows_at(&self, second: u64) -> bool {
        let second = second & 0xffff_ffff;
        let state = self.state.load(Ordering::Relaxed);
        let lines = if state >> 32 == second {
            state & 0xffff_ffff
        } else {
            0
        };
        // Two threads may both count the same line: a limit, not a ledger.
        let next = (second << 32) | (lines + 1).min(LINES + 1);
        self.state.store(next, Ordering::Relaxed);
        lines < LINES
    }
}

fn since_start() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_a_second() {
        let limit = LogLimit::new();
        assert_eq!((0..100).filter(|_| limit.allows_at(7)).count(), 5);
        assert_eq!((0..100).filter(|_| limit.allows_at(8)).count(), 5);
    }
}
