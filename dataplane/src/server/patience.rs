//! How long a device waits for what is under way when its frontend is gone, was sent away, or the device goes
//! itself (ADR 0024): after a while what can be cancelled is, and the frontend's connection is closed; a detach is
//! then told of as done, although requests are still with the kernel.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

/// How long cancelled requests may take to end before a detach is told of.
const CANCEL_TIME: Duration = Duration::from_millis(500);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Workers give up what is under way; with `wipe` the device's keys too.
    GiveUp { wipe: bool },
    /// Whoever asked for the detach is told.
    Tell,
}

/// How far the giving up of a device is.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    since: Option<Instant>,
    leaving_since: Option<Instant>,
    /// Workers were told.
    gave_up: Option<Instant>,
    wiped: Option<Instant>,
    told: bool,
}

impl Waiting {
    /// Takes in what is waited for now: for queues to stop, for the device to go. What is to be done about it,
    /// once each.
    pub(super) fn look(
        &mut self,
        now: Instant,
        (closing, leaving): (bool, bool),
        patience: Duration,
    ) -> Option<Due> {
        if !closing && !leaving {
            *self = Self::default();
            return None;
        }
        let since = *self.since.get_or_insert(now);
        let over = |since: Instant| now.saturating_duration_since(since) >= patience;
        if leaving {
            let since = *self.leaving_since.get_or_insert(now);
            // Those that wait for the detach do not wait for what was given up before.
            if self.wiped.is_none() && (over(since) || self.gave_up.is_some()) {
                self.gave_up = Some(now);
                self.wiped = Some(now);
                return Some(Due::GiveUp { wipe: true });
            }
            let wiped = self.wiped.filter(|_| !self.told)?;
            if now.saturating_duration_since(wiped) >= CANCEL_TIME {
                self.told = true;
                return Some(Due::Tell);
            }
        } else if self.gave_up.is_none() && over(since) {
            self.gave_up = Some(now);
            return Some(Due::GiveUp { wipe: false });
        }
        None
    }

    /// Whether something is waited for that nothing announces.
    pub(super) fn goes_on(&self) -> bool {
        self.since.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3);

    #[test]
    fn a_detach_is_told_of_after_a_while() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        let mut at = |ms: u64, closing: bool, leaving: bool| {
            let now = start + Duration::from_millis(ms);
            waiting.look(now, (closing, leaving), PATIENCE)
        };
        assert_eq!(at(0, false, false), None);
        assert_eq!(at(1000, true, true), None);
        assert_eq!(at(3999, true, true), None);
        assert_eq!(at(4000, true, true), Some(Due::GiveUp { wipe: true }));
        assert_eq!(at(4100, true, true), None);
        assert_eq!(at(4499, true, true), None);
        assert_eq!(at(4500, true, true), Some(Due::Tell));
        assert_eq!(at(9000, true, true), None, "once");
    }

    #[test]
    fn a_frontend_that_is_gone_is_given_up_and_the_keys_stay_until_a_detach() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        let mut at = |ms: u64, closing: bool, leaving: bool| {
            let now = start + Duration::from_millis(ms);
            waiting.look(now, (closing, leaving), PATIENCE)
        };
        assert_eq!(at(0, true, false), None);
        assert_eq!(at(3000, true, false), Some(Due::GiveUp { wipe: false }));
        assert_eq!(at(3100, true, false), None);
        assert_eq!(at(5000, true, true), Some(Due::GiveUp { wipe: true }));
        assert_eq!(at(5500, true, true), Some(Due::Tell));
        // Another one, later: the time begins anew.
        assert_eq!(at(6000, false, false), None);
        assert_eq!(at(6001, true, false), None);
        assert_eq!(at(9001, true, false), Some(Due::GiveUp { wipe: false }));
    }
}
