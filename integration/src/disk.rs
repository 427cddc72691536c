//! An attached disk: a frontend and a driver that together do what a virtual machine does.
//!
//! Guest memory has three regions: two adjacent ones in different files (the second at an offset
//! in its file) and, above a hole, a third.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use crate::driver::memory::GuestMemory;
use crate::driver::ring::{Desc, Format, Ring};
use crate::driver::{
    DriverError, HEADER_BYTES, ID_BYTES, SECTOR_BYTES, header, kind, status as blk_status,
};
use crate::frontend::message::{self, protocol_feature, request};
use crate::frontend::{Addresses, Frontend, FrontendError};

/// virtio feature bits that tests use.
pub mod feature {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const BLK_SEG_MAX: u64 = 1 << 2;
    pub const BLK_RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const BLK_MQ: u64 = 1 << 12;
    pub const BLK_DISCARD: u64 = 1 << 13;
    pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
    pub const RING_RESET: u64 = 1 << 40;
}

/// First region: rings, headers, status bytes.
pub const LOW: u64 = 0x4000_0000;
/// Bytes of [`LOW`].
pub const LOW_BYTES: u64 = 0x10_0000;
/// Second region, adjacent: data.
pub const DATA: u64 = LOW + LOW_BYTES;
/// Bytes of [`DATA`].
pub const DATA_BYTES: u64 = 0x60_0000;
/// Third region, above a hole.
pub const HIGH: u64 = 0x1_0000_0000;
/// Bytes of [`HIGH`].
pub const HIGH_BYTES: u64 = 0x10_0000;
/// Where request headers, status bytes and indirect tables lie: 4096 bytes per slot.
const SLOTS: u64 = LOW + 8 * Ring::SPAN_BYTES;
/// Descriptors that each slot has in the table.
const SLOT_DESCS: u16 = 16;
/// Slots that one queue of 128 entries can have in flight.
pub const GROUP: u16 = 8;
/// How long a request may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How to attach.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Queues to start.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// virtio features wanted; those not offered are left out.
    pub features: u64,
    /// Protocol features wanted; those not offered are left out.
    pub protocol_features: u64,
    /// Put each request into an indirect table.
    pub indirect: bool,
    /// Guest address and bytes of one region more.
    pub extra_region: Option<(u64, u64)>,
    /// Send each message in pieces of so many bytes.
    pub piece_bytes: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            features: feature::VERSION_1
                | feature::BLK_FLUSH
                | feature::BLK_SEG_MAX
                | feature::BLK_SIZE
                | feature::BLK_MQ
                | feature::INDIRECT_DESC,
            protocol_features: protocol_feature::MQ
                | protocol_feature::REPLY_ACK
                | protocol_feature::CONFIG,
            indirect: false,
            extra_region: None,
            piece_bytes: None,
        }
    }
}

/// Why a disk failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The vhost-user side.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// The virtio side.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The backend does not offer what decides how rings are read.
    #[error("the backend does not offer features {0:#x}")]
    NotOffered(u64),
    /// A mistake of the test, or a system call.
    #[error("disk: {0}")]
    Io(#[from] std::io::Error),
}

impl From<crate::driver::memory::OutOfMemory> for DiskError {
    fn from(error: crate::driver::memory::OutOfMemory) -> Self {
        Self::Driver(error.into())
    }
}

impl From<Errno> for DiskError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A request with where its bytes lie.
#[derive(Debug, Clone)]
pub struct Request {
    /// One of [`kind`].
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// Guest address and bytes of each data segment.
    pub segments: Vec<(u64, u32)>,
}

impl Request {
    /// Data bytes.
    #[must_use]
    pub fn data_bytes(&self) -> u32 {
        self.segments.iter().map(|(_, len)| len).sum()
    }

    /// Whether the device writes to the data segments.
    #[must_use]
    pub fn device_writes(&self) -> bool {
        matches!(self.kind, kind::IN | kind::GET_ID)
    }
}

/// A disk with its queues running.
#[derive(Debug)]
pub struct Disk {
    /// The connection.
    pub frontend: Frontend,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The queues.
    pub rings: Vec<Ring>,
    /// virtio features as negotiated.
    pub features: u64,
    indirect: bool,
}

impl Disk {
    /// Connects and negotiates; no memory and no queue is given to the backend.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn negotiate(path: &Path, options: &Options) -> Result<Self, DiskError> {
        let mut frontend = Frontend::connect(path, PATIENCE)?;
        frontend.piece_bytes = options.piece_bytes;
        let features = negotiate_features(&mut frontend, options)?;
        Self::assemble(frontend, options, features)
    }

    /// Memory and rings for a connection on which these features were negotiated.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn assemble(
        frontend: Frontend,
        options: &Options,
        features: u64,
    ) -> Result<Self, DiskError> {
        let mut layout = vec![
            (LOW, LOW_BYTES, 0),
            (DATA, DATA_BYTES, 0x1_0000),
            (HIGH, HIGH_BYTES, 0),
        ];
        layout.extend(options.extra_region.map(|(addr, bytes)| (addr, bytes, 0)));
        let memory = GuestMemory::new(&layout)?;
        let mut rings = Vec::new();
        let format = if features & feature::RING_PACKED != 0 {
            Format::Packed
        } else {
            Format::Split
        };
        for i in 0..u64::from(options.queues) {
            let base = LOW + i * Ring::SPAN_BYTES;
            let mut ring = Ring::with_format(&memory, base, options.queue_size, format)?;
            ring.event_idx = features & feature::EVENT_IDX != 0;
            ring.in_order = features & feature::IN_ORDER != 0;
            rings.push(ring);
        }
        Ok(Self {
            frontend,
            memory: Arc::new(memory),
            rings,
            features,
            indirect: options.indirect,
        })
    }

    /// Connects, negotiates, shares memory and starts the queues.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn attach(path: &Path, options: &Options) -> Result<Self, DiskError> {
        let disk = Self::negotiate(path, options)?;
        disk.share_memory()?;
        for index in 0..disk.rings.len() {
            disk.start_queue(index)?;
        }
        Ok(disk)
    }

    /// SET_MEM_TABLE with all of the memory.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn share_memory(&self) -> Result<(), DiskError> {
        Ok(self.memory.share_with(&self.frontend)?)
    }

    /// Starts a queue at the index where its ring is, and enables it.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn start_queue(&self, index: usize) -> Result<(), DiskError> {
        let ring = &self.rings[index];
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let frontend = &self.frontend;
        frontend.set_size_and_base(number, ring.size, ring.base())?;
        self.set_addresses(index, ring.desc, ring.used, ring.avail)?;
        self.give_events(index)?;
        self.enable(index)
    }

    /// SET_VRING_ERR, SET_VRING_CALL and SET_VRING_KICK with the ring's eventfds.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn give_events(&self, index: usize) -> Result<(), DiskError> {
        let ring = &self.rings[index];
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        Ok(self.frontend.give_events(number, ring.events())?)
    }

    /// SET_VRING_ENABLE, where protocol features were negotiated (without them a queue is enabled
    /// from its start).
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn enable(&self, index: usize) -> Result<(), DiskError> {
        if self.features & feature::PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        Ok(self.frontend.enable_queue(number, true)?)
    }

    /// SET_VRING_ADDR, from guest addresses.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn set_addresses(
        &self,
        index: usize,
        desc: u64,
        used: u64,
        avail: u64,
    ) -> Result<(), DiskError> {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let addresses = Addresses {
            desc: self.memory.user_addr(desc)?,
            used: self.memory.user_addr(used)?,
            avail: self.memory.user_addr(avail)?,
        };
        Ok(self.frontend.set_addresses(number, addresses)?)
    }

    /// Stops a queue; what GET_VRING_BASE says, in its whole width.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn stop_queue_at(&self, index: usize) -> Result<u32, DiskError> {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        Ok(self.frontend.get_vring_base(number)?)
    }

    /// Stops a split queue; the index it would go on from.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn stop_queue(&self, index: usize) -> Result<u16, DiskError> {
        let base = self.stop_queue_at(index)?;
        Ok(u16::try_from(base).map_err(std::io::Error::other)?)
    }

    /// Size of the disk in sectors, from its configuration space.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn capacity_sectors(&self) -> Result<u64, DiskError> {
        let bytes = self.frontend.get_config(0, 8)?;
        Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    /// Guest address of the header of a slot.
    #[must_use]
    pub fn header_addr(slot: u16) -> u64 {
        SLOTS + u64::from(slot) * 4096
    }

    /// Guest address of the status byte of a slot.
    #[must_use]
    pub fn status_addr(slot: u16) -> u64 {
        Self::header_addr(slot) + 64
    }

    /// Guest address of the indirect table of a slot: 192 entries.
    #[must_use]
    pub fn table_addr(slot: u16) -> u64 {
        Self::header_addr(slot) + 1024
    }

    /// The head that a slot uses: slots come in groups of [`GROUP`], one group per queue.
    #[must_use]
    pub fn head(slot: u16) -> u16 {
        slot % GROUP * SLOT_DESCS
    }

    /// The descriptors of a request: header, data, status.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn descriptors(&self, slot: u16, request: &Request) -> Result<Vec<Desc>, DiskError> {
        self.memory.write(
            Self::header_addr(slot),
            &header(request.kind, request.sector),
        )?;
        self.memory
            .write(Self::status_addr(slot), &[blk_status::UNTOUCHED])?;
        let mut descs = vec![Desc::readable(Self::header_addr(slot), HEADER_BYTES)];
        for &(addr, len) in &request.segments {
            descs.push(if request.device_writes() {
                Desc::writable(addr, len)
            } else {
                Desc::readable(addr, len)
            });
        }
        descs.push(Desc::writable(Self::status_addr(slot), 1));
        Ok(descs)
    }

    /// Offers a request, directly or in an indirect table; the backend sees it with
    /// [`Disk::publish`].
    ///
    /// # Errors
    /// See [`DiskError`]; too many segments for a slot count as a mistake of the test.
    pub fn push(&mut self, queue: usize, slot: u16, request: &Request) -> Result<(), DiskError> {
        let descs = self.descriptors(slot, request)?;
        let head = Self::head(slot);
        let ring = &mut self.rings[queue];
        if self.indirect || descs.len() > usize::from(SLOT_DESCS) {
            ring.offer_table(&self.memory, head, Self::table_addr(slot), &descs)?;
        } else {
            ring.offer(&self.memory, head, &descs)?;
        }
        Ok(())
    }

    /// Shows the backend what was pushed.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn publish(&mut self, queue: usize) -> Result<(), DiskError> {
        Ok(self.rings[queue].publish(&self.memory)?)
    }

    /// Checks a completion: used length and status byte.
    ///
    /// # Errors
    /// [`DriverError::Status`], [`DriverError::WrongLength`].
    pub fn check(&self, slot: u16, request: &Request, used_len: u32) -> Result<(), DiskError> {
        let status = self.memory.read(Self::status_addr(slot), 1)?[0];
        if status != blk_status::OK {
            return Err(DriverError::Status(status).into());
        }
        let written = if request.device_writes() {
            request.data_bytes()
        } else {
            0
        };
        if used_len != written + 1 {
            return Err(DriverError::WrongLength {
                given: used_len,
                expected: written + 1,
            }
            .into());
        }
        Ok(())
    }

    /// One request on slot 0 of a queue, from push to check.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn run(&mut self, queue: usize, request: &Request) -> Result<(), DiskError> {
        self.push(queue, 0, request)?;
        self.publish(queue)?;
        let used = self.rings[queue].wait_used(&self.memory, PATIENCE)?;
        if used.id != u32::from(Self::head(0)) {
            return Err(DriverError::WrongHead {
                given: used.id,
                len: used.len,
                expected: u32::from(Self::head(0)),
            }
            .into());
        }
        self.check(0, request, used.len)
    }

    /// Reads `len` bytes from `sector` through one segment.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn read(&mut self, queue: usize, sector: u64, len: u32) -> Result<Vec<u8>, DiskError> {
        let request = Request {
            kind: kind::IN,
            sector,
            segments: vec![(DATA, len)],
        };
        self.memory.fill(DATA, len as usize, 0xdd)?;
        self.run(queue, &request)?;
        Ok(self.memory.read(DATA, len as usize)?)
    }

    /// Writes bytes at `sector` through one segment.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn write(&mut self, queue: usize, sector: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.memory.write(DATA, bytes)?;
        let len = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
        let request = Request {
            kind: kind::OUT,
            sector,
            segments: vec![(DATA, len)],
        };
        self.run(queue, &request)
    }

    /// Flushes.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn flush(&mut self, queue: usize) -> Result<(), DiskError> {
        let request = Request {
            kind: kind::FLUSH,
            sector: 0,
            segments: Vec::new(),
        };
        self.run(queue, &request)
    }

    /// The serial: 20 bytes, zero-padded.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn id(&mut self, queue: usize) -> Result<Vec<u8>, DiskError> {
        let request = Request {
            kind: kind::GET_ID,
            sector: 0,
            segments: vec![(DATA, ID_BYTES)],
        };
        self.run(queue, &request)?;
        Ok(self.memory.read(DATA, ID_BYTES as usize)?)
    }

    /// Reads the first `sectors` of the disk, 1 MiB at a time.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn read_all(&mut self, sectors: u64) -> Result<Vec<u8>, DiskError> {
        const STEP: u64 = 2048;
        let mut bytes = Vec::new();
        let mut sector = 0;
        while sector < sectors {
            let count = STEP.min(sectors - sector);
            let len = u32::try_from(count * SECTOR_BYTES).unwrap_or(u32::MAX);
            bytes.extend(self.read(0, sector, len)?);
            sector += count;
        }
        Ok(bytes)
    }
}

/// Negotiates what the options ask for on a new connection; the virtio features.
pub(crate) fn negotiate_features(
    frontend: &mut Frontend,
    options: &Options,
) -> Result<u64, DiskError> {
    frontend.set(request::SET_OWNER, &[], &[])?;
    let offered = frontend.ask_u64(request::GET_FEATURES)?;
    // What changes how rings are read can't be left out quietly: the test would be another one.
    let missing = options.features & !offered & (feature::RING_PACKED | feature::IN_ORDER);
    if missing != 0 {
        return Err(DiskError::NotOffered(missing));
    }
    let mut features = options.features & offered;
    if offered & feature::PROTOCOL_FEATURES != 0 && options.protocol_features != 0 {
        features |= feature::PROTOCOL_FEATURES;
        let known = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
        let wanted = options.protocol_features & known;
        frontend.set(
            request::SET_PROTOCOL_FEATURES,
            &message::words(&[wanted]),
            &[],
        )?;
        frontend.protocol_features = wanted;
    }
    frontend.set(request::SET_FEATURES, &message::words(&[features]), &[])?;
    Ok(features)
}
