//! Upgrades: keyd is asked before rot, the operator hears how it ended, and nobody waits for it.

use std::os::fd::AsFd;

use bulkhead_bundle::{OperatorKey, ReleaseStatement, sign_release};
use bulkhead_protocol::Channel;
use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::envelope::to_memfd;
use bulkhead_protocol::release::{Component, ProgramStatus, Release};
use bulkhead_protocol::rot::{FromRot, Role};

use crate::bundles::{alice, bundle, mallory, volume};
use crate::peers::Halt;
use crate::world::World;

fn release(component: Component) -> Release {
    Release {
        component,
        version: 41,
        measurement: [7; 48].into(),
    }
}

fn statement(component: Component, key: &OperatorKey) -> Vec<u8> {
    let statement = ReleaseStatement {
        component: component.to_string(),
        version: 41,
        name: "a-name".to_owned(),
        sha384: [7; 48].into(),
    };
    sign_release(&statement, &[key]).expect("signed")
}

fn ask(world: &World, statement: &[u8]) -> Channel {
    let client = world.connect();
    let fd = to_memfd(statement).expect("memfd");
    let sent = client.send(&AdminRequest::Upgrade, &[fd.as_fd()]);
    sent.expect("send");
    client
}

#[track_caller]
fn refused(world: &mut World, client: &Channel, why: &str) {
    match world.reply(client) {
        AdminReply::Refused { reason } => assert!(reason.contains(why), "{reason}"),
        other => panic!("not refused: {other:?}"),
    }
}

/// Halts rot at the request, which it neither carries out nor answers.
fn halt_rot(world: &mut World) {
    world.peers.halt = Some(Halt {
        at: "rot upgrade".to_owned(),
        handled: false,
    });
}

/// rot says something of the upgrade that it was asked for.
fn say(world: &World, message: impl Fn(u64) -> FromRot) {
    let message = message(world.peers.upgrade);
    world.rot.send(&message, &[]).expect("send");
}

#[test]
fn keyd_is_asked_first_and_the_operator_hears_of_the_end() {
    let mut world = World::new();
    let client = ask(&world, &statement(Component::Dataplane, alice()));
    let release = release(Component::Dataplane);
    assert_eq!(world.reply(&client), AdminReply::Upgraded { release });
    let asked = |line: &str| world.peers.log.iter().position(|l| l == line);
    let (check, upgrade) = (asked("keyd check release"), asked("rot upgrade dataplane"));
    assert!(check.expect("asked") < upgrade.expect("asked"));
}

#[test]
fn refused_by_keyd_and_never_asked_of_rot() {
    let mut world = World::new();
    let client = ask(&world, &statement(Component::Keyd, mallory()));
    refused(&mut world, &client, "unknown key");
    assert_eq!(world.count("rot upgrade"), 0);
    // The next is served all the same.
    let client = ask(&world, &statement(Component::Keyd, alice()));
    assert!(matches!(world.reply(&client), AdminReply::Upgraded { .. }));
}

#[test]
fn others_are_served_meanwhile_and_a_second_upgrade_is_refused() {
    let mut world = World::new();
    world.peers.halt = Some(Halt {
        at: "keyd check release".to_owned(),
        handled: false,
    });
    let first = ask(&world, &statement(Component::Dataplane, alice()));
    world.drive("the check", |world| world.count("keyd check release") == 1);
    world.status();
    let second = ask(&world, &statement(Component::Agent, alice()));
    refused(&mut world, &second, "another upgrade is under way");
    // keyd's answer never comes, since keyd ends.
    world.peers.halt = None;
    world.announce(Role::Keyd);
    refused(&mut world, &first, "keyd ended before it answered");
    world.apply_fully(&bundle(1, vec![volume(1)]));
}

#[test]
fn the_upgrade_of_the_agent_itself_is_answered_before_it_ends() {
    let mut world = World::new();
    halt_rot(&mut world);
    let client = ask(&world, &statement(Component::Agent, alice()));
    world.drive("the request", |world| world.count("rot upgrade agent") == 1);
    say(&world, |request_id| FromRot::Upgrading { request_id });
    let release = release(Component::Agent);
    assert_eq!(world.reply(&client), AdminReply::UpgradeBegun { release });
}

#[test]
fn a_failure_is_told_and_shown() {
    let mut world = World::new();
    halt_rot(&mut world);
    let client = ask(&world, &statement(Component::Dataplane, alice()));
    world.drive("the request", |world| world.count("rot upgrade") == 1);
    say(&world, |request_id| FromRot::Upgrading { request_id });
    let reason = "it ended\nearly".to_owned();
    let failed = |request_id| FromRot::Failed {
        request_id,
        reason: reason.clone(),
    };
    say(&world, failed);
    refused(&mut world, &client, "it ended early");
    let programs = vec![ProgramStatus {
        component: Component::Dataplane,
        measurement: [7; 48].into(),
        version: None,
        failed: Some(reason.clone()),
    }];
    world.peers.halt = None;
    world
        .rot
        .send(&FromRot::Programs { programs }, &[])
        .expect("send");
    let status = world.status();
    assert_eq!(status.programs[0].failed.as_deref(), Some("it ended early"));
}

#[test]
fn without_keyd_nothing_is_upgraded() {
    let mut world = World::new();
    world.keyd = None;
    world.drive_for(std::time::Duration::from_millis(20));
    let client = ask(&world, &statement(Component::Dataplane, alice()));
    refused(&mut world, &client, "keyd");
    assert_eq!(world.count("rot upgrade"), 0);
}
