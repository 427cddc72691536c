//! Which releases keyd approves: those that operators signed, and none older than what ran.

use bulkhead_bundle::{OperatorKey, ReleaseStatement, sign_release};
use bulkhead_protocol::Received;
use bulkhead_protocol::keys::KeydToAgent;
use bulkhead_protocol::release::{Component, Release};
use bulkhead_protocol::rot::{FromRot, ToRot};

use crate::bundles::{alice, bundle, mallory, plain, signed};
use crate::host::{Host, next};

fn release(version: u64, byte: u8) -> Release {
    Release {
        component: Component::Dataplane,
        version,
        measurement: [byte; 48].into(),
    }
}

fn statement(release: Release, key: &OperatorKey) -> Vec<u8> {
    let statement = ReleaseStatement {
        component: release.component.to_string(),
        version: release.version,
        name: "a-name".to_owned(),
        sha384: release.measurement,
    };
    sign_release(&statement, &[key]).expect("signed")
}

/// Asks, and expects that rot hears of it before the agent does.
#[track_caller]
fn approved(host: &mut Host, release: Release) {
    host.ask_release(&statement(release, alice()));
    let told: Received<ToRot> = next(&host.rot).expect("rot is told");
    assert_eq!(told.message, ToRot::Approve { release });
    match host.answer() {
        KeydToAgent::ReleaseApproved { release: said, .. } => assert_eq!(said, release),
        other => panic!("not approved: {other:?}"),
    }
}

#[track_caller]
fn refused(host: &mut Host, statement: &[u8], why: &str) {
    host.ask_release(statement);
    let reason = host.refusal();
    assert!(reason.contains(why), "{reason}");
}

fn runs(host: &Host, release: Release) {
    host.rot
        .send(&FromRot::Runs { release }, &[])
        .expect("send");
}

#[test]
fn a_signed_release_is_approved_to_rot() {
    let mut host = Host::new();
    approved(&mut host, release(7, 1));
    // What was approved and never ran keeps nobody from another.
    approved(&mut host, release(6, 2));
}

#[test]
fn refused_what_others_signed_what_was_changed_and_what_is_no_release() {
    let mut host = Host::new();
    refused(
        &mut host,
        &statement(release(1, 1), mallory()),
        "unknown key",
    );
    let mut changed = statement(release(1, 1), alice());
    let at = changed
        .windows(48)
        .position(|w| w == [1; 48])
        .expect("the digest");
    changed[at] ^= 1;
    refused(&mut host, &changed, "was changed");
    refused(
        &mut host,
        &signed(&bundle(1, vec![plain(1)])),
        "content type",
    );
    refused(&mut host, b"", "malformed");
    // And a release statement applies no bundle.
    host.ask(&statement(release(1, 1), alice()));
    assert!(host.refusal().contains("content type"));
}

#[test]
fn refused_older_than_what_ran_also_after_a_restart() {
    let mut host = Host::new();
    approved(&mut host, release(7, 1));
    runs(&host, release(7, 1));
    let older = statement(release(6, 1), alice());
    // rot's word comes over another channel than the agent's: wait for its effect.
    let kept = || std::fs::read_to_string(host.path("keyd/releases")).is_ok();
    let end = std::time::Instant::now() + crate::host::PATIENCE;
    while !kept() {
        assert!(std::time::Instant::now() < end, "it is not kept");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    refused(&mut host, &older, "older than 7");
    host.start();
    host.connect();
    refused(&mut host, &older, "older than 7");
    refused(&mut host, &statement(release(7, 2), alice()), "other bytes");
    approved(&mut host, release(7, 1));
    approved(&mut host, release(8, 2));
    host.kill();
    std::fs::write(host.path("keyd/releases"), "").expect("write");
    assert!(host.start_in_vain().contains("releases is damaged"));
}
