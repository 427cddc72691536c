//! A worker's view of a device's limits.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Membership, Moment, Qos};

/// What may pass in one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// So many requests at most.
    pub requests: usize,
    /// Once so many bytes have passed, no further request; the last one may have more.
    pub bytes: u64,
}

impl Allowance {
    /// Nothing is limited.
    pub const ALL: Self = Self {
        requests: usize::MAX,
        bytes: u64::MAX,
    };
}

/// Where the requests of one device pass on one worker.
#[derive(Debug, Default)]
pub struct Gate {
    version: u32,
    membership: Option<Membership>,
    /// Nothing passes before.
    shut_until: Option<Moment>,
    /// How often in a row it was shut.
    refusals: u32,
}

impl Gate {
    /// A device that has no tokens is looked at again no sooner: as many as come until then are taken at
    /// once, so that its worker sleeps most of the time.
    pub const SHORTEST_WAIT: Duration = Duration::from_micros(500);
    /// And no later, so that another limit is effective soon. A worker that sleeps need not be told.
    pub const LONGEST_WAIT: Duration = Duration::from_millis(20);

    /// Whether the device has limits. To be asked first: if not, there is nothing else to ask.
    #[must_use]
    #[inline]
    pub fn is_limited(qos: &Qos) -> bool {
        qos.version() & 1 == 1
    }

    /// What may pass now; none: nothing before [`Gate::shut_until`].
    pub fn ask(&mut self, qos: &Qos, now: Moment) -> Option<Allowance> {
        if self.is_shut(now) {
            return None;
        }
        let version = qos.version();
        if version != self.version {
            self.version = version;
            self.membership = qos.membership();
        }
        let mut requests = qos.requests.tokens(now);
        let mut bytes = qos.bytes.tokens(now);
        // A group is asked only by who could use what it gives.
        if requests > 0
            && bytes > 0
            && let Some(Membership { group, member }) = &self.membership
        {
            let has = group.ask(member, now);
            (requests, bytes) = (requests.min(has.0), bytes.min(has.1));
        }
        match (usize::try_from(requests), u64::try_from(bytes)) {
            (Ok(requests @ 1..), Ok(bytes @ 1..)) => {
                self.refusals = 0;
                Some(Allowance { requests, bytes })
            }
            _ => {
                self.shut(qos, now);
                None
            }
        }
    }

    fn shut(&mut self, qos: &Qos, now: Moment) {
        // When a group has something depends on its other members, too: it is asked more and more seldom.
        let backed_off = Self::SHORTEST_WAIT * (1 << self.refusals.min(6));
        let known = qos.requests.wait_ns(now).max(qos.bytes.wait_ns(now));
        let wait = match (&self.membership, known) {
            (Some(_), 0) => backed_off,
            _ => Duration::from_nanos(known),
        };
        let wait = wait.clamp(Self::SHORTEST_WAIT, Self::LONGEST_WAIT);
        let ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.shut_until = Some(now.plus_ns(ns));
        qos.throttled_ns.fetch_add(ns, Ordering::Relaxed);
        self.refusals = self.refusals.saturating_add(1);
    }

    /// Whether nothing passes, as far as is known.
    #[must_use]
    #[inline]
    pub fn is_shut(&self, now: Moment) -> bool {
        self.shut_until.is_some_and(|until| now < until)
    }

    /// Until when nothing passes; none: something may.
    #[must_use]
    #[inline]
    pub fn shut_until(&self) -> Option<Moment> {
        self.shut_until
    }

    /// So much has passed.
    pub fn passed(&self, qos: &Qos, requests: u64, bytes: u64, now: Moment) {
        qos.requests.take(requests, now);
        qos.bytes.take(bytes, now);
        if let Some(Membership { group, member }) = &self.membership {
            group.take(member, requests, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bulkhead_protocol::limits::{Limits, Rate};

    use super::super::Group;
    use super::*;

    fn limits(requests: Option<u64>, bytes: Option<u64>) -> Limits {
        let rate = |per_second| Rate {
            per_second,
            burst: 100,
        };
        Limits {
            requests: requests.map(rate),
            bytes: bytes.map(rate),
        }
    }

    #[test]
    fn a_device_without_limits_is_not_asked() {
        let qos = Qos::default();
        assert!(!Gate::is_limited(&qos));
        qos.set(&limits(Some(1000), None), None);
        assert!(Gate::is_limited(&qos));
        qos.set(&limits(Some(10), None), None);
        assert!(Gate::is_limited(&qos));
        qos.set(&Limits::default(), None);
        assert!(!Gate::is_limited(&qos));
        qos.set(&Limits::default(), Some(Group::new(&Limits::default())));
        assert!(Gate::is_limited(&qos));
    }

    #[test]
    fn every_bucket_must_have_a_token() {
        let group = Group::new(&limits(Some(1000), None));
        let qos = Qos::default();
        qos.set(&limits(None, Some(1_000_000)), Some(Arc::clone(&group)));
        let now = Moment::now();
        let mut gate = Gate::default();
        let allowed = gate.ask(&qos, now).expect("both are full");
        // 5 ms of a million bytes are deeper than the burst.
        assert_eq!((allowed.requests, allowed.bytes), (100, 5000));
        gate.passed(&qos, 1, 5000, now);
        assert_eq!(gate.ask(&qos, now), None, "no bytes");
        let shut = gate.shut_until().expect("shut");
        assert_eq!(shut.since(now), Gate::SHORTEST_WAIT);
        let later = now.plus_ns(3_000_000);
        let allowed = gate.ask(&qos, later).expect("bytes have come");
        gate.passed(&qos, 200, 1, later);
        assert!(allowed.requests <= 100 && gate.ask(&qos, later).is_none());
        // The group alone is empty.
        qos.set(&limits(None, Some(1_000_000)), None);
        assert!(gate.ask(&qos, later.plus_ns(30_000_000)).is_some());
    }

    #[test]
    fn a_far_token_is_looked_for_again_soon() {
        let qos = Qos::default();
        qos.set(&limits(Some(1), None), None);
        let now = Moment::now();
        let mut gate = Gate::default();
        gate.passed(&qos, 1_000_000, 0, now);
        assert_eq!(gate.ask(&qos, now), None);
        let shut = gate.shut_until().expect("shut");
        assert_eq!(shut.since(now), Gate::LONGEST_WAIT);
        assert_eq!(qos.throttled(), Gate::LONGEST_WAIT);
        qos.set(&limits(Some(1_000_000_000), None), None);
        let then = now.plus_ns(20_000_000);
        assert!(gate.ask(&qos, then).is_some(), "the other limit holds");
    }

    #[test]
    fn a_volume_that_is_let_go_of_leaves_its_group() {
        let group = Group::new(&limits(Some(1), None));
        let now = Moment::now();
        let ask = || {
            let qos = Qos::default();
            qos.set(&Limits::default(), Some(Arc::clone(&group)));
            Gate::default().ask(&qos, now)
        };
        assert_eq!(ask().map(|allowed| allowed.requests), Some(100));
        assert_eq!(ask().map(|allowed| allowed.requests), Some(100));
    }
}
