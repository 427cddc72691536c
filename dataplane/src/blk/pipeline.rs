//! The way of a parsed request to the storage and back.
//!
//! What can be answered at once is ([`Begun::Done`]). Everything else is under way: a plain
//! transfer straight between guest memory and file where the alignment allows, else parts of it
//! through staging, as many at a time as there is room for. A request waits for staging or for the
//! ring in a queue, never in a loop.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{BlkDevice, SECTOR_BYTES};
use super::request::{Operation, Status};
use super::transform::{Place, Span, load, store};
use crate::memory::GuestBuffer;
use crate::storage::{FileSpec, StorageSpec};
use crate::virtqueue::Chain;
use crate::worker::ring::{
    Action, Buffer, Completion, FixedFile, MAX_IN_FLIGHT, MAX_SEGMENTS, Ring, Transfer,
};
use crate::worker::staging::{Chunk, LARGE_BYTES, Staging};

/// Ranges that a chain has room for from the start.
const USUAL_PIECES: usize = 4;

/// A worker's way to a device.
#[derive(Debug)]
pub struct Local {
    /// The device.
    pub device: Arc<BlkDevice>,
    /// Its file in this worker's ring.
    pub file: Option<FixedFile>,
}

/// What became of a request at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// It ended.
    Done(Outcome),
    /// It is under way.
    Pending,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its status.
    pub status: Status,
    /// Bytes of its writable buffer that were written, the status aside.
    pub written: u32,
    /// Bytes moved for the guest, for the counters.
    pub read_bytes: u32,
    /// Bytes taken from the guest, for the counters.
    pub stored_bytes: u32,
}

impl Outcome {
    /// It failed.
    #[must_use]
    pub fn failed(status: Status) -> Self {
        Self {
            status,
            written: 0,
            read_bytes: 0,
            stored_bytes: 0,
        }
    }

    fn ok(operation: Operation, bytes: u64) -> Self {
        // A chain has at most 2^32 bytes, one of them the status.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let (read_bytes, stored_bytes) = match operation {
            Operation::Read { .. } => (bytes, 0),
            Operation::Write { .. } => (0, bytes),
            Operation::Flush | Operation::GetId => (0, 0),
        };
        let written = match operation {
            Operation::Read { .. } | Operation::GetId => bytes,
            Operation::Write { .. } | Operation::Flush => 0,
        };
        Self {
            status: Status::Ok,
            written,
            read_bytes,
            stored_bytes,
        }
    }
}

/// A request under way.
#[derive(Debug)]
struct Flight {
    queue: u32,
    head: u16,
    operation: Operation,
    chain: Chain,
    /// Data bytes.
    bytes: u64,
    /// Data bytes that were given to the ring.
    submitted: u64,
    /// Transfers in the ring.
    outstanding: u32,
    failed: bool,
    waiting: bool,
    durable: bool,
    local: Option<std::rc::Rc<Local>>,
}

impl Flight {
    fn none() -> Self {
        Self {
            queue: 0,
            head: 0,
            operation: Operation::Flush,
            chain: Chain::with_capacity(USUAL_PIECES),
            bytes: 0,
            submitted: 0,
            outstanding: 0,
            failed: false,
            waiting: false,
            durable: false,
            local: None,
        }
    }
}

/// A request that ended after a while.
#[derive(Debug)]
pub struct Landed {
    /// Its queue, as it was given at the start.
    pub queue: u32,
    /// Its head.
    pub head: u16,
    /// How it ended; the status byte is written.
    pub outcome: Outcome,
}

/// What starts a request.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// The worker's number of its queue.
    pub queue: u32,
    /// Its head.
    pub head: u16,
    /// What is asked.
    pub operation: Operation,
    /// Of which device.
    pub local: &'a std::rc::Rc<Local>,
    /// Writes are completed only when stable (FLUSH was not negotiated).
    pub durable: bool,
}

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
    /// Flights that have something left to submit, and no room.
    waiting: VecDeque<u32>,
}

/// Where a transfer belongs: flight and first sector within it.
fn token(flight: u32, at: u64) -> u64 {
    // A request has less than 2^32 bytes: 2^23 sectors.
    (u64::from(flight) << 24) | (at / SECTOR_BYTES)
}

fn untoken(token: u64) -> (u32, u64) {
    let flight = u32::try_from(token >> 24).unwrap_or(u32::MAX);
    (flight, (token & 0xff_ffff) * SECTOR_BYTES)
}

/// First bit that a token of this module never has.
pub const TOKEN_BITS: u32 = 56;

impl Pipeline {
    /// Nothing under way; room for as much as the ring has, so that nothing is allocated later.
    #[must_use]
    pub fn new(ring: Ring, mut staging: Staging) -> Self {
        let scratch = staging.take(u64::from(LARGE_BYTES));
        Self {
            ring,
            staging,
            scratch,
            flights: (0..MAX_IN_FLIGHT).map(|_| Flight::none()).collect(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            waiting: VecDeque::with_capacity(MAX_IN_FLIGHT as usize),
        }
    }

    /// Whether another request can be begun.
    #[must_use]
    #[inline]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins a request. Its chain is taken (and an empty one left) if it is under way afterwards.
    #[inline]
    pub fn begin(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        let device = &start.local.device;
        match start.operation {
            Operation::GetId => Begun::Done(identify(device, chain)),
            Operation::Flush => self.begin_flush(start, chain),
            Operation::Read { .. } | Operation::Write { .. } => match &device.storage {
                StorageSpec::File(file) => self.begin_transfer(start, chain, file),
                StorageSpec::Null if device.cipher.is_none() => {
                    Begun::Done(Outcome::ok(start.operation, data(start, chain).bytes()))
                }
                StorageSpec::Null | StorageSpec::Ram(_) => Begun::Done(self.at_once(start, chain)),
            },
        }
    }

    fn begin_flush(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        let device = &start.local.device;
        if device.flush_failed() {
            return Begun::Done(Outcome::failed(Status::IoError));
        }
        if start.local.file.is_none() {
            return Begun::Done(Outcome::ok(Operation::Flush, 0));
        }
        let Some(index) = self.take_off(start, chain, 0) else {
            return Begun::Done(Outcome::failed(Status::IoError));
        };
        self.advance(index);
        Begun::Pending
    }

    #[inline]
    fn begin_transfer(&mut self, start: Start<'_>, chain: &mut Chain, file: &FileSpec) -> Begun {
        let buffer = data(start, chain);
        let bytes = buffer.bytes();
        let direct = start.local.device.cipher.is_none() && is_aligned(buffer, file);
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

    /// Moves a chain into a flight; none if there is no room ([`Pipeline::has_room`]).
    #[inline]
    fn take_off(&mut self, start: Start<'_>, chain: &mut Chain, bytes: u64) -> Option<u32> {
        let index = self.free.pop()?;
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
        flight.local = Some(std::rc::Rc::clone(start.local));
        Some(index)
    }

    /// The whole request as one transfer between guest memory and file.
    #[inline]
    fn submit_direct(&mut self, index: u32) {
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return;
        };
        let Some(file) = flight.local.as_ref().and_then(|local| local.file) else {
            return self.fail(index);
        };
        let (action, offset_bytes, buffer) = match flight.operation {
            Operation::Read { offset_bytes } => {
                (Action::Read, offset_bytes, &mut flight.chain.writable)
            }
            Operation::Write { offset_bytes } => {
                let durable = flight.durable;
                let action = Action::Write { durable };
                (action, offset_bytes, &mut flight.chain.readable)
            }
            Operation::Flush | Operation::GetId => return,
        };
        let transfer = Transfer {
            action,
            file,
            offset_bytes,
            buffer: Buffer::Guest(std::mem::take(buffer)),
        };
        match self.ring.push(token(index, 0), transfer) {
            Ok(_) => {
                flight.submitted = flight.bytes;
                flight.outstanding = 1;
            }
            Err(transfer) => {
                if let Buffer::Guest(back) = transfer.buffer {
                    *buffer = back;
                }
                self.wait_in_line(index);
            }
        }
    }

    fn wait_in_line(&mut self, index: u32) {
        if let Some(flight) = self.flights.get_mut(index as usize)
            && !flight.waiting
        {
            flight.waiting = true;
            self.waiting.push_back(index);
        }
    }

    /// Submits as many parts of a request as there is room for.
    fn advance(&mut self, index: u32) {
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return;
        };
        let Some(local) = flight.local.clone() else {
            return;
        };
        let Some(file) = local.file else {
            return self.fail(index);
        };
        if flight.operation == Operation::Flush {
            let transfer = Transfer {
                action: Action::Flush,
                file,
                offset_bytes: 0,
                buffer: Buffer::None,
            };
            match self.ring.push(token(index, 0), transfer) {
                Ok(_) => flight.outstanding = 1,
                Err(_) => self.wait_in_line(index),
            }
            return;
        }
        while !flight.failed && flight.submitted < flight.bytes {
            let left = flight.bytes - flight.submitted;
            let Some(chunk) = self.staging.take(left) else {
                return self.wait_in_line(index);
            };
            let bytes = chunk.bytes().min(u32::try_from(left).unwrap_or(u32::MAX));
            let at = flight.submitted;
            let (action, offset_bytes) = match flight.operation {
                Operation::Write { offset_bytes } => {
                    let offset_bytes = offset_bytes + at;
                    let span = Span {
                        buffer: &flight.chain.readable,
                        at,
                        bytes: bytes as usize,
                        offset_bytes,
                    };
                    let cipher = local.device.cipher.as_ref();
                    if !store(span, cipher, Place::Chunk(&chunk)) {
                        self.staging.give(chunk);
                        return self.fail(index);
                    }
                    let durable = flight.durable;
                    (Action::Write { durable }, offset_bytes)
                }
                Operation::Read { offset_bytes } => (Action::Read, offset_bytes + at),
                Operation::Flush | Operation::GetId => return,
            };
            let transfer = Transfer {
                action,
                file,
                offset_bytes,
                buffer: Buffer::Staging { chunk, bytes },
            };
            if let Err(back) = self.ring.push(token(index, at), transfer) {
                if let Buffer::Staging { chunk, .. } = back.buffer {
                    self.staging.give(chunk);
                }
                return self.wait_in_line(index);
            }
            flight.submitted += u64::from(bytes);
            flight.outstanding += 1;
        }
    }

    /// Takes a completion in; the request it was the last of, if it was.
    #[inline]
    pub fn land(&mut self, completion: Completion) -> Option<Landed> {
        let (index, at) = untoken(completion.token);
        let flight = self.flights.get_mut(index as usize)?;
        let local = flight.local.clone()?;
        flight.outstanding -= 1;
        flight.failed |= completion.result.is_err();
        if let Err(errno) = completion.result {
            report(flight.operation, errno);
        }
        match completion.buffer {
            Buffer::None => {
                if completion.result.is_err() {
                    local.device.latch_flush_failure();
                }
            }
            Buffer::Guest(buffer) => match flight.operation {
                Operation::Read { .. } => flight.chain.writable = buffer,
                _ => flight.chain.readable = buffer,
            },
            Buffer::Staging { chunk, bytes } => {
                if let (Operation::Read { offset_bytes }, false) = (flight.operation, flight.failed)
                {
                    let span = Span {
                        buffer: &flight.chain.writable,
                        at,
                        bytes: bytes as usize,
                        offset_bytes: offset_bytes + at,
                    };
                    let cipher = local.device.cipher.as_ref();
                    flight.failed |= !load(span, cipher, Place::Chunk(&chunk));
                }
                self.staging.give(chunk);
            }
        }
        self.finish(index)
    }

    /// Ends a flight of which nothing is left.
    fn finish(&mut self, index: u32) -> Option<Landed> {
        let flight = self.flights.get_mut(index as usize)?;
        let more = flight.submitted < flight.bytes && !flight.failed;
        if flight.outstanding > 0 || more || flight.waiting || flight.local.is_none() {
            return None;
        }
        let outcome = if flight.failed {
            Outcome::failed(Status::IoError)
        } else {
            Outcome::ok(flight.operation, flight.bytes)
        };
        let status = outcome.status;
        flight.chain.writable.write_last_byte(status as u8);
        let landed = Landed {
            queue: flight.queue,
            head: flight.head,
            outcome,
        };
        flight.chain.release();
        flight.local = None;
        self.free.push(index);
        Some(landed)
    }

    /// Goes on with requests that waited for room, as far as there is some. Those that ended
    /// without another transfer (they failed while they waited) are handed to `landed`.
    pub fn resume(&mut self, mut landed: impl FnMut(Landed)) {
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                return;
            };
            if let Some(flight) = self.flights.get_mut(index as usize) {
                flight.waiting = false;
                if !flight.failed {
                    self.advance(index);
                }
            }
            if let Some(ended) = self.finish(index) {
                landed(ended);
            }
            // The first that still has no room: the others have none either.
            if self.waiting.back() == Some(&index) {
                self.waiting.rotate_right(1);
                return;
            }
        }
    }

    /// Whether requests wait for room.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Memory storage, and nothing with a cipher: no kernel, no waiting.
    fn at_once(&self, start: Start<'_>, chain: &Chain) -> Outcome {
        let device = &start.local.device;
        let buffer = data(start, chain);
        let (total, cipher) = (buffer.bytes(), device.cipher.as_ref());
        let Some(chunk) = &self.scratch else {
            return Outcome::failed(Status::IoError);
        };
        let mut at = 0;
        let mut ok = true;
        while ok && at < total {
            let step = match &device.storage {
                StorageSpec::Ram(_) => total - at,
                _ => u64::from(chunk.bytes()).min(total - at),
            };
            let bytes = usize::try_from(step).unwrap_or(usize::MAX);
            let span = |offset_bytes: u64| Span {
                buffer,
                at,
                bytes,
                offset_bytes: offset_bytes + at,
            };
            let place = |offset_bytes: u64| match &device.storage {
                StorageSpec::Ram(ram) => Place::Ram(ram, offset_bytes + at),
                _ => Place::Chunk(chunk),
            };
            ok = match start.operation {
                Operation::Read { offset_bytes: o } => load(span(o), cipher, place(o)),
                Operation::Write { offset_bytes: o } => store(span(o), cipher, place(o)),
                Operation::Flush | Operation::GetId => true,
            };
            at += step;
        }
        if ok {
            Outcome::ok(start.operation, total)
        } else {
            Outcome::failed(Status::IoError)
        }
    }
}

/// The buffer with a transfer's data.
#[inline]
fn data<'a>(start: Start<'_>, chain: &'a Chain) -> &'a GuestBuffer {
    match start.operation {
        Operation::Write { .. } => &chain.readable,
        _ => &chain.writable,
    }
}

/// Whether the kernel can transfer a buffer as it lies.
#[inline]
fn is_aligned(buffer: &GuestBuffer, file: &FileSpec) -> bool {
    let pieces = buffer.pieces();
    let (memory, offset) = (file.memory_align_bytes, file.offset_align_bytes);
    pieces.len() <= MAX_SEGMENTS
        && pieces.iter().all(|piece| {
            let at = piece.host().addr().get();
            at.is_multiple_of(memory as usize) && piece.bytes().is_multiple_of(offset)
        })
}

/// GET_ID: the serial, zero-padded to the buffer.
fn identify(device: &BlkDevice, chain: &Chain) -> Outcome {
    let buffer = &chain.writable;
    let bytes = buffer.bytes();
    let serial = &device.geometry.serial;
    let shown = usize::try_from(bytes).map_or(serial.len(), |b| b.min(serial.len()));
    let rest = usize::try_from(bytes).unwrap_or(0).saturating_sub(shown);
    let written = serial.get(..shown).is_some_and(|s| buffer.copy_in(0, s))
        && buffer.zero(shown as u64, rest);
    if written {
        Outcome::ok(Operation::GetId, bytes)
    } else {
        Outcome::failed(Status::IoError)
    }
}

/// A failed transfer, for the log; at most a few lines a second.
fn report(operation: Operation, errno: i32) {
    static LIMIT: crate::log_limit::LogLimit = crate::log_limit::LogLimit::new();
    if LIMIT.allows() {
        let error = std::io::Error::from_raw_os_error(errno);
        tracing::warn!("a transfer failed ({operation:?}): {error}");
    }
}
