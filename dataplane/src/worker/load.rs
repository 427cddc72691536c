//! How busy a worker is.
//!
//! Time in which a worker found nothing to do, or slept, is idle; all else is busy. One turn in
//! [`PERIOD`] is timed and stands for the others, so that a turn costs one subtraction.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::clock;

/// One turn in so many is timed: a prime, so that no pattern of busy and empty turns hides between them.
const PERIOD: u32 = 61;
/// An empty turn that took longer was interrupted.
const LONGEST_EMPTY_TURN: Duration = Duration::from_micros(20);
/// Timed turns with work after which a worker that is watched says that it is busy: about 4,000 turns.
const BUSY_TURNS: u32 = 64;

/// What a worker shows of its load. Written by the worker, read by the control thread at any time.
#[derive(Debug, Default)]
pub struct Load {
    /// Ticks that it was idle, since its start.
    idle_ticks: AtomicU64,
    /// Since when it sleeps; 0: it does not.
    asleep_since: AtomicU64,
    /// The control thread sleeps, and is to be told when the worker gets busy.
    watched: AtomicBool,
}

impl Load {
    /// Ticks that the worker was idle from its start until `now` ([`clock::now`]).
    #[must_use]
    pub fn idle_ticks(&self, now: u64) -> u64 {
        let asleep_since = self.asleep_since.load(Ordering::Relaxed);
        let asleep = if asleep_since == 0 {
            0
        } else {
            now.saturating_sub(asleep_since)
        };
        self.idle_ticks.load(Ordering::Relaxed) + asleep
    }

    /// Has the worker say [`FromWorker::Busy`](super::message::FromWorker::Busy) once it has had work for a
    /// while.
    pub fn watch(&self) {
        self.watched.store(true, Ordering::Relaxed);
    }
}

/// The worker's end of a [`Load`].
#[derive(Debug)]
pub struct Meter {
    load: Arc<Load>,
    idle_ticks: u64,
    longest: u64,
    /// Turns until the next is timed, or until the timed one has ended.
    left: u32,
    /// When the timed turn began.
    since: Option<u64>,
    busy_turns: u32,
}

impl Meter {
    /// Of a worker that begins now.
    #[must_use]
    pub fn new(load: Arc<Load>) -> Self {
        Self {
            load,
            idle_ticks: 0,
            longest: clock::ticks_in(LONGEST_EMPTY_TURN),
            left: PERIOD,
            since: None,
            busy_turns: 0,
        }
    }

    /// A turn has ended, which did something or did not. True: the control thread wants to hear that this
    /// worker is busy.
    #[inline]
    pub fn turn(&mut self, busy: bool) -> bool {
        self.left -= 1;
        self.left == 0 && self.sample(busy)
    }

    fn sample(&mut self, busy: bool) -> bool {
        let now = clock::now();
        let Some(since) = self.since.take() else {
            (self.since, self.left) = (Some(now), 1);
            return false;
        };
        self.left = PERIOD - 1;
        if !busy {
            let ticks = now.saturating_sub(since).min(self.longest);
            self.idle(ticks * u64::from(PERIOD));
            return false;
        }
        self.busy_turns += 1;
        self.busy_turns.is_multiple_of(BUSY_TURNS)
            && self.load.watched.load(Ordering::Relaxed)
            && self.load.watched.swap(false, Ordering::Relaxed)
    }

    fn idle(&mut self, ticks: u64) {
        self.idle_ticks += ticks;
        self.load
            .idle_ticks
            .store(self.idle_ticks, Ordering::Relaxed);
    }

    /// It sleeps during `sleep`.
    pub fn asleep<T>(&mut self, sleep: impl FnOnce() -> T) -> T {
        let since = clock::now();
        self.load.asleep_since.store(since, Ordering::Relaxed);
        let result = sleep();
        self.load.asleep_since.store(0, Ordering::Relaxed);
        self.idle(clock::now().saturating_sub(since));
        (self.since, self.left) = (None, PERIOD);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> (Arc<Load>, Meter) {
        let load = Arc::new(Load::default());
        (Arc::clone(&load), Meter::new(load))
    }

    /// However long the machine takes for a turn: what is idle follows from which turns were.
    #[test]
    fn empty_turns_are_idle_and_others_are_not() {
        let (load, mut meter) = meter();
        for _ in 0..PERIOD * 100 {
            assert!(!meter.turn(true));
        }
        assert_eq!(load.idle_ticks(clock::now()), 0);
        for _ in 0..PERIOD * 100 {
            assert!(!meter.turn(false));
        }
        let idle = load.idle_ticks(clock::now());
        assert!(idle > 0);
        assert!(idle <= meter.longest * u64::from(PERIOD) * 100);
    }

    #[test]
    fn a_sleep_is_idle_while_it_lasts_and_afterwards() {
        let (load, mut meter) = meter();
        let before = clock::now();
        let during = meter.asleep(|| {
            std::thread::sleep(Duration::from_millis(5));
            load.idle_ticks(clock::now())
        });
        let (after, now) = (load.idle_ticks(clock::now()), clock::now());
        assert!(during >= clock::ticks_in(Duration::from_millis(4)));
        assert!(during <= after && after <= now - before);
    }

    #[test]
    fn a_worker_that_is_watched_says_once_that_it_is_busy() {
        let (load, mut meter) = meter();
        let mut said = |turns: u32, busy: bool| (0..turns).filter(|_| meter.turn(busy)).count();
        let turns = 2 * PERIOD * BUSY_TURNS;
        assert_eq!(said(turns, true), 0, "nobody asked");
        load.watch();
        assert_eq!(said(turns, false), 0, "it had nothing to do");
        assert_eq!(said(turns, true), 1);
        assert_eq!(said(turns, true), 0);
    }
}
