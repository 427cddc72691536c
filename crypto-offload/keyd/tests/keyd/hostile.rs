//! What no message can do: end keyd, confuse one connection with another, or use up what it has.

use std::fs;
use std::os::fd::AsFd;

use bulkhead_protocol::Channel;
use bulkhead_protocol::envelope::to_memfd;
use bulkhead_protocol::keys::{AgentToKeyd, DataplaneToKeyd};
use bulkhead_protocol::rot::{FromRot, Role};

use crate::bundles::{bundle, id, plain, signed};
use crate::host::{Host, own_pidfd, wait_for};

fn descriptors(host: &Host) -> usize {
    let dir = format!("/proc/{}/fd", host.pid());
    fs::read_dir(dir).expect("list").count()
}

#[test]
fn what_does_not_decode_is_dropped_and_its_descriptors_closed() {
    let envelope = signed(&bundle(1, vec![plain(1)]));
    let mut host = Host::new();
    host.apply(&envelope, 1);
    let before = descriptors(&host);
    let fd = to_memfd(&envelope).expect("memfd");
    let dataplane = host.dataplane.as_ref().expect("a data plane");
    for channel in [&host.agent, dataplane] {
        for noise in [&[0xff][..], &[0x82, 0x00], &[0; 200_000]] {
            nix::unistd::write(channel, noise).expect("write");
        }
        // A message of another kind, and descriptors that belong to none.
        let fds = [fd.as_fd(); 4];
        channel.send(&"hello", &fds).expect("send");
    }
    host.apply(&envelope, 1);
    assert_eq!(descriptors(&host), before);
}

#[test]
fn an_agent_or_data_plane_that_sends_only_noise_loses_its_channel_and_nobody_else_does() {
    let envelope = signed(&bundle(1, vec![plain(1)]));
    let mut host = Host::new();
    for _ in 0..20 {
        let _ = nix::unistd::write(&host.agent, &[0xff]);
        let _ = nix::unistd::write(host.dataplane.as_ref().expect("one"), &[0xff]);
    }
    let ended = |channel: &Channel| crate::host::next::<u8>(channel).is_err();
    assert!(ended(&host.agent) && ended(host.dataplane.as_ref().expect("one")));
    host.connect();
    host.apply(&envelope, 1);
}

#[test]
fn answers_that_nobody_asked_for_grant_nothing() {
    let mut host = Host::new();
    let volume = id(1);
    host.say(&DataplaneToKeyd::Granted { id: volume.into() });
    host.say(&DataplaneToKeyd::Revoked { id: volume.into() });
    wait_for(|| host.log().matches("was not asked").count() == 2);
    host.ask(&signed(&bundle(1, vec![plain(1), plain(2)])));
    host.delivered();
    host.say(&DataplaneToKeyd::Revoked { id: volume.into() });
    let reason = "no".to_owned();
    host.say(&DataplaneToKeyd::GrantRefused {
        id: volume.into(),
        reason,
    });
    host.take(1);
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert_eq!(undelivered[0].id, id(1).into());
}

#[test]
fn an_answer_with_descriptors_is_no_answer() {
    let mut host = Host::new();
    host.ask(&signed(&bundle(1, vec![plain(1)])));
    host.delivered();
    let before = descriptors(&host);
    let fd = to_memfd(b"").expect("memfd");
    let granted = DataplaneToKeyd::Granted { id: id(1).into() };
    let dataplane = host.dataplane.as_ref().expect("a data plane");
    dataplane.send(&granted, &[fd.as_fd()]).expect("send");
    host.say(&granted);
    assert_eq!(host.accepted(), (1, Vec::new()));
    assert_eq!(descriptors(&host), before);
}

#[test]
fn many_requests_at_once_are_answered_one_after_another() {
    let envelope = signed(&bundle(1, vec![plain(1)]));
    let fd = to_memfd(&envelope).expect("memfd");
    let mut host = Host::new();
    for request_id in 1000..1030 {
        let accept = AgentToKeyd::Accept { request_id };
        host.agent.send(&accept, &[fd.as_fd()]).expect("send");
    }
    host.take(30);
    for _ in 1000..1030 {
        crate::host::next::<bulkhead_protocol::keys::KeydToAgent>(&host.agent).expect("answer");
    }
    host.apply(&envelope, 1);
}

#[test]
fn what_rot_says_out_of_place_changes_nothing() {
    let envelope = signed(&bundle(1, vec![plain(1)]));
    let mut host = Host::new();
    host.apply(&envelope, 1);
    host.rot.send(&FromRot::AdminListener, &[]).expect("send");
    let peer = |role| FromRot::Peer {
        role,
        generation: 1, // not above the one that is there
        measurement: [0; 48].into(),
        pid: 1,
    };
    let (_ours, theirs) = Channel::pair().expect("pair");
    let pidfd = own_pidfd();
    let fds = [theirs.as_fd(), pidfd.as_fd()];
    for role in Role::ALL {
        host.rot.send(&peer(role), &fds).expect("send");
        host.rot.send(&peer(role), &fds[..1]).expect("send");
    }
    host.apply(&envelope, 1);
}
