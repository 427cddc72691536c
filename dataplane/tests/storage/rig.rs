//! A device on one or more workers and a driver of its queues that keeps several requests in flight.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::memory::{GuestMemory, anonymous};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::worker::message::{
    DeviceId, FromWorker, MovedQueue, QueueId, QueueStart, RingLayout, ToWorker,
};
use bulkhead_dataplane::worker::{Replies, WorkerConfig, WorkerHandle, start};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long a request may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Sectors of the device.
pub const SECTORS: u64 = 256;
/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Requests that a queue has in flight at most.
pub const SLOTS: u16 = 16;

/// Entries of a queue: three descriptors for each slot.
const SIZE: u16 = 64;
/// Guest addresses: each queue has a span, with its rings, then headers and status bytes, then data.
const SPAN: u64 = 0x40_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x3800;
const DATA: u64 = 0x1_0000;
/// Bytes of a slot's data.
const DATA_BYTES: u64 = 0x2_0000;

/// Negotiated features (virtio 1.2, 5.2.3).
pub const FLUSH: u64 = 1 << 9;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const DISCARD: u64 = 1 << 13;
pub const WRITE_ZEROES: u64 = 1 << 14;

/// Status bytes.
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;

const IN: u32 = 0;

/// A request.
#[derive(Debug, Clone)]
pub enum Op {
    /// First sector, sectors.
    Read(u64, u32),
    /// First sector, bytes.
    Write(u64, Vec<u8>),
    Flush,
    /// First sector, sectors.
    Discard(u64, u32),
    /// First sector, sectors, whether to unmap.
    Zero(u64, u32, bool),
}

/// A device and what drives it.
pub struct Rig {
    workers: Vec<WorkerHandle>,
    replies: Replies,
    memory: Option<Arc<GuestMemory>>,
    guest: File,
    queues: Vec<Queue>,
    /// Which worker has each queue.
    at: Vec<usize>,
    pub device: Arc<BlkDevice>,
    /// How often workers have said that the storage does better or worse.
    health_said: Cell<u32>,
}

struct Queue {
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
    free: Vec<u16>,
}

/// How a device is made.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes of a data unit; none: plain.
    pub unit: Option<u32>,
    /// Queues.
    pub queues: u16,
    /// Workers that serve them in turn.
    pub workers: usize,
    /// Negotiated features.
    pub features: u64,
}

impl Shape {
    /// A plain device with one queue and all features.
    pub const PLAIN: Self = Self {
        unit: None,
        queues: 1,
        workers: 1,
        features: FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES,
    };

    /// Sectors of a logical block.
    pub fn block(&self) -> u64 {
        u64::from(self.unit.unwrap_or(512)) / SECTOR as u64
    }
}

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd")
}

fn dup(event: &EventFd) -> Option<OwnedFd> {
    Some(event.as_fd().try_clone_to_owned().expect("dup"))
}

/// The key of every encrypted device here.
pub fn key() -> XtsKey {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [0x11; 64];
    key[32..].fill(0x22);
    XtsKey::new(&arena, &key).expect("key")
}

/// A queue of the device.
pub fn queue_id(index: u16) -> QueueId {
    QueueId {
        device: DeviceId(1),
        index,
    }
}

impl Rig {
    pub fn new(storage: StorageSpec, shape: Shape) -> Self {
        let configs = vec![WorkerConfig::default(); shape.workers];
        let (workers, replies) = start(&configs).expect("workers");
        Self::on(workers, replies, storage, shape)
    }

    /// The same workers with another device.
    pub fn again(self, storage: StorageSpec, shape: Shape) -> Self {
        let (workers, replies, _) = self.take_away();
        Self::on(workers, replies, storage, shape)
    }

    fn on(
        workers: Vec<WorkerHandle>,
        replies: Replies,
        storage: StorageSpec,
        shape: Shape,
    ) -> Self {
        let geometry = Geometry {
            logical_block_bytes: shape.unit.unwrap_or(512),
            read_only: false,
            serial: [0; 20],
            queues: shape.queues,
            discard: true,
        };
        let cipher = shape.unit.map(|unit| Cipher {
            key: key(),
            unit: DataUnit::new(unit).expect("unit"),
        });
        let device = BlkDevice::new(geometry, SECTORS, storage, cipher);
        Self::of(workers, replies, device, shape)
    }

    /// These workers with this device.
    pub fn of(
        workers: Vec<WorkerHandle>,
        replies: Replies,
        device: Arc<BlkDevice>,
        shape: Shape,
    ) -> Self {
        let (memory, fd) = anonymous(SPAN * u64::from(shape.queues)).expect("memory");
        let mut rig = Self {
            workers,
            replies,
            memory: Some(Arc::new(memory)),
            guest: fd.into(),
            queues: Vec::new(),
            at: Vec::new(),
            device,
            health_said: Cell::new(0),
        };
        rig.attach(shape);
        rig
    }

    fn attach(&mut self, shape: Shape) {
        for worker in &self.workers {
            worker.send(ToWorker::Attach {
                id: DeviceId(1),
                device: (&self.device).into(),
            });
        }
        for _ in 0..self.workers.len() {
            let FromWorker::Attached { result: Ok(()), .. } = self.reply() else {
                panic!("a worker does not take the device");
            };
        }
        for index in 0..shape.queues {
            let queue = Queue {
                avail: 0,
                used: 0,
                kick: event(),
                call: event(),
                free: (0..SLOTS).collect(),
            };
            let base = SPAN * u64::from(index);
            let start = QueueStart {
                queue: queue_id(index),
                memory: Arc::clone(self.memory.as_ref().expect("memory")),
                layout: RingLayout {
                    size: SIZE,
                    desc: base,
                    avail: base + AVAIL,
                    used: base + USED,
                },
                base: 0,
                log: None,
                region: None,
                anew: false,
                features: shape.features,
                enabled: true,
                kick: dup(&queue.kick),
                call: dup(&queue.call),
                error: None,
            };
            self.at.push(usize::from(index) % self.workers.len());
            self.worker(index).send(ToWorker::Start(Box::new(start)));
            assert!(matches!(self.reply(), FromWorker::Started { .. }));
            self.queues.push(queue);
        }
    }

    fn worker(&self, queue: u16) -> &WorkerHandle {
        &self.workers[self.at[usize::from(queue)]]
    }

    /// Says something to the worker of a queue.
    pub fn tell(&self, queue: u16, message: ToWorker) {
        self.worker(queue).send(message);
    }

    /// Says something to a worker.
    pub fn tell_worker(&self, worker: usize, message: ToWorker) {
        self.workers[worker].send(message);
    }

    /// Has a queue's worker give it away once it has drained.
    pub fn take_off(&self, queue: u16) -> Box<MovedQueue> {
        let id = queue_id(queue);
        self.tell(queue, ToWorker::Move { queue: id });
        match self.reply() {
            FromWorker::Moved(moved) if moved.queue == id => moved,
            other => panic!("{other:?}"),
        }
    }

    /// Has a worker give the device up.
    pub fn give_up(&self, worker: usize, wipe: bool) {
        let id = DeviceId(1);
        self.workers[worker].send(ToWorker::GiveUp { id, wipe });
    }

    /// Has a queue stop, however long that takes.
    pub fn stop(&self, queue: u16) {
        let id = queue_id(queue);
        self.tell(queue, ToWorker::Stop { queue: id });
    }

    /// Gives a queue that was taken off to the next worker.
    pub fn land(&mut self, moved: Box<MovedQueue>) {
        let (queue, workers) = (moved.queue.index, self.workers.len());
        let at = &mut self.at[usize::from(queue)];
        *at = (*at + 1) % workers;
        self.tell(queue, ToWorker::Resume(moved));
    }

    /// What a worker has said already; none: nothing.
    pub fn said(&self) -> Option<FromWorker> {
        loop {
            match self.replies.next() {
                Some(FromWorker::Health { .. }) => self.health_said.update(|n| n + 1),
                other => return other,
            }
        }
    }

    /// The event that a queue's driver is called with.
    pub fn call(&self, queue: u16) -> &EventFd {
        &self.queues[usize::from(queue)].call
    }

    /// Takes all of guest memory away.
    pub fn cut_off(&self) {
        self.guest.set_len(0).expect("truncate");
    }

    /// Makes a head available that can't be.
    pub fn break_ring(&mut self, queue: u16) {
        self.publish(queue, SPAN * u64::from(queue), SIZE);
    }

    /// What a worker, or the rekeyer, says next.
    pub fn reply(&self) -> FromWorker {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.replies.next() {
                Some(FromWorker::Health { .. }) => self.health_said.update(|n| n + 1),
                Some(message) => return message,
                None => {}
            }
            assert!(Instant::now() < deadline, "a worker does not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.guest
            .read_exact_at(&mut bytes, at)
            .expect("guest memory");
        bytes
    }

    /// Whether a queue takes another request.
    pub fn has_room(&self, queue: u16) -> bool {
        !self.queues[usize::from(queue)].free.is_empty()
    }

    /// Puts a request into a queue: its slot.
    pub fn submit(&mut self, queue: u16, op: &Op) -> u16 {
        let slot = self.queues[usize::from(queue)].free.pop().expect("a slot");
        let base = SPAN * u64::from(queue);
        let data = base + DATA + u64::from(slot) * DATA_BYTES;
        let range = |sector: u64, sectors: u32, flags: u32| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        };
        let (kind, sector, bytes) = match op {
            Op::Read(sector, sectors) => (IN, *sector, vec![0xdd; *sectors as usize * SECTOR]),
            Op::Write(sector, bytes) => (1, *sector, bytes.clone()),
            Op::Flush => (4, 0, Vec::new()),
            Op::Discard(sector, sectors) => (11, 0, range(*sector, *sectors, 0)),
            Op::Zero(sector, sectors, unmap) => {
                (13, 0, range(*sector, *sectors, u32::from(*unmap)))
            }
        };
        self.write(data, &bytes);
        let header_at = base + HEADERS + u64::from(slot) * 16;
        let status_at = base + STATUSES + u64::from(slot);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write(header_at, &header);
        self.write(status_at, &[0xee]);
        let length = u32::try_from(bytes.len()).expect("short");
        let mut parts = vec![(header_at, 16, false)];
        if length > 0 {
            parts.push((data, length, kind == IN));
        }
        parts.push((status_at, 1, true));
        self.chain(base, slot, &parts);
        self.publish(queue, base, slot * 3);
        slot
    }

    fn chain(&self, base: u64, slot: u16, parts: &[(u64, u32, bool)]) {
        let first = slot * 3;
        for (index, (addr, length, writable)) in (first..).zip(parts) {
            let last = usize::from(index - first) + 1 == parts.len();
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(length.to_le_bytes());
            bytes.extend((u16::from(!last) | (u16::from(*writable) << 1)).to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            self.write(base + u64::from(index) * 16, &bytes);
        }
    }

    fn publish(&mut self, queue: u16, base: u64, head: u16) {
        let state = &mut self.queues[usize::from(queue)];
        let entry = base + AVAIL + 4 + u64::from(state.avail % SIZE) * 2;
        state.avail = state.avail.wrapping_add(1);
        let index = state.avail;
        self.write(entry, &head.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.write(base + AVAIL + 2, &index.to_le_bytes());
        self.queues[usize::from(queue)]
            .kick
            .write(1)
            .expect("a kick");
    }

    /// The next request of a queue that ended: slot, status, and what was read of so many bytes.
    pub fn poll(&mut self, queue: u16, read_bytes: usize) -> Option<(u16, u8, Vec<u8>)> {
        let base = SPAN * u64::from(queue);
        let state = &self.queues[usize::from(queue)];
        let index = self.read(base + USED + 2, 2);
        if u16::from_le_bytes([index[0], index[1]]) == state.used {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let entry = base + USED + 4 + u64::from(state.used % SIZE) * 8;
        let head = self.read(entry, 2);
        let slot = u16::from_le_bytes([head[0], head[1]]) / 3;
        let status = self.read(base + STATUSES + u64::from(slot), 1)[0];
        let data = base + DATA + u64::from(slot) * DATA_BYTES;
        let bytes = self.read(data, read_bytes);
        let state = &mut self.queues[usize::from(queue)];
        state.used = state.used.wrapping_add(1);
        state.free.push(slot);
        Some((slot, status, bytes))
    }

    /// Waits for the next request of a queue to end.
    pub fn wait(&mut self, queue: u16, read_bytes: usize) -> (u16, u8, Vec<u8>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(ended) = self.poll(queue, read_bytes) {
                return ended;
            }
            assert!(Instant::now() < deadline, "a request does not end");
            std::hint::spin_loop();
        }
    }

    /// One request by itself: status, and what was read.
    pub fn run(&mut self, queue: u16, op: &Op) -> (u8, Vec<u8>) {
        let slot = self.submit(queue, op);
        let bytes = match op {
            Op::Read(_, sectors) => *sectors as usize * SECTOR,
            _ => 0,
        };
        let (ended, status, bytes) = self.wait(queue, bytes);
        assert_eq!(ended, slot, "another request ended");
        (status, bytes)
    }

    /// Takes the device away and ends the workers; how often they have said that the storage does better or
    /// worse.
    pub fn end(self) -> u32 {
        let (workers, _replies, said) = self.take_away();
        workers.into_iter().for_each(WorkerHandle::end);
        said
    }

    /// Stops the queues and takes the device away; then nothing may hold guest memory or the device.
    fn take_away(mut self) -> (Vec<WorkerHandle>, Replies, u32) {
        for index in 0..self.queues.len() {
            let index = u16::try_from(index).expect("few");
            let queue = queue_id(index);
            self.worker(index).send(ToWorker::Stop { queue });
            assert!(matches!(self.reply(), FromWorker::Stopped { .. }));
        }
        for worker in &self.workers {
            worker.send(ToWorker::Detach { id: DeviceId(1) });
        }
        for _ in 0..self.workers.len() {
            assert!(matches!(self.reply(), FromWorker::Detached { .. }));
        }
        let memory = self.memory.take().expect("memory");
        assert_eq!(Arc::strong_count(&memory), 1, "a buffer was not given back");
        assert_eq!(
            Arc::strong_count(&self.device),
            1,
            "a worker keeps the device"
        );
        (self.workers, self.replies, self.health_said.get())
    }
}
