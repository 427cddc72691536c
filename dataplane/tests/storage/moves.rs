//! A queue goes from worker to worker: with requests and kicks on the way, with storage that does not
//! answer, and where it can't be served.

use std::os::fd::AsFd;
use std::time::Duration;

use bulkhead_dataplane::storage::{RamSpec, StorageSpec};
use bulkhead_dataplane::worker::message::{FromWorker, ToWorker};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::hung::{SHORT, hanging, wait_for};
use crate::rig::{OK, Op, Rig, SECTOR, SECTORS, Shape, queue_id};

const SHAPE: Shape = Shape {
    workers: 2,
    ..Shape::PLAIN
};
/// Long enough that a worker without work sleeps, and has the kick waited for. Where it is not, a test shows less.
const NAP: Duration = Duration::from_millis(5);

fn ram() -> StorageSpec {
    StorageSpec::Ram(RamSpec::new(SECTORS * 512).expect("memory").into())
}

fn is_called(rig: &Rig, patience_ms: u16) -> bool {
    let mut fds = [PollFd::new(rig.call(0).as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(patience_ms)).expect("poll") > 0
}

/// A read that the worker has taken: it hangs long enough to be seen.
fn in_flight(rig: &mut Rig) {
    rig.device.health.set_patience(SHORT);
    wait_for(rig, "nothing in flight", |summary| summary.old == 0);
    rig.submit(0, &Op::Read(3, 1));
    wait_for(rig, "a request in flight", |summary| summary.old == 1);
}

fn write(rig: &mut Rig, byte: u8) {
    let (status, _) = rig.run(0, &Op::Write(u64::from(byte), vec![byte; SECTOR]));
    assert_eq!(status, OK);
}

fn reads(rig: &mut Rig, byte: u8) {
    let (status, bytes) = rig.run(0, &Op::Read(u64::from(byte), 1));
    assert_eq!((status, bytes), (OK, vec![byte; SECTOR]));
}

#[test]
fn a_queue_goes_to_and_fro_with_its_requests() {
    for unit in [None, Some(512)] {
        let mut rig = Rig::new(ram(), Shape { unit, ..SHAPE });
        for round in 1..100 {
            write(&mut rig, round);
            let moved = rig.take_off(0);
            rig.land(moved);
            reads(&mut rig, round);
        }
        let done = rig.device.metrics.totals();
        assert_eq!((done.requests_ok, done.requests_failed), (198, 0));
        rig.end();
    }
}

/// Another frontend's requests were given up there before, and have ended.
#[test]
fn a_queue_is_served_where_its_device_was_given_up_once() {
    let mut rig = Rig::new(hanging().1, SHAPE);
    write(&mut rig, 7);
    let moved = rig.take_off(0);
    rig.give_up(1, false);
    rig.land(moved);
    write(&mut rig, 8);
    for byte in [7, 8] {
        reads(&mut rig, byte);
    }
    rig.end();
}

#[test]
fn what_is_offered_on_the_way_is_served_at_its_end() {
    let mut rig = Rig::new(ram(), SHAPE);
    write(&mut rig, 9);
    for nap in [Duration::ZERO, NAP] {
        std::thread::sleep(nap);
        let moved = rig.take_off(0);
        rig.submit(0, &Op::Read(9, 1));
        std::thread::sleep(nap);
        rig.land(moved);
        assert_eq!(rig.wait(0, SECTOR).2, [9; SECTOR]);
    }
    rig.end();
}

/// The wait for the kick was with the first worker; now the second has to be woken by it.
#[test]
fn kicks_wake_the_worker_that_has_the_queue_now() {
    let mut rig = Rig::new(ram(), SHAPE);
    write(&mut rig, 7);
    for _ in 0..20 {
        std::thread::sleep(NAP);
        let moved = rig.take_off(0);
        rig.land(moved);
        std::thread::sleep(NAP);
        reads(&mut rig, 7);
    }
    rig.end();
}

#[test]
fn a_queue_whose_storage_does_not_answer_stays_when_it_is_told_to() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, SHAPE);
    write(&mut rig, 3);
    hang.stop(true);
    in_flight(&mut rig);
    let queue = queue_id(0);
    rig.tell(0, ToWorker::Move { queue });
    std::thread::sleep(NAP);
    assert!(rig.said().is_none(), "it can't have drained");
    // Not taken before it stays.
    rig.submit(0, &Op::Read(3, 1));
    rig.tell(0, ToWorker::Stay { queue });
    assert!(matches!(rig.reply(), FromWorker::Stays { queue: of } if of == queue));
    hang.stop(false);
    for _ in 0..2 {
        assert_eq!(rig.wait(0, SECTOR).2, [3; SECTOR]);
    }
    // One that is told too late does nothing, and is not answered.
    let moved = rig.take_off(0);
    rig.tell(0, ToWorker::Stay { queue });
    rig.land(moved);
    reads(&mut rig, 3);
    assert!(rig.said().is_none());
    rig.end();
}

#[test]
fn a_queue_that_sleeps_and_stays_is_kicked_awake() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, SHAPE);
    let queue = queue_id(0);
    for _ in 0..3 {
        write(&mut rig, 3);
        hang.stop(true);
        in_flight(&mut rig);
        // The wait for its kick is given up, but not what is in flight.
        rig.tell(0, ToWorker::Move { queue });
        std::thread::sleep(NAP);
        rig.tell(0, ToWorker::Stay { queue });
        assert!(matches!(rig.reply(), FromWorker::Stays { .. }));
        hang.stop(false);
        assert_eq!(rig.wait(0, SECTOR).2, [3; SECTOR]);
        std::thread::sleep(NAP);
        reads(&mut rig, 3);
    }
    rig.end();
}

#[test]
fn what_does_not_run_or_stops_or_is_retired_stays() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, Shape { queues: 2, ..SHAPE });
    let stays = |rig: &Rig, queue: u16, at: u16| {
        let queue = queue_id(queue);
        rig.tell(at, ToWorker::Move { queue });
        assert!(matches!(rig.reply(), FromWorker::Stays { queue: of } if of == queue));
    };
    stays(&rig, 7, 0);
    stays(&rig, 1, 0);
    rig.break_ring(1);
    assert!(matches!(rig.reply(), FromWorker::Retired { .. }));
    stays(&rig, 1, 1);
    // A stop ends a move, and none begins after it.
    hang.stop(true);
    in_flight(&mut rig);
    let queue = queue_id(0);
    rig.tell(0, ToWorker::Move { queue });
    rig.tell(0, ToWorker::Stop { queue });
    assert!(matches!(rig.reply(), FromWorker::Stays { .. }));
    stays(&rig, 0, 0);
    hang.stop(false);
    assert!(matches!(
        rig.reply(),
        FromWorker::Stopped { base: Some(1), .. }
    ));
    rig.end();
}

#[test]
fn a_queue_that_retires_while_it_drains_stays() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, SHAPE);
    hang.stop(true);
    in_flight(&mut rig);
    let queue = queue_id(0);
    rig.tell(0, ToWorker::Move { queue });
    rig.cut_off();
    hang.stop(false);
    assert!(matches!(rig.reply(), FromWorker::Retired { .. }));
    assert!(matches!(rig.reply(), FromWorker::Stays { queue: of } if of == queue));
    rig.end();
}

/// The driver's event is full, so that the signal is in the first worker's ring for ever: the second makes it.
#[test]
fn a_call_that_was_not_made_is_made_by_the_next_worker() {
    let mut rig = Rig::new(ram(), SHAPE);
    write(&mut rig, 1);
    assert!(is_called(&rig, 10_000));
    rig.call(0).read().expect("it was called");
    // A signal waits for room from now on, instead of being refused.
    let blocking = FcntlArg::F_SETFL(OFlag::empty());
    fcntl(rig.call(0).as_fd(), blocking).expect("flags");
    rig.call(0).write(u64::MAX - 1).expect("room");
    write(&mut rig, 2);
    let moved = rig.take_off(0);
    assert!(moved.call_due);
    rig.call(0).read().expect("full");
    rig.land(moved);
    assert!(is_called(&rig, 10_000), "the call is lost");
    rig.end();
}

#[test]
fn a_queue_that_can_not_be_served_there_is_retired_and_not_lost() {
    let mut rig = Rig::new(ram(), SHAPE);
    write(&mut rig, 1);
    write(&mut rig, 2);
    let moved = rig.take_off(0);
    // The next worker does not have the device.
    let id = queue_id(0).device;
    rig.tell_worker(1, ToWorker::Detach { id });
    assert!(matches!(rig.reply(), FromWorker::Detached { .. }));
    rig.land(moved);
    match rig.reply() {
        FromWorker::Retired { queue, reason } => {
            assert_eq!(queue, queue_id(0));
            assert!(reason.contains("not attached"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let stop = ToWorker::Stop { queue: queue_id(0) };
    rig.tell(0, stop);
    assert!(matches!(
        rig.reply(),
        FromWorker::Stopped { base: Some(2), .. }
    ));
    rig.end();
}

#[test]
fn a_worker_ends_with_a_queue_that_leaves() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, SHAPE);
    hang.stop(true);
    in_flight(&mut rig);
    let queue = queue_id(0);
    rig.tell(0, ToWorker::Move { queue });
    rig.tell(0, ToWorker::End);
    assert!(matches!(rig.reply(), FromWorker::Stays { .. }));
    hang.stop(false);
    assert!(matches!(rig.reply(), FromWorker::Stopped { .. }));
}
