//! What keyd grants and refuses where a key takes the place of another, and where a key would serve two
//! volumes.

use bulkhead_bundle::Volume;
use bulkhead_bundle::text::to_hex;
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::keys::KeydToDataplane;

use crate::bundles::{bundle, encrypted, id, plain, random_key, rekeyed, sealed, signed};
use crate::host::Host;

#[test]
fn a_grant_with_a_rekey_brings_the_key_and_then_the_previous_one() {
    let (key, previous) = (random_key(), random_key());
    let mut host = Host::new();
    let volumes = vec![rekeyed(1, &key, &previous), plain(2)];
    let got = host.apply(&signed(&bundle(3, volumes)), 2);
    let KeydToDataplane::Grant { grant } = &got[0].message else {
        panic!("no grant");
    };
    assert_eq!(grant.rekey, Some(RekeyId([0xc1; 16])));
    assert_eq!((got[0].key, got[0].previous), (Some(key), Some(previous)));
    // Without it, as it is finished: the key alone.
    let got = host.apply(&signed(&bundle(4, vec![encrypted(1, &key)])), 2);
    let KeydToDataplane::Grant { grant } = &got[1].message else {
        panic!("no grant");
    };
    assert_eq!((grant.rekey, got[1].key), (None, Some(key)));
}

/// Delivered alone, this volume is left out for a reason that says this.
fn check_undelivered(volume: Volume, expected: &str) {
    let mut host = Host::new();
    let (number, good) = (volume.id, random_key());
    host.ask(&signed(&bundle(1, vec![volume, encrypted(9, &good)])));
    assert_eq!(host.take(1)[0].key, Some(good));
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert_eq!(undelivered[0].id, number.into());
    let reason = &undelivered[0].reason;
    assert!(reason.contains(expected), "{reason}");
}

#[test]
fn a_rekey_to_the_same_key_leaves_its_volume_undelivered() {
    let key = random_key();
    check_undelivered(rekeyed(1, &key, &key), "the re-key would replace nothing");
}

#[test]
fn a_previous_key_that_does_not_open_leaves_its_volume_undelivered() {
    let mut moved = rekeyed(1, &random_key(), &random_key());
    let other = encrypted(2, &random_key());
    moved.rekey.as_mut().expect("a re-key").previous_keys = other.sealed_keys;
    check_undelivered(moved, "the previous key: ");
}

#[test]
fn refused_one_key_for_two_volumes() {
    let (key, other) = (random_key(), random_key());
    let shared = |a: Volume, b: Volume| vec![a, encrypted(7, &random_key()), b];
    for volumes in [
        shared(encrypted(1, &key), encrypted(2, &key)),
        shared(rekeyed(1, &other, &key), encrypted(2, &key)),
        shared(encrypted(1, &key), rekeyed(2, &key, &other)),
        shared(
            rekeyed(1, &random_key(), &key),
            rekeyed(2, &random_key(), &key),
        ),
    ] {
        let mut host = Host::new();
        host.apply(&signed(&bundle(1, vec![plain(1)])), 1);
        let reason = host.refuse(&signed(&bundle(2, volumes)));
        assert!(
            reason.contains("volumes \"disk1\" and \"disk2\" have the same key"),
            "{reason}"
        );
        for text in [host.log(), reason] {
            assert!(!text.contains(&to_hex(&key[..4])), "{text}");
        }
        // Refused before anything was kept.
        host.apply(&signed(&bundle(2, vec![plain(1)])), 1);
    }
}

#[test]
fn keys_that_differ_in_one_bit_are_two_keys() {
    let key = random_key();
    let mut volumes = vec![encrypted(1, &key)];
    for (number, byte) in [(2, 0), (3, 31), (4, 32), (5, 63)] {
        let mut near = key;
        near[byte] ^= 1;
        volumes.push(encrypted(number, &near));
    }
    Host::new().apply(&signed(&bundle(1, volumes)), 5);
}

#[test]
fn a_key_that_does_not_open_shares_nothing() {
    let key = random_key();
    let mut moved = encrypted(1, &key);
    moved.sealed_keys = vec![sealed(
        &key,
        crate::bundles::host_key().public(),
        &encrypted(3, &key),
    )];
    let mut host = Host::new();
    host.ask(&signed(&bundle(1, vec![moved, encrypted(2, &key)])));
    assert_eq!(host.take(1)[0].key, Some(key));
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered[0].id, id(1).into());
}
