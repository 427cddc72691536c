//! How old the requests under way are: a clock that is read where requests begin or end, once per turn at most;
//! a look at all of them about every 100 ms; and, between two looks, how long those took that ended.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Pipeline;
use super::flight::Local;
use crate::blk::health::{Found, LATENCY_BUCKETS, Level, bucket};
use crate::worker::clock;
use crate::worker::ring::MAX_IN_FLIGHT;

/// How often a worker looks at what it has under way; it sleeps no longer while something is.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Turns in which nothing begins or ends, before the clock is read without a reason.
const TURNS_PER_READ: u32 = 64;

/// When requests began, in nanoseconds since the worker did; and the clock.
#[derive(Debug)]
pub(super) struct Ages {
    /// By flight; zero: it is not under way. Apart from the flights, so that a look reads little memory.
    began: Box<[u64]>,
    /// The worker's clock at its start, and nanoseconds per 2^32 of its ticks.
    start_ticks: u64,
    scale: u128,
    now_ns: u64,
    /// The clock was read in this turn.
    is_fresh: bool,
    turns: u32,
    next_look_ns: u64,
    /// Ways to devices of which something ended since the last look.
    ended: Vec<Rc<Local>>,
    /// Those of which something was too old at the last one.
    old: Vec<Rc<Local>>,
}

impl Ages {
    pub(super) fn new() -> Self {
        Self {
            began: vec![0; MAX_IN_FLIGHT as usize].into_boxed_slice(),
            start_ticks: clock::now(),
            scale: clock::duration_of(1 << 32).as_nanos(),
            now_ns: 1,
            is_fresh: false,
            turns: 0,
            next_look_ns: 0,
            ended: Vec::new(),
            old: Vec::new(),
        }
    }

    #[inline]
    fn now_ns(&mut self) -> u64 {
        if !self.is_fresh {
            self.is_fresh = true;
            let ticks = clock::now().saturating_sub(self.start_ticks);
            let ns = (u128::from(ticks) * self.scale) >> 32;
            // Never zero, which means that a flight is not under way.
            self.now_ns = u64::try_from(ns).unwrap_or(u64::MAX) | 1;
        }
        self.now_ns
    }

    /// A request begins.
    #[inline]
    pub(super) fn begin(&mut self, flight: u32) {
        let now = self.now_ns();
        if let Some(began) = self.began.get_mut(flight as usize) {
            *began = now;
        }
    }

    /// It has ended.
    #[inline]
    pub(super) fn end(&mut self, flight: u32, local: &Rc<Local>) {
        let now = self.now_ns();
        let Some(began) = self.began.get_mut(flight as usize) else {
            return;
        };
        let took = now.saturating_sub(std::mem::take(began));
        if local.tally.count(took, local.device.health.slow_ns()) {
            self.ended.push(Rc::clone(local));
        }
    }

    /// A look is due with the next turn.
    pub(super) fn look_soon(&mut self) {
        self.next_look_ns = 0;
        // Read with the next turn, whether something ends in it or not.
        self.turns = TURNS_PER_READ - 1;
    }
}

/// What ended of a device on a worker since the last look, and what was old then.
#[derive(Debug, Default)]
pub(super) struct Tally {
    latency: [Cell<u32>; LATENCY_BUCKETS],
    slow: Cell<u32>,
    counted: Cell<bool>,
    found: Cell<Found>,
    level: Cell<Level>,
}

impl Tally {
    /// Counts a request that ended after so long; whether it is the first since the last look.
    #[inline]
    fn count(&self, took_ns: u64, slow_ns: u64) -> bool {
        if let Some(count) = self.latency.get(bucket(took_ns)) {
            count.set(count.get().wrapping_add(1));
        }
        if took_ns >= slow_ns {
            self.slow.set(self.slow.get().wrapping_add(1));
        }
        !self.counted.replace(true)
    }
}

impl Pipeline {
    /// Another turn begins, or a sleep has ended: the clock may have moved.
    #[inline]
    pub fn turn(&mut self) {
        self.ages.is_fresh = false;
    }

    /// Requests under way.
    #[must_use]
    #[inline]
    pub fn under_way(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// A sleep has ended.
    pub fn woke(&mut self) {
        self.ages.is_fresh = false;
        self.ages.now_ns();
    }

    /// Whether what is under way, or was too old at the last look, has to be looked at while nothing happens.
    #[must_use]
    pub fn watches(&self) -> bool {
        self.under_way() > 0 || !self.ages.old.is_empty()
    }

    /// Nothing of a device is under way, and nothing of it is kept.
    pub fn forget(&mut self, worker: usize, local: &Rc<Local>) {
        self.tell_of_ended();
        self.ages.old.retain(|old| !Rc::ptr_eq(old, local));
        local.device.health.report(worker, Found::default());
    }

    /// Whether [`Pipeline::look_at_ages`] is due: about every [`LOOK_EVERY`] while something is under way.
    #[must_use]
    #[inline]
    pub fn is_look_due(&mut self) -> bool {
        if !self.watches() && self.ages.ended.is_empty() {
            return false;
        }
        self.ages.turns = self.ages.turns.wrapping_add(1);
        if !self.ages.is_fresh && !self.ages.turns.is_multiple_of(TURNS_PER_READ) {
            return false;
        }
        self.ages.now_ns() >= self.ages.next_look_ns
    }

    /// Looks at the age of everything under way, and tells the devices of it; `changed` is called for those that
    /// do better or worse than at the last look.
    #[cold]
    pub fn look_at_ages(&mut self, worker: usize, mut changed: impl FnMut(&Rc<Local>)) {
        self.tell_of_ended();
        let now = self.ages.now_ns();
        let moment = Instant::now();
        let every = u64::try_from(LOOK_EVERY.as_nanos()).unwrap_or(u64::MAX);
        self.ages.next_look_ns = now.saturating_add(every);
        let mut old = std::mem::take(&mut self.ages.old);
        for local in &old {
            local.tally.found.set(Found::default());
        }
        for (began, flight) in self.ages.began.iter().zip(&self.flights) {
            let Some(local) = flight.local.as_ref().filter(|_| *began > 0) else {
                continue;
            };
            let is_old = now.saturating_sub(*began) >= local.device.health.slow_ns();
            if !is_old && !local.is_given_up() {
                continue;
            }
            let mut found = local.tally.found.get();
            if found.old == 0 && !old.iter().any(|known| Rc::ptr_eq(known, local)) {
                old.push(Rc::clone(local));
            }
            // By its age: the two clocks drift apart.
            let age = Duration::from_nanos(now.saturating_sub(*began));
            found.add(moment.checked_sub(age).unwrap_or(moment));
            local.tally.found.set(found);
        }
        for local in &old {
            let found = local.tally.found.get();
            local.device.health.report(worker, found);
            let level = local.device.health.level_of(found);
            if local.tally.level.replace(level) != level {
                changed(local);
            }
        }
        old.retain(|local| local.tally.found.get().old > 0);
        self.ages.old = old;
    }

    /// Adds to the devices' counters what has ended since the last time.
    pub fn tell_of_ended(&mut self) {
        for local in self.ages.ended.drain(..) {
            let (tally, health) = (&local.tally, &local.device.health);
            tally.counted.set(false);
            health.latency.add(tally.latency.iter().map(Cell::take));
            health.add_ended_slow(u64::from(tally.slow.take()));
        }
    }
}
