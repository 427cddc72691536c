//! Whose turn it is on a worker: its devices share its time, and so do the queues of a device.
//!
//! **By time, not by requests.** A turn is timed, and its device charged what it took: long chains, junk
//! descriptors, large encrypted requests and 64 queues all cost their own device. While several devices want
//! turns, one that has used more than the least of them, by [`SLACK`], stands back until the others have caught
//! up. A device that comes after a pause starts level with the others: it has no claim to what it missed. How many
//! requests a turn takes then follows from what the device's requests took lately, so that a turn is short.
//!
//! **Waited for.** A driver whose requests come one upon the other has an empty ring for a moment after each
//! turn, and a neighbour with long turns would get in each time. So a device whose next request used to come
//! within [`PATIENCE`] is waited for that long, if it lags behind; the wait is charged to it.
//!
//! **Polled or not.** Only queues in which something happened lately are looked at ([`Turns::poll`]); the others have
//! their kick armed and cost nothing, neither a busy worker nor one that falls asleep.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::Duration;

use super::clock;
use super::message::DeviceId;
use crate::device::Device;
use crate::qos::{Allowance, Gate, Moment};

/// How far a device may be ahead of others, and how long a turn is while others want one.
const SLACK: Duration = Duration::from_micros(20);
/// A turn while nobody else wants one is longer by this: somebody may come.
const TIMES_ALONE: u64 = 5;
/// One in so many turns of a device that is alone is timed, to know what its requests take.
const TIMED_EVERY: u32 = 32;
/// How long a device is waited for.
const PATIENCE: Duration = Duration::from_micros(3);
/// So many requests in a row, each within [`PATIENCE`] of the one before, and a device is waited for.
const KEEN: u8 = 4;
/// A queue of a busy worker is polled while it is empty for at least so long,
const LEAST_GRACE: Duration = Duration::from_micros(50);
/// and at most so long: the longer, the more often it was worth it.
const MOST_GRACE: Duration = Duration::from_micros(800);
/// Ticks after which a device's metrics are told of them: less than a millisecond's.
const COUNT_EVERY: u64 = 1 << 20;
/// A device with more polled queues is charged for looking at them, too.
const FREE_LOOKS: usize = 4;

/// A device with queues on this worker.
#[derive(Debug)]
struct Seat {
    id: DeviceId,
    device: Device,
    gate: Gate,
    /// As the gate's, in ticks; 0: it is open.
    shut_until: u64,
    /// Ticks that it was charged, and those of them that its metrics do not know of.
    used: u64,
    uncounted: u64,
    /// When it was first found without requests; 0: it had some when it was looked at last.
    idle_since: u64,
    /// When it was last found so.
    idle_at: u64,
    /// How often in a row its next request came at once, up to [`KEEN`].
    keen: u8,
    /// Ticks that a request takes, smoothed, and how many a turn has time for, if nobody else wants one.
    cost: u64,
    batch: usize,
    /// Numbers of its queues that are polled, and whose turn it is.
    polled: Vec<u32>,
    next: usize,
}

/// Devices of a worker, and who is next.
#[derive(Debug)]
pub struct Turns {
    seats: Vec<Option<Seat>>,
    /// Seats with polled queues.
    awake: Vec<u32>,
    /// What the least of the devices that want turns has used.
    level: u64,
    slack: u64,
    patience: u64,
    graces: (u64, u64),
    /// Turns of a device that is alone.
    lone_turns: u32,
}

/// How things stand at the beginning of a round.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Several devices want turns.
    contended: bool,
    /// None gets a turn that has used more.
    most_used: u64,
    /// Who has used least.
    least: Option<u32>,
}

/// A device's turn.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// Whose.
    pub seat: u32,
    /// Its polled queues.
    pub queues: usize,
    /// Requests to be taken from a queue.
    pub batch: usize,
    /// When it is over, if not sooner ([`clock::now`]).
    pub ends_at: u64,
}

impl Default for Turns {
    fn default() -> Self {
        Self::new(clock::ticks_in(SLACK), clock::ticks_in(PATIENCE))
    }
}

impl Turns {
    fn new(slack: u64, patience: u64) -> Self {
        Self {
            seats: Vec::new(),
            awake: Vec::new(),
            level: 0,
            slack: slack.max(1),
            patience,
            graces: (clock::ticks_in(LEAST_GRACE), clock::ticks_in(MOST_GRACE)),
            lone_turns: 0,
        }
    }

    /// The seat of a device, which gets one if it has none.
    pub fn seat(&mut self, id: DeviceId, device: &Device) -> u32 {
        let of = |seat: &Option<Seat>| seat.as_ref().is_some_and(|seat| seat.id == id);
        let free = |seats: &[Option<Seat>]| seats.iter().position(Option::is_none);
        let at = self.seats.iter().position(of).unwrap_or_else(|| {
            let at = free(&self.seats).unwrap_or(self.seats.len());
            if at == self.seats.len() {
                self.seats.push(None);
            }
            if let Some(seat) = self.seats.get_mut(at) {
                // Its requests are taken for slow ones until more is known.
                let cost = self.slack / 4;
                *seat = Some(Seat::new(id, device.clone(), self.level, cost));
            }
            at
        });
        u32::try_from(at).unwrap_or(u32::MAX)
    }

    /// Takes the seat of a device that has no queues any more.
    pub fn leave(&mut self, id: DeviceId) {
        for (number, seat) in (0..).zip(&mut self.seats) {
            if seat.take_if(|seat| seat.id == id).is_some() {
                self.awake.retain(|awake| *awake != number);
            }
        }
    }

    #[inline]
    fn at(&mut self, seat: u32) -> Option<&mut Seat> {
        self.seats.get_mut(seat as usize)?.as_mut()
    }

    /// A queue is looked at from now on.
    pub fn poll(&mut self, seat: u32, queue: u32) {
        let Some(of) = self.at(seat) else {
            return;
        };
        if of.polled.contains(&queue) {
            return;
        }
        of.polled.push(queue);
        if of.polled.len() == 1 {
            self.awake.push(seat);
        }
    }

    /// A queue is not looked at any more: it is gone, or waits for a kick.
    pub fn unpoll(&mut self, seat: u32, queue: u32) {
        let Some(of) = self.at(seat) else {
            return;
        };
        let Some(at) = of.polled.iter().position(|polled| *polled == queue) else {
            return;
        };
        // What comes after it in the list keeps its place, or takes this one: who goes through the list from
        // its end misses nothing.
        of.polled.swap_remove(at);
        if of.polled.is_empty()
            && let Some(at) = self.awake.iter().position(|awake| *awake == seat)
        {
            self.awake.swap_remove(at);
        }
    }

    /// For how long a queue is polled from now on while it is empty, which was polled no more at some moment.
    #[must_use]
    pub fn grace(&self, before: u64, parked_at: u64) -> u64 {
        let (least, most) = self.graces;
        // Had it been polled for as long again, its driver need not have kicked.
        let soon = clock::now().saturating_sub(parked_at) < before.max(least);
        let grace = if soon { before * 2 } else { before / 2 };
        grace.clamp(least, most)
    }

    /// The only queue of the only device that is polled, most of the time: with nobody to be fair to, it is
    /// served without a look at the clock. How many requests are to be taken from it, of `most` in a batch.
    #[inline]
    pub fn lone(&mut self, most: usize) -> Option<(u32, usize)> {
        let [number] = self.awake[..] else {
            return None;
        };
        self.lone_turns = self.lone_turns.wrapping_add(1);
        let seat = self.seats.get(number as usize)?.as_ref()?;
        let [queue] = seat.polled[..] else {
            return None;
        };
        let is_open = seat.shut_until == 0;
        let is_timed = self.lone_turns.is_multiple_of(TIMED_EVERY);
        (is_open && !is_timed).then_some((queue, seat.batch.min(most)))
    }

    /// Begins a round, in which each device may get a turn.
    #[inline]
    pub fn round(&mut self, now: u64) -> Round {
        let mut round = Round {
            contended: false,
            most_used: u64::MAX,
            least: None,
        };
        // With one device there is nobody to be fair to.
        if self.awake.len() > 1 {
            self.compare(now, &mut round);
        }
        round
    }

    fn compare(&mut self, now: u64, round: &mut Round) {
        let (mut least, mut wanting) = (u64::MAX, 0);
        for number in &self.awake {
            let seat = self.seats.get(*number as usize).and_then(Option::as_ref);
            let Some(seat) = seat.filter(|seat| seat.wants(now, self.patience)) else {
                continue;
            };
            wanting += 1;
            if seat.used < least {
                least = seat.used;
                round.least = Some(*number);
            }
        }
        round.contended = wanting > 1;
        if wanting > 0 {
            self.level = self.level.max(least);
            round.most_used = self.level.saturating_add(self.slack);
        }
    }

    /// Devices that may get a turn, for [`Turns::turn`].
    #[must_use]
    #[inline]
    pub fn awake(&self) -> usize {
        self.awake.len()
    }

    /// The turn of the `place`th of them; none if it stands back, or has used up its limit.
    #[inline]
    pub fn turn(&mut self, place: usize, round: &Round, now: u64, batch: usize) -> Option<Turn> {
        let number = *self.awake.get(place)?;
        let (level, slack) = (self.level, self.slack);
        let seat = self.at(number)?;
        if now < seat.shut_until {
            return None;
        }
        if seat.used > round.most_used {
            return None;
        }
        let mut length = slack * TIMES_ALONE;
        if round.contended {
            seat.used = seat.used.max(level.saturating_sub(slack));
            length = slack;
        }
        let fits = usize::try_from(length / seat.cost.max(1)).unwrap_or(batch);
        seat.batch = fits.clamp(1, batch);
        Some(Turn {
            seat: number,
            queues: seat.polled.len(),
            batch: seat.batch,
            ends_at: now.saturating_add(length),
        })
    }

    /// What the limits of a device let pass in its turn; none: nothing, for a while.
    pub fn allowance(&mut self, seat: u32, now: u64) -> Option<Allowance> {
        let seat = self.at(seat)?;
        let moment = Moment::now();
        let allowance = seat.gate.ask(seat.device.qos(), moment);
        seat.shut_until = match seat.gate.shut_until() {
            Some(until) if allowance.is_none() => {
                now.saturating_add(clock::ticks_in(until.since(moment)))
            }
            _ => 0,
        };
        allowance
    }

    /// So much of what the limits let pass was used.
    pub fn passed(&mut self, seat: u32, requests: usize, bytes: u64) {
        if let Some(seat) = self.at(seat) {
            let gate = &mut seat.gate;
            gate.passed(seat.device.qos(), requests as u64, bytes, Moment::now());
        }
    }

    /// The queue of a device whose turn it is.
    #[inline]
    pub fn next_queue(&mut self, seat: u32) -> Option<u32> {
        let seat = self.at(seat)?;
        seat.next += 1;
        if seat.next >= seat.polled.len() {
            seat.next = 0;
        }
        seat.polled.get(seat.next).copied()
    }

    /// A turn is over, in which so many requests were taken.
    #[inline]
    pub fn charge(&mut self, turn: &Turn, requests: usize, from: u64, to: u64) {
        let patience = self.patience;
        let Some(seat) = self.at(turn.seat) else {
            return;
        };
        let ticks = to.saturating_sub(from);
        if requests == 0 {
            if turn.queues > FREE_LOOKS {
                seat.charge(ticks);
            }
            if seat.idle_since == 0 {
                seat.idle_since = from.max(1);
            }
            seat.idle_at = from;
            return;
        }
        seat.charge(ticks);
        seat.cost = (seat.cost * 7 + ticks / requests as u64) / 8;
        let idle_since = std::mem::take(&mut seat.idle_since);
        // It came since the last look: while others had their turns, that may be long ago.
        let at_once = seat.idle_at.saturating_sub(idle_since) < patience;
        seat.keen = if idle_since == 0 || at_once {
            (seat.keen + 1).min(KEEN)
        } else {
            seat.keen / 2
        };
    }

    /// Time outside of turns that a device is the reason of: completions of its requests.
    #[inline]
    pub fn charge_more(&mut self, seat: u32, ticks: u64) {
        if let Some(seat) = self.at(seat) {
            seat.charge(ticks);
        }
    }

    /// A round in which nothing was taken: whoever others stood back for pays for the wait.
    #[inline]
    pub fn waited(&mut self, round: &Round, from: u64, to: u64) {
        if let Some(least) = round.least.filter(|_| round.contended) {
            self.charge_more(least, to.saturating_sub(from));
        }
    }

    /// Until when a device that used up its limits is not looked at ([`clock::now`]); 0: it is.
    #[must_use]
    pub fn shut_until(&self, seat: u32) -> u64 {
        let seat = self.seats.get(seat as usize).and_then(Option::as_ref);
        seat.map_or(0, |seat| seat.shut_until)
    }

    /// The seat at a place, and how many of its queues are polled.
    #[must_use]
    pub fn place(&self, place: usize) -> Option<(u32, usize)> {
        let number = *self.awake.get(place)?;
        let seat = self.seats.get(number as usize)?.as_ref()?;
        Some((number, seat.polled.len()))
    }

    /// One of a seat's polled queues.
    #[must_use]
    pub fn polled(&self, seat: u32, at: usize) -> Option<u32> {
        let seat = self.seats.get(seat as usize)?.as_ref()?;
        seat.polled.get(at).copied()
    }
}

impl Seat {
    fn new(id: DeviceId, device: Device, level: u64, cost: u64) -> Self {
        Self {
            id,
            device,
            gate: Gate::default(),
            shut_until: 0,
            used: level,
            uncounted: 0,
            idle_since: 1,
            idle_at: u64::MAX,
            keen: 0,
            cost,
            batch: 1,
            polled: Vec::new(),
            next: 0,
        }
    }

    #[inline]
    fn charge(&mut self, ticks: u64) {
        self.used += ticks;
        self.uncounted += ticks;
        if self.uncounted >= COUNT_EVERY {
            let ticks = std::mem::take(&mut self.uncounted);
            self.device.add_worker_ticks(ticks);
        }
    }

    /// Whether others have to let it pass: it has requests, or its next one is about to come.
    #[inline]
    fn wants(&self, now: u64, patience: u64) -> bool {
        let comes = self.keen == KEEN && self.idle_at.saturating_sub(self.idle_since) < patience;
        now >= self.shut_until && (self.idle_since == 0 || comes)
    }
}

#[cfg(test)]
mod tests;
