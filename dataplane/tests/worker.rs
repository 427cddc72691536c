//! A worker with a driver written down byte by byte: requests on every kind of storage, stops,
//! retirement, requests larger than staging, and sleep and wake-up.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::memory::{GuestMemory, SharedArea, anonymous};
use bulkhead_dataplane::storage::{FileSpec, RamSpec, StorageSpec};
use bulkhead_dataplane::worker::message::{
    DeviceId, FromWorker, QueueId, QueueStart, RingLayout, ToWorker,
};
use bulkhead_dataplane::worker::{Replies, WorkerConfig, WorkerHandle, start};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3800;
const DATA: u64 = 0x1_0000;
const SIZE: u16 = 8;
const MEMORY_BYTES: u64 = 64 << 20;
const VOLUME_BYTES: u64 = 32 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const FLUSH_FEATURE: u64 = 1 << 9;

struct Rig {
    worker: Option<WorkerHandle>,
    replies: Replies,
    memory: Arc<GuestMemory>,
    guest: File,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    avail: u16,
    used: u16,
    device: Arc<BlkDevice>,
}

const QUEUE: QueueId = QueueId {
    device: DeviceId(1),
    index: 0,
};

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd")
}

fn dup(event: &EventFd) -> Option<OwnedFd> {
    Some(event.as_fd().try_clone_to_owned().expect("dup"))
}

fn geometry() -> Geometry {
    Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: *b"serial-of-the-volume",
        queues: 1,
        discard: false,
    }
}

fn file_storage() -> (StorageSpec, File) {
    let file = tempfile::NamedTempFile::new_in(".").expect("file");
    file.as_file().set_len(VOLUME_BYTES).expect("length");
    // Opened twice: O_DIRECT is set on the worker's own.
    let fd = file.reopen().expect("open").into();
    let spec = FileSpec::from_fd(fd, false, 512).expect("usable");
    (StorageSpec::File(spec), file.into_file())
}

fn cipher(unit: u32) -> Cipher {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [0x11; 64];
    key[32..].fill(0x22);
    Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::new(unit).expect("unit"),
    }
}

impl Rig {
    fn new(storage: StorageSpec, cipher: Option<Cipher>, features: u64) -> Self {
        let (mut workers, replies) = start(&[WorkerConfig::default()]).expect("worker");
        let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
        let mut rig = Self {
            worker: workers.pop(),
            replies,
            memory: Arc::new(memory),
            guest: fd.into(),
            kick: event(),
            call: event(),
            error: event(),
            avail: 0,
            used: 0,
            device: BlkDevice::new(geometry(), VOLUME_BYTES / 512, storage, cipher),
        };
        let attach = ToWorker::Attach {
            id: QUEUE.device,
            device: (&rig.device).into(),
        };
        rig.send(attach);
        assert!(matches!(
            rig.reply(),
            FromWorker::Attached { result: Ok(()), .. }
        ));
        rig.start(features);
        rig
    }

    fn start(&mut self, features: u64) {
        let start = QueueStart {
            queue: QUEUE,
            memory: Arc::clone(&self.memory),
            layout: RingLayout {
                size: SIZE,
                desc: DESC,
                avail: AVAIL,
                used: USED,
            },
            base: u32::from(self.avail),
            log: None,
            region: None,
            anew: false,
            features,
            enabled: true,
            kick: dup(&self.kick),
            call: dup(&self.call),
            error: dup(&self.error),
        };
        self.send(ToWorker::Start(Box::new(start)));
        assert!(matches!(self.reply(), FromWorker::Started { .. }));
    }

    fn send(&self, message: ToWorker) {
        self.worker.as_ref().expect("running").send(message);
    }

    fn reply(&self) -> FromWorker {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(message) = self.replies.next() {
                return message;
            }
            assert!(Instant::now() < deadline, "no reply");
            wait_for(self.replies.as_fd());
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

    fn u16_at(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().expect("two"))
    }

    fn desc(&self, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(DESC + index * 16, &bytes);
    }

    /// Puts a request with one data segment at head 0 and makes it available.
    fn offer(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write(HEADER, &header);
        self.write(STATUS, &[0xee]);
        let writable = u16::from(matches!(kind, IN | GET_ID)) * 2;
        self.desc(0, HEADER, 16, 1, if data.is_some() { 1 } else { 2 });
        if let Some((at, len)) = data {
            self.desc(1, at, len, 1 | writable, 2);
        }
        self.desc(2, STATUS, 1, 2, 0);
        self.publish(0);
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail % SIZE);
        self.write(AVAIL + 4 + slot * 2, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail.to_le_bytes());
        self.kick.write(1).expect("kick");
    }

    /// Status and used length of the next completion.
    fn completed(&mut self) -> (u8, u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.u16_at(USED + 2) == self.used {
            assert!(Instant::now() < deadline, "not completed");
            std::thread::yield_now();
        }
        let slot = u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let entry = self.read(USED + 4 + slot * 8, 8);
        let len = u32::from_le_bytes(entry[4..8].try_into().expect("four"));
        (self.read(STATUS, 1)[0], len)
    }

    fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> (u8, u32) {
        self.offer(kind, sector, data);
        self.completed()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.end();
        }
    }
}

fn wait_for(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(2000u16)).expect("poll") > 0
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 24) as u8
    };
    (0..len).map(|_| next(&mut state)).collect()
}

/// Writes, flushes and reads back through a worker.
fn round_trip(rig: &mut Rig, sector: u64, at: u64, len: u32) {
    let bytes = pattern(len as usize, u8::try_from(sector % 251).expect("small"));
    rig.write(at, &bytes);
    assert_eq!(rig.request(OUT, sector, Some((at, len))), (0, 1));
    assert_eq!(rig.request(FLUSH, 0, None), (0, 1));
    rig.write(at, &vec![0; len as usize]);
    assert_eq!(rig.request(IN, sector, Some((at, len))), (0, len + 1));
    assert!(
        rig.read(at, len as usize) == bytes,
        "{len} bytes at {at:#x}"
    );
}

#[test]
fn a_file_direct_staged_and_larger_than_staging() {
    for cipher_unit in [None, Some(512), Some(4096)] {
        let (storage, file) = file_storage();
        let mut rig = Rig::new(storage, cipher_unit.map(cipher), FLUSH_FEATURE);
        round_trip(&mut rig, 8, DATA, 4096);
        round_trip(&mut rig, 64, DATA + 1, 8192);
        round_trip(&mut rig, 0, DATA + 3, 20 << 20);
        let stored = {
            let mut stored = vec![0; 8192];
            file.read_exact_at(&mut stored, 64 * 512).expect("file");
            stored
        };
        let plain = rig.read(DATA + 3 + 64 * 512, 8192);
        assert_eq!(stored == plain, cipher_unit.is_none());
    }
}

#[test]
fn what_is_written_is_what_the_cipher_makes_of_it() {
    let (storage, file) = file_storage();
    let mut rig = Rig::new(storage, Some(cipher(4096)), FLUSH_FEATURE);
    let bytes = pattern(8192, 9);
    rig.write(DATA + 77, &bytes);
    assert_eq!(rig.request(OUT, 16, Some((DATA + 77, 8192))).0, 0);
    let mut stored = vec![0; 8192];
    file.read_exact_at(&mut stored, 8192).expect("file");
    let mut expected = vec![0; 8192];
    let oracle = cipher(4096);
    oracle
        .key
        .encrypt(oracle.unit, 2, &bytes, &mut expected)
        .expect("whole units");
    assert!(stored == expected);
}

#[test]
fn memory_storage_and_none() {
    for unit in [None, Some(512), Some(4096)] {
        let ram = RamSpec::new(VOLUME_BYTES).expect("memory");
        let mut rig = Rig::new(
            StorageSpec::Ram(ram.into()),
            unit.map(cipher),
            FLUSH_FEATURE,
        );
        round_trip(&mut rig, 8, DATA, 4096);
        round_trip(&mut rig, 16, DATA + 5, 1 << 20);
    }
    for unit in [None, Some(4096)] {
        let mut rig = Rig::new(StorageSpec::Null, unit.map(cipher), 0);
        assert_eq!(rig.request(OUT, 8, Some((DATA, 4096))), (0, 1));
        assert_eq!(
            rig.request(IN, 8, Some((DATA, 1 << 20))),
            (0, (1 << 20) + 1)
        );
    }
}

#[test]
fn the_serial_and_what_is_not_known() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    assert_eq!(rig.request(GET_ID, 0, Some((DATA, 20))), (0, 21));
    assert_eq!(rig.read(DATA, 20), b"serial-of-the-volume");
    assert_eq!(rig.request(GET_ID, 0, Some((DATA, 6))), (0, 7));
    assert_eq!(rig.request(99, 0, Some((DATA, 512))), (2, 1));
    assert_eq!(
        rig.request(IN, VOLUME_BYTES / 512, Some((DATA, 512))),
        (1, 1)
    );
    // FLUSH was not negotiated.
    assert_eq!(rig.request(FLUSH, 0, None), (2, 1));
    assert_eq!(rig.device.metrics.totals().requests_ok, 2);
    assert_eq!(rig.device.metrics.totals().requests_failed, 3);
}

#[test]
fn a_request_that_can_not_be_done_marks_nothing_but_its_status() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    let (_, file) = anonymous(4096).expect("memory");
    let area = SharedArea::map(file.as_fd(), 0, 4096).expect("mapped");
    rig.memory.log().set_area(Some(area));
    rig.memory.log().enable(true);
    let marked = |rig: &mut Rig, sector: u64| {
        let status = rig.request(IN, sector, Some((DATA, 1 << 20))).0;
        let mut bits = [0; 0x110 / 8];
        File::from(file.try_clone().expect("dup"))
            .read_exact_at(&mut bits, 0)
            .expect("the log");
        let pages: u32 = bits.iter().map(|byte: &u8| byte.count_ones()).sum();
        (status, pages)
    };
    assert_eq!(marked(&mut rig, VOLUME_BYTES / 512), (1, 1));
    // One that is done marks its data: 256 pages.
    assert_eq!(marked(&mut rig, 0), (0, 257));
}

#[test]
fn a_sleeping_worker_is_kicked_awake_and_calls() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        rig.offer(IN, 0, Some((DATA, 512)));
        assert!(wait_for(rig.call.as_fd()), "no call");
        rig.call.read().expect("counter");
        assert_eq!(rig.completed(), (0, 513));
    }
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_a_start_goes_on() {
    let (storage, _file) = file_storage();
    let mut rig = Rig::new(storage, Some(cipher(512)), FLUSH_FEATURE);
    for round in 1..=10 {
        rig.offer(IN, 0, Some((DATA, 8 << 20)));
        rig.send(ToWorker::Stop { queue: QUEUE });
        let FromWorker::Stopped { base, .. } = rig.reply() else {
            panic!("not stopped");
        };
        let next_avail = u16::try_from(base.expect("it ran")).expect("split");
        // Taken before the stop and completed, or not taken: never in between.
        let used = rig.u16_at(USED + 2);
        assert_eq!(next_avail, used, "round {round}");
        rig.avail = next_avail;
        rig.used = used;
        rig.start(FLUSH_FEATURE);
        rig.kick.write(1).expect("kick");
        if next_avail != rig.u16_at(AVAIL + 2) {
            rig.avail = rig.u16_at(AVAIL + 2);
            assert_eq!(rig.completed().0, 0);
        }
    }
    rig.send(ToWorker::Stop { queue: QUEUE });
    assert!(matches!(rig.reply(), FromWorker::Stopped { .. }));
    rig.send(ToWorker::Stop { queue: QUEUE });
    assert!(matches!(
        rig.reply(),
        FromWorker::Stopped { base: None, .. }
    ));
    rig.send(ToWorker::Detach { id: QUEUE.device });
    assert!(matches!(rig.reply(), FromWorker::Detached { .. }));
}

#[test]
fn a_broken_ring_retires_and_says_so() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    assert_eq!(rig.request(IN, 0, Some((DATA, 512))).0, 0);
    rig.publish(SIZE);
    assert!(matches!(rig.reply(), FromWorker::Retired { .. }));
    assert!(wait_for(rig.error.as_fd()));
    rig.publish(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.u16_at(USED + 2), rig.used);
    rig.send(ToWorker::Stop { queue: QUEUE });
    assert!(matches!(rig.reply(), FromWorker::Stopped { .. }));
}

/// Whatever requests that ended at once have left in the worker's batch.
#[test]
fn memory_that_was_replaced_is_let_go_of() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    for _ in 0..3 {
        assert_eq!(rig.request(OUT, 0, Some((DATA, 512))), (0, 1));
    }
    let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
    // What the rings hold goes over, as it would if only another region had changed.
    let rings = rig.read(0, 0x4000);
    let before = Arc::downgrade(&rig.memory);
    (rig.memory, rig.guest) = (Arc::new(memory), fd.into());
    rig.write(0, &rings);
    rig.send(ToWorker::SetMemory {
        queue: QUEUE,
        memory: Arc::clone(&rig.memory),
    });
    assert!(matches!(rig.reply(), FromWorker::MemorySet { .. }));
    assert_eq!(before.strong_count(), 0);
    assert_eq!(rig.request(OUT, 0, Some((DATA, 512))), (0, 1));
}

#[test]
fn memory_that_is_cut_off_retires_the_queue() {
    let mut rig = Rig::new(StorageSpec::Null, None, 0);
    assert_eq!(rig.request(IN, 0, Some((DATA, 512))).0, 0);
    rig.guest.set_len(0).expect("truncate");
    rig.kick.write(1).expect("kick");
    assert!(matches!(rig.reply(), FromWorker::Retired { .. }));
}

/// The zeroes in its place look like a ring without requests when none was taken yet.
#[test]
fn memory_that_is_cut_off_before_the_first_request_retires_the_queue() {
    let rig = Rig::new(StorageSpec::Null, None, FLUSH_FEATURE);
    rig.guest.set_len(0).expect("truncate");
    rig.kick.write(1).expect("kick");
    assert!(matches!(rig.reply(), FromWorker::Retired { .. }));
}

#[test]
fn a_transfer_that_fails_is_an_error_and_a_failed_flush_stays_failed() {
    let (storage, file) = file_storage();
    let mut rig = Rig::new(storage, None, FLUSH_FEATURE);
    file.set_len(4096).expect("shorter");
    // Past the end of the file: a short read.
    assert_eq!(rig.request(IN, 64, Some((DATA, 4096))), (1, 1));
    rig.device.latch_flush_failure();
    assert_eq!(rig.request(FLUSH, 0, None), (1, 1));
    assert_eq!(rig.request(FLUSH, 0, None), (1, 1));
}
