//! What survives whom: keyd killed at any point, a data plane that ends, a state that is damaged.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_protocol::Channel;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::rot::{FromRot, Role};
use bulkhead_sealing::RecipientKey;

use crate::bundles::{bundle, encrypted, id, plain, random_key, signed};
use crate::grants::volume_of;
use crate::host::{Host, own_pidfd, wait_for, yes_to};

#[test]
fn a_restart_keeps_the_floor_and_the_digest() {
    let old = signed(&bundle(4, vec![plain(1)]));
    let current = signed(&bundle(5, vec![plain(1)]));
    let mut host = Host::new();
    host.apply(&old, 1);
    host.apply(&current, 1);
    host.start();
    host.connect();
    assert!(host.refuse(&old).contains("not above the floor 5"));
    host.apply(&current, 1);
}

#[test]
fn killed_between_keeping_the_floor_and_the_first_grant() {
    let key = random_key();
    let old = signed(&bundle(4, vec![plain(1)]));
    let current = signed(&bundle(5, vec![encrypted(1, &key)]));
    let mut host = Host::without_peers();
    host.new_agent(own_pidfd());
    let (ours, theirs) = Channel::pair().expect("pair");
    host.announce(Role::Dataplane, &theirs, &own_pidfd());
    // A second end in the hands of the test: filled, keyd can't send the grant.
    theirs.set_nonblocking(true).expect("fcntl");
    while theirs.send(&0u8, &[]).is_ok() {}
    host.ask(&current);
    wait_for(|| host.path("keyd/accepted").exists());
    std::thread::sleep(Duration::from_millis(100));
    host.kill();
    while let Ok(received) = ours.receive::<u8>() {
        assert_eq!(received.message, 0, "nothing but the filling");
        if !crate::host::is_readable(&ours, Duration::ZERO) {
            break;
        }
    }
    host.start();
    host.connect();
    assert!(host.refuse(&old).contains("not above the floor 5"));
    assert_eq!(host.apply(&current, 1)[0].key, Some(key));
}

#[test]
fn a_full_channel_is_waited_for() {
    let mut host = Host::without_peers();
    host.new_agent(own_pidfd());
    let (ours, theirs) = Channel::pair().expect("pair");
    theirs.set_nonblocking(true).expect("fcntl");
    let mut filling = 0;
    while theirs.send(&0u8, &[]).is_ok() {
        filling += 1;
    }
    host.announce(Role::Dataplane, &theirs, &own_pidfd());
    host.ask(&signed(&bundle(5, vec![plain(1)])));
    wait_for(|| host.path("keyd/accepted").exists());
    for _ in 0..filling {
        ours.receive::<u8>().expect("filling");
    }
    host.dataplane = Some(ours);
    // What it was to be told at once comes first all the same.
    let first = &host.take(2)[0].message;
    assert_eq!(*first, KeydToDataplane::Workers { workers: None });
    assert_eq!(host.accepted(), (5, Vec::new()));
}

#[test]
fn killed_in_the_middle_of_grants() {
    let volumes: Vec<_> = (1..=20).map(plain).collect();
    let old = signed(&bundle(4, vec![plain(1)]));
    let current = signed(&bundle(5, volumes));
    let mut host = Host::new();
    host.ask(&current);
    host.take(3);
    host.kill();
    host.start();
    host.connect();
    assert!(host.refuse(&old).contains("not above the floor 5"));
    host.apply(&current, 20);
}

#[test]
fn what_an_earlier_keyd_granted_is_revoked_by_the_next() {
    let mut host = Host::new();
    host.apply(&signed(&bundle(1, vec![plain(1), plain(2)])), 2);
    host.start();
    host.connect();
    let got = host.apply(&signed(&bundle(2, vec![plain(2)])), 2);
    assert_eq!(
        got[0].message,
        KeydToDataplane::Revoke { id: id(1).into() },
        "the data plane may still hold it"
    );
}

#[test]
fn what_a_new_data_plane_may_have_taken_over_is_revoked() {
    let mut host = Host::new();
    host.apply(&signed(&bundle(1, vec![plain(1), plain(2)])), 2);
    host.new_dataplane();
    let got = host.apply(&signed(&bundle(2, vec![plain(2)])), 2);
    assert!(matches!(got[0].message, KeydToDataplane::Revoke { id: gone } if gone == id(1).into()));
    assert_eq!(volume_of(&got[1].message), id(2));
}

#[test]
fn a_data_plane_that_ends_in_the_middle_of_grants() {
    let volumes: Vec<_> = (1..=20).map(|n| encrypted(n, &random_key())).collect();
    let envelope = signed(&bundle(1, volumes));
    let mut host = Host::new();
    host.ask(&envelope);
    host.take(3);
    let asked = Instant::now();
    host.dataplane = None;
    let (epoch, undelivered) = host.accepted();
    assert!(asked.elapsed() < Duration::from_secs(5), "no deadline");
    assert_eq!((epoch, undelivered.len()), (1, 20));
    // What it had taken went with it.
    assert!(undelivered.iter().all(|u| u.reason.contains("ended")));
    host.new_dataplane();
    host.apply(&envelope, 20);
}

#[test]
fn a_data_plane_that_is_replaced_in_the_middle_of_grants() {
    let volumes: Vec<_> = (1..=20).map(plain).collect();
    let envelope = signed(&bundle(1, volumes));
    let mut host = Host::new();
    host.ask(&envelope);
    host.take(3);
    let old = host.dataplane.take();
    host.new_dataplane();
    assert_eq!(host.accepted().1.len(), 20);
    drop(old);
    host.apply(&envelope, 20);
}

#[test]
fn a_silent_data_plane_has_a_deadline_and_its_late_answers_count_for_nothing() {
    let envelope = signed(&bundle(1, vec![plain(1), plain(2)]));
    let mut host = Host::new();
    host.ask(&envelope);
    let late = host.delivered().message;
    host.take(1);
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert_eq!(undelivered[0].id, id(1).into());
    assert!(undelivered[0].reason.contains("10 s"));
    host.ask(&envelope);
    assert_eq!(volume_of(&host.delivered().message), id(1));
    // This is the answer to the first question; the second is refused.
    host.say(&yes_to(&late));
    let reason = "changed my mind".to_owned();
    let volume = id(1);
    host.say(&DataplaneToKeyd::GrantRefused {
        id: volume.into(),
        reason,
    });
    host.take(1);
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert!(undelivered[0].reason.contains("changed my mind"));
}

#[test]
fn a_restarted_agent_gets_no_answer_that_it_did_not_ask_for() {
    let envelope = signed(&bundle(1, vec![plain(1)]));
    let mut host = Host::new();
    host.ask(&envelope);
    let grant = host.delivered().message;
    host.new_agent(own_pidfd());
    host.say(&yes_to(&grant));
    let again = host.ask(&envelope);
    host.take(1);
    // `accepted` checks the number.
    host.accepted();
    assert_eq!(again, 2);
}

#[test]
fn a_damaged_state_stops_it() {
    let mut host = Host::new();
    host.apply(&signed(&bundle(7, vec![plain(1)])), 1);
    let path = host.path("keyd/accepted");
    let good = fs::read_to_string(&path).expect("state");
    for bad in [
        good.replace("epoch 7", "epoch 6"),
        good[..good.len() / 2].to_owned(),
        String::new(),
    ] {
        fs::write(&path, bad).expect("write");
        let log = host.start_in_vain();
        assert!(
            log.contains("keyd/accepted is damaged") && log.contains("backup"),
            "{log}"
        );
    }
    fs::write(&path, good).expect("write");
    host.start();
}

#[test]
fn without_its_key_or_with_that_of_another_host_it_does_not_start() {
    let mut host = Host::prepared();
    let path = host.path("keyd/host.key");
    fs::remove_file(&path).expect("remove");
    assert!(host.start_in_vain().contains("bulkhead host init"));
    let other = RecipientKey::generate("host-b").expect("key");
    other.save(&path).expect("save");
    assert!(host.start_in_vain().contains("that of \"host-b\""));
}

#[test]
fn stop_and_a_closed_channel_end_it_in_good_order() {
    let mut host = Host::new();
    host.rot.send(&FromRot::Stop, &[]).expect("send");
    assert_eq!(host.exit_code(), Some(0));
    host.start();
    host.rot = Channel::pair().expect("pair").0;
    assert_eq!(host.exit_code(), Some(0));
    // Also while it waits for the data plane.
    host.start();
    host.connect();
    host.ask(&signed(&bundle(1, vec![plain(1)])));
    host.delivered();
    host.rot.send(&FromRot::Stop, &[]).expect("send");
    assert_eq!(host.exit_code(), Some(0));
}

/// It goes on with what its predecessor served: to open 256 sealed keys for it would take a CPU 0.1 s, in which
/// guests wait for their disks.
#[test]
fn a_data_plane_that_took_volumes_over_is_granted_them_without_their_keys() {
    let (first, second) = (random_key(), random_key());
    let volumes = vec![encrypted(1, &first), encrypted(2, &second), plain(3)];
    let envelope = signed(&bundle(5, volumes.clone()));
    let keys = |got: &[crate::host::Delivered]| -> Vec<_> { got.iter().map(|d| d.key).collect() };
    let mut host = Host::new();
    host.apply(&envelope, 3);
    host.dataplane = None;
    host.new_dataplane_that_holds(&[id(1)]);
    let got = host.apply(&envelope, 3);
    assert_eq!(keys(&got), [None, Some(second), None], "it has one of them");
    let got = host.apply(&envelope, 3);
    assert_eq!(keys(&got), [Some(first), Some(second), None], "once");
    // Another bundle is another matter.
    host.dataplane = None;
    host.new_dataplane_that_holds(&[id(1), id(2)]);
    let got = host.apply(&signed(&bundle(6, volumes)), 3);
    assert_eq!(keys(&got), [Some(first), Some(second), None]);
}

#[test]
fn a_data_plane_that_has_lost_a_key_is_given_it() {
    let key = random_key();
    let envelope = signed(&bundle(5, vec![encrypted(1, &key)]));
    let mut host = Host::new();
    host.apply(&envelope, 1);
    host.dataplane = None;
    host.new_dataplane_that_holds(&[id(1)]);
    host.ask(&envelope);
    assert_eq!(host.delivered().key, None);
    let no = |reason: &str| DataplaneToKeyd::GrantRefused {
        id: id(1).into(),
        reason: reason.to_owned(),
    };
    host.say(&no("its key was wiped meanwhile"));
    assert_eq!(host.delivered().key, Some(key));
    // Refused again it is refused.
    host.say(&no("there is no room"));
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert!(undelivered[0].reason.contains("there is no room"));
}
