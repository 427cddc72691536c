//! Giving a device up whose storage does not answer, when its frontend is gone or sent away (ADR 0024).
//!
//! What the kernel has of it is cancelled where it lets itself be cancelled; what it does not have ends. Whatever
//! is left stays as it is, slot, staging and guest memory, until the kernel has given it back: then it ends too,
//! without a word to the guest and without a key. The in-flight region keeps it, so that a frontend that comes
//! back has it done again, which begins only after the last of it has ended.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;
use std::rc::Rc;

use super::Pipeline;
use super::flight::{Local, Stage, untoken};

/// Whether a worker has given a device up.
#[derive(Debug, Default)]
pub(super) struct GivenUp {
    requests: Cell<bool>,
    keys: Cell<bool>,
}

impl Local {
    /// Whether what is under way ends without a word to the guest.
    #[must_use]
    #[inline]
    pub fn is_given_up(&self) -> bool {
        self.given_up.requests.get()
    }

    /// Whether its keys were wiped: nothing of it can begin any more.
    #[must_use]
    #[inline]
    pub fn is_wiped(&self) -> bool {
        self.given_up.keys.get()
    }
}

impl Pipeline {
    /// A queue of a device begins to be served here: what was given up of it is over, if all of it has ended.
    pub fn take_up(&self, local: &Rc<Local>) {
        let is_its = |of: &Rc<Local>| Rc::ptr_eq(of, local);
        let mut under_way = self
            .flights
            .iter()
            .filter_map(|flight| flight.local.as_ref());
        if local.is_given_up() && !under_way.any(is_its) {
            local.given_up.requests.set(false);
        }
    }

    /// Gives up what is under way of a device whose queues all stop; with `wipe` its keys too, for good.
    pub fn give_up(&mut self, local: &Rc<Local>, wipe: bool) {
        local.given_up.requests.set(true);
        if wipe {
            local.given_up.keys.set(true);
            local.keys.borrow_mut().take();
        }
        self.fail_all(local);
        let flights = &self.flights;
        let is_its = |token: u64| {
            let flight = flights.get(untoken(token).0 as usize);
            let of = flight.and_then(|flight| flight.local.as_ref());
            of.is_some_and(|of| Rc::ptr_eq(of, local))
        };
        self.ring.cancel_transfers(is_its);
        self.ages.look_soon();
    }

    /// Nothing more of them is begun, and those that nothing is under way of end in their turn.
    fn fail_all(&mut self, local: &Rc<Local>) {
        let is_its = |of: &Option<Rc<Local>>| of.as_ref().is_some_and(|of| Rc::ptr_eq(of, local));
        let mut idle = Vec::new();
        for (index, flight) in (0..).zip(&mut self.flights) {
            if !is_its(&flight.local) {
                continue;
            }
            flight.failed = true;
            // One that waits for a flush in flight ends with it.
            let flushes = self.flushing.contains(&index);
            if flight.stage == Stage::Parked {
                flight.stage = Stage::Transfers;
            }
            if flight.outstanding == 0 && !flushes {
                idle.push(index);
            }
        }
        self.parked.retain(|index| !idle.contains(index));
        self.unflushed.retain(|index| !idle.contains(index));
        local.unpark();
        for index in idle {
            self.wait_in_line(index);
        }
    }
}
