//! What it costs to take a plain chain from a ring and to give it back: chain by chain, and in runs.
//!
//! The rows `ratio/..` have both in turns.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_benches::ratio::medians;
use bulkhead_dataplane::memory::anonymous;
use bulkhead_dataplane::virtqueue::{Chain, QueueFeatures, Run, Virtqueue};
use bulkhead_dataplane::worker::message::RingLayout;
use criterion::{Criterion, Throughput};

const SIZE: u16 = 256;
const LAYOUT: RingLayout = RingLayout {
    size: SIZE,
    desc: 0,
    avail: 0x2000,
    used: 0x3000,
};
const BUFFERS: u64 = 0x1_0000;
const BUFFER_BYTES: u32 = 2048;
/// Chains that are taken before they are given back.
const BATCH: usize = 32;

/// A driver whose buffers are all available at the beginning of a round.
struct Rig {
    file: File,
    queue: Virtqueue,
    features: QueueFeatures,
    /// Rounds that were taken.
    round: u16,
    run: Run,
    chains: Vec<(u16, Chain)>,
}

impl Rig {
    fn new(packed: bool, in_order: bool) -> Self {
        let bytes = BUFFERS + u64::from(SIZE) * u64::from(BUFFER_BYTES);
        let (memory, file) = anonymous(bytes).unwrap();
        let file = File::from(file);
        let features = QueueFeatures {
            packed,
            in_order,
            ..QueueFeatures::default()
        };
        let base = if packed { 0x8000_8000 } else { 0 };
        let rig = Self {
            queue: Virtqueue::new(&Arc::new(memory), LAYOUT, base, features).unwrap(),
            file,
            features,
            round: 0,
            run: Run::to_write(),
            chains: (0..BATCH).map(|_| (0, Chain::with_capacity(4))).collect(),
        };
        let heads: Vec<u8> = (0..SIZE).flat_map(u16::to_le_bytes).collect();
        rig.file.write_all_at(&heads, LAYOUT.avail + 4).unwrap();
        rig.file.write_all_at(&rig.descriptors(), 0).unwrap();
        rig
    }

    /// All of them, as they are made available in this round.
    fn descriptors(&self) -> Vec<u8> {
        let owner: u16 = if self.round.is_multiple_of(2) {
            1 << 7
        } else {
            1 << 15
        };
        let each = (0..SIZE).flat_map(|index| {
            let at = BUFFERS + u64::from(index) * u64::from(BUFFER_BYTES);
            let (third, fourth) = match self.features.packed {
                true => (index, 2 | owner),
                false => (2, 0),
            };
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&at.to_le_bytes());
            desc[8..12].copy_from_slice(&BUFFER_BYTES.to_le_bytes());
            desc[12..14].copy_from_slice(&third.to_le_bytes());
            desc[14..].copy_from_slice(&fourth.to_le_bytes());
            desc
        });
        each.collect()
    }

    /// Makes all available; the other side of a comparison does the same.
    fn fill(&mut self) {
        if self.features.packed {
            self.file.write_all_at(&self.descriptors(), 0).unwrap();
        } else {
            let index = self.round.wrapping_add(1).wrapping_mul(SIZE).to_le_bytes();
            self.file.write_all_at(&index, LAYOUT.avail + 2).unwrap();
        }
        self.round = self.round.wrapping_add(1);
    }

    fn singles(&mut self) {
        self.fill();
        for _ in 0..usize::from(SIZE) / BATCH {
            for (id, chain) in &mut self.chains {
                *id = self.queue.pop(chain).unwrap().unwrap();
                black_box(&chain.writable);
            }
            for (id, _) in &self.chains {
                self.queue.push_used(*id, 64);
            }
            black_box(self.queue.publish());
        }
    }

    fn runs(&mut self) {
        self.fill();
        let lengths = [64; BATCH];
        for _ in 0..usize::from(SIZE) / BATCH {
            let taken = self.queue.pop_run(&mut self.run, BATCH);
            assert_eq!(black_box(taken), BATCH);
            self.queue.push_run(&mut self.run, &lengths);
            black_box(self.queue.publish());
        }
    }
}

/// Every kind of ring, as rows call it.
const KINDS: [(&str, bool, bool); 4] = [
    ("split", false, false),
    ("split, in order", false, true),
    ("packed", true, false),
    ("packed, in order", true, true),
];

pub fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("rings");
    group.throughput(Throughput::Elements(u64::from(SIZE)));
    for (name, packed, in_order) in KINDS {
        let mut rig = Rig::new(packed, in_order);
        group.bench_function(format!("{name}, chain by chain"), |b| {
            b.iter(|| rig.singles());
        });
        group.bench_function(format!("{name}, runs"), |b| b.iter(|| rig.runs()));
    }
    group.finish();
}

pub fn ratios() {
    for (name, packed, in_order) in KINDS {
        let [mut ours, mut beside] = [(); 2].map(|()| Rig::new(packed, in_order));
        let (mut runs, mut singles) = (|| ours.runs(), || beside.singles());
        let times = medians(&mut [&mut runs, &mut singles]);
        println!(
            "ratio/rings/{name}  chain by chain/runs {:.2}",
            times[1] / times[0]
        );
    }
}
