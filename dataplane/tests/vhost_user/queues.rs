//! Queues from their first message to their end: what waits for a worker, what a memory table does to
//! them, and how a connection lets go of everything.

use std::sync::{Arc, Weak};

use bulkhead_dataplane::memory::GuestMemory;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::vhost_user::{feature, protocol_feature};
use bulkhead_dataplane::worker::message::{FromWorker, QueueStart, RingLayout, ToWorker};

use crate::messages::{
    MEMORY_BYTES, SPLIT, addresses, event, halves, memfd, one_region, with_fd, without_fd, words,
};
use crate::rig::{Answer, Rig, ack, done, queue};

fn started(rig: &mut Rig) -> Box<QueueStart> {
    match rig.to_worker.pop_front() {
        Some(ToWorker::Start(start)) => start,
        other => panic!("no start: {other:?}"),
    }
}

fn base_reply(index: u32, base: u32) -> Answer {
    Answer::Reply(halves(&[index, base]))
}

#[test]
fn a_start_says_everything_and_is_acknowledged_by_the_worker() {
    let mut rig = Rig::negotiated();
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    rig.place(1);
    assert_eq!(rig.kick(1), Answer::Pending);
    assert!(rig.session.is_pending());
    let start = started(&mut rig);
    assert_eq!(start.queue, queue(1));
    let layout = RingLayout {
        size: 8,
        desc: 0x1000,
        avail: 0x1400,
        used: 0x1800,
    };
    assert_eq!(start.layout, layout);
    assert_eq!(start.base, 3);
    assert_eq!(start.features, SPLIT);
    assert!(!start.enabled, "SET_VRING_ENABLE comes later");
    assert!(start.kick.is_some() && start.call.is_some() && start.error.is_some());
    assert_eq!(rig.say(FromWorker::Started { queue: queue(1) }), ack(0));
    assert_eq!(rig.session.queues(), (1, 0));
}

#[test]
fn a_queue_that_can_not_start_is_refused_and_can_be_tried_again() {
    let mut rig = Rig::negotiated();
    assert_eq!(rig.kick(0), ack(1), "no size, no addresses, no memory");
    rig.place(0);
    assert_eq!(rig.kick(0), ack(1), "no memory");
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    assert_eq!(rig.kick(0), Answer::Pending);
    drop(started(&mut rig));
    let failed = FromWorker::StartFailed {
        queue: queue(0),
        reason: "it is not aligned".to_owned(),
    };
    assert_eq!(rig.say(failed), ack(1));
    assert_eq!(rig.session.queues(), (0, 0));
    assert_eq!(rig.kick(0), Answer::Pending);
    assert_eq!(rig.work(), ack(0));
}

/// As SPDK's frontend does: no acknowledgements, queues enabled before they are anything.
#[test]
fn queues_are_enabled_before_they_have_a_size() {
    let mut rig = Rig::new();
    rig.quietly(code::SET_OWNER, vec![], vec![]);
    let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    rig.quietly(code::SET_FEATURES, words(&[features]), vec![]);
    let protocol = protocol_feature::MQ | protocol_feature::CONFIG;
    rig.quietly(code::SET_PROTOCOL_FEATURES, words(&[protocol]), vec![]);
    rig.quietly(code::SET_VRING_ENABLE, halves(&[0, 1]), vec![]);
    rig.quietly(code::SET_VRING_CALL, with_fd(0), vec![event()]);
    let table = crate::messages::table(&[(0, MEMORY_BYTES)]);
    rig.quietly(code::SET_MEM_TABLE, table, vec![memfd(MEMORY_BYTES)]);
    rig.quietly(code::SET_VRING_NUM, halves(&[0, 8]), vec![]);
    rig.quietly(code::SET_VRING_BASE, halves(&[0, 0]), vec![]);
    rig.quietly(code::SET_VRING_ADDR, addresses(0), vec![]);
    rig.quietly(code::SET_VRING_KICK, with_fd(0), vec![event()]);
    assert!(started(&mut rig).enabled);
}

#[test]
fn without_protocol_features_a_queue_is_enabled_from_its_start() {
    let mut rig = Rig::new();
    rig.quietly(code::SET_FEATURES, words(&[feature::VERSION_1]), vec![]);
    let table = crate::messages::table(&[(0, MEMORY_BYTES)]);
    rig.quietly(code::SET_MEM_TABLE, table, vec![memfd(MEMORY_BYTES)]);
    rig.quietly(code::SET_VRING_NUM, halves(&[0, 8]), vec![]);
    rig.quietly(code::SET_VRING_ADDR, addresses(0), vec![]);
    rig.quietly(code::SET_VRING_KICK, without_fd(0), vec![]);
    let start = started(&mut rig);
    assert!(start.enabled && start.kick.is_none());
}

#[test]
fn a_queue_ends_with_the_index_it_goes_on_from() {
    let mut rig = Rig::running();
    let get = |rig: &mut Rig, index| rig.send(code::GET_VRING_BASE, halves(&[index, 0]), vec![]);
    assert_eq!(get(&mut rig, 1), Answer::Pending);
    assert_eq!(rig.told(), ["stop 1"]);
    assert_eq!(rig.work(), base_reply(1, 77));
    assert_eq!(rig.session.queues(), (1, 0));
    assert_eq!(get(&mut rig, 1), base_reply(1, 77), "at once");
    assert_eq!(rig.kick(1), Answer::Pending);
    assert_eq!(started(&mut rig).base, 77);
}

#[test]
fn a_running_queue_keeps_its_shape_and_takes_new_descriptors() {
    let mut rig = Rig::running();
    for (code, body) in [
        (code::SET_VRING_NUM, halves(&[0, 16])),
        (code::SET_VRING_BASE, halves(&[0, 3])),
        (code::SET_VRING_ADDR, {
            let mut other = addresses(1);
            other[0] = 0;
            other
        }),
    ] {
        assert_eq!(rig.send(code, body, vec![]), ack(1), "{code}");
    }
    assert_eq!(
        rig.send(code::SET_VRING_NUM, halves(&[0, 8]), vec![]),
        ack(0)
    );
    assert_eq!(rig.send(code::SET_VRING_ADDR, addresses(0), vec![]), ack(0));
    for (code, body, fds, told) in [
        (code::SET_VRING_KICK, with_fd(0), 1, "kick 0 true"),
        (code::SET_VRING_KICK, without_fd(1), 0, "kick 1 false"),
        (code::SET_VRING_CALL, with_fd(0), 1, "call 0 true"),
        (code::SET_VRING_CALL, without_fd(0), 0, "call 0 false"),
        (code::SET_VRING_ERR, with_fd(1), 1, "error 1 true"),
        (
            code::SET_VRING_ENABLE,
            halves(&[1, 0]),
            0,
            "enabled 1 false",
        ),
    ] {
        let fds = (0..fds).map(|_| event()).collect();
        assert_eq!(rig.send(code, body, fds), Answer::Pending, "{told}");
        assert_eq!(rig.told(), [told]);
        assert_eq!(rig.work(), ack(0));
    }
}

#[test]
fn values_that_can_not_be_are_refused() {
    let mut rig = Rig::negotiated();
    for (code, body) in [
        (code::SET_VRING_NUM, halves(&[0, 0])),
        (code::SET_VRING_NUM, halves(&[0, 7])),
        (code::SET_VRING_NUM, halves(&[0, 65536])),
        (code::SET_VRING_BASE, halves(&[0, 65536])),
        (code::SET_VRING_NUM, halves(&[2, 8])),
        (code::SET_VRING_ENABLE, halves(&[u32::MAX, 1])),
        (code::SET_VRING_KICK, without_fd(255)),
    ] {
        assert_eq!(rig.send(code, body, vec![]), ack(1), "{code}");
    }
}

#[test]
fn what_is_no_eventfd_is_refused() {
    for code in [
        code::SET_VRING_KICK,
        code::SET_VRING_CALL,
        code::SET_VRING_ERR,
    ] {
        let mut rig = Rig::running();
        assert_eq!(rig.send(code, with_fd(0), vec![memfd(4096)]), ack(1));
        assert_eq!(rig.told(), Vec::<String>::new(), "the old one stays");
    }
}

#[test]
fn a_memory_table_waits_for_every_running_queue() {
    let mut rig = Rig::running();
    assert_eq!(
        rig.share(&[(0, MEMORY_BYTES), (0x10_0000, 4096)]),
        Answer::Pending
    );
    assert_eq!(rig.told(), ["memory 0", "memory 1"]);
    let set = |index| FromWorker::MemorySet {
        queue: queue(index),
    };
    assert_eq!(rig.say(set(0)), Answer::Pending);
    assert_eq!(rig.say(set(1)), ack(0));
}

#[test]
fn a_table_that_is_refused_changes_nothing() {
    let mut rig = Rig::running();
    assert_eq!(rig.share(&[(0, 4096), (0, 4096)]), ack(1));
    assert_eq!(rig.told(), Vec::<String>::new());
    let get = rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![]);
    assert_eq!(get, Answer::Pending);
    assert_eq!(rig.work(), base_reply(0, 77));
    assert_eq!(rig.kick(0), Answer::Pending, "in the memory there was");
}

#[test]
fn a_queue_rests_while_its_ring_is_in_no_region() {
    let mut rig = Rig::negotiated();
    // Queue 0 in one region, queue 1 in another.
    assert_eq!(rig.share(&[(0, 0x1000), (0x1000, 0x1000)]), ack(0));
    for index in 0..2 {
        rig.place(index);
        let enable = halves(&[index, 1]);
        assert_eq!(rig.send(code::SET_VRING_ENABLE, enable, vec![]), ack(0));
        assert_eq!(rig.kick(index), Answer::Pending);
        assert_eq!(rig.work(), ack(0));
    }
    let remove = |rig: &mut Rig| rig.send(code::REM_MEM_REG, one_region(0, 0x1000), vec![]);
    assert_eq!(remove(&mut rig), Answer::Pending);
    assert_eq!(rig.told(), ["enabled 0 false", "memory 1"]);
    assert_eq!(rig.work(), ack(0));
    assert_eq!(remove(&mut rig), ack(1), "it is gone");
    // Another region changes nothing for it.
    let other = rig.send(
        code::ADD_MEM_REG,
        one_region(0x8000, 0x1000),
        vec![memfd(0x1000)],
    );
    assert_eq!(other, Answer::Pending);
    assert_eq!(rig.told(), ["memory 1"]);
    assert_eq!(rig.work(), ack(0));
    // Nor does being enabled.
    for enabled in [0, 1] {
        let enable = halves(&[0, enabled]);
        assert_eq!(
            rig.send(code::SET_VRING_ENABLE, enable, vec![]),
            Answer::Pending
        );
        assert_eq!(rig.told(), ["enabled 0 false"]);
        assert_eq!(rig.work(), ack(0));
    }
    let back = rig.send(
        code::ADD_MEM_REG,
        one_region(0, 0x1000),
        vec![memfd(0x1000)],
    );
    assert_eq!(back, Answer::Pending);
    assert_eq!(rig.told(), ["memory 0", "enabled 0 true", "memory 1"]);
    assert_eq!(rig.work(), ack(0));
}

#[test]
fn a_table_ends_a_rest_whether_or_not_it_has_the_ring() {
    for (regions, told) in [
        (
            [(0, MEMORY_BYTES)],
            ["memory 0", "enabled 0 true", "memory 1", "enabled 1 true"],
        ),
        // The worker retires the queues.
        (
            [(0x10_0000, 0x1000)],
            ["memory 0", "enabled 0 true", "memory 1", "enabled 1 true"],
        ),
    ] {
        let mut rig = Rig::running();
        let region = one_region(0, MEMORY_BYTES);
        assert_eq!(rig.send(code::REM_MEM_REG, region, vec![]), Answer::Pending);
        assert_eq!(rig.told(), ["enabled 0 false", "enabled 1 false"]);
        assert_eq!(rig.work(), ack(0));
        assert_eq!(rig.share(&regions), Answer::Pending);
        assert_eq!(rig.told(), told);
        assert_eq!(rig.work(), ack(0));
    }
}

#[test]
fn no_more_regions_than_there_are_slots() {
    let mut rig = Rig::negotiated();
    for slot in 0..33 {
        let body = one_region(slot * 0x1000, 0x1000);
        let answer = rig.send(code::ADD_MEM_REG, body, vec![memfd(0x1000)]);
        assert_eq!(answer, ack(u64::from(slot == 32)), "{slot}");
    }
}

#[test]
fn a_retired_queue_is_counted_until_it_is_stopped() {
    let mut rig = Rig::running();
    let retired = FromWorker::Retired {
        queue: queue(0),
        reason: "the avail index jumped".to_owned(),
    };
    assert_eq!(rig.say(retired), Answer::Pending);
    assert_eq!(rig.session.queues(), (1, 1));
    assert_eq!(rig.session.fault(), Some("the avail index jumped"));
    let get = rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![]);
    assert_eq!(get, Answer::Pending);
    assert_eq!(rig.work(), base_reply(0, 77));
    assert_eq!(rig.session.queues(), (1, 0));
    // It was said of a queue that has been stopped since.
    let late = FromWorker::Retired {
        queue: queue(0),
        reason: "too late".to_owned(),
    };
    assert_eq!(rig.say(late), Answer::Pending);
    assert_eq!(rig.session.queues(), (1, 0));
}

#[test]
fn a_frontend_whose_memory_went_away_has_to_go() {
    let mut rig = Rig::negotiated();
    let file = memfd(MEMORY_BYTES);
    let table = crate::messages::table(&[(0, MEMORY_BYTES)]);
    let shared = file.try_clone().expect("dup");
    assert_eq!(rig.send(code::SET_MEM_TABLE, table, vec![shared]), ack(0));
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    let memory = started(&mut rig).memory;
    assert_eq!(rig.say(FromWorker::Started { queue: queue(0) }), ack(0));
    nix::unistd::ftruncate(&file, 0).expect("cut");
    let mut buffer = bulkhead_dataplane::memory::GuestBuffer::with_capacity(1);
    buffer.reset(&bulkhead_dataplane::memory::Lease::new(memory));
    buffer.push(0, 8).expect("inside");
    assert!(buffer.copy_in(0, &[1; 8]));
    let retired = FromWorker::Retired {
        queue: queue(0),
        reason: "guest memory went away".to_owned(),
    };
    assert_eq!(rig.say(retired), Answer::End);
}

#[test]
fn a_reset_stops_every_queue() {
    let mut rig = Rig::running();
    assert_eq!(rig.send(code::RESET_OWNER, vec![], vec![]), Answer::Pending);
    assert_eq!(rig.told(), ["stop 0", "stop 1"]);
    assert_eq!(rig.work(), ack(0));
    assert_eq!(rig.session.queues(), (0, 0));
    assert_eq!(rig.send(code::RESET_OWNER, vec![], vec![]), ack(0));
}

/// Lets the worker answer one by one; the memory is there until the last queue stopped.
fn ends(rig: &mut Rig, memory: &Weak<GuestMemory>, stops: usize) {
    assert!(rig.close());
    let told = rig.told();
    assert_eq!(
        told.iter().filter(|t| t.starts_with("stop")).count(),
        stops,
        "{told:?}"
    );
    while let Some(message) = rig.to_worker.pop_front() {
        assert!(memory.strong_count() > 0, "a worker still uses it");
        let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
        let gone = rig
            .session
            .on_worker(done(&message), &mut out)
            .expect("an end");
        assert!(out.replies.is_empty(), "nobody reads it");
        assert_eq!(gone, rig.to_worker.is_empty());
    }
    assert_eq!(memory.strong_count(), 0);
}

fn memory_of(rig: &mut Rig) -> Weak<GuestMemory> {
    let region = one_region(0x100_0000, 0x1000);
    let added = rig.send(code::ADD_MEM_REG, region, vec![memfd(0x1000)]);
    assert_eq!(added, Answer::Pending);
    let memory = rig.to_worker.iter().find_map(|message| match message {
        ToWorker::SetMemory { memory, .. } => Some(Arc::downgrade(memory)),
        _ => None,
    });
    assert_eq!(rig.work(), ack(0));
    memory.expect("a queue runs")
}

#[test]
fn an_end_stops_every_queue_once_whatever_was_waited_for() {
    let mut rig = Rig::running();
    let memory = memory_of(&mut rig);
    ends(&mut rig, &memory, 2);

    let mut rig = Rig::running();
    let memory = memory_of(&mut rig);
    rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![]);
    ends(&mut rig, &memory, 2);

    let mut rig = Rig::running();
    let memory = memory_of(&mut rig);
    rig.send(code::RESET_OWNER, vec![], vec![]);
    ends(&mut rig, &memory, 2);

    let mut rig = Rig::running();
    let memory = memory_of(&mut rig);
    rig.send(code::SET_VRING_ENABLE, halves(&[0, 0]), vec![]);
    ends(&mut rig, &memory, 2);

    // One is stopped, and about to start again.
    let mut rig = Rig::running();
    let memory = memory_of(&mut rig);
    rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![]);
    rig.work();
    assert_eq!(rig.kick(0), Answer::Pending);
    ends(&mut rig, &memory, 2);
}

#[test]
fn an_end_waits_for_a_start_that_fails() {
    let mut rig = Rig::negotiated();
    rig.share(&[(0, MEMORY_BYTES)]);
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    assert!(rig.close());
    assert_eq!(rig.told(), ["start 0", "stop 0"]);
    let failed = FromWorker::StartFailed {
        queue: queue(0),
        reason: "no".to_owned(),
    };
    let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
    assert!(!rig.session.on_worker(failed, &mut out).expect("an end"));
    let stopped = FromWorker::Stopped {
        queue: queue(0),
        base: None,
        left: false,
    };
    assert!(rig.session.on_worker(stopped, &mut out).expect("an end"));
}

#[test]
fn an_end_without_queues_waits_for_nothing() {
    assert!(!Rig::new().close());
    let mut rig = Rig::negotiated();
    rig.share(&[(0, MEMORY_BYTES)]);
    rig.place(0);
    assert!(!rig.close());
}

#[test]
fn tables_that_requests_still_use_are_bounded() {
    let mut rig = Rig::running();
    let mut held = Vec::new();
    let refused = loop {
        let answer = rig.share(&[(0, MEMORY_BYTES)]);
        if answer != Answer::Pending {
            break answer;
        }
        for message in &rig.to_worker {
            if let ToWorker::SetMemory { memory, .. } = message {
                held.push(Arc::clone(memory));
            }
        }
        assert_eq!(rig.work(), ack(0));
        assert!(held.len() < 1000, "no end");
    };
    assert_eq!(refused, ack(1));
    // Once they are let go of, there is room again.
    held.clear();
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), Answer::Pending);
    assert_eq!(rig.work(), ack(0));
}
