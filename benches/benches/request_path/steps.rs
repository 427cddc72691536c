//! Each step of a request's way by itself: pop, parse, begin (with nothing to do, with encryption, with a
//! transfer), the storage's way there and back, and status with publication. A turn does all steps for
//! [`BATCH`] requests; criterion gets the time of one of them.

use std::time::{Duration, Instant};

use bulkhead_benches::serve::dataplane::block_device;
use bulkhead_benches::serve::devices::DiskSpec;
use bulkhead_benches::serve::file;
use bulkhead_crypto::SecretArena;
use bulkhead_dataplane::blk::config_space::feature;
use bulkhead_dataplane::blk::pipeline::{Begun, Landed, Start};
use bulkhead_dataplane::blk::request::{Operation, parse};
use bulkhead_dataplane::virtqueue::Chain;
use criterion::{Criterion, Throughput};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::guest::BATCH;
use crate::{Ours, REQUEST_BYTES, device, spec};

/// Bytes of the file: as many as a batch touches.
const FILE_BYTES: usize = BATCH as usize * REQUEST_BYTES as usize;

/// A step, in the order of a request's way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Pop,
    Parse,
    Begin,
    Storage,
    Publish,
}

/// Does a step.
type Run = fn(&mut Batch);

/// A batch on its way.
struct Batch {
    ours: Ours,
    chains: Vec<Chain>,
    heads: Vec<u16>,
    operations: Vec<Operation>,
    /// Heads with bytes written, of requests that have ended.
    ended: Vec<(u16, u32)>,
}

impl Batch {
    fn new(ours: Ours) -> Self {
        let room = usize::from(BATCH);
        Self {
            ours,
            chains: (0..BATCH).map(|_| Chain::with_capacity(4)).collect(),
            heads: Vec::with_capacity(room),
            operations: Vec::with_capacity(room),
            ended: Vec::with_capacity(room),
        }
    }

    fn pop(&mut self) {
        for chain in &mut self.chains {
            self.heads
                .push(self.ours.queue.pop(chain).unwrap().unwrap());
        }
    }

    fn parse(&mut self) {
        for chain in &mut self.chains {
            let operation = parse(chain, &self.ours.local.device, feature::FLUSH);
            self.operations.push(operation.unwrap().unwrap());
        }
    }

    fn begin(&mut self) {
        let requests = self.chains.iter_mut().zip(&self.heads);
        for ((chain, head), operation) in requests.zip(&self.operations) {
            let start = Start {
                queue: 0,
                head: *head,
                operation: *operation,
                local: &self.ours.local,
                durable: false,
            };
            if let Begun::Done(outcome) = self.ours.pipeline.begin(start, chain) {
                chain.writable.write_last_byte(outcome.status as u8);
                self.ended.push((*head, outcome.written));
            }
        }
    }

    /// Until all that is under way has landed.
    fn storage(&mut self) {
        let ended = &mut self.ended;
        let mut land = |landed: Landed| ended.push((landed.head, landed.outcome.written));
        while self.ours.pipeline.room() < self.ours.room {
            self.ours.pipeline.ring.turn();
            while let Some(completion) = self.ours.pipeline.ring.reap() {
                self.ours
                    .pipeline
                    .land(completion)
                    .into_iter()
                    .for_each(&mut land);
            }
            self.ours.pipeline.resume(&mut land);
        }
    }

    fn publish(&mut self) {
        for (head, written) in &self.ended {
            self.ours.queue.push_used(*head, written + 1);
        }
        self.ours.queue.publish();
    }

    /// Does all steps: the time of one of them.
    fn turn(&mut self, timed: Step) -> Duration {
        self.heads.clear();
        self.operations.clear();
        self.ended.clear();
        self.ours.guest.offer(BATCH);
        let mut took = Duration::ZERO;
        let steps: [(Step, Run); 5] = [
            (Step::Pop, Self::pop),
            (Step::Parse, Self::parse),
            (Step::Begin, Self::begin),
            (Step::Storage, Self::storage),
            (Step::Publish, Self::publish),
        ];
        for (step, run) in steps {
            let start = Instant::now();
            run(self);
            if step == timed {
                took = start.elapsed();
            }
        }
        took
    }
}

/// A plain disk in a file, with direct I/O where its file system has that.
fn in_file(folder: &tempfile::TempDir, kind: u32) -> Ours {
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0x5a; FILE_BYTES]).unwrap();
    let disk = DiskSpec {
        backing: file::open(&path, false, 512).unwrap(),
        ..spec(false)
    };
    let arena = SecretArena::new(1).unwrap();
    Ours::new(kind, REQUEST_BYTES, block_device(disk, &arena).unwrap())
}

pub fn rows(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let null = |kind, encrypted| Ours::new(kind, REQUEST_BYTES, device(encrypted));
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    let mut group = c.benchmark_group("step");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    for (name, step, ours) in [
        ("1 pop", Step::Pop, null(read, false)),
        ("2 parse", Step::Parse, null(read, false)),
        ("3 begin and end, null", Step::Begin, null(read, false)),
        ("3 decrypt 4 KiB, null", Step::Begin, null(read, true)),
        ("3 encrypt 4 KiB, null", Step::Begin, null(write, true)),
        ("5 publish", Step::Publish, null(read, false)),
    ] {
        let mut batch = Batch::new(ours);
        group.bench_function(name, |b| {
            b.iter_custom(|turns| (0..turns).map(|_| batch.turn(step)).sum());
        });
        batch.ours.guest.check(true);
    }
    for (name, step) in [
        ("3 begin, file", Step::Begin),
        ("4 submit, complete and land, file", Step::Storage),
    ] {
        let mut batch = Batch::new(in_file(&folder, read));
        group.bench_function(name, |b| {
            b.iter_custom(|turns| (0..turns).map(|_| batch.turn(step)).sum());
        });
        batch.ours.guest.check(true);
    }
    group.finish();
}
