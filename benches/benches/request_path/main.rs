//! What a request costs from the avail ring to the used ring, in one process: popping, parsing, whole null
//! requests and encrypted ones of 4 KiB; beside the stock crates as `serve --reference` uses them. And
//! encrypted ones of either size and data unit (`encrypted`). And each step by itself (`steps`).
//!
//! A turn is [`guest::BATCH`] requests, made available at once; criterion's throughput counts requests. Nobody
//! else runs: driver and device take turns on one thread, but for the rows `worker/..`, where a
//! worker of the data plane polls on another core. The rows `ratio/..` divide medians of one run.
#![allow(clippy::unwrap_used, reason = "a bench ends where something fails")]

mod encrypted;
mod guest;
mod steps;

use std::rc::Rc;
use std::sync::Arc;

use bulkhead_benches::ratio::medians;
use bulkhead_benches::serve::dataplane::block_device;
use bulkhead_benches::serve::devices::{Backing, DiskSpec, Xts};
use bulkhead_benches::serve::reference::request;
use bulkhead_benches::serve::reference::store::{Disk, Scratch};
use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, SecretMemory};
use bulkhead_dataplane::blk::BlkDevice;
use bulkhead_dataplane::blk::config_space::feature;
use bulkhead_dataplane::blk::pipeline::{Begun, Local, Pipeline, Start};
use bulkhead_dataplane::blk::request::parse;
use bulkhead_dataplane::virtqueue::QueueFeatures;
use bulkhead_dataplane::virtqueue::{Chain, SplitQueue};
use bulkhead_dataplane::worker::message::{DeviceId, FromWorker, QueueId, QueueStart, ToWorker};
use bulkhead_dataplane::worker::ring::Ring;
use bulkhead_dataplane::worker::staging::Staging;
use bulkhead_dataplane::worker::{Replies, WorkerConfig, WorkerHandle, start};
use criterion::{Criterion, Throughput};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::GuestAddress;

use guest::{AVAIL, BATCH, DESC, Guest, RING_SIZE, USED};

const DISK_BYTES: u64 = 1 << 30;
const REQUEST_BYTES: u32 = 4096;

fn key_bytes() -> [u8; KEY_BYTES] {
    std::array::from_fn(|i| u8::try_from(i).unwrap())
}

fn spec(encrypted: bool) -> DiskSpec {
    let xts = encrypted.then(|| {
        let mut key = SecretMemory::new(KEY_BYTES).unwrap();
        key.as_mut_bytes().copy_from_slice(&key_bytes());
        Xts {
            unit: DataUnit::B4096,
            key,
            rekey: None,
        }
    });
    DiskSpec {
        backing: Backing::Null { bytes: DISK_BYTES },
        xts,
        logical_block_bytes: if encrypted { 4096 } else { 512 },
        queues: 1,
        read_only: false,
        discard: false,
        serial: [0; 20],
    }
}

fn device(encrypted: bool) -> Arc<BlkDevice> {
    let arena = SecretArena::new(1).unwrap();
    block_device(spec(encrypted), &arena).unwrap()
}

/// How far a request goes.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Depth {
    Pop,
    Parse,
    Whole,
}

/// The data plane's functions, called as a worker calls them.
struct Ours {
    guest: Guest,
    queue: SplitQueue,
    chain: Chain,
    pipeline: Pipeline,
    /// The pipeline's, while nothing is under way.
    room: usize,
    local: Rc<Local>,
}

impl Ours {
    fn new(kind: u32, request_bytes: u32, device: Arc<BlkDevice>) -> Self {
        let guest = Guest::new(kind, request_bytes);
        let staging = Staging::new().unwrap();
        let mut ring = Ring::new(&staging).unwrap();
        let local = Local::open(device, &mut ring).unwrap();
        let features = QueueFeatures::default();
        let pipeline = Pipeline::new(ring, staging);
        Self {
            queue: SplitQueue::new(&guest.device_side, Guest::layout(), 0, features).unwrap(),
            guest,
            chain: Chain::with_capacity(4),
            room: pipeline.room(),
            pipeline,
            local: Rc::new(local),
        }
    }

    fn turn(&mut self, depth: Depth) {
        self.guest.offer(BATCH);
        while let Some(head) = self.queue.pop(&mut self.chain).unwrap() {
            let written = match depth {
                Depth::Pop => 0,
                Depth::Parse | Depth::Whole => self.request(head, depth),
            };
            self.queue.push_used(head, written + 1);
        }
        self.queue.publish();
    }

    fn request(&mut self, head: u16, depth: Depth) -> u32 {
        let device = &self.local.device;
        let operation = parse(&mut self.chain, device, feature::FLUSH);
        let operation = operation.unwrap().unwrap();
        if depth == Depth::Parse {
            std::hint::black_box(operation);
            return 0;
        }
        let start = Start {
            queue: 0,
            head,
            operation,
            local: &self.local,
            durable: false,
        };
        let Begun::Done(outcome) = self.pipeline.begin(start, &mut self.chain) else {
            panic!("a disk without a file waits for nothing");
        };
        self.chain.writable.write_last_byte(outcome.status as u8);
        outcome.written
    }
}

/// The stock crates, called as `serve --reference` calls them.
struct Peer {
    guest: Guest,
    queue: Queue,
    disk: Disk,
    scratch: Scratch,
}

impl Peer {
    fn new(kind: u32, encrypted: bool) -> Self {
        let mut queue = Queue::new(RING_SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(DESC))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        Self {
            guest: Guest::new(kind, REQUEST_BYTES),
            queue,
            disk: Disk::new(spec(encrypted)).unwrap(),
            scratch: Scratch::default(),
        }
    }

    fn turn(&mut self, depth: Depth) {
        self.guest.offer(BATCH);
        let memory = &self.guest.memory;
        let chains: Vec<_> = self.queue.iter(memory).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            let written = if depth == Depth::Whole {
                request::serve(&self.disk, &chain, &mut self.scratch)
            } else {
                chain.map(|desc| desc.len()).sum()
            };
            self.queue.add_used(memory, head, written).unwrap();
        }
        self.queue.needs_notification(memory).unwrap();
    }
}

/// A worker of the data plane on its own thread, and a driver that polls.
struct Threaded {
    guest: Guest,
    worker: Option<WorkerHandle>,
    replies: Replies,
}

impl Threaded {
    fn new() -> Self {
        let guest = Guest::new(VIRTIO_BLK_T_IN, REQUEST_BYTES);
        let (mut workers, replies) = start(&[WorkerConfig::default()]).unwrap();
        let threaded = Self {
            worker: workers.pop(),
            guest,
            replies,
        };
        let id = DeviceId(1);
        threaded.send(ToWorker::Attach {
            id,
            device: device(false).into(),
        });
        assert!(matches!(
            threaded.reply(),
            FromWorker::Attached { result: Ok(()), .. }
        ));
        threaded.send(ToWorker::Start(Box::new(QueueStart {
            queue: QueueId {
                device: id,
                index: 0,
            },
            memory: Arc::clone(&threaded.guest.device_side),
            layout: Guest::layout(),
            base: 0,
            log: None,
            region: None,
            anew: true,
            features: 0,
            enabled: true,
            // Without one the queue is polled, at most 100 us apart.
            kick: None,
            call: None,
            error: None,
        })));
        assert!(matches!(threaded.reply(), FromWorker::Started { .. }));
        threaded
    }

    fn send(&self, message: ToWorker) {
        self.worker.as_ref().unwrap().send(message);
    }

    fn reply(&self) -> FromWorker {
        loop {
            match self.replies.next() {
                Some(reply) => return reply,
                None => std::thread::yield_now(),
            }
        }
    }

    fn turn(&mut self, requests: u16) {
        self.guest.offer(requests);
        while self.guest.used() != self.guest.avail {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Threaded {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.end();
        }
    }
}

/// Rows that are measured, with what the stock crates have to compare with them.
const ROWS: [(&str, u32, bool, Depth, bool); 5] = [
    ("pop", VIRTIO_BLK_T_IN, false, Depth::Pop, true),
    ("pop+parse", VIRTIO_BLK_T_IN, false, Depth::Parse, false),
    ("null-read-4KiB", VIRTIO_BLK_T_IN, false, Depth::Whole, true),
    ("xts-read-4KiB", VIRTIO_BLK_T_IN, true, Depth::Whole, true),
    ("xts-write-4KiB", VIRTIO_BLK_T_OUT, true, Depth::Whole, true),
];

fn rows(c: &mut Criterion) {
    for (name, kind, encrypted, depth, has_peer) in ROWS {
        let mut group = c.benchmark_group(format!("request/{name}"));
        group.throughput(Throughput::Elements(u64::from(BATCH)));
        let mut ours = Ours::new(kind, REQUEST_BYTES, device(encrypted));
        group.bench_function("bulkhead", |b| b.iter(|| ours.turn(depth)));
        ours.guest.check(depth == Depth::Whole);
        if has_peer {
            let mut peer = Peer::new(kind, encrypted);
            group.bench_function("reference", |b| b.iter(|| peer.turn(depth)));
            peer.guest.check(depth == Depth::Whole);
        }
        group.finish();
    }
    let mut group = c.benchmark_group("worker/null-read-4KiB");
    for requests in [1, BATCH] {
        let mut threaded = Threaded::new();
        group.throughput(Throughput::Elements(u64::from(requests)));
        group.bench_function(format!("{requests} at once"), |b| {
            b.iter(|| threaded.turn(requests));
        });
        threaded.guest.check(false);
    }
    group.finish();
}

fn ratios() {
    for (name, kind, encrypted, depth, has_peer) in ROWS {
        if !has_peer {
            continue;
        }
        let mut ours = Ours::new(kind, REQUEST_BYTES, device(encrypted));
        let mut peer = Peer::new(kind, encrypted);
        let times = medians(&mut [&mut || ours.turn(depth), &mut || peer.turn(depth)]);
        println!(
            "ratio/request/{name}  reference/bulkhead {:.2}",
            times[1] / times[0]
        );
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    rows(&mut criterion);
    encrypted::rows(&mut criterion);
    steps::rows(&mut criterion);
    criterion.final_summary();
    // `cargo bench` says --bench; without it criterion only tries each row once.
    if std::env::args().any(|argument| argument == "--bench") {
        ratios();
        encrypted::ratios();
    }
}
