//! A session that a predecessor left goes on as it was: what it says of itself is the same, its queues start where
//! they lay, and what can't go on is refused. (Random sessions die in `vhost_user_random`.)

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_dataplane::stored::{Fd, Step, StoredConnection, StoredPhase};
use bulkhead_dataplane::vhost_user::message::{ProtocolError, code};
use bulkhead_dataplane::vhost_user::{Facts, Outbox, Session};
use bulkhead_dataplane::worker::message::{FromWorker, ToWorker};

use crate::messages::{
    CAPACITY_SECTORS, MEMORY_BYTES, SPLIT, addresses, disk, event, facts, halves, memfd, one_region,
};
use crate::rig::{Answer, Rig, ack, queue};

fn fd(fd: OwnedFd) -> Fd {
    Arc::new(fd)
}

fn left(rig: &Rig) -> StoredConnection<Fd> {
    rig.session.remembered(&fd(event()), Step::Idle)
}

/// The next process's session of it, and what its workers are told.
fn go_on(left: StoredConnection<Fd>) -> Rig {
    go_on_with(facts(), left)
}

fn go_on_with(facts: Facts, left: StoredConnection<Fd>) -> Rig {
    let mut rig = Rig::of(facts.clone());
    rig.session = Session::resumed(facts, left).expect("it can go on");
    let mut out = Outbox::default();
    rig.session.start_again(&mut out).expect("it can go on");
    let messages = out.to_workers.drain(..).map(|(_, message)| message);
    rig.to_worker.extend(messages);
    rig
}

fn refused(left: StoredConnection<Fd>, why: &str) {
    let error = Session::resumed(facts(), left).expect_err(why);
    assert!(matches!(error, ProtocolError::Resume(_)), "{error}");
    assert!(error.to_string().contains(why), "{error}");
}

#[test]
fn queues_start_where_they_lay_and_nobody_is_answered() {
    let before = Rig::running();
    let mut rig = go_on(left(&before));
    assert!(rig.session.is_pending(), "until they have started");
    for (index, message) in (0..).zip(&rig.to_worker) {
        let ToWorker::Start(start) = message else {
            panic!("a start: {message:?}");
        };
        assert_eq!((start.queue, start.features), (queue(index), SPLIT));
        let at = u64::from(index) * 0x1000;
        assert_eq!((start.layout.size, start.layout.desc), (8, at));
        assert_eq!(
            (start.layout.avail, start.layout.used),
            (at + 0x400, at + 0x800)
        );
        assert_eq!((start.base, start.anew, start.enabled), (3, false, true));
        assert!(start.kick.is_some() && start.call.is_some() && start.error.is_some());
    }
    assert_eq!(rig.told(), ["start 0", "start 1"]);
    assert_eq!(
        rig.work(),
        Answer::Pending,
        "no message waits for an answer"
    );
    assert!(!rig.session.is_pending() && rig.session.holds_volume());
    assert_eq!(rig.session.queues(), (2, 0));
    // It answers as the one before did.
    let base = halves(&[0, 0]);
    assert_eq!(
        rig.send(code::GET_VRING_BASE, base, vec![]),
        Answer::Pending
    );
    assert_eq!(rig.work(), Answer::Reply(halves(&[0, 77])));
    assert!(left(&rig).vrings[0].anew);
    assert_eq!(rig.kick(0), Answer::Pending);
    let Some(ToWorker::Start(start)) = rig.to_worker.front() else {
        panic!("a start");
    };
    assert!(start.anew && start.base == 77);
}

#[test]
fn a_queue_that_was_stopped_is_known_to_be() {
    let mut before = Rig::running();
    let base = halves(&[1, 0]);
    assert_eq!(
        before.send(code::GET_VRING_BASE, base, vec![]),
        Answer::Pending
    );
    assert_eq!(before.work(), Answer::Reply(halves(&[1, 77])));
    let mut rig = go_on(left(&before));
    assert_eq!(rig.told(), ["start 0"]);
    assert_eq!(rig.work(), Answer::Pending);
    assert_eq!(rig.kick(1), Answer::Pending);
    let Some(ToWorker::Start(start)) = rig.to_worker.front() else {
        panic!("a start");
    };
    assert!(start.anew && start.base == 77);
}

#[test]
fn a_retired_queue_stays_so() {
    let mut before = Rig::running();
    let reason = "its driver broke it".to_owned();
    let retired = FromWorker::Retired {
        queue: queue(0),
        reason,
    };
    assert_eq!(before.say(retired), Answer::Pending);
    let left_behind = left(&before);
    assert_eq!(left_behind.vrings[0].phase, StoredPhase::Retired);
    let mut rig = go_on(left_behind);
    assert_eq!(rig.told(), ["start 1"]);
    assert_eq!(rig.work(), Answer::Pending);
    assert_eq!(rig.session.queues(), (1, 1));
    // Other memory does not wake it.
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), Answer::Pending);
    assert_eq!(rig.told(), ["memory 1"]);
    assert_eq!(rig.work(), ack(0));
}

#[test]
fn a_queue_whose_ring_is_nowhere_starts_when_it_is_back() {
    let mut before = Rig::running();
    let gone = one_region(0, MEMORY_BYTES);
    assert_eq!(
        before.send(code::REM_MEM_REG, gone, vec![]),
        Answer::Pending
    );
    assert_eq!(before.work(), ack(0));
    let mut rig = go_on(left(&before));
    assert_eq!(rig.told(), Vec::<String>::new());
    assert_eq!(rig.session.queues(), (2, 0));
    let base = halves(&[0, 0]);
    // Where it is can't be told.
    assert_eq!(
        rig.send(code::SET_VRING_ENABLE, halves(&[0, 1]), vec![]),
        Answer::Pending
    );
    assert_eq!(rig.work(), ack(0));
    let back = one_region(0, MEMORY_BYTES);
    let file = vec![memfd(MEMORY_BYTES)];
    assert_eq!(rig.send(code::ADD_MEM_REG, back, file), Answer::Pending);
    assert_eq!(rig.told(), ["start 0", "start 1"]);
    assert_eq!(rig.work(), ack(0));
    assert_eq!(
        rig.send(code::GET_VRING_BASE, base, vec![]),
        Answer::Pending
    );
}

#[test]
fn a_queue_that_does_not_start_ends_the_connection() {
    let mut rig = go_on(left(&Rig::running()));
    let reason = "as the test wants it".to_owned();
    let failed = FromWorker::StartFailed {
        queue: queue(0),
        reason,
    };
    assert_eq!(rig.say(failed), Answer::End);
}

#[test]
fn a_frontend_is_told_of_a_capacity_that_it_does_not_know() {
    let mut before = Rig::negotiated();
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    assert_eq!(
        before.send(code::SET_BACKEND_REQ_FD, vec![], vec![ours.into()]),
        ack(0)
    );
    let config = [halves(&[0, 8, 0]), vec![0; 8]].concat();
    before.send(code::GET_CONFIG, config, vec![]);
    let known = left(&before);
    assert_eq!(known.told_sectors, Some(CAPACITY_SECTORS));
    drop(before);
    let told = |left: StoredConnection<Fd>, theirs: &mut UnixStream| {
        drop(go_on(left));
        theirs.set_nonblocking(true).expect("non-blocking");
        let mut notice = [0; 12];
        theirs.read_exact(&mut notice).is_ok() && notice[0] == 2
    };
    assert!(!told(known.clone(), &mut theirs));
    for sectors in [None, Some(CAPACITY_SECTORS - 8)] {
        let mut left = known.clone();
        left.told_sectors = sectors;
        assert!(told(left, &mut theirs), "{sectors:?}");
    }
}

#[test]
fn the_cache_mode_outlives_a_process() {
    let before = facts();
    let rig = Rig::of(before.clone());
    assert!(rig.session.cache_mode().writeback);
    disk(&before).set_writeback(false);
    let cache = rig.session.cache_mode();
    assert!(!cache.writeback && cache.chosen);
    let next = facts();
    disk(&next).resume_cache_mode(cache);
    // Nobody chooses for a driver that has chosen.
    disk(&next).negotiated(0);
    assert_eq!(go_on_with(next, left(&rig)).session.cache_mode(), cache);
}

#[test]
fn what_can_not_go_on_is_refused() {
    let before = left(&Rig::running());
    let mut other = before.clone();
    other.features |= 1 << 63;
    refused(other, "not offered");
    let mut other = before.clone();
    other.protocol_features |= 1 << 63;
    refused(other, "not offered");
    let mut other = before.clone();
    other.vrings.pop();
    refused(other, "1 queues");
    let mut other = before.clone();
    other.vrings[0].running = None;
    refused(other, "queue 0 runs nowhere");
    let mut other = before.clone();
    other.vrings[1].phase = StoredPhase::Stopped;
    refused(other, "queue 1 runs nowhere");
    let mut other = before.clone();
    other.vrings[1].call = Some(fd(memfd(4096)));
    refused(other, "not an eventfd");
    let mut other = before.clone();
    other.memory[0].fd = fd(event());
    refused(other, "region 0");
    let mut other = before.clone();
    other.memory[0].bytes = u64::MAX;
    refused(other, "region 0");
    let mut other = before;
    other.backend = Some(fd(memfd(4096)));
    refused(other, "not a socket");
}

#[test]
fn addresses_stay_the_frontends() {
    let mut before = Rig::negotiated();
    assert_eq!(before.share(&[(0, MEMORY_BYTES)]), ack(0));
    before.place(0);
    let mut rig = go_on(left(&before));
    assert_eq!(rig.told(), Vec::<String>::new(), "nothing ran");
    assert_eq!(rig.send(code::SET_VRING_ADDR, addresses(0), vec![]), ack(0));
    assert_eq!(rig.kick(0), Answer::Pending);
    assert_eq!(rig.told(), ["start 0"]);
}
