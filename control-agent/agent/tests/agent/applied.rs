//! Bundles that are applied: the steps in their order, as the peers see them, and no more of them
//! than the change needs.

use bulkhead_bundle::Group;
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::limits::{Limits, Rate};
use bulkhead_protocol::workers::Workers;

use crate::bundles::{SIZE_BYTES, bundle, encrypted, id, signed, volume};
use crate::world::World;

/// What the peers saw since the last time.
fn seen(world: &mut World) -> Vec<String> {
    world.serve();
    std::mem::take(&mut world.peers.log)
}

#[test]
fn first_bundle_in_order() {
    let mut world = World::new();
    seen(&mut world);
    let steps = world.apply_fully(&bundle(1, vec![volume(1), encrypted(2)]));
    assert_eq!(
        seen(&mut world),
        [
            "keyd accept 1",
            "rot bind vm1 0:0 600",
            "rot bind vm2 0:0 600",
            "dataplane status",
            "dataplane attach 1 vm1",
            "dataplane attach 2 vm2",
        ]
    );
    for line in [
        "verified: signed by alice",
        "volume disk1: added, file disk1.img, listener vm1",
        "accepted by keyd",
        "kept as the bundle in force",
    ] {
        assert!(steps.iter().any(|step| step == line), "{line}: {steps:?}");
    }
    let status = world.settle(1);
    assert_eq!((status.epoch_floor, status.host.as_str()), (1, "host-a"));
    assert_eq!(status.processes.len(), 2);
    let first = &status.volumes[0];
    assert!(first.socket_path.ends_with("run/vm1.sock"), "{first:?}");
    let state = first.state.as_ref().expect("the data plane answered");
    assert_eq!(state.requests_ok, 7);
    // A peer's words can't drive the operator's terminal.
    assert_eq!(state.fault.as_deref(), Some("a fault [2J"));
    let workers = status.workers.as_deref().expect("it said so");
    assert_eq!(workers.problem.as_deref(), Some("no CPU [2J"));
}

#[test]
fn limits_and_groups_change_beneath_a_connected_guest_and_are_told() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1), volume(2)]));
    world.peers.connected.extend([id(1), id(2)]);
    seen(&mut world);
    let mut limited = bundle(2, vec![volume(1), volume(2)]);
    let group = Group {
        name: "tenant-a".parse().expect("a name"),
        limits: Limits {
            requests: Some(Rate::with_default_burst(5000)),
            bytes: None,
        },
    };
    limited.volumes[0].group = Some(group.name.clone());
    limited.volumes[1].limits = group.limits;
    limited.groups = vec![group.clone()];
    limited.workers = Workers::new(Some(2), Vec::new()).ok();
    let steps = world.apply_fully(&limited);
    assert_eq!(seen(&mut world), ["keyd accept 2", "dataplane status"]);
    for line in [
        "volume disk1: limits none, group tenant-a; its frontend stays",
        "volume disk2: limits 5000 requests/s (burst 500); its frontend stays",
        "group tenant-a: limits 5000 requests/s (burst 500)",
        "workers: 2",
    ] {
        assert!(steps.iter().any(|step| step == line), "{line}: {steps:?}");
    }
    let status = world.settle(2);
    let [first, second] = &status.volumes[..] else {
        panic!("{status:?}");
    };
    assert_eq!(first.group.as_ref(), Some(&group.name));
    assert_eq!(
        (first.limits, second.limits),
        (Limits::default(), group.limits)
    );
    assert_eq!(status.groups[0].name, group.name);
    assert_eq!(world.peers.connected.len(), 2, "nobody was detached");
}

#[test]
fn the_rest_goes_on_undisturbed_when_one_volume_is_replaced() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1), volume(2)]));
    world.peers.connected.insert(id(2));
    seen(&mut world);
    world.apply_fully(&bundle(2, vec![volume(2), volume(3)]));
    assert_eq!(
        seen(&mut world),
        [
            "dataplane status",
            "dataplane prepare 1 force=false",
            "keyd accept 2",
            "rot bind vm3 0:0 600",
            "dataplane status",
            "dataplane attach 3 vm3",
            "rot unbind vm1",
        ]
    );
    assert!(world.peers.connected.contains(&id(2)));
}

#[test]
fn a_file_is_the_data_planes_alone_and_another_hosts_lock_does_not_matter() {
    let mut world = World::new();
    // Another host's data plane serves the volume until its guest has migrated.
    let other = std::fs::File::open(world.path("volumes/disk1.img")).expect("open");
    other.lock().expect("lock");
    world.apply_fully(&bundle(1, vec![volume(1), volume(2)]));
    let held = std::fs::read_dir(format!("/proc/{}/fd", world.pid())).expect("list");
    let held: Vec<_> = held
        .filter_map(|entry| std::fs::read_link(entry.expect("entry").path()).ok())
        .filter(|target| target.to_string_lossy().ends_with(".img"))
        .collect();
    assert!(held.is_empty(), "the agent still holds {held:?}");
    // What the data plane locks is free as soon as it has closed it.
    let file = &world.peers.attached[&id(2)];
    file.try_lock().expect("nobody else has a lock");
    world.peers.attached.remove(&id(2));
    let file = std::fs::File::open(world.path("volumes/disk2.img")).expect("open");
    file.try_lock().expect("the lock went with the descriptor");
}

#[test]
fn a_volume_grows_while_its_frontend_is_connected() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1), volume(2)]));
    world.peers.connected.insert(id(1));
    world.make_file("disk1.img", 2 * SIZE_BYTES);
    seen(&mut world);
    let mut grown = encrypted(1);
    grown.size_bytes *= 2;
    let next = bundle(2, vec![grown, volume(2)]);
    let client = world.send_apply(&signed(&next), true);
    let AdminReply::Applied { steps, .. } = world.reply(&client) else {
        panic!("the dry run was refused");
    };
    assert_eq!(
        steps,
        [
            "volume disk1: grows from 1048576 to 2097152 bytes; its frontend stays",
            "1 volume goes on undisturbed",
        ]
    );
    assert!(seen(&mut world).is_empty());
    world.apply_fully(&next);
    assert_eq!(seen(&mut world), ["keyd accept 2", "dataplane status"]);
    assert!(world.peers.connected.contains(&id(1)));
}

#[test]
fn a_volume_grows_and_moves_to_another_file_at_once() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    world.make_file("disk4.img", 2 * SIZE_BYTES);
    seen(&mut world);
    // The file that it has is too short for the grant.
    world.peers.too_short.insert(id(1));
    let mut moved = encrypted(1);
    (moved.size_bytes, moved.path) = (2 * SIZE_BYTES, "disk4.img".to_owned());
    world.apply_fully(&bundle(2, vec![moved]));
    assert_eq!(
        seen(&mut world),
        [
            "dataplane status",
            "dataplane prepare 1 force=false",
            "keyd accept 2",
            "keyd accept 2",
            "dataplane status",
            "dataplane detach 1",
            "keyd accept 2",
            "dataplane status",
            "dataplane attach 1 vm1",
            "dataplane cancel 1",
        ]
    );
    assert_eq!(world.peers.inodes()[&id(1)], world.inode("disk4.img"));
}

#[test]
fn a_volume_whose_storage_hangs_moves_when_its_requests_have_ended() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    world.make_file("disk4.img", SIZE_BYTES);
    world.peers.hung.insert(id(1), 12);
    let mut moved = encrypted(1);
    (moved.path, moved.force_removal) = ("disk4.img".to_owned(), true);
    let reply = world.apply(&signed(&bundle(2, vec![moved])));
    let AdminReply::Applied { pending, .. } = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(
        pending,
        ["volume disk1: attach: 12 requests still with the kernel"]
    );
    assert!(world.peers.attached.is_empty());
    world.peers.hung.clear();
    world.settle(2);
    assert_eq!(world.peers.inodes()[&id(1)], world.inode("disk4.img"));
}

#[test]
fn a_removed_volume_whose_storage_hangs_stays_in_the_status() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1), encrypted(2)]));
    world.peers.hung.insert(id(1), 12);
    world.apply_fully(&bundle(2, vec![encrypted(2)]));
    let pending = world.status().pending;
    let line = format!("volume {} was removed: given up: 12 requests", id(1));
    assert!(
        matches!(&pending[..], [only] if only.starts_with(&line)),
        "{pending:?}"
    );
    world.peers.hung.clear();
    assert_eq!(world.status().pending, Vec::<String>::new());
}

#[test]
fn a_volume_whose_grant_changes_is_attached_again() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1)]));
    seen(&mut world);
    let mut changed = volume(1);
    changed.queues = 4;
    changed.socket.mode = 0o660;
    world.apply_fully(&bundle(2, vec![changed]));
    assert_eq!(
        seen(&mut world),
        [
            "dataplane status",
            "dataplane prepare 1 force=false",
            "keyd accept 2",
            "rot bind vm1 0:0 660",
            "dataplane status",
            "dataplane attach 1 vm1",
            "dataplane cancel 1",
        ]
    );
}

#[test]
fn a_volume_that_moves_to_another_file_is_detached_by_the_agent() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    seen(&mut world);
    let mut moved = encrypted(1);
    moved.path = world.path("volumes/disk4.img").display().to_string();
    world.apply_fully(&bundle(2, vec![moved]));
    assert_eq!(
        seen(&mut world),
        [
            "dataplane status",
            "dataplane prepare 1 force=false",
            "keyd accept 2",
            "dataplane status",
            "dataplane detach 1",
            // The detach wiped its key.
            "keyd accept 2",
            "dataplane status",
            "dataplane attach 1 vm1",
            "dataplane cancel 1",
        ]
    );
    assert_eq!(world.peers.inodes()[&id(1)], world.inode("disk4.img"));
    assert!(world.peers.prepared.is_empty());
}

#[test]
fn two_volumes_exchange_their_files() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1), volume(2)]));
    let (mut one, mut two) = (volume(1), volume(2));
    (one.path, two.path) = (two.path, one.path);
    // One of them even changes how its file is opened.
    one.read_only = true;
    world.apply_fully(&bundle(2, vec![one, two]));
    let inodes = world.peers.inodes();
    assert_eq!(inodes[&id(1)], world.inode("disk2.img"));
    assert_eq!(inodes[&id(2)], world.inode("disk1.img"));
}

#[test]
fn names_and_sealed_keys_change_without_a_detach() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    world.peers.connected.insert(id(1));
    seen(&mut world);
    let mut changed = encrypted(1);
    changed.name = "renamed".to_owned();
    changed.force_removal = true;
    changed.sealed_keys[0].ciphertext = vec![9; 80];
    world.apply_fully(&bundle(2, vec![changed]));
    assert_eq!(seen(&mut world), ["keyd accept 2", "dataplane status"]);
    assert!(world.peers.connected.contains(&id(1)));
    assert_eq!(world.status().volumes[0].name, "renamed");
}

#[test]
fn in_use_is_removed_with_force() {
    let mut world = World::new();
    let mut forced = volume(2);
    forced.force_removal = true;
    world.apply_fully(&bundle(1, vec![volume(1), forced]));
    world.peers.connected.extend([id(1), id(2)]);
    seen(&mut world);
    let mut next = bundle(2, vec![volume(3)]);
    next.force_remove = vec![id(1)];
    world.apply_fully(&next);
    let log = seen(&mut world);
    assert_eq!(log[1], "dataplane prepare 1 force=true");
    assert_eq!(log[2], "dataplane prepare 2 force=true");
    assert_eq!(world.peers.attached.len(), 1);
}

#[test]
fn what_is_shredded_goes_although_it_is_in_use_and_the_status_tells_of_it() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1), volume(2)]));
    assert_eq!(world.status().keys.expect("told").shreds, []);
    world.peers.connected.extend([id(1), id(2)]);
    seen(&mut world);
    let mut next = bundle(2, vec![volume(2)]);
    next.shred = vec![id(1), id(7)];
    let envelope = signed(&next);
    let told = [
        "volume disk1 (01010101-0101-0101-0101-010101010101): SHREDDED, its key is destroyed for ever",
        "volume 07070707-0707-0707-0707-070707070707: SHREDDED, its key is destroyed for ever",
        "host key: replaced, and the old one destroyed",
        "volume disk1: removed",
        "listener vm1: removed",
        "1 volume goes on undisturbed",
    ];
    let client = world.send_apply(&envelope, true);
    match world.reply(&client) {
        AdminReply::Applied { steps, .. } => assert_eq!(steps, told),
        other => panic!("{other:?}"),
    }
    match world.apply(&envelope) {
        AdminReply::Applied { steps, pending, .. } => {
            assert_eq!(steps[1..=told.len()], told);
            let key = format!("host key {} destroyed", "01".repeat(48));
            assert!(steps.iter().any(|s| s.starts_with(&key)), "{steps:?}");
            assert_eq!(pending, Vec::<String>::new());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(seen(&mut world)[1], "dataplane prepare 1 force=true");
    let keys = world.status().keys.expect("told");
    assert_eq!((keys.shreds.len(), keys.shreds[0].volume), (2, id(1)));
    // What is shredded already is nothing to do: the list may stay in the source.
    next.epoch = 3;
    let client = world.send_apply(&signed(&next), true);
    match world.reply(&client) {
        AdminReply::Applied { steps, .. } => assert_eq!(steps, told[5..]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_same_envelope_again_changes_nothing() {
    let mut world = World::new();
    let envelope = signed(&bundle(1, vec![volume(1)]));
    world.apply(&envelope);
    let before = world.snapshot();
    seen(&mut world);
    match world.apply(&envelope) {
        AdminReply::Applied { steps, pending, .. } => {
            assert!(steps[0].contains("in force already"), "{steps:?}");
            assert!(pending.is_empty());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(seen(&mut world), Vec::<String>::new());
    assert_eq!(world.snapshot(), before);
}

#[test]
fn dry_run_tells_the_plan_and_does_nothing() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![volume(1)]));
    let before = world.snapshot();
    seen(&mut world);
    let client = world.send_apply(&signed(&bundle(2, vec![volume(2)])), true);
    match world.reply(&client) {
        AdminReply::Applied { epoch, steps, .. } => {
            assert_eq!(epoch, 2);
            assert_eq!(
                steps,
                [
                    "volume disk1: removed",
                    "volume disk2: added, file disk2.img, listener vm2",
                    "listener vm2: bound",
                    "listener vm1: removed",
                ]
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(seen(&mut world), Vec::<String>::new());
    assert_eq!(world.snapshot(), before);
    // And it does refuse what would be refused.
    let client = world.send_apply(&signed(&bundle(1, vec![volume(2)])), true);
    assert!(matches!(world.reply(&client), AdminReply::Refused { .. }));
}

#[test]
fn a_relative_path_is_found_in_the_first_directory_that_has_it() {
    let mut world = World::new();
    let elsewhere = world.path("other/deep.img");
    std::fs::File::create(&elsewhere)
        .and_then(|file| file.set_len(crate::bundles::SIZE_BYTES))
        .expect("file");
    let mut deep = volume(1);
    deep.path = "deep.img".to_owned();
    world.apply_fully(&bundle(1, vec![deep]));
    let inode = std::os::unix::fs::MetadataExt::ino(&elsewhere.metadata().expect("stat"));
    assert_eq!(world.peers.inodes()[&id(1)], inode);
}

#[test]
fn the_agent_is_locked_in() {
    let world = World::new();
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.pid()));
    let status = status.expect("status");
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "Threads:\t1",
    ] {
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
}
