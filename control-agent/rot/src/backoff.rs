//! How long rot waits before it starts a dead child again.
#![forbid(unsafe_code)]

use std::time::Duration;

/// The wait after the second death in a row.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A child that lived this long begins anew.
const LIVED_WELL: Duration = Duration::from_secs(30);

/// The back-off of one role: at once, then 100 ms, doubling to 5 s.
#[derive(Debug, Default)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The wait before the next start, after a child that has lived for `lived`.
    pub fn after(&mut self, lived: Duration) -> Duration {
        let wait = if lived >= LIVED_WELL {
            Duration::ZERO
        } else {
            self.next
        };
        self.next = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_doubling_to_the_longest_and_anew_after_a_good_life() {
        let mut backoff = Backoff::default();
        let short = Duration::from_secs(29);
        let waits: Vec<u128> = (0..9).map(|_| backoff.after(short).as_millis()).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.after(LIVED_WELL), Duration::ZERO);
        assert_eq!(backoff.after(short), FIRST_WAIT);
    }
}
