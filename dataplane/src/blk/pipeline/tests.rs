//! What waits: for room in a storage, for staging, for a flush. With storages that do as a test says.

mod crash;
mod zone;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::*;
use crate::blk::{BlkDevice, Geometry};
use crate::memory::{GuestMemory, Lease, anonymous};
use crate::storage::{Polled, Storage, StorageSpec};

const MEMORY_BYTES: u64 = 8 << 20;

/// Refuses so many transfers for want of room, keeps those that it is told to keep, and does the rest.
#[derive(Debug, Default)]
struct Scripted {
    full: Cell<u32>,
    keep: Cell<bool>,
    kept: RefCell<VecDeque<Completion>>,
    /// Offsets of what was begun, in order.
    begun: RefCell<Vec<u64>>,
}

#[derive(Debug)]
struct Shared(Rc<Scripted>);

impl Storage for Shared {
    fn begin(&self, _ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        if self.0.full.get() > 0 {
            self.0.full.set(self.0.full.get() - 1);
            return Begin::Full(transfer);
        }
        self.0.begun.borrow_mut().push(transfer.offset_bytes);
        let done = Ok(transfer.bytes);
        if self.0.keep.get() {
            self.0.kept.borrow_mut().push_back(Completion {
                token,
                transfer,
                done,
            });
            return Begin::Held;
        }
        Begin::Done(transfer, done)
    }

    fn poll(&self, _ring: &mut Ring) -> Option<Polled> {
        if self.0.keep.get() {
            return None;
        }
        self.0.kept.borrow_mut().pop_front().map(Polled::Ended)
    }
}

struct Rig {
    pipeline: Pipeline,
    local: Rc<Local>,
    storage: Rc<Scripted>,
    memory: Lease,
    next: u16,
    ended: Vec<(u16, Status)>,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        let geometry = Geometry {
            logical_block_bytes: 512,
            read_only: false,
            serial: [0; 20],
            queues: 1,
            discard: true,
        };
        let device = BlkDevice::new(geometry, 1 << 20, StorageSpec::Null, None);
        let staging = Staging::new().expect("staging");
        let mut ring = Ring::new(&staging).expect("ring");
        let mut local = Local::open(device, &mut ring).expect("open");
        let storage = Rc::new(Scripted::default());
        local.storage = Box::new(Shared(Rc::clone(&storage)));
        local.memory = Memory::No;
        local.limits = limits;
        let (memory, _fd): (GuestMemory, _) = anonymous(MEMORY_BYTES).expect("memory");
        Self {
            pipeline: Pipeline::new(ring, staging),
            local: Rc::new(local),
            storage,
            memory: Lease::new(Arc::new(memory)),
            next: 0,
            ended: Vec::new(),
        }
    }

    /// Begins a request of so many bytes of guest memory; its head.
    fn begin(&mut self, operation: Operation, bytes: u32) -> u16 {
        let head = self.next;
        self.next += 1;
        let mut chain = Chain::with_capacity(4);
        let buffer = match operation {
            Operation::Write { .. } => &mut chain.readable,
            _ => &mut chain.writable,
        };
        buffer.reset(&self.memory);
        buffer.push(0, bytes).expect("in memory");
        let start = Start {
            queue: 0,
            head,
            operation,
            local: &self.local,
            durable: false,
        };
        if let Begun::Done(outcome) = self.pipeline.begin(start, &mut chain) {
            self.ended.push((head, outcome.status));
        }
        head
    }

    /// Goes on until nothing does any more.
    fn go_on(&mut self) {
        let ended = &mut self.ended;
        while self
            .pipeline
            .resume(|landed| ended.push((landed.head, landed.outcome.status)))
        {}
    }
}

fn write(offset_bytes: u64) -> Operation {
    Operation::Write { offset_bytes }
}

#[test]
fn what_finds_no_room_goes_on_in_its_order() {
    let mut rig = Rig::new(Limits::NONE);
    rig.storage.full.set(7);
    let heads: Vec<u16> = (0..4).map(|i| rig.begin(write(i * 512), 512)).collect();
    assert!(rig.ended.is_empty() && rig.pipeline.has_waiting());
    // The storage has no room three more times; each look takes the first one only.
    for _ in 0..3 {
        rig.pipeline.resume(|_| panic!("there is no room"));
    }
    rig.go_on();
    assert_eq!(*rig.storage.begun.borrow(), [0, 512, 1024, 1536]);
    let expected: Vec<_> = heads.iter().map(|head| (*head, Status::Ok)).collect();
    assert_eq!(rig.ended, expected);
    assert!(!rig.pipeline.has_waiting());
}

/// More staging is asked for than there is: requests wait in line, and each ends with all of its parts.
#[test]
fn what_finds_no_staging_waits_in_line() {
    let odd = Limits {
        memory_align_bytes: 1 << 30,
        length_align_bytes: 1,
    };
    let mut rig = Rig::new(odd);
    rig.storage.keep.set(true);
    let count = 12;
    let bytes = u32::try_from(MEMORY_BYTES / 2).expect("small");
    for i in 0..count {
        rig.begin(write(i * u64::from(bytes)), bytes);
    }
    rig.go_on();
    assert!(rig.ended.is_empty() && !rig.pipeline.lines.is_empty());
    rig.storage.keep.set(false);
    rig.go_on();
    assert_eq!(rig.ended.len(), usize::try_from(count).expect("few"));
    assert!(rig.ended.iter().all(|(_, status)| *status == Status::Ok));
    assert!(!rig.pipeline.has_waiting());
    assert_eq!(rig.pipeline.free.len(), MAX_IN_FLIGHT as usize);
}

/// Flushes that come while one is in flight are done by the next, which is one for all of them.
#[test]
fn flushes_that_wait_share_the_next_one() {
    let mut rig = Rig::new(Limits::NONE);
    rig.storage.keep.set(true);
    for _ in 0..5 {
        rig.begin(Operation::Flush, 1);
    }
    assert_eq!(rig.storage.begun.borrow().len(), 1);
    rig.storage.keep.set(false);
    rig.go_on();
    assert_eq!(rig.storage.begun.borrow().len(), 2, "one, and one for four");
    assert_eq!(rig.ended.len(), 5);
    assert!(rig.ended.iter().all(|(_, status)| *status == Status::Ok));
}

/// While another worker has the turn, a flush waits, and nothing else does.
#[test]
fn a_flush_waits_for_another_workers() {
    let mut rig = Rig::new(Limits::NONE);
    assert!(rig.local.device.take_flush_turn());
    let flush = rig.begin(Operation::Flush, 1);
    let other = rig.begin(write(0), 512);
    rig.go_on();
    assert_eq!(rig.ended, [(other, Status::Ok)]);
    assert!(rig.pipeline.has_waiting(), "the worker looks again soon");
    rig.local.device.give_flush_turn();
    rig.go_on();
    assert_eq!(rig.ended, [(other, Status::Ok), (flush, Status::Ok)]);
    // And if that one failed, so does this.
    assert!(rig.local.device.take_flush_turn());
    let flush = rig.begin(Operation::Flush, 1);
    rig.local.device.latch_flush_failure();
    rig.local.device.give_flush_turn();
    rig.go_on();
    assert_eq!(rig.ended.last(), Some(&(flush, Status::IoError)));
}
