//! Questions and their answers, features, refusals.

use bulkhead_dataplane::blk::config_space;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::vhost_user::{feature, protocol_feature};

use crate::messages::{DEVICE_FEATURES, QUEUES, SPLIT, config, disk, event, facts, halves, words};
use crate::rig::{Answer, Rig, ack};

#[test]
fn questions_are_answered_before_anything_was_negotiated() {
    let mut rig = Rig::new();
    for (code, answer) in [
        (code::GET_FEATURES, feature::TRANSPORT | DEVICE_FEATURES),
        (code::GET_PROTOCOL_FEATURES, protocol_feature::OFFERED),
        (code::GET_QUEUE_NUM, u64::from(QUEUES)),
        (code::GET_MAX_MEM_SLOTS, 32),
    ] {
        assert_eq!(rig.send(code, vec![], vec![]), ack(answer), "{code}");
    }
    rig.quietly(code::SET_OWNER, vec![], vec![]);
}

#[test]
fn an_acknowledgement_is_given_once_it_was_negotiated_and_asked_for() {
    let mut rig = Rig::new();
    let owner = |rig: &mut Rig| rig.send(code::SET_OWNER, vec![], vec![]);
    assert_eq!(owner(&mut rig), Answer::Pending, "it was not negotiated");
    let features = words(&[protocol_feature::REPLY_ACK]);
    assert_eq!(
        rig.send(code::SET_PROTOCOL_FEATURES, features, vec![]),
        ack(0)
    );
    assert_eq!(owner(&mut rig), ack(0));
    rig.quietly(code::SET_OWNER, vec![], vec![]);
}

#[test]
fn a_refusal_is_acknowledged_or_ends_the_connection() {
    let too_many = || words(&[u64::MAX]);
    assert_eq!(
        Rig::negotiated().send(code::SET_FEATURES, too_many(), vec![]),
        ack(1)
    );
    assert_eq!(
        Rig::new().send(code::SET_FEATURES, too_many(), vec![]),
        Answer::End
    );
    // What can't be answered with a no ends the connection even so.
    for (code, body) in [
        (code::GET_VRING_BASE, halves(&[u32::from(QUEUES), 0])),
        (code::GET_FEATURES, vec![0]),
    ] {
        assert_eq!(Rig::negotiated().send(code, body, vec![]), Answer::End);
    }
}

#[test]
fn what_is_not_known_or_has_another_length_is_refused() {
    for (code, body) in [
        (0, vec![]),
        (6, words(&[0])),
        (code::SET_LOG_BASE, words(&[4096, 0])),
        (code::SET_LOG_BASE, words(&[4096])),
        (code::SET_BACKEND_REQ_FD, vec![]),
        (code::SET_INFLIGHT_FD, vec![0; 16]),
        (code::SET_STATUS, words(&[0x100])),
        (28, vec![]),
        (u32::MAX, vec![]),
        (code::SET_FEATURES, vec![0; 7]),
        (code::SET_FEATURES, vec![0; 9]),
        (code::SET_VRING_NUM, vec![]),
        (code::SET_VRING_ADDR, vec![0; 32]),
        (code::SET_VRING_ADDR, vec![0; 48]),
        (code::SET_MEM_TABLE, halves(&[1, 0])),
        (code::SET_MEM_TABLE, halves(&[9, 0])),
        (code::SET_MEM_TABLE, halves(&[u32::MAX, 0])),
        (code::ADD_MEM_REG, vec![0; 32]),
        (code::REM_MEM_REG, vec![0; 40]),
        (code::SET_VRING_KICK, vec![0; 4]),
    ] {
        let mut rig = Rig::negotiated();
        let answer = rig.send(code, body.clone(), vec![]);
        assert_eq!(answer, ack(1), "{code} with {} bytes", body.len());
        assert_eq!(rig.send(code::SET_OWNER, vec![], vec![]), ack(0));
    }
}

#[test]
fn descriptors_are_as_many_as_belong_to_the_message() {
    for (code, body, fds, answer) in [
        (code::SET_VRING_CALL, words(&[0]), 0, 1),
        (code::SET_VRING_CALL, words(&[0]), 1, 0),
        (code::SET_VRING_CALL, words(&[0]), 2, 1),
        (code::SET_VRING_CALL, words(&[0x100]), 0, 0),
        (code::SET_VRING_CALL, words(&[0x100]), 1, 1),
        (code::SET_VRING_NUM, halves(&[0, 8]), 1, 0),
        (code::SET_MEM_TABLE, halves(&[0, 0]), 1, 1),
    ] {
        let fds_sent = (0..fds).map(|_| event()).collect();
        let given = Rig::negotiated().send(code, body, fds_sent);
        assert_eq!(given, ack(answer), "{code} with {fds}");
    }
}

#[test]
fn the_configuration_space_is_read_in_parts_and_padded() {
    let mut rig = Rig::negotiated();
    let mut read =
        |offset, size: usize| rig.send(code::GET_CONFIG, config(offset, &vec![0xff; size]), vec![]);
    assert_eq!(read(0, 4), Answer::Reply(config(0, b"disk")));
    assert_eq!(read(2, 3), Answer::Reply(config(2, b"sk\0")));
    assert_eq!(read(255, 1), Answer::Reply(config(255, &[0])));
    let whole = config_space::read(disk(&facts()));
    assert_eq!(read(0, 256), Answer::Reply(config(0, &whole)));
    let no = Answer::Reply(vec![]);
    for (offset, size) in [(0, 0), (0, 257), (255, 2), (256, 1), (u32::MAX, 8)] {
        assert_eq!(read(offset, size), no, "{size} bytes at {offset}");
    }
    let lie = halves(&[0, 8, 0]);
    assert_eq!(rig.send(code::GET_CONFIG, lie, vec![]), no);
    // Nothing can be written; who does not ask is not told.
    let write = config(0, &[0; 8]);
    assert_eq!(rig.send(code::SET_CONFIG, write.clone(), vec![]), ack(1));
    rig.quietly(code::SET_CONFIG, write, vec![]);
}

#[test]
fn features_are_of_what_was_offered_and_stay_while_a_queue_runs() {
    let mut rig = Rig::running();
    let set = |rig: &mut Rig, features| rig.send(code::SET_FEATURES, words(&[features]), vec![]);
    let all = SPLIT;
    assert_eq!(set(&mut rig, all), ack(0), "as they are");
    assert_eq!(set(&mut rig, all & !feature::EVENT_IDX), ack(1));
    assert_eq!(set(&mut rig, all | 1), ack(1));
    let protocol = words(&[u64::MAX]);
    assert_eq!(
        rig.send(code::SET_PROTOCOL_FEATURES, protocol, vec![]),
        ack(1)
    );
}
