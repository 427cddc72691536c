//! A driver that receives, and the queue that it receives from, of both ring formats.

use std::sync::Arc;

use bulkhead_integration::driver::desc::Desc;
use bulkhead_integration::driver::memory::GuestMemory as Shared;
use bulkhead_integration::driver::ring::{Format, Ring};

use super::of_guest;
use crate::memory::{DirtyLog, GuestMemory, RegionSpec, SharedArea};
use crate::net::frame::Frame;
use crate::net::header::{Header, feature};
use crate::net::receive::{Delivered, Receiver, Refused, Scratch, deliver, deliver_usual};
use crate::vhost_user::feature::{IN_ORDER, INDIRECT_DESC, RING_PACKED, VERSION_1};
use crate::virtqueue::{QueueFeatures, Virtqueue};
use crate::worker::message::RingLayout;

pub(super) const BASE: u64 = 0x10_0000;
/// Receive buffers, each with a gap behind it.
pub(super) const BUFFERS: u64 = BASE + 0x1_0000;
pub(super) const MEMORY_BYTES: u64 = 0x40_0000;
const SIZE: u16 = 128;
pub(super) const MERGEABLE: u64 = VERSION_1 | feature::MRG_RXBUF;
pub(super) const ALL: u64 = MERGEABLE
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_USO4
    | feature::GUEST_USO6;
/// What no byte of a frame is: it tells what was not written.
pub(super) const UNTOUCHED: u8 = 0xfe;

/// A driver that receives, and the queue that it receives from.
pub(super) struct Rig {
    pub(super) memory: Shared,
    pub(super) ring: Ring,
    pub(super) queue: Virtqueue,
    pub(super) features: u64,
    scratch: Scratch,
    /// Where the next buffer lies.
    pub(super) next: u64,
    /// Buffers of the chains that are offered, by their heads.
    offered: Vec<Vec<(u64, usize)>>,
    pub(super) log: std::fs::File,
    /// Something was written that was put back.
    pub(super) was_put_back: bool,
}

impl Rig {
    pub(super) fn new(features: u64) -> Self {
        let memory = Shared::new(&[(BASE, MEMORY_BYTES, 0)]).expect("memory");
        memory
            .fill(
                BUFFERS,
                usize::try_from(MEMORY_BYTES).expect("small") - 0x1_0000,
                UNTOUCHED,
            )
            .expect("inside");
        let format = if features & RING_PACKED == 0 {
            Format::Split
        } else {
            Format::Packed
        };
        let ring = Ring::with_format(&memory, BASE, SIZE, format).expect("ring");
        let region = &memory.regions()[0];
        let spec = RegionSpec {
            guest_addr: BASE,
            bytes: MEMORY_BYTES,
            user_addr: region.entry().user_addr,
            file_offset: 0,
        };
        let mapped = GuestMemory::map(&[(spec, region.file())]).expect("mapped");
        let (_, area) = crate::memory::anonymous(4096).expect("memory");
        let log = Arc::new(DirtyLog::default());
        let shared = SharedArea::map(std::os::fd::AsFd::as_fd(&area), 0, 4096).expect("mapped");
        log.set_area(Some(shared));
        let mapped = Arc::new(mapped.with_log(&log));
        log.enable(true);
        let layout = RingLayout {
            size: SIZE,
            desc: ring.desc,
            avail: ring.avail,
            used: ring.used,
        };
        let wanted = QueueFeatures::of(features | INDIRECT_DESC);
        let queue = Virtqueue::new(&mapped, layout, ring.base(), wanted).expect("a queue");
        Self {
            memory,
            ring,
            queue,
            features,
            scratch: Scratch::default(),
            next: BUFFERS,
            offered: Vec::new(),
            log: area.into(),
            was_put_back: false,
        }
    }

    /// Offers a chain of buffers of these lengths.
    pub(super) fn offer(&mut self, lengths: &[usize]) {
        let mut buffers = Vec::new();
        for length in lengths {
            buffers.push((self.next, *length));
            self.next += *length as u64 + 16;
        }
        let descs: Vec<Desc> = buffers
            .iter()
            .map(|(at, length)| Desc::writable(*at, u32::try_from(*length).expect("small")))
            .collect();
        self.offer_descs(&descs);
        *self.offered.last_mut().expect("it was offered") = buffers;
    }

    /// Offers a chain of one buffer, as most drivers do: as a descriptor in the ring.
    pub(super) fn offer_plain(&mut self, length: usize) {
        let id = u16::try_from(self.offered.len()).expect("few");
        let desc = Desc::writable(self.next, u32::try_from(length).expect("small"));
        self.ring.offer(&self.memory, id, &[desc]).expect("room");
        self.ring.publish_quietly(&self.memory).expect("shown");
        self.offered.push(vec![(self.next, length)]);
        self.next += length as u64 + 16;
    }

    pub(super) fn offer_descs(&mut self, descs: &[Desc]) {
        let id = u16::try_from(self.offered.len()).expect("few");
        let at = BASE + 0x8000 + 0x80 * u64::from(id);
        self.ring
            .offer_table(&self.memory, id, at, descs)
            .expect("room");
        self.ring.publish_quietly(&self.memory).expect("shown");
        self.offered.push(Vec::new());
    }

    pub(super) fn deliver_with_mtu(
        &mut self,
        frame: &Frame<'_>,
        mtu: u16,
    ) -> Result<Delivered, Refused> {
        let receiver = Receiver::of(self.features, mtu);
        let (queue, scratch) = (&mut self.queue, &mut self.scratch);
        let mut delivered = Delivered::default();
        deliver(queue, receiver, scratch, frame, &mut delivered)?;
        Ok(delivered)
    }

    /// Several at once: how many, and what was counted.
    pub(super) fn deliver_usual(&mut self, frames: &[Frame<'_>], mtu: u16) -> (usize, Delivered) {
        let receiver = Receiver::of(self.features, mtu);
        let (queue, scratch) = (&mut self.queue, &mut self.scratch);
        let mut delivered = Delivered::default();
        let frames = frames.iter().copied();
        let count = deliver_usual(queue, receiver, scratch, frames, &mut delivered);
        (count, delivered)
    }

    pub(super) fn deliver(&mut self, header: &Header, bytes: &[u8]) -> Result<Delivered, Refused> {
        // Cut where guests do, and inside of what is copied first.
        of_guest(header, bytes, &[12, 54, 3000, 1], |frame| {
            self.deliver_with_mtu(&frame.expect("good"), 9000)
        })
    }

    /// What the driver sees as used: the chain, and the bytes that were written to it. Behind them nothing was.
    pub(super) fn used(&mut self) -> Vec<(u32, Vec<u8>)> {
        self.queue.publish();
        let mut all = Vec::new();
        while let Some(used) = self.ring.poll_used(&self.memory).expect("good") {
            let mut bytes = Vec::new();
            for (at, length) in &self.offered[used.id as usize] {
                // With the gap behind it.
                let mut part = self.memory.read(*at, *length + 16).expect("inside");
                let gap = part.split_off(*length);
                assert!(
                    gap.iter().all(|byte| *byte == UNTOUCHED),
                    "a write behind a buffer"
                );
                bytes.extend(part);
            }
            let behind = bytes.split_off(used.len as usize);
            let is_untouched = behind.iter().all(|byte| *byte == UNTOUCHED);
            assert!(is_untouched || self.was_put_back, "more than it says");
            all.push((used.id, bytes));
        }
        all
    }

    /// The frames that the driver gets, put together as it does (5.1.6.3.2).
    pub(super) fn frames(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut used = self.used().into_iter();
        let mut frames = Vec::new();
        while let Some((_, mut bytes)) = used.next() {
            let is_long = self.features & MERGEABLE != 0;
            let mut header = [0; 12];
            let size = if is_long { 12 } else { 10 };
            header[..size].copy_from_slice(&bytes[..size]);
            let header = Header::parse(&header);
            for _ in 1..header.num_buffers {
                bytes.extend(used.next().expect("as many as it says").1);
            }
            frames.push((header, bytes.split_off(size)));
        }
        frames
    }

    /// Nothing is used, nothing in flight.
    pub(super) fn assert_untouched(&mut self) {
        assert_eq!(self.used(), []);
        assert_eq!(self.queue.in_flight(), 0);
    }
}

/// Both formats, in order or not.
pub(super) fn each(features: u64, test: impl Fn(Rig)) {
    for transport in [0, RING_PACKED, IN_ORDER, RING_PACKED | IN_ORDER] {
        test(Rig::new(features | transport));
    }
}
