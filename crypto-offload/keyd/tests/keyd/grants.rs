//! What an accepted bundle grants, and what it revokes.

use bulkhead_protocol::ServedId;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane, VolumeGrant};
use bulkhead_protocol::limits::Limits;
use bulkhead_sealing::RecipientKey;

use crate::bundles::{HOST, bundle, encrypted, id, now, plain, random_key, sealed, signed};
use crate::host::{Host, own_pidfd};

#[test]
fn a_grant_says_what_the_bundle_says_and_brings_the_key() {
    let (first, second) = (random_key(), random_key());
    let volumes = vec![encrypted(1, &first), plain(2), encrypted(3, &second)];
    let mut host = Host::new();
    let got = host.apply(&signed(&bundle(7, volumes.clone())), 3);
    let expected = volumes.iter().map(|volume| VolumeGrant {
        volume: volume.id,
        socket: volume.socket.name.clone(),
        allowed_uid: volume.allowed_uid,
        size_bytes: volume.size_bytes,
        logical_block_bytes: 4096,
        data_unit_bytes: volume.data_unit_bytes,
        read_only: volume.read_only,
        serial: volume.serial.clone(),
        queues: 3,
        discard: volume.discard,
        epoch: 7,
        rekey: None,
        limits: Limits::default(),
        group: None,
    });
    let keys = [Some(first), None, Some(second)];
    for ((delivered, grant), key) in got.iter().zip(expected).zip(keys) {
        assert_eq!(delivered.message, KeydToDataplane::Grant { grant });
        assert_eq!(delivered.key, key);
    }
    assert!(host.log().contains("bundle accepted"));
}

#[test]
fn more_volumes_than_are_asked_about_at_a_time() {
    let volumes: Vec<_> = (1..=60).map(plain).collect();
    let mut host = Host::new();
    let got = host.apply(&signed(&bundle(1, volumes)), 60);
    let order: Vec<_> = got.iter().map(|d| volume_of(&d.message)).collect();
    assert_eq!(order, (1..=60).map(id).collect::<Vec<_>>());
}

#[test]
fn what_a_bundle_leaves_out_is_revoked_first() {
    let mut host = Host::new();
    host.apply(&signed(&bundle(1, vec![plain(1), plain(2), plain(3)])), 3);
    let got = host.apply(&signed(&bundle(2, vec![plain(3), plain(4)])), 4);
    let revoked = |n| KeydToDataplane::Revoke { id: id(n).into() };
    assert_eq!(got[0].message, revoked(1));
    assert_eq!(got[1].message, revoked(2));
    let granted = [2, 3].map(|i| volume_of(&got[i].message));
    assert_eq!(granted, [id(3), id(4)]);
    // What was revoked is not revoked again.
    host.apply(&signed(&bundle(3, vec![plain(3)])), 2);
    host.apply(&signed(&bundle(4, vec![plain(3)])), 1);
}

#[test]
fn a_bundle_of_no_volumes_is_accepted() {
    let mut host = Host::new();
    host.apply(&signed(&bundle(1, Vec::new())), 0);
}

#[test]
fn the_bundle_accepted_last_is_granted_again_even_after_its_expiry() {
    let key = random_key();
    let mut short = bundle(5, vec![encrypted(1, &key)]);
    short.expires = now() + 2;
    let envelope = signed(&short);
    let mut host = Host::new();
    host.apply(&envelope, 1);
    let again = host.apply(&envelope, 1);
    assert_eq!(again[0].key, Some(key));
    while now() < short.expires {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let after = host.apply(&envelope, 1);
    assert_eq!(after[0].key, Some(key));
    assert!(host.log().contains("after its expiry"));
    // Expiry stops every other.
    let mut other = bundle(6, vec![plain(1)]);
    other.expires = short.expires;
    assert!(host.refuse(&signed(&other)).contains("expired"));
}

#[test]
fn a_key_that_does_not_open_leaves_its_volume_undelivered() {
    let good = random_key();
    let earlier = RecipientKey::generate(HOST).expect("key");
    let mut to_earlier = encrypted(2, &random_key());
    to_earlier.sealed_keys = vec![sealed(&random_key(), earlier.public(), &to_earlier)];
    let mut moved = encrypted(3, &random_key());
    moved.sealed_keys = encrypted(4, &random_key()).sealed_keys;
    let mut resized = encrypted(5, &random_key());
    resized.size_bytes *= 2;
    let mut host = Host::new();
    let volumes = vec![to_earlier, moved, resized, encrypted(1, &good)];
    host.ask(&signed(&bundle(1, volumes)));
    let got = host.take(1);
    assert_eq!(got[0].key, Some(good));
    let (epoch, undelivered) = host.accepted();
    assert_eq!(epoch, 1);
    let reason = |n| {
        let mut entries = undelivered.iter();
        let entry = entries.find(|u| u.id == id(n).into()).expect("named");
        entry.reason.as_str()
    };
    assert_eq!(undelivered.len(), 3);
    assert!(reason(2).contains("another key"), "{}", reason(2));
    assert!(reason(3).contains("does not open"), "{}", reason(3));
    assert!(reason(5).contains("does not open"), "{}", reason(5));
}

#[test]
fn without_a_data_plane_nothing_is_delivered_and_the_bundle_is_accepted() {
    let mut host = Host::without_peers();
    host.new_agent(own_pidfd());
    let envelope = signed(&bundle(1, vec![encrypted(1, &random_key()), plain(2)]));
    host.ask(&envelope);
    let (epoch, undelivered) = host.accepted();
    assert_eq!((epoch, undelivered.len()), (1, 2));
    assert!(undelivered[0].reason.contains("no data plane"));
    // When it is there, the agent asks again.
    host.new_dataplane();
    host.apply(&envelope, 2);
}

#[test]
fn what_the_data_plane_refuses_is_undelivered_with_its_reason() {
    let mut host = Host::new();
    host.ask(&signed(&bundle(1, vec![plain(1), plain(2)])));
    let volume = volume_of(&host.delivered().message);
    let reason = "no room\n\u{1b}[2J".to_owned();
    host.say(&DataplaneToKeyd::GrantRefused {
        id: volume.into(),
        reason,
    });
    host.take(1);
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert_eq!(undelivered[0].id, id(1).into());
    let reason = &undelivered[0].reason;
    assert!(
        reason.contains("no room") && !reason.contains('\u{1b}'),
        "{reason:?}"
    );
}

pub fn volume_of(message: &KeydToDataplane) -> bulkhead_protocol::VolumeId {
    match message {
        KeydToDataplane::Grant { grant } => grant.volume,
        KeydToDataplane::Revoke {
            id: ServedId::Volume(id),
        } => *id,
        other => panic!("it is about no volume: {other:?}"),
    }
}
