//! Peers and operators that send what makes no sense, too much of it, or nothing at all: the agent
//! goes on, and serves the others.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::control::DataplaneToAgent;
use bulkhead_protocol::keys::KeydToAgent;
use bulkhead_protocol::rot::{FromRot, Role};
use bulkhead_protocol::{Channel, ChannelError};
use nix::sys::socket::{MsgFlags, send};

use crate::bundles::{bundle, id, signed, volume};
use crate::peers::{Halt, keys};
use crate::world::World;

/// Messages that are none.
fn garbage() -> Vec<Vec<u8>> {
    vec![
        vec![0xff],
        vec![0; 200],
        // An array that claims to be without end, a map in a map, text where a number belongs.
        vec![0x9f, 0x9f, 0x9f],
        vec![0x82, 0x18, 0x63, 0x80],
        b"status".to_vec(),
        vec![
            0x82, 0x00, 0x81, 0x1b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00,
        ],
    ]
}

fn send_raw(channel: &Channel, bytes: &[u8]) {
    send(channel.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).expect("send");
}

#[test]
fn garbage_from_each_peer_is_survived() {
    let mut world = World::new();
    for bytes in garbage() {
        send_raw(&world.rot, &bytes);
        send_raw(world.keyd.as_ref().expect("keyd"), &bytes);
        send_raw(world.dataplane.as_ref().expect("data plane"), &bytes);
    }
    world.apply_fully(&bundle(1, vec![volume(1)]));
    assert_eq!(world.status().processes.len(), 2);
}

#[test]
fn answers_to_nothing_and_descriptors_out_of_place_are_survived() {
    let mut world = World::new();
    let null = File::open("/dev/null").expect("open");
    let keyd = world.keyd.as_ref().expect("keyd");
    let dataplane = world.dataplane.as_ref().expect("data plane");
    for request_id in [0, 1, 2, u64::MAX] {
        let accepted = KeydToAgent::Accepted {
            request_id,
            epoch: 99,
            undelivered: Vec::new(),
            keys: keys(&[], 99),
        };
        keyd.send(&accepted, &[]).expect("send");
        let done = DataplaneToAgent::Done { request_id };
        dataplane.send(&done, &[]).expect("send");
        dataplane.send(&done, &[null.as_fd()]).expect("send");
        let bound = FromRot::Bound { request_id };
        world.rot.send(&bound, &[]).expect("send");
    }
    // Not for the agent, without its descriptors, and of a generation that is not new.
    let name = "vm1".parse().expect("name");
    let listener = FromRot::ListenerGone { name };
    world.rot.send(&listener, &[]).expect("send");
    world.rot.send(&FromRot::AdminListener, &[]).expect("send");
    world.drive_for(Duration::from_millis(50));
    let before = world.status();
    assert_eq!(before.epoch, None);
    world.apply_fully(&bundle(1, vec![volume(1)]));
}

#[test]
fn a_peer_that_sends_nothing_but_garbage_loses_its_channel() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1)]));
    let dataplane = world.dataplane.take().expect("data plane");
    for _ in 0..16 {
        send_raw(&dataplane, &[0xff]);
    }
    let end = Instant::now() + Duration::from_secs(5);
    while !matches!(dataplane.receive::<u8>(), Err(ChannelError::Closed)) {
        assert!(Instant::now() < end, "the channel stays open");
        world.drive_for(Duration::from_millis(10));
    }
    let status = world.status();
    assert_eq!(status.processes.len(), 1);
    assert_eq!(status.volumes[0].state, None);
    world.peers.dataplane_died();
    world.announce(Role::Dataplane);
    world.settle(1);
}

#[test]
fn garbage_from_an_operator_is_answered_and_closed() {
    let mut world = World::new();
    for bytes in garbage() {
        let client = world.connect();
        send_raw(&client, &bytes);
        match world.reply(&client) {
            AdminReply::Refused { reason } => {
                assert!(reason.contains("not understood"), "{reason}")
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            client.receive::<AdminReply>(),
            Err(ChannelError::Closed)
        ));
    }
    // An envelope is missing, or there are two, or it is no file.
    let (pipe, _write_end) = nix::unistd::pipe().expect("pipe");
    let null = File::open("/dev/null").expect("open");
    let apply = AdminRequest::Apply { dry_run: false };
    for (fds, words) in [
        (vec![], "0 descriptors"),
        (vec![null.as_fd(), null.as_fd()], "2 descriptors"),
        (vec![null.as_fd()], "not a regular file"),
        (vec![pipe.as_fd()], "not a regular file"),
    ] {
        let client = world.connect();
        client.send(&apply, &fds).expect("send");
        match world.reply(&client) {
            AdminReply::Refused { reason } => assert!(reason.contains(words), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    world.apply_fully(&bundle(1, vec![volume(1)]));
}

#[test]
fn silent_operators_are_dropped_and_their_number_is_bounded() {
    let mut world = World::new();
    let silent: Vec<Channel> = (0..16).map(|_| world.connect()).collect();
    world.drive_for(Duration::from_millis(50));
    let one_more = world.connect();
    match world.reply(&one_more) {
        AdminReply::Refused { reason } => assert!(reason.contains("16 operators"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let end = Instant::now() + Duration::from_secs(8);
    let closed =
        |client: &Channel| matches!(client.receive::<AdminReply>(), Err(ChannelError::Closed));
    while !silent.iter().all(closed) {
        assert!(Instant::now() < end, "silent operators stay");
        world.drive_for(Duration::from_millis(20));
    }
    world.status();
}

#[test]
fn operators_wait_their_turn_and_may_leave() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1)]));
    world.peers.halt = Some(Halt {
        at: "dataplane prepare".to_owned(),
        handled: false,
    });
    // The first is served until the data plane's time is up; the next eight wait, no more.
    let first = world.send_apply(&signed(&bundle(2, vec![volume(2)])), false);
    world.drive("prepare", |world| world.peers.halted);
    let waiting: Vec<Channel> = (0..8)
        .map(|_| {
            let client = world.connect();
            client.send(&AdminRequest::Status, &[]).expect("send");
            client
        })
        .collect();
    world.drive_for(Duration::from_millis(100));
    let refused = world.connect();
    refused.send(&AdminRequest::Status, &[]).expect("send");
    assert!(
        matches!(world.reply(&refused), AdminReply::Refused { reason } if reason.contains("busy"))
    );
    let mut waiting = waiting.into_iter();
    drop(waiting.next());
    let reply = world.reply(&first);
    assert!(
        matches!(&reply, AdminReply::Refused { reason } if reason.contains("did not answer")),
        "{reply:?}"
    );
    assert_eq!(world.count("dataplane cancel 1"), 1);
    for client in waiting {
        assert!(matches!(world.reply(&client), AdminReply::Status { .. }));
    }
    assert!(world.peers.attached.contains_key(&id(1)));
}

#[test]
fn a_status_comes_without_a_data_plane_that_answers() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1)]));
    world.peers.halt = Some(Halt {
        at: "dataplane status".to_owned(),
        handled: false,
    });
    let asked = Instant::now();
    let status = world.status();
    assert!(asked.elapsed() < Duration::from_secs(3));
    assert_eq!(status.volumes[0].state, None);
    assert_eq!(status.epoch, Some(1));
}
