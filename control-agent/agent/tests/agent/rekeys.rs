//! A volume whose key takes the place of another: what is refused by the record in its file, and that
//! nobody is detached.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use bulkhead_protocol::RekeyId;
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::rekey::{Record, Stage, layout, prepared};
use bulkhead_protocol::rot::Role;

use crate::bundles::{SIZE_BYTES, bundle, encrypted, id, rekeyed, signed, volume};
use crate::world::World;

/// Writes the record of volume 1 as the command line and the data plane do.
fn record(world: &World, stage: Stage) {
    let path = world.path("volumes/disk1.img");
    let file = File::options().write(true).open(path).expect("open");
    let layout = layout(SIZE_BYTES).expect("a layout");
    let rekey = RekeyId([0xc1; 16]);
    file.set_len(layout.end).expect("size");
    file.write_all_at(&prepared(id(1), rekey, SIZE_BYTES, 512), layout.copies[0])
        .expect("write");
    let record = Record {
        volume: id(1),
        rekey,
        size_bytes: SIZE_BYTES,
        data_unit_bytes: 512,
        sequence: 4,
        stage,
    };
    file.write_all_at(&record.encode(), layout.copy_for(4))
        .expect("write");
}

/// The answer to a bundle, and to a dry run of it.
fn refused(world: &mut World, envelope: &[u8], says: &str) {
    let before = world.snapshot();
    for dry_run in [true, false] {
        let client = world.send_apply(envelope, dry_run);
        match world.reply(&client) {
            AdminReply::Refused { reason } => assert!(reason.contains(says), "{reason}"),
            other => panic!("not refused: {other:?}"),
        }
        assert_eq!(world.snapshot(), before);
    }
}

#[test]
fn a_rekey_begins_and_ends_while_a_frontend_is_connected() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    world.peers.connected.insert(id(1));
    let begins = bundle(2, vec![rekeyed(1)]);
    refused(
        &mut world,
        &signed(&begins),
        "volume disk1: its file is not prepared for the re-key c1c1",
    );
    record(&world, Stage::Prepared);
    world.peers.log.clear();
    let steps = world.apply_fully(&begins);
    let says = "volume disk1: gets another key (re-key c1c1c1c1-c1c1-c1c1-c1c1-c1c1c1c1c1c1), while it \
                is served; its frontend stays";
    assert!(steps.contains(&says.to_owned()), "{steps:?}");
    assert!(world.peers.granted[&id(1)].rekey.is_some());

    let ends = signed(&bundle(3, vec![encrypted(1)]));
    record(
        &world,
        Stage::Running {
            frontier_bytes: SIZE_BYTES / 4,
            zone: None,
            previous_check: [1; 16],
            check: [2; 16],
        },
    );
    refused(&mut world, &ends, "is not done, it is at 25 %");
    record(&world, Stage::Done { check: [2; 16] });
    let steps = world.apply_fully(&bundle(3, vec![encrypted(1)]));
    let says = "volume disk1: its previous key is dropped; its frontend stays";
    assert!(steps.contains(&says.to_owned()), "{steps:?}");
    assert!(world.peers.granted[&id(1)].rekey.is_none());
    assert!(world.peers.connected.contains(&id(1)));
    for disturbance in ["dataplane detach", "dataplane prepare", "dataplane attach"] {
        assert_eq!(world.count(disturbance), 0, "{:?}", world.peers.log);
    }
}

#[test]
fn why_a_rekey_stopped_is_shown_and_can_not_drive_the_terminal() {
    let mut world = World::new();
    record(&world, Stage::Prepared);
    world.apply_fully(&bundle(1, vec![rekeyed(1)]));
    world.peers.rekey_fault = Some("at byte 7: it broke\x1b[2J".to_owned());
    let status = world.status();
    let state = status.volumes[0].state.as_ref().expect("a state");
    let shown = format!("{:?}", state.rekey);
    assert!(shown.contains("at byte 7: it broke [2J"), "{shown}");
}

#[test]
fn what_is_encrypted_under_a_key_is_counted_over_restarts() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1), volume(2)]));
    let shown = |world: &mut World| {
        let status = world.status();
        let entries = status.volumes.iter().map(|entry| entry.key_bytes);
        entries.collect::<Vec<_>>()
    };
    world.peers.written_bytes = 5000;
    // What was asked for when this status was put together is in it.
    assert_eq!(shown(&mut world), [Some(5000), None]);
    world.peers.written_bytes = 7000;
    assert_eq!(shown(&mut world), [Some(7000), None]);
    // Another data plane counts from zero; the total is kept when the first one goes.
    world.peers.written_bytes = 11;
    world.peers.dataplane_died();
    world.announce(Role::Dataplane);
    world.settle(1);
    assert_eq!(shown(&mut world), [Some(7011), None]);
    // Another agent takes up what was kept.
    world.start();
    world.settle(1);
    assert_eq!(shown(&mut world)[0], Some(7000 + 11));
    // Another key, under which the volume itself is written once.
    record(&world, Stage::Prepared);
    world.apply_fully(&bundle(2, vec![rekeyed(1), volume(2)]));
    assert_eq!(shown(&mut world)[0], Some(SIZE_BYTES));
}

#[test]
fn a_count_that_is_damaged_or_can_not_be_read_keeps_no_agent_from_starting() {
    let mut world = World::new();
    world.apply_fully(&bundle(1, vec![encrypted(1)]));
    let file = world.path("state/key-use");
    for damage in ["", "bulkhead agent key use v1\ndata", &"x".repeat(1 << 21)] {
        fs::write(&file, damage).expect("damage");
        world.start();
        world.settle(1);
    }
    fs::remove_file(&file).expect("remove");
    fs::create_dir(&file).expect("directory");
    world.start();
    assert_eq!(world.settle(1).epoch_floor, 1);
}
