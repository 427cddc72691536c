//! The zone of a re-key in a worker: the bytes that nobody may touch while they get another key.
//!
//! From the moment that it is locked, requests that overlap it wait (*parked*), and when the last of those
//! that had begun has ended, the ticket drops: so the rekeyer knows that the bytes are its own. It is
//! locked for some ten milliseconds, or until the rekeyer gives up waiting. A parked request has a flight; a
//! device with [`MOST_PARKED`] of them has no more requests taken until then, so that it can't take the flights
//! of the worker's other devices.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::Pipeline;
use super::flight::{Begun, Flight, Local, Outcome, Stage, Start};
use crate::blk::request::{Operation, Status};
use crate::blk::{Ciphers, Keys};
use crate::rekey::Ticket;
use crate::virtqueue::Chain;

/// Parked requests of a device on a worker, those of one more turn aside.
const MOST_PARKED: u32 = 256;

/// A device's zone. Without one, `to` is 0: nothing begins below that.
#[derive(Debug, Default)]
pub(super) struct Zone {
    from: Cell<u64>,
    to: Cell<u64>,
    /// Its bytes are lost until the volume is taken anew: requests that overlap it fail.
    fails: Cell<bool>,
    parked: Cell<u32>,
}

impl Zone {
    #[inline]
    fn overlaps(&self, offset_bytes: u64, bytes: u64) -> bool {
        offset_bytes < self.to.get() && self.from.get() < offset_bytes.saturating_add(bytes)
    }

    fn set(&self, zone: Range<u64>, fails: bool) {
        self.from.set(zone.start);
        self.to.set(zone.end);
        self.fails.set(fails);
    }
}

impl Local {
    /// Whether so many requests are parked that no more are to be taken.
    #[must_use]
    #[inline]
    pub fn is_clogged(&self) -> bool {
        self.may_park() == 0
    }

    /// How many more requests may be parked, and so be taken together.
    #[must_use]
    #[inline]
    pub fn may_park(&self) -> usize {
        MOST_PARKED.saturating_sub(self.zone.parked.get()) as usize
    }

    /// None of its requests is parked any more.
    pub(super) fn unpark(&self) {
        self.zone.parked.set(0);
    }

    /// Whether a request has to keep off the zone.
    #[inline]
    pub(super) fn keeps_off(&self, offset_bytes: u64, bytes: u64) -> bool {
        self.zone.overlaps(offset_bytes, bytes)
    }
}

impl Flight {
    /// Whether it transfers bytes of the zone of its device.
    fn is_in_zone(&self, local: &Rc<Local>) -> bool {
        let of = self.local.as_ref().is_some_and(|of| Rc::ptr_eq(of, local));
        let (offset_bytes, bytes) = match self.operation {
            Operation::Read { offset_bytes } | Operation::Write { offset_bytes } => {
                (offset_bytes, self.bytes)
            }
            Operation::Discard | Operation::WriteZeroes => {
                (self.extent.start, self.extent.end - self.extent.start)
            }
            Operation::Flush | Operation::GetId => return false,
        };
        of && self.stage == Stage::Transfers && local.zone.overlaps(offset_bytes, bytes)
    }
}

impl Pipeline {
    /// Has a request wait for the end of the zone that it overlaps, or fail with it.
    #[cold]
    pub(super) fn park(&mut self, start: Start<'_>, chain: &mut Chain, bytes: u64) -> Begun {
        if start.local.zone.fails.get() {
            return Begun::Done(Outcome::failed(Status::IoError));
        }
        match self.take_off(start, chain, bytes) {
            Some(index) => self.park_flight(index, start.local),
            None => return Begun::Done(Outcome::failed(Status::IoError)),
        }
        Begun::Pending
    }

    fn park_flight(&mut self, index: u32, local: &Local) {
        if let Some(flight) = self.flights.get_mut(index as usize) {
            flight.stage = Stage::Parked;
            self.parked.push(index);
            local.zone.parked.update(|n| n + 1);
        }
    }

    /// As [`Pipeline::park`], for a flight whose ranges are known; false where it may begin.
    pub(super) fn parks_ranges(&mut self, index: u32, local: &Local) -> bool {
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return false;
        };
        let starts = flight.ranges.iter().map(|r| r.offset_bytes);
        let ends = flight.ranges.iter().map(|r| r.offset_bytes + r.bytes);
        flight.extent = starts.min().unwrap_or(0)..ends.max().unwrap_or(0);
        let bytes = flight.extent.end - flight.extent.start;
        if !local.zone.overlaps(flight.extent.start, bytes) {
            return false;
        }
        if local.zone.fails.get() {
            self.fail(index);
        } else {
            self.park_flight(index, local);
        }
        true
    }

    /// Keeps requests off a zone from now on. The ticket drops once none that overlaps it is in flight, or
    /// with the zone's end.
    pub fn lock_zone(&mut self, local: &Rc<Local>, zone: Range<u64>, ticket: Ticket) {
        self.clearing.retain(|(of, _)| !Rc::ptr_eq(of, local));
        local.zone.set(zone, false);
        self.clearing.push((Rc::clone(local), ticket));
        self.look_for_clear();
    }

    /// Whether a zone is locked that is not clear yet.
    #[must_use]
    #[inline]
    pub fn has_clearing(&self) -> bool {
        !self.clearing.is_empty()
    }

    /// Drops the tickets of zones in which nothing is in flight any more.
    pub fn look_for_clear(&mut self) {
        let flights = &self.flights;
        self.clearing
            .retain(|(local, _)| flights.iter().any(|flight| flight.is_in_zone(local)));
    }

    /// Ends a zone: everything below the frontier is under the key now, and what waited goes on.
    pub fn unlock_zone(&mut self, local: &Rc<Local>, frontier_bytes: u64) {
        if let Some(keys) = local.keys.borrow_mut().as_mut() {
            keys.set_frontier(frontier_bytes);
        }
        local.zone.set(0..0, false);
        self.end_zone(local);
    }

    /// Nobody knows what the zone holds: what waits for it fails, and what comes for it.
    pub fn fail_zone(&mut self, local: &Rc<Local>, zone: Range<u64>) {
        local.zone.set(zone, true);
        self.end_zone(local);
    }

    fn end_zone(&mut self, local: &Rc<Local>) {
        self.clearing.retain(|(of, _)| !Rc::ptr_eq(of, local));
        let mut at = 0;
        while let Some(&index) = self.parked.get(at) {
            let flight = self.flights.get_mut(index as usize);
            let Some(flight) =
                flight.filter(|f| f.local.as_ref().is_some_and(|of| Rc::ptr_eq(of, local)))
            else {
                at += 1;
                continue;
            };
            flight.stage = Stage::Transfers;
            self.parked.swap_remove(at);
            if local.zone.fails.get() {
                self.fail(index);
            } else {
                // All of an encrypted device's transfers are staged. It goes on in its turn.
                self.wait_in_line(index);
            }
        }
        local.zone.parked.set(0);
    }

    /// Other keys for the same bytes, from now on: with a re-key, all of them are under the previous one.
    pub fn set_ciphers(&mut self, local: &Rc<Local>, ciphers: &Ciphers) {
        if !local.is_wiped() {
            *local.keys.borrow_mut() = Some(Keys::new(ciphers));
        }
    }
}
