//! A zone in a worker: who waits for it, who is waited for, and how it ends.

use std::ops::Range as Bytes;

use crossbeam_channel::{Receiver, TryRecvError};

use super::*;
use crate::rekey::Ticket;

const ZONE: Bytes<u64> = 8192..16384;

fn read(offset_bytes: u64) -> Operation {
    Operation::Read { offset_bytes }
}

/// What a zone's owner sees of its ticket.
struct Owner(Receiver<()>);

impl Owner {
    fn is_alone(&self) -> bool {
        self.0.try_recv() == Err(TryRecvError::Disconnected)
    }
}

impl Rig {
    fn lock(&mut self, zone: Bytes<u64>) -> Owner {
        let (held, owner) = crossbeam_channel::bounded(0);
        let local = Rc::clone(&self.local);
        self.pipeline.lock_zone(&local, zone, Ticket::new(held));
        Owner(owner)
    }

    fn unlock(&mut self) {
        let local = Rc::clone(&self.local);
        self.pipeline.unlock_zone(&local, 0);
    }

    fn fail(&mut self, zone: Bytes<u64>) {
        let local = Rc::clone(&self.local);
        self.pipeline.fail_zone(&local, zone);
    }

    /// Zeroes or discards these bytes.
    fn begin_ranges(&mut self, operation: Operation, ranges: &[Bytes<u64>]) -> u16 {
        let head = self.next;
        self.next += 1;
        let mut chain = Chain::with_capacity(4);
        chain.readable.reset(&self.memory);
        let sectors = |bytes: u64| u32::try_from(bytes / 512).expect("few");
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|range| {
                let count = sectors(range.end - range.start).to_le_bytes();
                let first = (range.start / 512).to_le_bytes();
                [first.as_slice(), &count, &[0; 4]].concat()
            })
            .collect();
        let length = u32::try_from(bytes.len()).expect("short");
        chain.readable.push(4096, length).expect("in memory");
        assert!(chain.readable.copy_in(0, &bytes));
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

    fn begun(&self) -> Vec<u64> {
        let mut begun = self.storage.begun.take();
        begun.sort_unstable();
        begun
    }

    fn statuses(&mut self, heads: &[u16]) -> Vec<Status> {
        let status = |head: &u16| self.ended.iter().find(|(ended, _)| ended == head);
        let found = heads.iter().filter_map(status).map(|(_, status)| *status);
        found.collect()
    }
}

#[test]
fn a_zone_is_its_owners_once_what_had_begun_has_ended() {
    let mut rig = Rig::new(Limits::NONE);
    rig.storage.keep.set(true);
    // The first reaches into it, the second ends where it begins.
    let inside = rig.begin(write(4096), 8192);
    rig.begin(write(4096), 4096);
    rig.begun();
    let owner = rig.lock(ZONE);
    assert!(!owner.is_alone());
    let waits = [
        rig.begin(read(8192), 512),
        rig.begin(write(16384 - 512), 4096),
    ];
    let goes = [rig.begin(read(4096), 4096), rig.begin(write(16384), 512)];
    assert_eq!(rig.begun(), [4096, 16384], "what overlaps it has not begun");
    rig.pipeline.look_for_clear();
    assert!(!owner.is_alone(), "the first is still in flight");
    rig.storage.keep.set(false);
    rig.go_on();
    rig.pipeline.look_for_clear();
    assert!(owner.is_alone() && !rig.pipeline.has_clearing());
    assert_eq!(rig.statuses(&[inside]), [Status::Ok]);
    assert_eq!(rig.statuses(&goes), [Status::Ok; 2]);
    assert_eq!(rig.statuses(&waits), [], "they wait");
    rig.unlock();
    rig.go_on();
    assert_eq!(rig.begun(), [8192, 15872]);
    assert_eq!(rig.statuses(&waits), [Status::Ok; 2]);
    assert_eq!(rig.pipeline.free.len(), MAX_IN_FLIGHT as usize);
}

/// A request that never ends keeps the zone, and nobody else: its owner gives it back.
#[test]
fn a_zone_that_is_given_back_has_nobody_wait() {
    let mut rig = Rig::new(Limits::NONE);
    rig.storage.keep.set(true);
    rig.begin(write(8192), 512);
    let owner = rig.lock(ZONE);
    let waits = rig.begin(read(12288), 512);
    rig.begun();
    rig.unlock();
    assert!(owner.is_alone(), "the ticket goes with the lock");
    rig.go_on();
    assert_eq!(rig.begun(), [12288], "it goes on beside the endless one");
    // Locked again, both are waited for.
    let owner = rig.lock(ZONE);
    rig.pipeline.look_for_clear();
    assert!(!owner.is_alone());
    rig.storage.keep.set(false);
    rig.go_on();
    rig.pipeline.look_for_clear();
    assert!(owner.is_alone());
    assert_eq!(rig.statuses(&[waits]), [Status::Ok]);
}

#[test]
fn what_comes_for_a_failed_zone_fails_until_its_end() {
    let mut rig = Rig::new(Limits::NONE);
    let _owner = rig.lock(ZONE);
    let waited = rig.begin(write(8192), 512);
    let zeroes = rig.begin_ranges(Operation::WriteZeroes, std::slice::from_ref(&(8192..8704)));
    rig.fail(ZONE);
    rig.go_on();
    let later = rig.begin(read(12288), 512);
    let discard = rig.begin_ranges(Operation::Discard, &[0..512, 8192..8704]);
    let outside = rig.begin(read(0), 8192);
    rig.go_on();
    assert_eq!(
        rig.statuses(&[waited, zeroes, later, discard]),
        [Status::IoError; 4]
    );
    assert_eq!(rig.statuses(&[outside]), [Status::Ok]);
    assert_eq!(rig.begun(), [0]);
    rig.unlock();
    let after = rig.begin(read(12288), 512);
    rig.go_on();
    assert_eq!(rig.statuses(&[after]), [Status::Ok]);
}

#[test]
fn zeroes_and_discards_keep_off_it_with_all_of_their_ranges() {
    let mut rig = Rig::new(Limits::NONE);
    let _owner = rig.lock(ZONE);
    let waits = [
        rig.begin_ranges(Operation::WriteZeroes, &[0..512, 8192..8704]),
        rig.begin_ranges(
            Operation::Discard,
            std::slice::from_ref(&(16384 - 512..20480)),
        ),
        // It has the zone between its ranges, and waits without need.
        rig.begin_ranges(Operation::Discard, &[0..512, 20480..20992]),
    ];
    let goes = rig.begin_ranges(Operation::Discard, std::slice::from_ref(&(4096..8192)));
    rig.go_on();
    assert_eq!(rig.begun(), [4096]);
    assert_eq!(rig.statuses(&[goes]), [Status::Ok]);
    rig.unlock();
    rig.go_on();
    assert_eq!(rig.statuses(&waits), [Status::Ok; 3]);
    assert_eq!(rig.begun().len(), 5, "each range once");
}

/// The owner waits for zeroes that had begun, although it knows of none of their parts.
#[test]
fn zeroes_in_flight_are_waited_for() {
    let mut rig = Rig::new(Limits::NONE);
    rig.storage.keep.set(true);
    rig.begin_ranges(Operation::WriteZeroes, &[0..512, 12288..12800]);
    let owner = rig.lock(ZONE);
    rig.pipeline.look_for_clear();
    assert!(!owner.is_alone());
    rig.storage.keep.set(false);
    rig.go_on();
    rig.pipeline.look_for_clear();
    assert!(owner.is_alone());
}

#[test]
fn a_device_with_many_that_wait_is_left_alone() {
    let mut rig = Rig::new(Limits::NONE);
    let _owner = rig.lock(ZONE);
    let mut heads = Vec::new();
    let most = rig.local.may_park();
    while !rig.local.is_clogged() {
        heads.push(rig.begin(read(8192), 512));
        // So a batch is never larger than what may be parked.
        assert_eq!(rig.local.may_park(), most - heads.len());
        assert!(heads.len() < MAX_IN_FLIGHT as usize / 2, "others have room");
    }
    rig.unlock();
    assert_eq!(rig.local.may_park(), most);
    rig.go_on();
    assert_eq!(rig.statuses(&heads), vec![Status::Ok; heads.len()]);
}
