//! A worker in the steady state allocates nothing: thousands of requests, split and packed, on every kind
//! of storage, with an allocator that counts what the worker's thread asks for.

mod counting;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::memory::anonymous;
use bulkhead_dataplane::storage::{FileSpec, RamSpec, StorageSpec};
use bulkhead_dataplane::vhost_user::feature;
use bulkhead_dataplane::worker::message::{
    DeviceId, FromWorker, QueueId, QueueStart, RingLayout, ToWorker,
};
use bulkhead_dataplane::worker::{Replies, WorkerConfig, start};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use counting::{allocations_of, assert_it_counts, worker_thread};

/// Requests that are under way together.
const DEPTH: u16 = 16;
/// Descriptors of the ring: three for each request.
const SIZE: u16 = 64;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
const STATUSES: u64 = 0x8000;
const DATA_BYTES: u32 = 4096;
const VOLUME_BYTES: u64 = 1 << 20;
const QUEUE: QueueId = QueueId {
    device: DeviceId(1),
    index: 0,
};

/// A driver that offers the same sixteen requests again and again: writes and reads by turns.
struct Driver {
    guest: File,
    packed: bool,
    avail: u16,
    used: u16,
}

impl Driver {
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

    /// The three descriptors of a request: address, length, flags.
    fn parts(request: u16) -> [(u64, u32, u16); 3] {
        let n = u64::from(request);
        let direction = if request.is_multiple_of(2) { 0 } else { 2 };
        [
            (HEADERS + n * 16, 16, 1),
            (DATA + n * u64::from(DATA_BYTES), DATA_BYTES, 1 | direction),
            (STATUSES + n, 1, 2),
        ]
    }

    fn put(&self, index: u16, (addr, len, flags): (u64, u32, u16), last: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        let (third, fourth) = if self.packed {
            (last, flags)
        } else {
            (flags, last)
        };
        bytes.extend(third.to_le_bytes());
        bytes.extend(fourth.to_le_bytes());
        self.write(u64::from(index) * 16, &bytes);
    }

    fn prepare(&self) {
        for request in 0..DEPTH {
            let kind = u32::from(request.is_multiple_of(2));
            let sector = u64::from(request / 2) * 8;
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            self.write(HEADERS + u64::from(request) * 16, &header);
            if !self.packed {
                for (i, part) in (0u16..).zip(Self::parts(request)) {
                    self.put(request * 3 + i, part, request * 3 + i + 1);
                }
            }
        }
    }

    fn packed_flags(at: u16) -> u16 {
        if (at / SIZE).is_multiple_of(2) {
            1 << 7
        } else {
            1 << 15
        }
    }

    fn offer(&mut self, request: u16) {
        if self.packed {
            let parts = Self::parts(request);
            // The first one's flags last.
            for i in [1u16, 2, 0] {
                let at = self.avail.wrapping_add(i);
                let (addr, len, flags) = parts[usize::from(i)];
                self.put(
                    at % SIZE,
                    (addr, len, flags | Self::packed_flags(at)),
                    request,
                );
            }
            self.avail = self.avail.wrapping_add(3);
        } else {
            let slot = u64::from(self.avail % SIZE);
            self.write(AVAIL + 4 + slot * 2, &(request * 3).to_le_bytes());
            self.avail = self.avail.wrapping_add(1);
            self.write(AVAIL + 2, &self.avail.to_le_bytes());
        }
    }

    fn is_used(&self) -> bool {
        if !self.packed {
            return self.u16_at(USED + 2) != self.used;
        }
        let flags = self.u16_at(u64::from(self.used % SIZE) * 16 + 14);
        let wrap = (self.used / SIZE).is_multiple_of(2);
        (flags & (1 << 7) != 0, flags & (1 << 15) != 0) == (wrap, wrap)
    }

    fn round(&mut self, kick: &EventFd) {
        for request in 0..DEPTH {
            self.offer(request);
        }
        kick.write(1).expect("kick");
        let deadline = Instant::now() + Duration::from_secs(20);
        for _ in 0..DEPTH {
            while !self.is_used() {
                assert!(Instant::now() < deadline, "a request does not end");
                std::thread::yield_now();
            }
            self.used = self.used.wrapping_add(if self.packed { 3 } else { 1 });
        }
        let mut statuses = [0xff; DEPTH as usize];
        self.guest
            .read_exact_at(&mut statuses, STATUSES)
            .expect("guest memory");
        assert_eq!(statuses, [0; DEPTH as usize]);
    }
}

fn reply(replies: &Replies) -> FromWorker {
    loop {
        if let Some(message) = replies.next() {
            return message;
        }
        let mut fds = [PollFd::new(replies.as_fd(), PollFlags::POLLIN)];
        assert!(
            poll(&mut fds, PollTimeout::from(5000u16)).expect("poll") > 0,
            "no reply"
        );
    }
}

fn cipher() -> Cipher {
    let arena = SecretArena::new(1).expect("arena");
    let key: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
    Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::new(4096).expect("unit"),
    }
}

fn file() -> StorageSpec {
    let file = tempfile::NamedTempFile::new_in(".").expect("file");
    file.as_file()
        .write_all_at(&vec![1; 1 << 20], 0)
        .expect("allocate");
    let fd = file.reopen().expect("open").into();
    StorageSpec::File(FileSpec::from_fd(fd, false, 512).expect("usable"))
}

fn file_in_memory() -> StorageSpec {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let fd = nix::sys::memfd::memfd_create("volume", flags).expect("memfd");
    nix::sys::uio::pwrite(&fd, &vec![1; 1 << 20], 0).expect("allocate");
    let spec = FileSpec::from_fd(fd, false, 512).expect("usable");
    assert!(spec.in_memory);
    StorageSpec::File(spec)
}

/// Allocations of `rounds` rounds after some that fill what is filled once.
fn allocations(packed: bool, storage: StorageSpec, cipher: Option<Cipher>, rounds: u32) -> u64 {
    let (mut workers, replies) = start(&[WorkerConfig::default()]).expect("worker");
    let worker = workers.pop().expect("one");
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: 1,
        discard: false,
    };
    let device = BlkDevice::new(geometry, VOLUME_BYTES / 512, storage, cipher);
    let id = QUEUE.device;
    let device = device.into();
    worker.send(ToWorker::Attach { id, device });
    assert!(matches!(
        reply(&replies),
        FromWorker::Attached { result: Ok(()), .. }
    ));
    let (memory, fd) = anonymous(1 << 20).expect("memory");
    let mut driver = Driver {
        guest: fd.into(),
        packed,
        avail: 0,
        used: 0,
    };
    driver.prepare();
    let kick = EventFd::new().expect("eventfd");
    let call = EventFd::new().expect("eventfd");
    let dup = |event: &EventFd| Some(event.as_fd().try_clone_to_owned().expect("dup"));
    worker.send(ToWorker::Start(Box::new(QueueStart {
        queue: QUEUE,
        memory: Arc::new(memory),
        layout: RingLayout {
            size: SIZE,
            desc: 0,
            avail: AVAIL,
            used: USED,
        },
        base: if packed { 0x8000_8000 } else { 0 },
        log: None,
        region: None,
        anew: false,
        features: (1 << 9) | if packed { feature::RING_PACKED } else { 0 },
        enabled: true,
        kick: dup(&kick),
        call: dup(&call),
        error: None,
    })));
    assert!(matches!(reply(&replies), FromWorker::Started { .. }));
    for _ in 0..rounds {
        driver.round(&kick);
    }
    let count = allocations_of(worker_thread(), || {
        for _ in 0..rounds {
            driver.round(&kick);
        }
    });
    worker.end();
    count
}

/// One test, since the count is the process's.
#[test]
fn a_worker_allocates_nothing_in_the_steady_state() {
    for packed in [false, true] {
        let ram = || StorageSpec::Ram(Arc::new(RamSpec::new(VOLUME_BYTES).expect("memory")));
        for (name, storage, cipher, rounds) in [
            ("null", StorageSpec::Null, None, 500),
            ("ram", ram(), None, 500),
            ("encrypted ram", ram(), Some(cipher()), 300),
            ("file", file(), None, 100),
            ("encrypted file", file(), Some(cipher()), 100),
            ("file in memory", file_in_memory(), None, 500),
            (
                "encrypted file in memory",
                file_in_memory(),
                Some(cipher()),
                300,
            ),
        ] {
            let count = allocations(packed, storage, cipher, rounds);
            assert_eq!(count, 0, "{name}, packed: {packed}");
        }
    }
    assert_it_counts();
}
