//! A driver whose backend has died, and the worker that goes on with its queue.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::memory::{GuestMemory, SharedArea, anonymous};
use bulkhead_dataplane::storage::{DelaySpec, FileSpec, StorageSpec};
use bulkhead_dataplane::virtqueue::{Chain, Format, QueueFeatures, QueueRegion, Virtqueue};
use bulkhead_dataplane::worker::message::{
    DeviceId, FromWorker, QueueId, QueueStart, RingLayout, ToWorker,
};
use bulkhead_dataplane::worker::{Replies, WorkerConfig, WorkerHandle, start};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub const SIZE: u16 = 32;
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x3800;
const DATA: u64 = 0x1_0000;
const MEMORY_BYTES: u64 = 1 << 20;
/// Sectors of the device.
const SECTORS: u64 = 64;
/// The status of a request that has not ended.
const OPEN: u8 = 0xee;

const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

pub const QUEUE: QueueId = QueueId {
    device: DeviceId(1),
    index: 0,
};

/// Both formats, in order and not.
pub fn formats() -> impl Iterator<Item = (Format, bool)> {
    [Format::Split, Format::Packed]
        .into_iter()
        .flat_map(|format| [(format, false), (format, true)])
}

pub struct Rig {
    worker: Option<WorkerHandle>,
    replies: Replies,
    memory: Arc<GuestMemory>,
    guest: File,
    area: Arc<SharedArea>,
    region: File,
    image: File,
    /// The device.
    pub device: Arc<BlkDevice>,
    /// The storage, which hangs as long as it is told to.
    pub storage: Arc<DelaySpec>,
    format: Format,
    in_order: bool,
    pub call: EventFd,
    pub kick: EventFd,
    offered: u16,
    /// Slots that were seen as used, in order.
    pub used: Vec<u16>,
}

/// How a queue is started.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    pub base: u32,
    pub enabled: bool,
    pub anew: bool,
    pub call: bool,
}

impl Start {
    /// After a crash, with a base that means nothing.
    pub const AGAIN: Self = Self {
        base: 0,
        enabled: true,
        anew: false,
        call: true,
    };
}

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd")
}

pub fn dup(event: &EventFd) -> Option<OwnedFd> {
    Some(event.as_fd().try_clone_to_owned().expect("dup"))
}

impl Rig {
    pub fn new(format: Format, in_order: bool) -> Self {
        let (mut workers, replies) = start(&[WorkerConfig::default()]).expect("worker");
        let (memory, guest) = anonymous(MEMORY_BYTES).expect("memory");
        let bytes = format.region_bytes(SIZE);
        let (_, region) = anonymous(bytes).expect("region");
        let area = SharedArea::map(region.as_fd(), 0, bytes).expect("mapped");
        let image = tempfile::NamedTempFile::new_in(".").expect("file");
        image.as_file().set_len(SECTORS * 512).expect("length");
        let fd = image.reopen().expect("open").into();
        let storage = StorageSpec::File(FileSpec::from_fd(fd, false, 512).expect("usable"));
        let storage = DelaySpec::new(storage, Duration::ZERO);
        let geometry = Geometry {
            logical_block_bytes: 512,
            read_only: false,
            serial: [0; 20],
            queues: 1,
            discard: false,
        };
        let delayed = StorageSpec::Delay(Arc::clone(&storage));
        let device = BlkDevice::new(geometry, SECTORS, delayed, None);
        let rig = Self {
            device: Arc::clone(&device),
            worker: workers.pop(),
            replies,
            memory: Arc::new(memory),
            guest: guest.into(),
            area: Arc::new(area),
            region: region.into(),
            image: image.into_file(),
            storage,
            format,
            in_order,
            call: event(),
            kick: event(),
            offered: 0,
            used: Vec::new(),
        };
        rig.tell(ToWorker::Attach {
            id: QUEUE.device,
            device: device.into(),
        });
        assert!(matches!(
            rig.hear(),
            FromWorker::Attached { result: Ok(()), .. }
        ));
        rig
    }

    fn features(&self) -> u64 {
        let packed = u64::from(self.format == Format::Packed) << 34;
        packed | u64::from(self.in_order) << 35
    }

    const LAYOUT: RingLayout = RingLayout {
        size: SIZE,
        desc: DESC,
        avail: AVAIL,
        used: USED,
    };

    fn region(&self) -> QueueRegion {
        QueueRegion::new(&self.area, self.format, 0, SIZE).expect("it fits")
    }

    /// Somebody else's program keeps the region in another way.
    pub fn set_version(&self, version: u16) {
        let written = self.region.write_all_at(&version.to_le_bytes(), 8);
        written.expect("the region");
    }

    /// The backend that is going to die: takes so many requests. Those that it is told to have ended are shown, or
    /// only given back.
    pub fn live_and_die(&mut self, taken: u16, shown: &[u16], given_back: &[u16]) {
        let base = if self.format == Format::Packed {
            0x8000_8000
        } else {
            0
        };
        let features = QueueFeatures::of(self.features());
        let queue = Virtqueue::new(&self.memory, Self::LAYOUT, base, features);
        let mut queue = queue.expect("a queue");
        queue.recover(self.region()).expect("fresh");
        let mut chain = Chain::default();
        let mut ids = Vec::new();
        for _ in 0..taken {
            ids.push(queue.pop(&mut chain).expect("good").expect("one"));
        }
        for slot in shown {
            queue.push_used(ids[usize::from(*slot)], 1);
        }
        queue.publish();
        for slot in given_back {
            queue.push_used(ids[usize::from(*slot)], 1);
        }
    }

    pub fn start(&self, how: Start) -> FromWorker {
        self.tell(ToWorker::Start(Box::new(QueueStart {
            queue: QUEUE,
            memory: Arc::clone(&self.memory),
            layout: Self::LAYOUT,
            base: how.base,
            log: None,
            region: Some(self.region()),
            anew: how.anew,
            features: self.features(),
            enabled: how.enabled,
            kick: dup(&self.kick),
            call: how.call.then(|| dup(&self.call)).flatten(),
            error: None,
        })));
        self.hear()
    }

    pub fn tell(&self, message: ToWorker) {
        self.worker.as_ref().expect("running").send(message);
    }

    /// What the worker says next.
    pub fn hear(&self) -> FromWorker {
        self.until("the worker says something", || {
            loop {
                match self.replies.next() {
                    Some(FromWorker::Health { .. }) => {}
                    other => return other,
                }
            }
        })
    }

    pub fn until<T>(&self, what: &str, mut f: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = f() {
                return value;
            }
            assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.guest
            .read_exact_at(&mut bytes, at)
            .expect("guest memory");
        bytes
    }

    fn half(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    /// What a request writes to its sector.
    fn content(slot: u16) -> Vec<u8> {
        vec![u8::try_from(slot).expect("few") + 1; 512]
    }

    /// Writes to so many sectors more, a request each, which no kick tells of.
    pub fn offer(&mut self, count: u16) {
        for slot in self.offered..self.offered + count {
            let at = u64::from(slot);
            let mut header = 1u32.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(at.to_le_bytes());
            self.write(HEADERS + 16 * at, &header);
            self.write(DATA + 512 * at, &Self::content(slot));
            self.write(STATUSES + at, &[OPEN]);
            let parts = [
                (HEADERS + 16 * at, 16, 1),
                (DATA + 512 * at, 512, 1),
                (STATUSES + at, 1, 2),
            ];
            for (index, (addr, bytes, flags)) in (3 * slot..).zip(parts) {
                self.descriptor(index, slot, addr, bytes, flags);
            }
            if self.format == Format::Split {
                self.write(AVAIL + 4 + 2 * at, &(3 * slot).to_le_bytes());
                self.write(AVAIL + 2, &(slot + 1).to_le_bytes());
            }
        }
        self.offered += count;
    }

    fn descriptor(&self, index: u16, slot: u16, addr: u64, len: u32, flags: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        if self.format == Format::Packed {
            bytes.extend(slot.to_le_bytes());
            bytes.extend((flags | PACKED_AVAIL).to_le_bytes());
        } else {
            bytes.extend(flags.to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
        }
        self.write(DESC + 16 * u64::from(index), &bytes);
    }

    /// The driver changes the address of a request's data to one that is not there.
    pub fn spoil(&self, slot: u16) {
        let index = u64::from(3 * slot + 1);
        self.write(DESC + 16 * index, &(MEMORY_BYTES * 2).to_le_bytes());
    }

    /// Sees what is used; none of it twice.
    pub fn look(&mut self) -> usize {
        while let Some(id) = self.next_used() {
            let slot = if self.format == Format::Packed {
                id
            } else {
                id / 3
            };
            assert!(!self.used.contains(&slot), "{slot} is used twice");
            self.used.push(slot);
        }
        self.used.len()
    }

    fn next_used(&self) -> Option<u16> {
        let seen = u16::try_from(self.used.len()).expect("few");
        if self.format == Format::Packed {
            let flags = self.half(DESC + 16 * u64::from(3 * seen) + 14);
            let both = PACKED_AVAIL | PACKED_USED;
            return (flags & both == both).then(|| self.half(DESC + 16 * u64::from(3 * seen) + 12));
        }
        (self.half(USED + 2) != seen).then(|| self.half(USED + 4 + 8 * u64::from(seen)))
    }

    /// Waits until so many requests are used.
    pub fn wait(&mut self, count: u16) {
        let deadline = Instant::now() + PATIENCE;
        while self.look() < usize::from(count) {
            assert!(Instant::now() < deadline, "only {:?} are used", self.used);
            std::thread::sleep(Duration::from_micros(100));
        }
        assert_eq!(self.used.len(), usize::from(count), "{:?}", self.used);
    }

    /// These requests were done by the worker: their status, and what the disk has.
    pub fn check_done(&self, slots: impl IntoIterator<Item = u16>) {
        for slot in slots {
            let at = u64::from(slot);
            assert_eq!(self.read(STATUSES + at), [0], "status of {slot}");
            assert!(self.sector(slot) == Self::content(slot), "sector {slot}");
        }
    }

    /// These were not.
    pub fn check_open(&self, slots: impl IntoIterator<Item = u16>) {
        for slot in slots {
            let at = u64::from(slot);
            assert_eq!(self.read(STATUSES + at), [OPEN], "status of {slot}");
            assert!(self.sector(slot) == [0; 512], "sector {slot}");
        }
    }

    fn sector(&self, slot: u16) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        let at = 512 * u64::from(slot);
        self.image.read_exact_at(&mut bytes, at).expect("the image");
        bytes
    }

    /// Chains that the region says are in flight.
    pub fn in_flight(&self) -> usize {
        let entry = if self.format == Format::Packed {
            32
        } else {
            16
        };
        let is_open = |index: &u64| {
            let mut flag = [0];
            let read = self.region.read_exact_at(&mut flag, entry * (1 + index));
            read.expect("the region");
            flag == [1]
        };
        (0..u64::from(SIZE)).filter(is_open).count()
    }

    /// The driver was called; forgets it.
    pub fn was_called(&self) -> bool {
        self.call.read().is_ok()
    }

    /// Waits until the driver is called.
    pub fn wait_called(&self) {
        self.until("a call", || self.was_called().then_some(()));
    }

    /// Stops the queue: where it goes on.
    pub fn stop(&self) -> Option<u32> {
        self.stop_leaving().0
    }

    /// The same, and whether chains were left in the region.
    pub fn stop_leaving(&self) -> (Option<u32>, bool) {
        self.tell(ToWorker::Stop { queue: QUEUE });
        match self.hear() {
            FromWorker::Stopped { base, left, .. } => (base, left),
            other => panic!("{other:?}"),
        }
    }

    /// Where a queue goes on of which so many requests were taken and used.
    pub fn base_after(&self, count: u16) -> u32 {
        if self.format == Format::Packed {
            let at = u32::from(3 * count) | 0x8000;
            at | (at << 16)
        } else {
            u32::from(count)
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.end();
        }
    }
}
