//! Workers, and devices whose drivers have made all of their requests available before anything is served, so
//! that nothing waits for a driver.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::device::Device;
use bulkhead_dataplane::memory::{GuestMemory, anonymous};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::worker::message::{
    DeviceId, FromWorker, QueueId, QueueStart, RingLayout, ToWorker,
};
use bulkhead_dataplane::worker::{Replies, WorkerConfig, WorkerHandle, start};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Requests that a ring can have.
pub const RING: u16 = 32768;
/// Where a queue's rings lie, from the beginning of its part of the memory on.
pub const AVAIL: u64 = 0x8_0000;
pub const USED: u64 = 0xA_0000;
/// Of a queue.
pub const PART_BYTES: u64 = 0x10_0000;
/// Shared by all queues of a device, behind them: the descriptors of a request, its header, its status, its data.
const SHARED_BYTES: u64 = 0x20_0000;
const TABLE: u64 = 0;
const HEADER: u64 = 0x8_0000;
const STATUS: u64 = 0x8_1000;
const DATA: u64 = 0x10_0000;
const INDIRECT_FEATURE: u64 = 1 << 28;

/// What each request of a device is.
#[derive(Debug, Clone, Copy)]
pub enum Requests {
    /// A read of so many bytes.
    Reads(u32),
    /// No request: a chain of so many descriptors of a byte each.
    Junk(u16),
}

/// How a device is made.
#[derive(Debug)]
pub struct Plan {
    pub storage: StorageSpec,
    pub encrypted: bool,
    pub queues: u16,
    pub requests: Requests,
}

impl Plan {
    /// Reads of 4 KiB that cost nothing but their way.
    pub fn null() -> Self {
        Self {
            storage: StorageSpec::Null,
            encrypted: false,
            queues: 1,
            requests: Requests::Reads(4096),
        }
    }
}

/// Workers. There is one such at a time, so that what the process uses is theirs.
pub struct Rig {
    workers: Vec<WorkerHandle>,
    replies: Replies,
    devices: u64,
    _alone: MutexGuard<'static, ()>,
}

/// A device, its queues running on one worker.
pub struct Disk {
    pub device: Arc<BlkDevice>,
    id: DeviceId,
    worker: usize,
    guest: File,
    memory: Arc<GuestMemory>,
    kicks: Vec<EventFd>,
}

pub fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd")
}

pub fn dup(event: &EventFd) -> Option<OwnedFd> {
    Some(event.as_fd().try_clone_to_owned().expect("dup"))
}

fn cipher() -> Cipher {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [0x11; 64];
    key[32..].fill(0x22);
    Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::new(4096).expect("unit"),
    }
}

impl Rig {
    pub fn new(workers: usize) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (workers, replies) =
            start(&vec![WorkerConfig::default(); workers]).expect("workers start");
        Self {
            workers,
            replies,
            devices: 0,
            _alone: alone,
        }
    }

    /// A device whose queues run on a worker, with nothing available.
    pub fn disk(&mut self, worker: usize, plan: Plan) -> Disk {
        let id = self.next_id();
        let geometry = Geometry {
            logical_block_bytes: 4096,
            read_only: false,
            serial: [0; 20],
            queues: plan.queues,
            discard: false,
        };
        let cipher = plan.encrypted.then(cipher);
        let device = BlkDevice::new(geometry, 1 << 20, plan.storage, cipher);
        let shared = u64::from(plan.queues) * PART_BYTES;
        let (memory, fd) = anonymous(shared + SHARED_BYTES).expect("memory");
        let disk = Disk {
            device,
            id,
            worker,
            guest: fd.into(),
            memory: Arc::new(memory),
            kicks: (0..plan.queues).map(|_| event()).collect(),
        };
        disk.write_request(shared, plan.requests);
        for index in 0..plan.queues {
            disk.write_descriptors(index, shared, plan.requests);
        }
        self.attach(worker, id, (&disk.device).into());
        for index in 0..plan.queues {
            self.start(worker, disk.start(index));
        }
        disk
    }

    /// A number for another device.
    pub fn next_id(&mut self) -> DeviceId {
        self.devices += 1;
        DeviceId(self.devices)
    }

    /// Has a worker take a device.
    pub fn attach(&self, worker: usize, id: DeviceId, device: Device) {
        self.workers[worker].send(ToWorker::Attach { id, device });
        let attached = self.reply();
        assert!(
            matches!(attached, FromWorker::Attached { result: Ok(()), .. }),
            "{attached:?}"
        );
    }

    /// Has a worker serve a queue.
    pub fn start(&self, worker: usize, start: QueueStart) {
        self.workers[worker].send(ToWorker::Start(Box::new(start)));
        let started = self.reply();
        assert!(matches!(started, FromWorker::Started { .. }), "{started:?}");
    }

    /// Says something to a worker that is not answered.
    pub fn tell(&self, worker: usize, message: ToWorker) {
        self.workers[worker].send(message);
    }

    fn reply(&self) -> FromWorker {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(message) = self.replies.next() {
                return message;
            }
            assert!(Instant::now() < deadline, "no reply");
            let mut fds = [PollFd::new(self.replies.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u8)).expect("poll");
        }
    }

    /// Gives a device's queues up.
    pub fn stop(&self, disk: &Disk) {
        for index in 0..disk.kicks.len() {
            let queue = disk.queue(u16::try_from(index).expect("few"));
            self.workers[disk.worker].send(ToWorker::Stop { queue });
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.workers.drain(..).for_each(WorkerHandle::end);
    }
}

impl Disk {
    fn queue(&self, index: u16) -> QueueId {
        QueueId {
            device: self.id,
            index,
        }
    }

    fn start(&self, index: u16) -> QueueStart {
        let part = u64::from(index) * PART_BYTES;
        QueueStart {
            queue: self.queue(index),
            memory: Arc::clone(&self.memory),
            layout: RingLayout {
                size: RING,
                desc: part,
                avail: part + AVAIL,
                used: part + USED,
            },
            base: 0,
            log: None,
            region: None,
            anew: false,
            features: INDIRECT_FEATURE,
            enabled: true,
            kick: dup(&self.kicks[usize::from(index)]),
            call: None,
            error: None,
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    fn u16_at(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest
            .read_exact_at(&mut bytes, at)
            .expect("guest memory");
        u16::from_le_bytes(bytes)
    }

    /// The one request that every descriptor means.
    fn write_request(&self, shared: u64, requests: Requests) {
        let mut table = Vec::new();
        match requests {
            Requests::Reads(bytes) => {
                table.extend(desc(shared + HEADER, 16, 1, 1));
                table.extend(desc(shared + DATA, bytes, 1 | 2, 2));
                table.extend(desc(shared + STATUS, 1, 2, 0));
            }
            Requests::Junk(length) => {
                for next in 1..length {
                    table.extend(desc(shared + DATA + u64::from(next), 1, 1, next));
                }
                table.extend(desc(shared + STATUS, 1, 2, 0));
            }
        }
        self.write(shared + TABLE, &table);
        // Type IN, sector 0: zeroes. Junk begins with another type.
        self.write(shared + DATA, &[0xff; 64]);
        self.write(shared + HEADER, &[0; 16]);
    }

    fn write_descriptors(&self, index: u16, shared: u64, requests: Requests) {
        let part = u64::from(index) * PART_BYTES;
        let length = match requests {
            Requests::Reads(_) => 3,
            Requests::Junk(length) => u32::from(length),
        };
        let one = desc(shared + TABLE, length * 16, 4, 0);
        self.write(part, &one.repeat(usize::from(RING)));
        let mut avail = vec![0; 4];
        avail.extend((0..RING).flat_map(u16::to_le_bytes));
        self.write(part + AVAIL, &avail);
    }

    /// Makes so many requests in all available in each queue, and kicks.
    pub fn offer(&self, requests: u16) {
        for (index, kick) in (0u64..).zip(&self.kicks) {
            let at = index * PART_BYTES + AVAIL + 2;
            self.write(at, &requests.to_le_bytes());
            kick.write(1).expect("kick");
        }
    }

    /// Makes so many requests available in one queue, and kicks if the device asks for that; whether it did.
    pub fn offer_one(&self, requests: u16) -> bool {
        self.write(AVAIL + 2, &requests.to_le_bytes());
        let asks = self.u16_at(USED) & 1 == 0;
        if asks {
            self.kicks[0].write(1).expect("kick");
        }
        asks
    }

    /// Requests that were completed, of all queues together.
    pub fn completed(&self) -> u64 {
        let used = |index| u64::from(self.u16_at(index * PART_BYTES + USED + 2));
        (0..self.kicks.len() as u64).map(used).sum()
    }

    /// Waits until its first queue asks for a kick.
    pub fn wait_until_parked(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.u16_at(USED) & 1 != 0 {
            assert!(Instant::now() < deadline, "it is polled still");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until so many were.
    pub fn wait_for(&self, requests: u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.completed() < requests {
            assert!(
                Instant::now() < deadline,
                "{} of {requests}",
                self.completed()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

pub fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}
