//! A request under way, from where it starts to how it ends.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::ageing::Tally;
use super::give_up::GivenUp;
use super::share::{NOBODY, Share};
use super::zone::Zone;
use crate::blk::Keys;
use crate::blk::device::{BlkDevice, SECTOR_BYTES};
use crate::blk::request::{Operation, Range, Status};
use crate::memory::GuestBuffer;
use crate::storage::{Limits, RamSpec, Storage, StorageSpec};
use crate::virtqueue::Chain;
use crate::worker::ring::Ring;

/// Ranges of guest memory that a chain has room for from the start.
const USUAL_PIECES: usize = 4;

/// Blocks that need no transfer.
#[derive(Debug)]
pub(super) enum Memory {
    /// They do.
    No,
    /// There are none.
    Nowhere,
    /// They are in memory of this process.
    Ram(Arc<RamSpec>),
}

/// A worker's way to a device.
#[derive(Debug)]
pub struct Local {
    /// The device.
    pub device: Arc<BlkDevice>,
    pub(super) storage: Box<dyn Storage>,
    pub(super) limits: Limits,
    pub(super) memory: Memory,
    /// How its blocks are encrypted; none: plain.
    pub(super) keys: RefCell<Option<Keys>>,
    /// What nobody may touch while it is re-keyed.
    pub(super) zone: Zone,
    /// What it has of the worker's room.
    pub(super) share: Share,
    /// What the flush under way settles ([`BlkDevice::settle_wanted`]).
    pub(super) settling: Cell<u64>,
    /// Its number ([`BlkDevice::begin_flush`]).
    pub(super) flush_number: Cell<u64>,
    /// How long its requests take.
    pub(super) tally: Tally,
    pub(super) given_up: GivenUp,
}

impl Local {
    /// Takes the device's storage into a worker's ring.
    ///
    /// # Errors
    /// What the ring refuses it with.
    pub fn open(device: Arc<BlkDevice>, ring: &mut Ring) -> io::Result<Self> {
        let storage = device.storage.open(ring)?;
        let memory = match &device.storage {
            StorageSpec::Null => Memory::Nowhere,
            StorageSpec::Ram(ram) => Memory::Ram(Arc::clone(ram)),
            _ => Memory::No,
        };
        let keys = device.ciphers().as_ref().map(Keys::new);
        Ok(Self {
            limits: storage.limits(),
            keys: RefCell::new(keys),
            zone: Zone::default(),
            share: Share::default(),
            device,
            storage,
            memory,
            settling: Cell::new(0),
            flush_number: Cell::new(0),
            tally: Tally::default(),
            given_up: GivenUp::default(),
        })
    }

    /// Takes the storage out of the ring again; nothing of the device is under way.
    pub fn close(&self, ring: &mut Ring) {
        self.storage.close(ring);
    }
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
    #[inline]
    pub fn failed(status: Status) -> Self {
        Self {
            status,
            written: 0,
            read_bytes: 0,
            stored_bytes: 0,
        }
    }

    /// It succeeded, with so many bytes of data.
    #[must_use]
    #[inline]
    pub fn ok(operation: Operation, bytes: u64) -> Self {
        // A chain has at most 2^32 bytes, one of them the status.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let (written, read_bytes, stored_bytes) = match operation {
            Operation::Read { .. } => (bytes, bytes, 0),
            Operation::Write { .. } => (0, 0, bytes),
            Operation::GetId => (bytes, 0, 0),
            Operation::Flush | Operation::Discard | Operation::WriteZeroes => (0, 0, 0),
        };
        Self {
            status: Status::Ok,
            written,
            read_bytes,
            stored_bytes,
        }
    }
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
    pub local: &'a Rc<Local>,
    /// It is completed only when what it changed is stable.
    pub durable: bool,
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

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It waits for the end of a zone ([`super::zone`]), with nothing begun.
    Parked,
    /// Its transfers are under way.
    Transfers,
    /// They ended, and it waits for a flush.
    Flush,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) queue: u32,
    pub(super) head: u16,
    pub(super) operation: Operation,
    pub(super) chain: Chain,
    /// Data bytes.
    pub(super) bytes: u64,
    /// Data bytes that were given to the storage.
    pub(super) submitted: u64,
    /// Of a discard or zeroes: what was not given to the storage yet.
    pub(super) ranges: Vec<Range>,
    /// Of these: from the first to the last byte that they had.
    pub(super) extent: std::ops::Range<u64>,
    /// Transfers that the storage has, or that wait for room there.
    pub(super) outstanding: u32,
    pub(super) failed: bool,
    /// It stands in its device's line, for staging or for its end,
    pub(super) waiting: bool,
    /// before this one.
    pub(super) behind: u32,
    /// Writes are stable when they end.
    pub(super) durable: bool,
    /// A flush follows its transfers.
    pub(super) flushes: bool,
    pub(super) stage: Stage,
    /// Flushes of the device that were begun before it waited for one.
    pub(super) flushes_before: u64,
    pub(super) local: Option<Rc<Local>>,
}

impl Flight {
    pub(super) fn none() -> Self {
        Self {
            queue: 0,
            head: 0,
            operation: Operation::Flush,
            chain: Chain::with_capacity(USUAL_PIECES),
            bytes: 0,
            submitted: 0,
            ranges: Vec::new(),
            extent: 0..0,
            outstanding: 0,
            failed: false,
            waiting: false,
            behind: NOBODY,
            durable: false,
            flushes: false,
            stage: Stage::Transfers,
            flushes_before: 0,
            local: None,
        }
    }

    /// Whether something was not given to the storage yet.
    #[inline]
    pub(super) fn has_more(&self) -> bool {
        self.submitted < self.bytes || !self.ranges.is_empty()
    }
}

/// Where a transfer belongs: flight and first sector within it.
pub(super) fn token(flight: u32, at: u64) -> u64 {
    // A request has less than 2^32 bytes: 2^23 sectors.
    (u64::from(flight) << 24) | (at / SECTOR_BYTES)
}

pub(super) fn untoken(token: u64) -> (u32, u64) {
    let flight = u32::try_from(token >> 24).unwrap_or(u32::MAX);
    (flight, (token & 0xff_ffff) * SECTOR_BYTES)
}

/// The buffer with a transfer's data.
#[inline]
pub(super) fn data(operation: Operation, chain: &Chain) -> &GuestBuffer {
    match operation {
        Operation::Write { .. } => &chain.readable,
        _ => &chain.writable,
    }
}
