//! Quality of service: how much a volume, and a group of volumes, may do in a second.
//!
//! A volume's limits are two token buckets ([`bucket`]), of requests and of bytes, which all workers that
//! serve its queues share. Volumes of a group ([`group`]) share two more; each has the same part of them while
//! it can use it. A request passes when none of the buckets that it takes from is empty: it costs a token of
//! the requests, whatever its kind is and however it ends, and one of the bytes for each byte of data that it
//! reads or writes. A flush, a discard and zeroes cost no bytes: they move none between guest and storage.
//!
//! | who | what |
//! | --- | --- |
//! | control thread | [`Qos::set`], [`Group::set`]: effective with a worker's next turn |
//! | a worker | a [`Gate`] for each of its devices: asked once a batch, told afterwards what the batch was |
//!
//! A device without limits costs its workers one load and one branch a batch.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod bucket;
mod gate;
pub mod group;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_protocol::limits::Limits;

use bucket::Bucket;
pub use gate::{Allowance, Gate};
pub use group::Group;
use group::Member;

/// A moment, as nanoseconds since this process first asked for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// A moment for tests and simulations.
    #[must_use]
    pub fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since the first.
    #[must_use]
    pub fn ns(self) -> u64 {
        self.0
    }

    /// Time since another one; none at all if that is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    fn plus_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
}

/// The limits of a volume, shared by the workers that serve it.
#[derive(Debug, Default)]
pub struct Qos {
    /// Counts changes. Even: nothing is limited.
    version: AtomicU32,
    requests: Bucket,
    bytes: Bucket,
    membership: Mutex<Option<Membership>>,
    /// How long nothing was let pass, in ns, on all workers together.
    throttled_ns: AtomicU64,
}

/// A volume in a group.
#[derive(Debug, Clone)]
struct Membership {
    group: Arc<Group>,
    member: Arc<Member>,
}

impl Qos {
    /// Sets the limits of the volume and the group that it is in, or in none. Effective for every worker
    /// with its next turn, for one that sleeps because there are no tokens within [`Gate::LONGEST_WAIT`].
    /// Tokens and debts stay; a volume that stays in its group keeps its part.
    pub fn set(&self, limits: &Limits, group: Option<Arc<Group>>) {
        let now = Moment::now();
        let mut membership = lock(&self.membership);
        self.requests.set(limits.requests, now);
        self.bytes.set(limits.bytes, now);
        let is_same = match (membership.as_ref(), group.as_ref()) {
            (Some(old), Some(new)) => Arc::ptr_eq(&old.group, new),
            (None, None) => true,
            _ => false,
        };
        if !is_same {
            leave(membership.take());
            *membership = group.map(|group| Membership {
                member: group.join(),
                group,
            });
        }
        let limited = membership.is_some() || !limits.is_none();
        let version = self.version.load(Ordering::Relaxed);
        let next = (version | 1).wrapping_add(if limited { 2 } else { 1 });
        self.version.store(next, Ordering::Release);
    }

    /// How long the limits have let nothing pass, whether or not a request waited, added up over the workers.
    #[must_use]
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_ns.load(Ordering::Relaxed))
    }

    /// Changes with every [`Qos::set`]; even: nothing is limited.
    #[inline]
    fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    fn membership(&self) -> Option<Membership> {
        lock(&self.membership).clone()
    }
}

impl Drop for Qos {
    fn drop(&mut self) {
        let membership = self.membership.get_mut();
        leave(membership.unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn leave(membership: Option<Membership>) {
    if let Some(Membership { group, member }) = membership {
        group.leave(&member);
    }
}

/// No lock here is held for longer than a walk through the members of a group.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
