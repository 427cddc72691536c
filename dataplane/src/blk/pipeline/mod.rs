//! The way of a parsed request to the storage and back.
//!
//! What can be answered at once is ([`Begun::Done`]). Everything else is under way: a plain
//! transfer straight between guest memory and file where the alignment allows, else parts of it
//! through staging, as many at a time as there is room for. A request waits for staging, for the
//! ring or for a flush in a queue, never in a loop.
//!
//! A transfer that a storage could not take right now is tried again as it was, a few times; one that
//! ends short has failed.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod ageing;
mod at_once;
mod flight;
mod flush;
mod give_up;
mod ranges;
mod share;
mod transfers;
mod waiting;
mod zone;

use std::collections::VecDeque;
use std::rc::Rc;

use super::request::{MAX_RANGES, Operation, Range, Status};
use crate::memory::GuestBuffer;
use crate::rekey::Ticket;
use crate::storage::{Action, Begin, Completion, Limits, Transfer};
use crate::virtqueue::Chain;
use crate::worker::ring::{self, MAX_IN_FLIGHT, MAX_SEGMENTS, Ring};
use crate::worker::staging::{Chunk, LARGE_BYTES, Staging};
use ageing::Ages;
use at_once::identify;
pub use flight::{Begun, Landed, Local, Outcome, Start};
use flight::{Flight, Memory, Stage, data, token, untoken};

/// First bit that a token of this module never has.
pub const TOKEN_BITS: u32 = 56;
/// How often a transfer is tried again.
pub(crate) const MAX_RETRIES: u8 = 16;
/// Devices that may have a line of waiting flights before something is allocated for it.
const USUAL_DEVICES: usize = 64;

/// All requests under way on a worker, and what they need.
#[derive(Debug)]
pub struct Pipeline {
    /// Dropped first: it waits for what the kernel still uses.
    pub ring: Ring,
    staging: Staging,
    /// Where the ciphertext of a device without storage goes.
    scratch: Option<Chunk>,
    flights: Vec<Flight>,
    free: Vec<u32>,
    ages: Ages,
    /// Devices with flights that have something left to submit and no staging, or that are to end.
    lines: VecDeque<Rc<Local>>,
    /// The flight that was first in its line and is gone on with.
    resumed: Option<u32>,
    /// Transfers that the storage had no room for.
    again: VecDeque<(u64, Transfer)>,
    /// Transfers that ended outside the ring.
    ended: VecDeque<Completion>,
    /// Ways to storages that hold transfers, and how many there are in all.
    holders: Vec<Rc<Local>>,
    held: usize,
    /// Flights that wait for a flush to begin, and those that one is in flight for.
    unflushed: VecDeque<u32>,
    flushing: Vec<u32>,
    /// Flights that wait for the end of a zone.
    parked: Vec<u32>,
    /// Locked zones in which something is in flight still.
    clearing: Vec<(Rc<Local>, Ticket)>,
    /// Where the ranges of a request are put together.
    ranges: Vec<Range>,
}

impl Pipeline {
    /// Nothing under way; room for as much as the ring has, so that nothing is allocated later.
    #[must_use]
    pub fn new(ring: Ring, mut staging: Staging) -> Self {
        let scratch = staging.take(u64::from(LARGE_BYTES));
        let most = MAX_IN_FLIGHT as usize;
        Self {
            ring,
            staging,
            scratch,
            flights: (0..MAX_IN_FLIGHT).map(|_| Flight::none()).collect(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            ages: Ages::new(),
            lines: VecDeque::with_capacity(USUAL_DEVICES),
            resumed: None,
            again: VecDeque::with_capacity(most),
            ended: VecDeque::with_capacity(most),
            holders: Vec::new(),
            held: 0,
            unflushed: VecDeque::with_capacity(most),
            flushing: Vec::with_capacity(most),
            parked: Vec::new(),
            clearing: Vec::new(),
            ranges: Vec::with_capacity(MAX_RANGES),
        }
    }

    /// How many more requests can be begun, of whichever device.
    #[must_use]
    #[inline]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Begins a request. Its chain is taken (and an empty one left) if it is under way afterwards.
    ///
    /// Inlined, so that the outcome of the shortest requests never lies in memory: what reads it there in
    /// other pieces than it was written waits until all stores before it, to lines of another CPU, are done.
    #[inline(always)]
    pub fn begin(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        let local = start.local;
        match start.operation {
            Operation::Read { .. } | Operation::Write { .. } => match local.memory {
                Memory::No => self.begin_transfer(start, chain),
                Memory::Nowhere if !local.device.is_encrypted() => {
                    let bytes = data(start.operation, chain).bytes();
                    Begun::Done(Outcome::ok(start.operation, bytes))
                }
                Memory::Nowhere | Memory::Ram(_) => Begun::Done(self.at_once(start, chain)),
            },
            Operation::GetId => Begun::Done(identify(&local.device, chain)),
            Operation::Flush => self.begin_flush(start, chain),
            Operation::Discard | Operation::WriteZeroes => self.begin_ranges(start, chain),
        }
    }

    fn begin_flush(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        if start.local.device.flush_failed() {
            return Begun::Done(Outcome::failed(Status::IoError));
        }
        if !matches!(start.local.memory, Memory::No) {
            return Begun::Done(Outcome::ok(Operation::Flush, 0));
        }
        let Some(index) = self.take_off(start, chain, 0) else {
            return Begun::Done(Outcome::failed(Status::IoError));
        };
        // It has not failed a line above, and if it has since, the flight is in line for its end.
        if self.want_flush(index).is_some() {
            return Begun::Done(Outcome::failed(Status::IoError));
        }
        Begun::Pending
    }

    #[inline(never)]
    fn begin_transfer(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        let local = start.local;
        let buffer = data(start.operation, chain);
        let bytes = buffer.bytes();
        let (Operation::Read { offset_bytes } | Operation::Write { offset_bytes }) =
            start.operation
        else {
            return Begun::Done(Outcome::failed(Status::IoError));
        };
        if local.keeps_off(offset_bytes, bytes) {
            return self.park(start, chain, bytes);
        }
        let direct = !local.device.is_encrypted() && is_aligned(buffer, local.limits);
        let Some(index) = self.take_off(start, chain, bytes) else {
            return Begun::Done(Outcome::failed(Status::IoError));
        };
        if direct {
            self.submit_direct(index);
        } else {
            self.advance(index);
        }
        Begun::Pending
    }

    /// A flight ends outside of [`Pipeline::land`] by standing in line.
    fn fail(&mut self, index: u32) {
        if let Some(flight) = self.flights.get_mut(index as usize) {
            flight.failed = true;
            if flight.outstanding == 0 {
                self.wait_in_line(index);
            }
        }
    }

    /// Moves a chain into a flight; none if there is no room ([`Pipeline::room`]).
    #[inline]
    fn take_off(&mut self, start: Start<'_>, chain: &mut Chain, bytes: u64) -> Option<u32> {
        let index = self.free.pop()?;
        start.local.share.flights.update(|n| n + 1);
        let flight = self.flights.get_mut(index as usize)?;
        std::mem::swap(&mut flight.chain, chain);
        flight.queue = start.queue;
        flight.head = start.head;
        flight.operation = start.operation;
        flight.bytes = bytes;
        flight.submitted = 0;
        flight.outstanding = 0;
        flight.failed = false;
        flight.durable = start.durable;
        // What was written before the driver chose write-through is to be stable no later.
        flight.flushes = start.durable
            && matches!(start.operation, Operation::Write { .. })
            && start.local.device.is_unsettled();
        flight.stage = Stage::Transfers;
        flight.local = Some(Rc::clone(start.local));
        self.ages.begin(index);
        Some(index)
    }

    /// Gives a transfer of a flight to its storage; false where that has no more room.
    #[inline]
    fn submit(&mut self, index: u32, at: u64, transfer: Transfer) -> bool {
        if let Some(flight) = self.flights.get_mut(index as usize) {
            flight.outstanding += 1;
        }
        self.give(token(index, at), transfer)
    }

    #[inline]
    fn give(&mut self, token: u64, transfer: Transfer) -> bool {
        let (index, _) = untoken(token);
        let flight = self.flights.get(index as usize);
        let Some(local) = flight.and_then(|flight| flight.local.as_ref()) else {
            debug_assert!(false, "a transfer of no flight");
            return true;
        };
        // A flush comes after everything else has ended.
        if local.is_given_up() && transfer.action != Action::Flush {
            let done = Err(libc::ECANCELED);
            self.ended.push_back(Completion {
                token,
                transfer,
                done,
            });
            return true;
        }
        match local.storage.begin(&mut self.ring, token, transfer) {
            Begin::Later => {}
            Begin::Held => {
                self.held += 1;
                if !self.holders.iter().any(|held| Rc::ptr_eq(held, local)) {
                    self.holders.push(Rc::clone(local));
                }
            }
            Begin::Done(transfer, done) => self.ended.push_back(Completion {
                token,
                transfer,
                done,
            }),
            Begin::Full(transfer) => {
                self.again.push_back((token, transfer));
                return false;
            }
        }
        true
    }

    /// Submits as many parts of a request as there is room for.
    fn advance(&mut self, index: u32) {
        let flight = self.flights.get(index as usize);
        let Some((local, operation)) =
            flight.and_then(|flight| Some((flight.local.clone()?, flight.operation)))
        else {
            return;
        };
        match operation {
            Operation::Discard | Operation::WriteZeroes => self.advance_ranges(index, &local),
            _ => self.advance_staged(index, &local),
        }
        // Nothing will come back for it: it ends, or goes on, from the line.
        let flight = self.flights.get(index as usize);
        if flight.is_some_and(|flight| flight.outstanding == 0) {
            self.wait_in_line(index);
        }
    }

    /// The queue of the request that a completion is for.
    #[must_use]
    #[inline]
    pub fn queue_of(&self, token: u64) -> Option<u32> {
        let (index, _) = untoken(token);
        let flight = self.flights.get(index as usize)?;
        flight.local.is_some().then_some(flight.queue)
    }

    /// Takes a completion of the ring in; the request it was the last of, if it was.
    #[inline]
    pub fn land(&mut self, completion: ring::Completion) -> Option<Landed> {
        self.take_in(Completion {
            token: completion.token,
            transfer: completion.transfer?,
            done: completion.done,
        })
    }

    #[inline]
    fn take_in(&mut self, completion: Completion) -> Option<Landed> {
        let Completion {
            token,
            mut transfer,
            done,
        } = completion;
        let (index, at) = untoken(token);
        let flight = self.flights.get_mut(index as usize)?;
        let local = flight.local.clone()?;
        crate::hand::take(local.device.hand.get());
        let result = transfer.judge(done);
        if let Err(errno) = result
            && is_temporary(transfer.action, errno)
            && transfer.retries < MAX_RETRIES
            && !flight.failed
        {
            transfer.retries += 1;
            self.give(token, transfer);
            return None;
        }
        flight.outstanding -= 1;
        if transfer.action == Action::Flush {
            self.flushed(&local, result);
            return None;
        }
        if let Err(errno) = result
            && !self.goes_another_way(index, &local, &transfer, errno)
        {
            self.note_failure(index, &local, transfer.action, errno);
        }
        self.take_back(index, at, &local, transfer);
        self.go_on(index)
    }

    fn note_failure(&mut self, index: u32, local: &Local, action: Action, errno: i32) {
        if let Some(flight) = self.flights.get_mut(index as usize) {
            flight.failed = true;
            report(flight.operation, errno);
        }
        // A frontend that takes guest memory away (EFAULT) says nothing about the storage.
        let durable = action == (Action::Write { durable: true });
        if durable && errno != libc::EFAULT && !was_cancelled(local, errno) {
            // What it did not make stable, no flush can say to be.
            local.device.latch_flush_failure();
        }
    }

    /// What comes next for a flight: more transfers, a flush, or its end.
    #[inline]
    fn go_on(&mut self, index: u32) -> Option<Landed> {
        let flight = self.flights.get_mut(index as usize)?;
        if flight.waiting || flight.local.is_none() {
            return None;
        }
        if flight.stage == Stage::Transfers && !flight.failed {
            if flight.has_more() {
                self.advance(index);
                return None;
            }
            if flight.outstanding == 0 && flight.flushes {
                return self.want_flush(index);
            }
        }
        self.finish(index)
    }

    /// Ends a flight of which nothing is in flight.
    fn finish(&mut self, index: u32) -> Option<Landed> {
        let flight = self.flights.get_mut(index as usize)?;
        if flight.outstanding > 0 {
            return None;
        }
        let outcome = if flight.failed {
            Outcome::failed(Status::IoError)
        } else {
            Outcome::ok(flight.operation, flight.bytes)
        };
        let given_up = flight.local.as_ref().is_some_and(|of| of.is_given_up());
        if !given_up {
            flight.chain.writable.write_last_byte(outcome.status as u8);
        }
        let landed = Landed {
            queue: flight.queue,
            head: flight.head,
            outcome,
        };
        flight.chain.release();
        flight.ranges.clear();
        if let Some(local) = flight.local.take() {
            self.ages.end(index, &local);
            local.share.flights.update(|n| n - 1);
        }
        self.free.push(index);
        Some(landed)
    }
}

/// Whether another try may go better. Of a flush it may not: the kernel forgets a lost write once it has
/// told of it, and a second flush would know nothing of it. A durable write repeats what it makes stable,
/// but tells of others' lost writes too.
pub(crate) fn is_temporary(action: Action, errno: i32) -> bool {
    match action {
        Action::Flush => false,
        Action::Write { durable: true } => matches!(errno, libc::EAGAIN | libc::EINTR),
        _ => matches!(errno, libc::EAGAIN | libc::EINTR | libc::ENOMEM),
    }
}

/// Whether a transfer ended because it was cancelled: nobody was told of anything by it, and nothing that was
/// completed is lost.
fn was_cancelled(local: &Local, errno: i32) -> bool {
    local.is_given_up() && matches!(errno, libc::ECANCELED | libc::EINTR)
}

/// Whether a storage can transfer a buffer as it lies.
#[inline]
fn is_aligned(buffer: &GuestBuffer, limits: Limits) -> bool {
    let pieces = buffer.pieces();
    pieces.len() <= MAX_SEGMENTS
        && pieces.iter().all(|piece| {
            let at = piece.host().addr().get();
            at.is_multiple_of(limits.memory_align_bytes as usize)
                && piece.bytes().is_multiple_of(limits.length_align_bytes)
        })
}

/// A failed transfer, for the log; at most a few lines a second.
fn report(operation: Operation, errno: i32) {
    static LIMIT: crate::log_limit::LogLimit = crate::log_limit::LogLimit::new();
    if LIMIT.allows() {
        let error = std::io::Error::from_raw_os_error(errno);
        tracing::warn!("a transfer failed ({operation:?}): {error}");
    }
}

#[cfg(test)]
mod tests;
