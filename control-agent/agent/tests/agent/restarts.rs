//! Processes die at every step, the agent itself by SIGKILL, and the host comes to be what the
//! last accepted bundle says.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_bundle::HostBundle;
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::rot::Role;

use crate::bundles::{SIZE_BYTES, bundle, encrypted, id, mallory, signed, volume};
use crate::peers::Halt;
use crate::world::{World, start_in_vain};

/// The host is exactly what this bundle says: files, listeners, grants, and nothing left over.
fn is_what_it_says(world: &World, bundle: &HostBundle) {
    let inodes: BTreeMap<_, _> = bundle
        .volumes
        .iter()
        .map(|volume| (volume.id, world.inode(&volume.path)))
        .collect();
    assert_eq!(world.peers.inodes(), inodes);
    let bound: BTreeMap<_, _> = bundle
        .volumes
        .iter()
        .map(|v| {
            (
                v.socket.name.clone(),
                (v.socket.uid, v.socket.gid, v.socket.mode),
            )
        })
        .collect();
    assert_eq!(world.peers.bound, bound);
    assert_eq!(world.peers.floor, bundle.epoch);
    assert!(
        world.peers.prepared.is_empty(),
        "{:?}",
        world.peers.prepared
    );
}

fn first() -> HostBundle {
    bundle(1, vec![encrypted(1), volume(2)])
}

/// Volume 1 moves to another file and its listener to another owner, 2 goes, 3 comes.
fn second() -> HostBundle {
    let mut moved = encrypted(1);
    moved.path = "disk4.img".to_owned();
    moved.socket.mode = 0o660;
    bundle(2, vec![moved, volume(3)])
}

/// Kills the agent when this message arrives, done or not done by the peer; then all is as the
/// bundle of this epoch says, and the one after it can be applied.
fn killed_at(message: &str, handled: bool, epoch: u64) {
    let mut world = World::new();
    let bundles = [first(), second()];
    world.apply_fully(&bundles[0]);
    world.peers.halt = Some(Halt {
        at: message.to_owned(),
        handled,
    });
    let _client = world.send_apply(&signed(&bundles[1]), false);
    world.drive(message, |world| world.peers.halted);
    world.kill();
    world.peers.halt = None;
    world.start();
    world.settle(epoch);
    // Listeners that go are the last step of a pass.
    world.drive_for(Duration::from_millis(100));
    let index = usize::try_from(epoch - 1).expect("small");
    is_what_it_says(&world, &bundles[index]);
    let third = bundle(3, vec![volume(3)]);
    world.apply_fully(&third);
    is_what_it_says(&world, &third);
}

#[test]
fn killed_while_removals_are_prepared() {
    killed_at("dataplane prepare 1", false, 1);
    killed_at("dataplane prepare 1", true, 1);
    killed_at("dataplane prepare 2", true, 1);
}

#[test]
fn killed_while_keyd_is_asked() {
    // keyd accepted, or is asked again after the restart: the operator's word stands either way.
    killed_at("keyd accept 2", true, 2);
    killed_at("keyd accept 2", false, 2);
}

#[test]
fn killed_while_listeners_change() {
    killed_at("rot bind vm1 0:0 660", false, 2);
    killed_at("rot bind vm1 0:0 660", true, 2);
    killed_at("rot bind vm3", true, 2);
}

#[test]
fn killed_while_volumes_move() {
    killed_at("dataplane detach 1", false, 2);
    killed_at("dataplane detach 1", true, 2);
    killed_at("dataplane attach 1", false, 2);
    killed_at("dataplane attach 3", true, 2);
}

#[test]
fn killed_before_the_last_step() {
    killed_at("rot unbind vm2", false, 2);
    killed_at("rot unbind vm2", true, 2);
}

#[test]
fn killed_while_a_volume_grows() {
    for handled in [false, true] {
        let mut world = World::new();
        world.apply_fully(&first());
        world.peers.connected.insert(id(1));
        world.make_file("disk1.img", 2 * SIZE_BYTES);
        let mut grown = encrypted(1);
        grown.size_bytes *= 2;
        let second = bundle(2, vec![grown, volume(2)]);
        world.peers.halt = Some(Halt {
            at: "keyd accept 2".to_owned(),
            handled,
        });
        let _client = world.send_apply(&signed(&second), false);
        world.drive("accept", |world| world.peers.halted);
        world.kill();
        world.peers.halt = None;
        world.start();
        world.settle(2);
        is_what_it_says(&world, &second);
        assert_eq!(world.peers.granted[&id(1)].size_bytes, 2 * SIZE_BYTES);
        assert!(world.peers.connected.contains(&id(1)), "{handled}");
        assert_eq!(world.count("dataplane detach"), 0, "{handled}");
    }
}

#[test]
fn a_growth_that_the_data_plane_refuses_waits_for_its_file() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.connected.insert(id(1));
    world.make_file("disk1.img", 2 * SIZE_BYTES);
    // The agent saw it long enough; the data plane, a moment later, does not.
    world.peers.too_short.insert(id(1));
    let mut grown = encrypted(1);
    grown.size_bytes *= 2;
    let second = bundle(2, vec![grown, volume(2)]);
    let AdminReply::Applied { pending, .. } = world.apply(&signed(&second)) else {
        panic!("not applied");
    };
    assert!(
        pending.iter().any(|line| line.contains("disk1: ")),
        "{pending:?}"
    );
    assert!(world.peers.connected.contains(&id(1)));
    world.peers.too_short.clear();
    world.settle(2);
    assert_eq!(world.peers.granted[&id(1)].size_bytes, 2 * SIZE_BYTES);
    assert!(world.peers.connected.contains(&id(1)));
}

#[test]
fn a_candidate_that_keyd_refuses_after_a_restart_is_dropped() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.halt = Some(Halt {
        at: "keyd accept 2".to_owned(),
        handled: false,
    });
    let _client = world.send_apply(&signed(&second()), false);
    world.drive("accept", |world| world.peers.halted);
    world.kill();
    assert!(world.path("state/candidate.cose").exists());
    world.peers.halt = None;
    // keyd has accepted something else meanwhile, far above.
    let last_digest = world.peers.last_digest;
    world.peers.floor = 7;
    world.start();
    world.settle(1);
    assert!(!world.path("state/candidate.cose").exists());
    assert_eq!(world.peers.last_digest, last_digest);
    assert!(world.peers.prepared.is_empty());
}

#[test]
fn a_restarted_agent_disturbs_nobody() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.connected.extend([id(1), id(2)]);
    let inodes = world.peers.inodes();
    world.kill();
    world.peers.log.clear();
    world.start();
    world.settle(1);
    assert_eq!(world.peers.inodes(), inodes);
    assert_eq!(world.peers.connected.len(), 2);
    let disturbing = [
        "dataplane detach",
        "dataplane prepare",
        "rot unbind",
        "dataplane attach",
    ];
    for line in disturbing {
        assert_eq!(world.count(line), 0, "{:?}", world.peers.log);
    }
}

#[test]
fn a_new_data_plane_gets_grants_and_volumes_again() {
    let mut world = World::new();
    world.apply_fully(&first());
    let inodes = world.peers.inodes();
    for _ in 0..2 {
        world.dataplane = None;
        world.peers.dataplane_died();
        world.peers.log.clear();
        world.announce(Role::Dataplane);
        world.settle(1);
        assert_eq!(world.peers.inodes(), inodes);
        assert_eq!(world.count("keyd accept 1"), 1);
        assert_eq!(world.count("rot"), 0, "the listeners are rot's and stay");
    }
}

#[test]
fn a_new_data_plane_gets_its_volumes_from_an_agent_that_is_new_too() {
    let mut world = World::new();
    world.apply_fully(&first());
    let inodes = world.peers.inodes();
    world.kill();
    world.peers.dataplane_died();
    world.start();
    world.settle(1);
    assert_eq!(world.peers.inodes(), inodes);
}

#[test]
fn a_new_keyd_is_asked_again_and_volumes_stay() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.connected.insert(id(1));
    world.peers.log.clear();
    world.keyd = None;
    world.announce(Role::Keyd);
    world.drive("accept", |world| world.count("keyd accept 1") == 1);
    world.settle(1);
    assert_eq!(world.count("dataplane attach"), 0);
    assert!(world.peers.connected.contains(&id(1)));
}

#[test]
fn keyd_that_dies_while_it_is_asked_is_asked_again() {
    let mut world = World::new();
    world.apply_fully(&first());
    for handled in [false, true] {
        let epoch = if handled { 3 } else { 2 };
        let mut bundle = second();
        bundle.epoch = epoch;
        world.peers.halted = false;
        world.peers.halt = Some(Halt {
            at: format!("keyd accept {epoch}"),
            handled,
        });
        let client = world.send_apply(&signed(&bundle), false);
        world.drive("accept", |world| world.peers.halted);
        world.peers.halt = None;
        world.keyd = None;
        world.drive_for(Duration::from_millis(50));
        world.announce(Role::Keyd);
        let reply = world.reply(&client);
        assert!(matches!(reply, AdminReply::Applied { pending, .. } if pending.is_empty()));
        is_what_it_says(&world, &bundle);
    }
}

#[test]
fn a_silent_keyd_leaves_the_bundle_open_until_it_says() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.halt = Some(Halt {
        at: "keyd accept 2".to_owned(),
        handled: true,
    });
    let reply = world.apply(&signed(&second()));
    let AdminReply::Open { reason } = reply else {
        panic!("{reply:?}")
    };
    assert!(
        reason.contains("whether it accepted epoch 2 is not known"),
        "{reason}"
    );
    // Until that is known, nothing else is taken, and the host is as before.
    let reply = world.apply(&signed(&bundle(3, vec![volume(3)])));
    let AdminReply::Refused { reason } = reply else {
        panic!("{reply:?}")
    };
    assert!(reason.contains("keyd has not said yet whether"), "{reason}");
    assert_eq!(world.status().epoch, Some(1));
    world.peers.halt = None;
    world.keyd = None;
    world.announce(Role::Keyd);
    world.settle(2);
    world.drive_for(Duration::from_millis(100));
    is_what_it_says(&world, &second());
}

#[test]
fn a_data_plane_that_dies_while_removals_are_prepared_refuses_the_bundle() {
    let mut world = World::new();
    world.apply_fully(&first());
    world.peers.halt = Some(Halt {
        at: "dataplane prepare".to_owned(),
        handled: false,
    });
    let client = world.send_apply(&signed(&second()), false);
    world.drive("prepare", |world| world.peers.halted);
    world.peers.halt = None;
    world.dataplane = None;
    world.peers.dataplane_died();
    let reply = world.reply(&client);
    assert!(
        matches!(&reply, AdminReply::Refused { reason } if reason.contains("ended meanwhile")),
        "{reply:?}"
    );
    // Whether anything is in use can't be asked without a data plane.
    let reply = world.apply(&signed(&second()));
    assert!(
        matches!(&reply, AdminReply::Refused { reason } if reason.contains("can't be asked")),
        "{reply:?}"
    );
    world.announce(Role::Dataplane);
    world.settle(1);
    world.apply_fully(&second());
}

#[test]
fn a_bundle_is_taken_without_a_data_plane_and_completed_with_it() {
    let mut world = World::new();
    world.dataplane = None;
    world.peers.undelivered.insert(id(1).into());
    world.drive_for(Duration::from_millis(50));
    let reply = world.apply(&signed(&bundle(1, vec![volume(1)])));
    let AdminReply::Applied { pending, .. } = reply else {
        panic!("{reply:?}")
    };
    assert!(
        pending
            .iter()
            .any(|line| line.contains("the data plane is not there")),
        "{pending:?}"
    );
    assert_eq!(world.status().pending, pending);
    world.peers.undelivered.clear();
    world.announce(Role::Dataplane);
    world.settle(1);
}

#[test]
fn what_fails_is_pending_and_tried_again() {
    let mut world = World::new();
    world.peers.refuse_attach = 1;
    let reply = world.apply(&signed(&first()));
    let AdminReply::Applied { pending, .. } = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(
        pending,
        ["volume disk1: attach: the file has no blocks today"]
    );
    let status = world.status();
    assert_eq!(status.pending, pending);
    assert_eq!(status.epoch, Some(1));
    assert!(
        world.peers.attached.contains_key(&id(2)),
        "the other is served"
    );
    world.settle(1);
    is_what_it_says(&world, &first());
}

#[test]
fn a_grant_that_did_not_arrive_is_asked_for_again() {
    let mut world = World::new();
    world.peers.undelivered.insert(id(2).into());
    let reply = world.apply(&signed(&first()));
    let AdminReply::Applied { pending, .. } = reply else {
        panic!("{reply:?}")
    };
    assert!(
        pending[0].contains("disk2: the data plane did not answer"),
        "{pending:?}"
    );
    assert!(world.peers.attached.contains_key(&id(1)));
    world.peers.undelivered.clear();
    world.settle(1);
}

#[test]
fn a_damaged_state_is_named_and_not_started_from() {
    for (file, damage) in [
        (
            "accepted.cose",
            "it is not the envelope that the floor names",
        ),
        ("floor", "its text is not what the agent writes"),
        ("unfinished", "its text is not what the agent writes"),
    ] {
        let mut world = World::new();
        world.apply_fully(&first());
        let path = world.path("state").join(file);
        let mut bytes = std::fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes.truncate(middle);
        std::fs::write(&path, bytes).expect("write");
        let log = start_in_vain(&mut world);
        for words in [damage, path.to_str().expect("text"), "restore"] {
            assert!(log.contains(words), "{words:?} is not in {log}");
        }
    }
}

#[test]
fn a_commit_cut_off_between_its_two_writes_is_completed() {
    let mut world = World::new();
    world.apply_fully(&first());
    let before = std::fs::read(world.path("state/accepted.cose")).expect("read");
    world.apply_fully(&second());
    world.kill();
    // The floor names the new envelope; the rename to its place is missing.
    let accepted = world.path("state/accepted.cose");
    std::fs::rename(&accepted, world.path("state/candidate.cose")).expect("rename");
    std::fs::write(&accepted, &before).expect("write");
    world.start();
    world.settle(2);
    is_what_it_says(&world, &second());
    assert!(!world.path("state/candidate.cose").exists());
    // A candidate that is not above the floor was refused long ago.
    world.kill();
    std::fs::write(world.path("state/candidate.cose"), &before).expect("write");
    world.start();
    world.settle(2);
    is_what_it_says(&world, &second());
    assert!(!world.path("state/candidate.cose").exists());
}

#[test]
fn a_floor_of_another_epoch_than_its_bundle_is_damaged() {
    let mut world = World::new();
    world.apply_fully(&first());
    let path = world.path("state/floor");
    let text = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, text.replace("epoch 1", "epoch 0")).expect("write");
    let log = start_in_vain(&mut world);
    assert!(
        log.contains("it says epoch 0, the accepted bundle 1"),
        "{log}"
    );
}

#[test]
fn a_trust_root_that_no_longer_takes_the_bundle_is_named() {
    let mut world = World::new();
    world.apply_fully(&first());
    let others = vec![mallory().public().clone()];
    let root = bulkhead_bundle::TrustRoot::new(others, 1).expect("consistent");
    std::fs::write(world.path("trust.toml"), root.to_text()).expect("write");
    let log = start_in_vain(&mut world);
    for words in ["refused now", "unknown key", "was the trust root changed?"] {
        assert!(log.contains(words), "{words:?} is not in {log}");
    }
}

#[test]
fn a_floor_outlives_the_bundle_it_came_from() {
    let mut world = World::new();
    world.apply_fully(&bundle(4, vec![volume(1)]));
    world.kill();
    std::fs::remove_file(world.path("state/accepted.cose")).expect("remove");
    world.start();
    let status = world.status();
    assert_eq!((status.epoch, status.epoch_floor), (None, 4));
    let reply = world.apply(&signed(&bundle(4, vec![volume(2)])));
    assert!(
        matches!(&reply, AdminReply::Refused { reason } if reason.contains("not above the floor 4")),
        "{reply:?}"
    );
}

#[test]
fn stop_ends_the_agent_in_good_order() {
    let mut world = World::new();
    world
        .rot
        .send(&bulkhead_protocol::rot::FromRot::Stop, &[])
        .expect("send");
    assert_eq!(world.exit_code(), Some(0));
}
