//! The start's tests: what it waits for, what it keeps, and that nobody keeps it from starting.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_protocol::VolumeId;

use super::*;

const SOON: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

fn workers(count: u16) -> Option<Workers> {
    Workers::new(Some(count), Vec::new()).ok()
}

/// A pidfd of this process, as the kernel names the sender of a message.
fn own_pidfd() -> OwnedFd {
    let (a, b) = Channel::pair().expect("pair");
    b.ask_for_sender().expect("SO_PASSPIDFD");
    a.send(&0u8, &[]).expect("send");
    let received = b.receive::<u8>().expect("message");
    received.sender.expect("a pidfd")
}

/// A start, and rot's end of its channel.
fn start() -> (Start, Channel) {
    let (rot, theirs) = Channel::pair().expect("pair");
    (Start::new(theirs), rot)
}

/// Introduces a keyd that is said to be this process; its end of the channel.
fn keyd(rot: &Channel, generation: u64, process: &OwnedFd) -> Channel {
    let (ours, theirs) = Channel::pair().expect("pair");
    theirs.ask_for_sender().expect("SO_PASSPIDFD");
    let peer = FromRot::Peer {
        role: Role::Keyd,
        generation,
        measurement: [0; 48].into(),
        pid: 1,
    };
    rot.send(&peer, &[theirs.as_fd(), process.as_fd()])
        .expect("send");
    ours
}

fn say(keyd: &Channel, workers: Option<Workers>) {
    let message = KeydToDataplane::Workers { workers };
    keyd.send(&message, &[]).expect("send");
}

#[test]
fn keyd_says_the_workers_and_what_rot_said_besides_is_kept() {
    let (mut start, rot) = start();
    let name = "disk".parse().expect("a name");
    let gone = FromRot::ListenerGone { name };
    rot.send(&gone, &[]).expect("send");
    let ours = keyd(&rot, 3, &own_pidfd());
    say(&ours, workers(2));
    assert_eq!(start.ask_for(LONG), Ok(workers(2)));
    assert!(start.early.said_hello && start.early.heard && !start.is_stopped());
    assert_eq!(rot.receive::<ToRot>().expect("one").message, ToRot::Hello);
    assert_eq!(
        start.early.from_rot.pop_front().expect("kept").message,
        gone
    );
    assert_eq!(start.early.keyd.expect("met").generation, 3);
}

#[test]
fn a_bundle_that_asks_for_none_is_an_answer() {
    let (mut start, rot) = start();
    say(&keyd(&rot, 1, &own_pidfd()), None);
    assert_eq!(start.ask_for(LONG), Ok(None));
    assert!(start.early.heard);
}

#[test]
fn a_keyd_that_ends_or_does_not_speak_is_waited_for_and_not_for_ever() {
    let (mut start, rot) = start();
    drop(keyd(&rot, 1, &own_pidfd()));
    let silent = keyd(&rot, 2, &own_pidfd());
    let volume = VolumeId([1; 16]);
    // Nothing but the workers is heard before there are some.
    let early = KeydToDataplane::Revoke { id: volume.into() };
    silent.send(&early, &[]).expect("send");
    assert_eq!(start.ask_for(SOON), Ok(None));
    assert!(start.early.said_hello && !start.early.heard);
    assert_eq!(start.early.keyd.expect("met").generation, 2);
}

#[test]
fn another_process_says_nothing_in_the_place_of_keyd() {
    let (mut start, rot) = start();
    let other = OwnedFd::from(File::open("/dev/null").expect("open"));
    let ours = keyd(&rot, 1, &other);
    say(&ours, workers(7));
    assert_eq!(start.ask_for(SOON), Ok(None));
    assert!(!start.early.heard);
}

#[test]
fn rot_may_say_stop_or_be_gone_meanwhile() {
    let (mut stopped, rot) = start();
    rot.send(&FromRot::Stop, &[]).expect("send");
    assert_eq!(stopped.ask_for(LONG), Ok(None));
    assert!(stopped.is_stopped());
    let (mut left, rot) = start();
    drop(rot);
    assert!(left.ask_for(LONG).is_err());
}
