//! How long rot waits before it starts a dead child again.
#![forbid(unsafe_code)]

use std::time::Duration;

/// The wait after the second death in a row before a `Hello`.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Two starts of a role whose processes say `Hello` are so far apart at least.
const APART: Duration = Duration::from_millis(50);

/// The back-off of one role.
///
/// A process that said `Hello` is followed at once: guests wait for it, and it has shown that it
/// can start. Only a life shorter than [`APART`] is filled up to that, so that a process that
/// always dies at once can't take a whole CPU for its starts. One that never says `Hello` is
/// followed at once, then after 100 ms, doubling to 5 s.
#[derive(Debug, Default)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The wait before the next start, after a process that has lived for `lived` and said `Hello`
    /// or not.
    pub fn after(&mut self, lived: Duration, hello: bool) -> Duration {
        if hello {
            self.next = Duration::ZERO;
            return APART.saturating_sub(lived);
        }
        let wait = self.next;
        self.next = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_doubling_to_the_longest_and_anew_after_a_hello() {
        let mut backoff = Backoff::default();
        let lived = Duration::from_secs(14);
        let waits: Vec<u128> = (0..9)
            .map(|_| backoff.after(lived, false).as_millis())
            .collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.after(lived, true), Duration::ZERO);
        assert_eq!(backoff.after(lived, false), Duration::ZERO);
        assert_eq!(backoff.after(lived, false), FIRST_WAIT);
    }

    #[test]
    fn who_said_hello_is_followed_at_once_however_often_but_not_faster_than_a_start_in_50_ms() {
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            assert_eq!(backoff.after(APART, true), Duration::ZERO);
        }
        let short = Duration::from_millis(20);
        assert_eq!(backoff.after(short, true), Duration::from_millis(30));
        assert_eq!(backoff.after(Duration::ZERO, true), APART);
    }
}
