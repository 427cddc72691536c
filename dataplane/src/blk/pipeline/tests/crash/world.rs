//! A device on two workers in one thread, whose storage does nothing until it is told to.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use super::model::{Content, Op};
use crate::blk::pipeline::{Begun, Local, Pipeline, Start};
use crate::blk::request::{Operation, Status};
use crate::blk::{BlkDevice, Cipher, Ciphers, Geometry};
use crate::memory::{Lease, anonymous};
use crate::storage::{
    Begin, Completion, Polled, RamSpec, Storage, StorageSpec, Transfer, VolatileCache,
};
use crate::virtqueue::Chain;
use crate::worker::ring::Ring;
use crate::worker::staging::Staging;

pub const SECTOR: usize = 512;
const BLOCKS: u64 = 2;
/// Guest memory of a request: its ranges, then its data.
const REQUEST_BYTES: u64 = 0x1_0000;
const DATA: u64 = 0x1000;

/// When a write is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// After a flush.
    Back,
    /// When it completes.
    Through,
    /// As `Back`, until the driver changes it.
    Changes,
}

/// Of what shape a device is.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Bytes of a data unit; none: plain.
    pub unit: Option<u32>,
    pub mode: Mode,
}

impl Setting {
    fn block_bytes(self) -> u32 {
        self.unit.unwrap_or(512)
    }

    fn sectors_per_block(self) -> u64 {
        u64::from(self.block_bytes()) / SECTOR as u64
    }

    /// The block that a sector belongs to.
    pub fn block_of(self, sector: usize) -> u64 {
        sector as u64 / self.sectors_per_block()
    }

    fn bytes(self) -> usize {
        usize::try_from(BLOCKS * u64::from(self.block_bytes())).expect("small")
    }
}

/// What a worker's storage has been given and has not done.
#[derive(Debug, Default)]
struct Held {
    transfers: RefCell<Vec<(u64, Option<Transfer>)>>,
    /// Which of them is done now.
    next: Cell<Option<usize>>,
}

/// A storage that does a transfer when it is told to, and then at once; a flush is for what was written before it
/// was given.
#[derive(Debug)]
struct Stepped {
    inner: Box<dyn Storage>,
    held: Rc<Held>,
}

impl Storage for Stepped {
    fn begin(&self, ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        let kept = if matches!(transfer.action, crate::storage::Action::Flush) {
            assert!(matches!(
                self.inner.begin(ring, token, transfer),
                Begin::Held
            ));
            None
        } else {
            Some(transfer)
        };
        self.held.transfers.borrow_mut().push((token, kept));
        Begin::Held
    }

    fn poll(&self, ring: &mut Ring) -> Option<Polled> {
        let next = self.held.next.take()?;
        let (token, transfer) = self.held.transfers.borrow_mut().remove(next);
        // A device has one flush in flight at a time, which takes some looks.
        let Some(transfer) = transfer else {
            return (0..100).find_map(|_| self.inner.poll(ring));
        };
        match self.inner.begin(ring, token, transfer) {
            Begin::Done(transfer, done) => Some(Polled::Ended(Completion {
                token,
                transfer,
                done,
            })),
            other => panic!("{other:?}"),
        }
    }
}

/// A worker, and its way to the device of this time.
struct Worker {
    pipeline: Pipeline,
    local: Option<Rc<Local>>,
    held: Rc<Held>,
}

impl Worker {
    fn new() -> Self {
        let staging = Staging::new().expect("staging");
        let ring = Ring::new(&staging).expect("ring");
        Self {
            pipeline: Pipeline::new(ring, staging),
            local: None,
            held: Rc::default(),
        }
    }

    /// As a worker does when a device is detached.
    fn close(&mut self, number: usize) {
        if let Some(local) = self.local.take() {
            self.pipeline.forget(number, &local);
            local.close(&mut self.pipeline.ring);
        }
    }

    fn open(&mut self, device: &Arc<BlkDevice>) {
        let mut local = Local::open(Arc::clone(device), &mut self.pipeline.ring).expect("open");
        let inner = std::mem::replace(&mut local.storage, Box::new(Nothing));
        local.storage = Box::new(Stepped {
            inner,
            held: Rc::clone(&self.held),
        });
        self.local = Some(Rc::new(local));
    }
}

/// Stands where a storage is taken from.
#[derive(Debug)]
struct Nothing;

impl Storage for Nothing {
    fn begin(&self, _ring: &mut Ring, _token: u64, transfer: Transfer) -> Begin {
        Begin::Done(transfer, Err(libc::ENODEV))
    }
}

pub struct World {
    setting: Setting,
    ciphers: Option<Ciphers>,
    memory: Lease,
    workers: [Worker; 2],
    cache: Arc<VolatileCache>,
    device: Arc<BlkDevice>,
    ended: Vec<usize>,
}

impl World {
    pub fn new(setting: Setting) -> Self {
        let ciphers = setting.unit.map(|unit| {
            let arena = SecretArena::new(1).expect("arena");
            let mut key = [0x11; 64];
            key[32..].fill(0x22);
            Ciphers::single(Cipher {
                key: XtsKey::new(&arena, &key).expect("key"),
                unit: DataUnit::new(unit).expect("unit"),
            })
        });
        let (memory, _fd) = anonymous(REQUEST_BYTES * 8).expect("memory");
        let (cache, device) = device(setting, ciphers.as_ref());
        Self {
            setting,
            ciphers,
            memory: Lease::new(Arc::new(memory)),
            workers: [Worker::new(), Worker::new()],
            cache,
            device,
            ended: Vec::new(),
        }
    }

    pub fn setting(&self) -> Setting {
        self.setting
    }

    /// Another device, as it is before the first request.
    pub fn begin(&mut self) {
        let (old_cache, old_device) = (Arc::downgrade(&self.cache), Arc::downgrade(&self.device));
        (self.cache, self.device) = device(self.setting, self.ciphers.as_ref());
        for (number, worker) in self.workers.iter_mut().enumerate() {
            worker.close(number);
            worker.open(&self.device);
        }
        // Nothing of a device outlives its last request.
        assert_eq!(
            (old_cache.strong_count(), old_device.strong_count()),
            (0, 0)
        );
    }

    /// Worker and index of each transfer that a storage holds.
    pub fn held(&self) -> Vec<(usize, usize)> {
        let of = |(at, worker): (usize, &Worker)| {
            let count = worker.held.transfers.borrow().len();
            (0..count).map(move |index| (at, index))
        };
        self.workers.iter().enumerate().flat_map(of).collect()
    }

    /// Has the storage do one of them.
    pub fn step(&mut self, worker: usize, index: usize) {
        self.workers[worker].held.next.set(Some(index));
        self.go_on();
    }

    /// Calls `f` with each request that has ended since.
    pub fn ended(&mut self, f: impl FnMut(usize)) {
        self.ended.drain(..).for_each(f);
    }

    /// Gives a worker a request with this number.
    pub fn submit(&mut self, worker: usize, id: usize, op: Op) {
        let (operation, bytes) = match op {
            Op::WriteThrough => return self.device.set_writeback(false),
            Op::Flush => (Operation::Flush, Vec::new()),
            Op::Write(first, count) => {
                let offset_bytes = first * u64::from(self.setting.block_bytes());
                (
                    Operation::Write { offset_bytes },
                    self.stamped(id, first, count),
                )
            }
            Op::Zero(first, count, unmap) => {
                (Operation::WriteZeroes, self.range(first, count, unmap))
            }
            Op::Discard(first, count) => (Operation::Discard, self.range(first, count, false)),
        };
        let at = REQUEST_BYTES * id as u64 + DATA;
        let mut chain = Chain::with_capacity(2);
        chain.readable.reset(&self.memory);
        chain.writable.reset(&self.memory);
        let length = u32::try_from(bytes.len()).expect("short");
        if length > 0 {
            chain.readable.push(at, length).expect("in memory");
            assert!(chain.readable.copy_in(0, &bytes));
        }
        let Worker {
            pipeline, local, ..
        } = &mut self.workers[worker];
        let start = Start {
            queue: 0,
            head: u16::try_from(id).expect("few"),
            operation,
            local: local.as_ref().expect("open"),
            durable: self.setting.mode == Mode::Through || !self.device.writeback(),
        };
        let begun = pipeline.begin(start, &mut chain);
        assert_eq!(begun, Begun::Pending, "{op:?}");
        self.go_on();
    }

    fn range(&self, first: u64, count: u64, unmap: bool) -> Vec<u8> {
        let sectors = self.setting.sectors_per_block();
        let mut bytes = (first * sectors).to_le_bytes().to_vec();
        bytes.extend(u32::try_from(count * sectors).expect("few").to_le_bytes());
        bytes.extend(u32::from(unmap).to_le_bytes());
        bytes
    }

    fn stamped(&self, id: usize, first: u64, count: u64) -> Vec<u8> {
        let sectors = self.setting.sectors_per_block();
        let sectors = first * sectors..(first + count) * sectors;
        sectors.flat_map(|sector| stamp(Some(id), sector)).collect()
    }

    /// Goes on until nothing does, short of the storages.
    fn go_on(&mut self) {
        let mut any = true;
        while any {
            any = false;
            for worker in &mut self.workers {
                let ended = &mut self.ended;
                any |= worker.pipeline.resume(|landed| {
                    assert_eq!(landed.outcome.status, Status::Ok);
                    ended.push(usize::from(landed.head));
                });
            }
        }
    }

    /// Images, decrypted, that a power cut now may leave: together they have each version of each sector.
    pub fn images(&self) -> Vec<Vec<u8>> {
        let mut versions = 1;
        let _ = self.cache.cut(|of| {
            versions = versions.max(of);
            0
        });
        let image = |version: usize| {
            let stored = self.cache.cut(|of| version.min(of - 1));
            let Some(ciphers) = &self.ciphers else {
                return stored;
            };
            let mut plain = vec![0; stored.len()];
            let Cipher { key, unit } = &*ciphers.cipher;
            key.decrypt(*unit, 0, &stored, &mut plain)
                .expect("whole units");
            plain
        };
        (0..versions).map(image).collect()
    }

    /// What a sector of an image is.
    pub fn content(&self, sector: usize, bytes: &[u8]) -> Content {
        let sector = sector as u64;
        if bytes.iter().all(|byte| *byte == 0) {
            return Content::Zero;
        }
        if bytes == stamp(None, sector) {
            return Content::Initial;
        }
        let stamped = (0..8).find(|id| bytes == stamp(Some(*id), sector));
        stamped.map_or(Content::Noise, Content::Stamp)
    }
}

/// What a request has written to a sector; none: what was there before.
fn stamp(id: Option<usize>, sector: u64) -> [u8; SECTOR] {
    let id = id.map_or(u64::MAX, |id| id as u64);
    let mut bytes = [0; SECTOR];
    for (index, chunk) in bytes.chunks_exact_mut(16).enumerate() {
        chunk[..8].copy_from_slice(&(sector << 8 | index as u64 | 1 << 63).to_le_bytes());
        chunk[8..].copy_from_slice(&id.to_le_bytes());
    }
    bytes
}

fn device(setting: Setting, ciphers: Option<&Ciphers>) -> (Arc<VolatileCache>, Arc<BlkDevice>) {
    let geometry = Geometry {
        logical_block_bytes: setting.block_bytes(),
        read_only: false,
        serial: [0; 20],
        queues: 2,
        discard: true,
    };
    let bytes = setting.bytes();
    let sectors = (bytes / SECTOR) as u64;
    let mut stored: Vec<u8> = (0..sectors)
        .flat_map(|sector| stamp(None, sector))
        .collect();
    if let Some(ciphers) = ciphers {
        let Cipher { key, unit } = &*ciphers.cipher;
        let plain = stored.clone();
        key.encrypt(*unit, 0, &plain, &mut stored)
            .expect("whole units");
    }
    let stable = RamSpec::new(bytes as u64).expect("memory");
    assert!(stable.copy_in(0, &stored));
    let cache = VolatileCache::new(stable);
    let storage = StorageSpec::Volatile(Arc::clone(&cache));
    let device = BlkDevice::with_ciphers(geometry, sectors, storage, ciphers.cloned());
    (cache, device)
}
