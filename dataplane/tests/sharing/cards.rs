//! Network cards on a worker, whose drivers have made all of their frames and buffers available before anything is
//! served.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::memory::{GuestMemory, anonymous};
use bulkhead_dataplane::net::{Counts, NetDevice, Shape};
use bulkhead_dataplane::port::{Guard, PortSpec};
use bulkhead_dataplane::worker::message::{DeviceId, QueueId, QueueStart, RingLayout, ToWorker};
use bulkhead_protocol::net::SpoofChecks;
use nix::sys::eventfd::EventFd;

use super::rig::{AVAIL, PART_BYTES, RING, Rig, USED, desc, dup, event};

/// Queues of a card: one to receive, one to send with.
const QUEUES: u64 = 2;
const TX: u16 = 1;
/// Behind the queues' parts: the one frame that is sent, and where every frame is received.
const FRAME: u64 = QUEUES * PART_BYTES;
const BUFFER: u64 = FRAME + 0x1_0000;
const BUFFER_BYTES: u32 = 0x1_0000;
const MEMORY_BYTES: u64 = BUFFER + BUFFER_BYTES as u64;
/// VIRTIO_F_VERSION_1.
const FEATURES: u64 = 1 << 32;

/// A card, its queues running on a worker; the one that sends is not enabled.
pub struct Guest {
    pub device: Arc<NetDevice>,
    id: DeviceId,
    worker: usize,
    guest: File,
    memory: Arc<GuestMemory>,
    kicks: [EventFd; 2],
}

/// The address of a card.
pub fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// Everyone's.
pub const EVERYBODY: [u8; 6] = [0xff; 6];

impl Guest {
    /// A card with this address, with so many buffers to receive into.
    pub fn new(rig: &mut Rig, worker: usize, port: PortSpec, number: u8, buffers: u16) -> Self {
        let shape = Shape {
            mac: mac(number),
            mtu: 60_000,
            queue_pairs: 1,
        };
        let guard = Guard::new(shape.mac, &SpoofChecks::default());
        let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
        let guest = Self {
            device: NetDevice::with_port(shape, port, guard),
            id: rig.next_id(),
            worker,
            guest: fd.into(),
            memory: Arc::new(memory),
            kicks: [event(), event()],
        };
        let buffer = desc(BUFFER, BUFFER_BYTES, 2, 0);
        guest.write(0, &buffer.repeat(usize::from(RING)));
        guest.write(AVAIL, &avail(buffers));
        rig.attach(worker, guest.id, (&guest.device).into());
        rig.start(worker, guest.start(0, true));
        rig.start(worker, guest.start(TX, false));
        guest
    }

    fn queue(&self, index: u16) -> QueueId {
        QueueId {
            device: self.id,
            index,
        }
    }

    fn start(&self, index: u16, enabled: bool) -> QueueStart {
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
            features: FEATURES,
            enabled,
            kick: dup(&self.kicks[usize::from(index)]),
            call: None,
            error: None,
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    /// Has as many frames as a ring can have ready to be sent, all of them the same.
    pub fn prepare(&self, to: [u8; 6], bytes: usize) {
        self.prepare_as(self.device.shape.mac, to, bytes);
    }

    /// The same from this address.
    pub fn prepare_as(&self, from: [u8; 6], to: [u8; 6], bytes: usize) {
        let mut frame = vec![0; 12];
        frame.extend(to);
        frame.extend(from);
        frame.extend([0x88, 0xb5]);
        frame.resize(12 + bytes, 7);
        self.write(FRAME, &frame);
        let length = u32::try_from(frame.len()).expect("short");
        let one = desc(FRAME, length, 0, 0);
        self.write(PART_BYTES, &one.repeat(usize::from(RING)));
        self.write(PART_BYTES + AVAIL, &avail(RING));
    }

    /// Has so many of them in all ready, and no more.
    pub fn limit(&self, frames: u16) {
        self.write(PART_BYTES + AVAIL + 2, &frames.to_le_bytes());
        self.kicks[1].write(1).expect("kick");
    }

    /// Has the worker take what is ready.
    pub fn begin(&self, rig: &Rig) {
        let message = ToWorker::SetEnabled {
            queue: self.queue(TX),
            enabled: true,
        };
        rig.tell(self.worker, message);
    }

    /// What it has sent.
    pub fn sent(&self) -> Counts {
        self.device.metrics.sent()
    }

    /// Frames of it that were taken, whatever became of them.
    pub fn taken(&self) -> u64 {
        let mut bytes = [0; 2];
        let at = PART_BYTES + USED + 2;
        self.guest
            .read_exact_at(&mut bytes, at)
            .expect("guest memory");
        u64::from(u16::from_le_bytes(bytes))
    }

    /// Waits until so many were.
    pub fn wait_for(&self, frames: u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.taken() < frames {
            assert!(Instant::now() < deadline, "{} of {frames}", self.taken());
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// An avail ring in which so many chains are there.
fn avail(chains: u16) -> Vec<u8> {
    let mut bytes = vec![0; 2];
    bytes.extend(chains.to_le_bytes());
    bytes.extend((0..RING).flat_map(u16::to_le_bytes));
    bytes
}
