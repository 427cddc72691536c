//! What is signed is what is verified; keys and trust roots survive their files.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use bulkhead_protocol::NicId;
use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{
    InterfaceName, IpPrefix, Mac, MirrorSpec, NicLimits, PortSpec, SpoofChecks, TrafficLimits,
    Trusted, Uplink,
};
use bulkhead_protocol::workers::Workers;

use crate::private_file::PrivateFileError;
use crate::{Group, KeyError, Nic, OperatorPublicKey, Switch, encoding, inspect, verify};

#[test]
fn a_signed_bundle_verifies_to_itself() {
    let envelope = signed(&bundle());
    let trust = trust(1);
    let verified = verify(&envelope, &policy(&trust)).expect("verifies");
    assert_eq!(*verified, bundle());
    assert_eq!(verified.digest(), crate::digest_of(&envelope));
    assert_eq!(verified.signers(), ["alice"]);
    let seen = inspect(&envelope).expect("reads");
    assert_eq!(seen.claimed, bundle());
    assert_eq!(seen.claimed_signers.len(), 2);
}

fn any_rate() -> impl Strategy<Value = Option<Rate>> {
    let rate = any::<(u64, u64)>().prop_map(|(per_second, burst)| Rate { per_second, burst });
    proptest::option::of(rate)
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (any_rate(), any_rate()).prop_map(|(requests, bytes)| Limits { requests, bytes })
}

fn any_group() -> impl Strategy<Value = Group> {
    ("[a-z0-9][a-z0-9._-]{0,63}", any_limits()).prop_map(|(name, limits)| Group {
        name: name.parse().expect("a name"),
        limits,
    })
}

fn any_workers() -> impl Strategy<Value = Option<Workers>> {
    let workers = any::<(u16, Vec<u16>)>().prop_map(|(count, cpus)| Workers { count, cpus });
    proptest::option::of(workers)
}

fn any_volume() -> impl Strategy<Value = Volume> {
    let geometry = (0u8..5, 1u64..1 << 40);
    let sealed = vec(
        (
            "[a-z]{1,64}",
            vec(any::<u8>(), 0..60),
            vec(any::<u8>(), 0..2000),
        ),
        0..4,
    );
    let socket = ("[a-z0-9][a-z0-9._-]{0,63}", any::<(u32, u32, u32)>());
    let rekey = proptest::option::of(any::<[u8; 16]>());
    (
        any::<[u8; 16]>(),
        any::<String>(),
        geometry,
        any::<(bool, bool, bool, u16, u32)>(),
        socket,
        (sealed, rekey),
        (any_limits(), proptest::option::of(any_group())),
    )
        .prop_map(
            |(id, text, geometry, (read_only, pass, force, queues, uid), socket, keys, limits)| {
                let (unit, size) = geometry;
                let (sealed, rekey) = keys;
                let (limits, group) = limits;
                let sealed_keys: Vec<_> = sealed
                    .into_iter()
                    .map(|(recipient, short, long)| SealedKeyEntry {
                        recipient,
                        fingerprint: short,
                        enc: long.clone(),
                        ciphertext: long,
                    })
                    .collect();
                Volume {
                    id: VolumeId(id),
                    name: text.clone(),
                    path: text.clone(),
                    size_bytes: size,
                    data_unit_bytes: (unit > 0).then(|| u32::from(unit) * 512),
                    logical_block_bytes: uid,
                    read_only,
                    serial: text,
                    discard: if pass {
                        DiscardPolicy::Pass
                    } else {
                        DiscardPolicy::Ignore
                    },
                    queues,
                    socket: SocketSpec {
                        name: socket.0.parse().expect("a name"),
                        uid: socket.1.0,
                        gid: socket.1.1,
                        mode: socket.1.2,
                    },
                    allowed_uid: uid,
                    force_removal: force,
                    rekey: rekey.map(|id| Rekey {
                        id: RekeyId(id),
                        previous_keys: sealed_keys.clone(),
                    }),
                    sealed_keys,
                    limits,
                    group: group.map(|group| group.name),
                }
            },
        )
}

fn any_interface() -> impl Strategy<Value = InterfaceName> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,14}".prop_map(|name| name.parse().expect("a name"))
}

fn any_switch() -> impl Strategy<Value = Switch> {
    let tap = any_interface().prop_map(|interface| Uplink::Tap { interface });
    let af_xdp = (any_interface(), any::<u16>())
        .prop_map(|(interface, queue)| Uplink::AfXdp { interface, queue });
    let uplink = proptest::option::of(prop_oneof![tap, af_xdp]);
    ("[a-z0-9][a-z0-9._-]{0,63}", uplink).prop_map(|(name, uplink)| Switch {
        name: name.parse().expect("a name"),
        uplink,
    })
}

fn any_nic() -> impl Strategy<Value = Nic> {
    let port = prop_oneof![
        any_switch().prop_map(|switch| PortSpec::Switch {
            switch: switch.name
        }),
        any_interface().prop_map(|interface| PortSpec::Tap { interface }),
        (any_interface(), any::<u16>())
            .prop_map(|(interface, queue)| PortSpec::AfXdp { interface, queue }),
        Just(PortSpec::Null),
    ];
    let mirror =
        (any::<String>(), any::<(u32, u64)>()).prop_map(|(file, (snap, most))| MirrorSpec {
            file,
            snap_bytes: snap,
            most_bytes: most,
        });
    let addresses = any::<(std::net::Ipv4Addr, std::net::Ipv6Addr, bool)>();
    let source = addresses.prop_map(|(v4, v6, first)| {
        let prefix = match first {
            true => IpPrefix::new(v4.into(), 32),
            false => IpPrefix::new(v6.into(), 128),
        };
        prefix.expect("a whole address")
    });
    let traffic =
        || (any_rate(), any_rate()).prop_map(|(packets, bytes)| TrafficLimits { packets, bytes });
    (
        any::<([u8; 16], [u8; 6])>(),
        any::<String>(),
        any::<(u16, u16, u32, bool, bool)>(),
        port,
        ("[a-z0-9][a-z0-9._-]{0,63}", any::<(u32, u32, u32)>()),
        (traffic(), traffic()),
        (
            vec(source, 0..3),
            any::<(bool, bool)>(),
            proptest::option::of(mirror),
        ),
    )
        .prop_map(
            |(ids, name, numbers, port, socket, (tx, rx), (sources, roles, mirror))| {
                let ((id, mut mac), (mtu, queue_pairs, uid, force, check)) = (ids, numbers);
                mac[0] = mac[0] & 0xfe | 2;
                Nic {
                    id: NicId(id),
                    name,
                    mac: Mac::new(mac).expect("of one station"),
                    mtu,
                    queue_pairs,
                    port,
                    socket: SocketSpec {
                        name: socket.0.parse().expect("a name"),
                        uid: socket.1.0,
                        gid: socket.1.1,
                        mode: socket.1.2,
                    },
                    allowed_uid: uid,
                    force_removal: force,
                    limits: NicLimits { tx, rx },
                    checks: SpoofChecks {
                        mac: check,
                        sources,
                        trusted: Trusted {
                            router: roles.0,
                            dhcp: roles.1,
                        },
                    },
                    mirror,
                }
            },
        )
}

fn any_bundle() -> impl Strategy<Value = HostBundle> {
    let ids = vec(any::<[u8; 16]>().prop_map(VolumeId), 0..4);
    let digests = vec(any::<[u8; 48]>().prop_map(Into::into), 0..3);
    (
        any::<String>(),
        any::<(u64, u64, u64)>(),
        digests,
        vec(any_volume(), 0..4),
        (ids.clone(), ids),
        (vec(any_group(), 0..3), any_workers()),
        (
            vec(any_switch(), 0..3),
            vec(any_nic(), 0..3),
            vec(any::<[u8; 16]>(), 0..3),
        ),
    )
        .prop_map(
            |(host, (epoch, not_before, expires), supersedes, volumes, gone, groups, nets)| {
                let (force_remove, shred) = gone;
                let (groups, workers) = groups;
                let (switches, nics, gone) = nets;
                HostBundle {
                    host,
                    epoch,
                    supersedes,
                    not_before,
                    expires,
                    volumes,
                    force_remove,
                    shred,
                    groups,
                    workers,
                    switches,
                    nics,
                    force_remove_nics: gone.into_iter().map(NicId).collect(),
                }
            },
        )
}

/// The payload of [`bundle`] without and with a volume to shred.
fn with_shred() -> (Vec<u8>, Vec<u8>) {
    let mut shredding = bundle();
    shredding.shred = vec![VolumeId([8; 16])];
    (encoding::encode(&bundle()), encoding::encode(&shredding))
}

#[test]
fn a_bundle_that_shreds_nothing_is_encoded_as_ever() {
    let (without, with) = with_shred();
    // Seven entries, as before there was an eighth; with one, it stands at the end.
    assert_eq!((without[0], with[0]), (0xa7, 0xa8));
    let mut eighth = vec![0x07, 0x81, 0x50];
    eighth.extend([8; 16]);
    assert_eq!(with[1..], [&without[1..], &eighth].concat());
    let decoded = encoding::decode(&with).expect("decodes");
    assert_eq!(decoded.shred, [VolumeId([8; 16])]);
}

#[test]
fn refused_an_empty_list_of_what_to_shred() {
    let (mut without, _) = with_shred();
    without[0] = 0xa8;
    without.extend([0x07, 0x80]);
    let refused = encoding::decode(&without);
    assert_eq!(refused, Err(encoding::DecodeError::NotCanonical));
}

proptest! {
    #[test]
    fn every_bundle_has_one_encoding(bundle in any_bundle()) {
        let bytes = encoding::encode(&bundle);
        prop_assert_eq!(encoding::decode(&bytes).expect("decodes"), bundle);
    }

    #[test]
    fn no_bytes_decode_to_what_encodes_otherwise(
        bundle in any_bundle(), at: prop::sample::Index, to: u8,
    ) {
        let mut bytes = encoding::encode(&bundle);
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(other) = encoding::decode(&bytes) {
            prop_assert_eq!(encoding::encode(&other), bytes);
        }
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>) {
        let trust = trust(1);
        prop_assert!(verify(&bytes, &policy(&trust)).is_err());
        prop_assert!(encoding::decode(&bytes).is_err());
    }
}

#[test]
fn a_key_file_brings_the_same_key_back() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("alice.key");
    alice().save(&path).expect("saves");
    let loaded = OperatorKey::load(&path).expect("loads");
    assert_eq!(loaded.public(), alice().public());
    let envelope = sign(&bundle(), &[&loaded]).expect("signs");
    let trust = trust(1);
    verify(&envelope, &policy(&trust)).expect("verifies");
    assert!(matches!(
        alice().save(&path),
        Err(KeyError::File(PrivateFileError::Exists(_)))
    ));
}

#[test]
fn refused_key_file_that_others_can_read() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("alice.key");
    alice().save(&path).expect("saves");
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).expect("chmod");
    let error = OperatorKey::load(&path).expect_err("refused").to_string();
    assert!(
        error.contains("can be read by others (mode 0640)"),
        "{error}"
    );
}

#[test]
fn public_keys_and_trust_roots_survive_their_text() {
    let text = bob().public().to_text();
    let back = OperatorPublicKey::from_text("bob.pub", &text).expect("reads");
    assert_eq!(back, *bob().public());
    let root = trust(2);
    assert_eq!(
        TrustRoot::from_text("t", &root.to_text()).expect("reads"),
        root
    );
}

#[test]
fn refused_trust_roots() {
    let text = trust(2).to_text();
    let alice_print = alice().public().fingerprint().to_string();
    let bob_print = bob().public().fingerprint().to_string();
    for (changed, expected) in [
        (
            text.replace("threshold = 2", "threshold = 3"),
            "not between 1 and the number",
        ),
        (
            text.replace("threshold = 2", "threshold = 0"),
            "not between 1 and the number",
        ),
        (
            text.replace("name = \"bob\"", "name = \"alice\""),
            "share a name or a key",
        ),
        (
            text.replace(&bob_print, &alice_print),
            "does not belong to these keys",
        ),
        (
            text.replace("kind = \"bulkhead trust root v1\"", "kind = \"x\""),
            "where a \"bulkhead trust root v1\" belongs",
        ),
        (
            format!("extra = 1\n{text}"),
            "trust.toml:1: extra: is an unknown field",
        ),
    ] {
        let error = TrustRoot::from_text("trust.toml", &changed).expect_err("refused");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(TrustRoot::new(Vec::new(), 1).is_err());
}
