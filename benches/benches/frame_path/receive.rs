//! What it costs to give a frame to a driver: as it is, and completed or cut in software.
//!
//! The rows `ratio/..` are beside a copy of the same bytes between the same places: what no delivery can do without.

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_benches::ratio::medians;
use bulkhead_dataplane::memory::{GuestBuffer, Lease, anonymous};
use bulkhead_dataplane::net::HashKey;
use bulkhead_dataplane::net::frame::{Frame, HeadBuffer};
use bulkhead_dataplane::net::header::{GSO_TCPV4, HeaderSize, NEEDS_CSUM, feature};
use bulkhead_dataplane::net::receive::{Delivered, Receiver, Scratch, deliver};
use bulkhead_dataplane::net::{checksum, header::Header};
use bulkhead_dataplane::virtqueue::{QueueFeatures, Virtqueue};
use bulkhead_dataplane::worker::message::RingLayout;
use criterion::{Criterion, Throughput};

const SIZE: u16 = 256;
const LAYOUT: RingLayout = RingLayout {
    size: SIZE,
    desc: 0,
    avail: 0x2000,
    used: 0x3000,
};
/// Where the frame lies, and where buffers do.
const SENT: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4_0000;
const BUFFER_BYTES: u32 = 4096;
const MERGEABLE: u64 = 1 << 32 | feature::MRG_RXBUF;
const ALL: u64 = MERGEABLE | feature::GUEST_CSUM | feature::GUEST_TSO4;

/// A driver whose buffers are always all available, and the queue over them.
struct Rig {
    file: std::fs::File,
    lease: Lease,
    queue: Virtqueue,
    scratch: Scratch,
    receiver: Receiver,
    avail: u16,
    sent: GuestBuffer,
    head: HeadBuffer,
    /// The buffer that is copied to next.
    next: u32,
}

impl Rig {
    /// With a frame that it is sent.
    fn new(features: u64, header: &Header, frame: &[u8]) -> Self {
        let bytes = BUFFERS + u64::from(SIZE) * u64::from(BUFFER_BYTES);
        let (memory, file) = anonymous(bytes).unwrap();
        let (memory, file) = (Arc::new(memory), std::fs::File::from(file));
        for index in 0..SIZE {
            let at = BUFFERS + u64::from(index) * u64::from(BUFFER_BYTES);
            let mut desc = at.to_le_bytes().to_vec();
            desc.extend(BUFFER_BYTES.to_le_bytes());
            desc.extend([2, 0, 0, 0]);
            file.write_all_at(&desc, 16 * u64::from(index)).unwrap();
            let slot = LAYOUT.avail + 4 + 2 * u64::from(index);
            file.write_all_at(&index.to_le_bytes(), slot).unwrap();
        }
        let whole = [&header.bytes()[..], frame].concat();
        file.write_all_at(&whole, SENT).unwrap();
        let lease = Lease::new(Arc::clone(&memory));
        let mut sent = GuestBuffer::default();
        sent.reset(&lease);
        sent.push(SENT, u32::try_from(whole.len()).unwrap())
            .unwrap();
        Self {
            file,
            lease,
            queue: Virtqueue::new(&memory, LAYOUT, 0, QueueFeatures::default()).unwrap(),
            scratch: Scratch::default(),
            receiver: Receiver::of(features, u16::MAX),
            avail: 0,
            sent,
            head: HeadBuffer::default(),
            next: 0,
        }
    }

    /// Makes all buffers available that are not.
    fn fill(&mut self) {
        let used = &mut [0; 2];
        self.file.read_exact_at(used, LAYOUT.used + 2).unwrap();
        self.avail = u16::from_le_bytes(*used).wrapping_add(SIZE);
        let index = self.avail.to_le_bytes();
        self.file.write_all_at(&index, LAYOUT.avail + 2).unwrap();
    }

    /// Takes the frame and delivers it, so many times in one batch.
    fn round(&mut self, times: usize) {
        self.fill();
        for _ in 0..times {
            let key = HashKey::new(7);
            let frame = Frame::of_chain(&self.sent, HeaderSize::Long, key, &mut self.head);
            let frame = frame.unwrap();
            let mut delivered = Delivered::default();
            let (queue, scratch) = (&mut self.queue, &mut self.scratch);
            deliver(queue, self.receiver, scratch, &frame, &mut delivered).unwrap();
            black_box(delivered);
        }
        self.queue.publish();
    }

    /// Copies as many bytes from there to the buffers that a delivery would fill, so many times.
    fn copies(&mut self, times: usize) {
        self.fill();
        let bytes = u32::try_from(self.sent.bytes()).unwrap();
        let buffers = bytes.div_ceil(BUFFER_BYTES);
        let mut to = GuestBuffer::with_capacity(1);
        for _ in 0..times {
            if self.next + buffers > u32::from(SIZE) {
                self.next = 0;
            }
            to.reset(&self.lease);
            let at = BUFFERS + u64::from(self.next * BUFFER_BYTES);
            to.push(at, bytes).unwrap();
            assert!(to.copy_from(0, &self.sent, 0, bytes as usize));
            self.next += buffers;
        }
    }
}

/// A TCP segment with so many bytes of payload, and what it asks for.
fn segment(payload: usize, gso_size: u16) -> (Header, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    frame.extend(u16::try_from(40 + payload).unwrap().to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    frame.resize(54 + payload, 7);
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type: if gso_size > 0 { GSO_TCPV4 } else { 0 },
        gso_size,
        csum_start: 34,
        csum_offset: 16,
        ..Header::default()
    };
    (header, frame)
}

/// Segments of 64 KiB in a round: as many as the buffers have room for.
const SEGMENTS: usize = 5;
/// Smaller frames, of a buffer each: enough of them that what a round costs beside them is little.
const FRAMES: usize = 250;

/// Frames of a round, each with so many bytes of payload.
fn times(payload: usize) -> usize {
    if payload > 10_000 { SEGMENTS } else { FRAMES }
}

pub fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("receive");
    for (name, features, payload, gso_size) in [
        ("64 B, as it is", ALL, 10, 0),
        ("64 B, completed", MERGEABLE, 10, 0),
        ("1500 B, as it is", ALL, 1446, 0),
        ("1500 B, completed", MERGEABLE, 1446, 0),
        ("64 KiB, as it is", ALL, 65_000, 1448),
        (
            "64 KiB, cut, checksums left",
            MERGEABLE | feature::GUEST_CSUM,
            65_000,
            1448,
        ),
        ("64 KiB, cut and completed", MERGEABLE, 65_000, 1448),
    ] {
        let (header, frame) = segment(payload, gso_size);
        let mut rig = Rig::new(features, &header, &frame);
        let times = times(payload);
        group.throughput(Throughput::Elements(times as u64));
        group.bench_function(name, |b| b.iter(|| rig.round(times)));
    }
    group.finish();
    let mut group = c.benchmark_group("checksum");
    for bytes in [64, 1500, 65_000] {
        let buffer = vec![7u8; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("{bytes} B"), |b| {
            b.iter(|| checksum::sum(black_box(&buffer)));
        });
    }
    group.finish();
}

pub fn ratios() {
    let (header, frame) = segment(65_000, 1448);
    let (mut whole, mut copied) = (
        Rig::new(ALL, &header, &frame),
        Rig::new(ALL, &header, &frame),
    );
    let mut cut = Rig::new(MERGEABLE, &header, &frame);
    let mut all = || whole.round(SEGMENTS);
    let mut pieces = || cut.round(SEGMENTS);
    let mut floor = || copied.copies(SEGMENTS);
    let times = medians(&mut [&mut all, &mut pieces, &mut floor]);
    println!(
        "ratio/receive/64 KiB as it is  copy/bulkhead {:.2}",
        times[2] / times[0]
    );
    println!(
        "ratio/receive/64 KiB cut and completed  copy/bulkhead {:.2}",
        times[2] / times[1]
    );
}
