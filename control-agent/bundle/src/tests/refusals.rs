//! Each way in which an envelope is refused, by name.

use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use minicbor::bytes::ByteArray;

use super::*;
use crate::cose::{Algorithm, Envelope, Kind};
use crate::encoding;
use crate::sign::{SignError, sign_payload};
use crate::{VerifyError, digest_of, verify};

/// The refusal of an envelope under the usual policy, one operator being enough.
fn refusal(envelope: &[u8]) -> VerifyError {
    let trust = trust(1);
    verify(envelope, &policy(&trust)).expect_err("must be refused")
}

/// The message has to say this much.
fn says(error: &VerifyError, text: &str) {
    let message = error.to_string();
    assert!(message.contains(text), "{message:?} does not say {text:?}");
}

fn parsed(envelope: &[u8]) -> Envelope {
    Envelope::parse(Kind::HostBundle, envelope).expect("parses")
}

#[test]
fn refused_one_signature_missing() {
    for (missing, kept) in [(Algorithm::Esp384, 1), (Algorithm::MlDsa87, 0)] {
        let mut envelope = parsed(&signed(&bundle()));
        envelope.signatures = vec![envelope.signatures[kept].clone()];
        let error = refusal(&envelope.encode());
        assert_eq!(
            error,
            VerifyError::SignatureMissing {
                operator: "alice".to_owned(),
                missing
            }
        );
        says(
            &error,
            &format!("the {missing} signature of operator alice is missing"),
        );
    }
}

#[test]
fn refused_no_signature() {
    let mut envelope = parsed(&signed(&bundle()));
    envelope.signatures.clear();
    assert_eq!(refusal(&envelope.encode()), VerifyError::NoSignature);
}

#[test]
fn refused_unknown_operator() {
    let error = refusal(&sign(&bundle(), &[mallory()]).expect("signs"));
    assert_eq!(
        error,
        VerifyError::UnknownSigner(mallory().public().fingerprint())
    );
    // An unknown signer beside a known one is no better: what it signed is not known either.
    let both = sign(&bundle(), &[alice(), mallory()]).expect("signs");
    assert!(matches!(refusal(&both), VerifyError::UnknownSigner(_)));
}

#[test]
fn refused_wrong_key() {
    let theirs = parsed(&sign(&bundle(), &[mallory()]).expect("signs"));
    for algorithm in [Algorithm::Esp384, Algorithm::MlDsa87] {
        // Each half alone: the other is alice's own.
        let mut envelope = parsed(&signed(&bundle()));
        let position = usize::from(algorithm == Algorithm::MlDsa87);
        envelope.signatures[position].signature = theirs.signatures[position].signature.clone();
        let error = refusal(&envelope.encode());
        assert_eq!(
            error,
            VerifyError::BadSignature {
                operator: "alice".to_owned(),
                algorithm
            }
        );
        says(
            &error,
            &format!("{algorithm} signature of operator alice is wrong"),
        );
    }
}

#[test]
fn refused_below_threshold() {
    let trust = trust(2);
    let error = verify(&signed(&bundle()), &policy(&trust)).expect_err("refused");
    assert_eq!(
        error,
        VerifyError::BelowThreshold {
            given: 1,
            needed: 2
        }
    );
    let both = sign(&bundle(), &[bob(), alice()]).expect("signs");
    let verified = verify(&both, &policy(&trust)).expect("two signed");
    let mut signers = verified.signers().to_vec();
    signers.sort();
    assert_eq!(signers, ["alice", "bob"]);
}

#[test]
fn refused_same_operator_counted_twice() {
    assert!(matches!(
        sign(&bundle(), &[alice(), alice()]),
        Err(SignError::SameOperatorTwice(_))
    ));
    let mut envelope = parsed(&signed(&bundle()));
    envelope.signatures.extend(envelope.signatures.clone());
    assert!(matches!(
        refusal(&envelope.encode()),
        VerifyError::NotCanonical(_)
    ));
}

#[test]
fn refused_other_host() {
    let trust = trust(1);
    let mut policy = policy(&trust);
    policy.host = "host-b";
    let error = verify(&signed(&bundle()), &policy).expect_err("refused");
    says(&error, "is for host \"host-a\", this is \"host-b\"");
}

#[test]
fn refused_epoch_not_above_floor() {
    let trust = trust(1);
    for floor in [7, 8, u64::MAX] {
        let mut policy = policy(&trust);
        policy.epoch_floor = floor;
        let error = verify(&signed(&bundle()), &policy).expect_err("refused");
        assert_eq!(error, VerifyError::EpochNotAboveFloor { epoch: 7, floor });
    }
}

#[test]
fn refused_expired() {
    let trust = trust(1);
    let mut policy = policy(&trust);
    policy.now = 1_999;
    assert!(verify(&signed(&bundle()), &policy).is_ok());
    policy.now = 2_000;
    let error = verify(&signed(&bundle()), &policy).expect_err("refused");
    says(&error, "expired at 2000");
}

#[test]
fn refused_not_yet_valid() {
    let trust = trust(1);
    let mut policy = policy(&trust);
    policy.now = 1_000;
    assert!(verify(&signed(&bundle()), &policy).is_ok());
    policy.now = 999;
    let error = verify(&signed(&bundle()), &policy).expect_err("refused");
    says(&error, "not valid before 1000");
}

#[test]
fn refused_supersedes_another() {
    let trust = trust(1);
    let mut bundle = bundle();
    bundle.supersedes = vec![ByteArray::from([5; 48]), ByteArray::from([6; 48])];
    let envelope = signed(&bundle);
    let mut policy = policy(&trust);
    assert!(
        verify(&envelope, &policy).is_ok(),
        "a host without a bundle"
    );
    policy.last_digest = Some([6; 48]);
    assert!(verify(&envelope, &policy).is_ok(), "one of the list");
    policy.last_digest = Some([7; 48]);
    let error = verify(&envelope, &policy).expect_err("refused");
    says(&error, "supersedes other envelopes");
}

#[test]
fn the_same_envelope_again_skips_epoch_and_expiry_and_nothing_else() {
    let trust = trust(1);
    let envelope = signed(&bundle());
    let mut policy = policy(&trust);
    policy.last_digest = Some(digest_of(&envelope));
    policy.epoch_floor = 7;
    policy.now = 99_999;
    assert!(verify(&envelope, &policy).is_ok());
    policy.host = "host-b";
    assert!(verify(&envelope, &policy).is_err());
}

#[test]
fn refused_over_size_cap() {
    let over = vec![0; MAX_ENVELOPE_BYTES + 1];
    let error = refusal(&over);
    assert_eq!(
        error,
        VerifyError::TooLarge {
            given: MAX_ENVELOPE_BYTES + 1
        }
    );
    // At the cap it is looked at, and found to be something else.
    assert!(matches!(refusal(&over[1..]), VerifyError::Malformed(_)));
    let mut large = bundle();
    large.supersedes = vec![ByteArray::from([1; 48]); 22_000];
    assert!(matches!(
        sign(&large, &[alice()]),
        Err(SignError::TooLarge(_))
    ));
}

/// A payload that is signed as it is.
fn signed_payload(payload: Vec<u8>) -> Vec<u8> {
    sign_payload(payload, &[alice()]).expect("signs")
}

#[test]
fn refused_not_canonical() {
    let payload = encoding::encode(&bundle());
    // The map of 7 with its length in a longer form, and of indefinite length.
    let mut longer = vec![0xb8, 7];
    longer.extend_from_slice(&payload[1..]);
    let mut indefinite = vec![0xbf];
    indefinite.extend_from_slice(&payload[1..]);
    indefinite.push(0xff);
    // Bytes behind the end.
    let mut trailing = payload.clone();
    trailing.push(0);
    // The first two fields the other way round.
    let host = &payload[1..1 + 1 + 1 + "host-a".len()];
    let epoch = &payload[1 + host.len()..1 + host.len() + 2];
    let mut swapped = vec![payload[0]];
    swapped.extend_from_slice(epoch);
    swapped.extend_from_slice(host);
    swapped.extend_from_slice(&payload[1 + host.len() + epoch.len()..]);
    // A field twice.
    let mut twice = vec![payload[0] + 1];
    twice.extend_from_slice(host);
    twice.extend_from_slice(&payload[1..]);
    for other in [longer, indefinite, trailing, swapped, twice] {
        let error = refusal(&signed_payload(other));
        says(&error, "payload is not in the one deterministic form");
    }
}

#[test]
fn refused_not_canonical_structure() {
    let envelope = signed(&bundle());
    let mut trailing = envelope.clone();
    trailing.push(0);
    let mut longer_tag = vec![0xd9, 0, 98];
    longer_tag.extend_from_slice(&envelope[2..]);
    for other in [trailing, longer_tag] {
        says(&refusal(&other), "not canonical");
    }
}

#[test]
fn refused_high_s() {
    let mut envelope = parsed(&signed(&bundle()));
    let signature = &mut envelope.signatures[0].signature;
    crate::low_s::negate_for_test(signature);
    says(&refusal(&envelope.encode()), "larger of its two possible s");
}

#[test]
fn refused_unknown_field() {
    let payload = encoding::encode(&bundle());
    let mut top = payload.clone();
    top[0] += 1;
    top.extend_from_slice(&[13, 0xf5]);
    assert_eq!(
        refusal(&signed_payload(top)),
        VerifyError::UnknownField("13".to_owned())
    );
    // In the second volume: its map of 14 becomes one of 15, with the field behind the last.
    let volumes = minicbor::to_vec(&bundle().volumes).expect("encodes");
    let second = minicbor::to_vec(&bundle().volumes[1]).expect("encodes");
    let start = payload
        .windows(volumes.len())
        .position(|window| window == volumes)
        .expect("there")
        + volumes.len()
        - second.len();
    let mut inner = payload[..start].to_vec();
    inner.push(second[0] + 1);
    inner.extend_from_slice(&second[1..]);
    inner.extend_from_slice(&[17, 0]);
    inner.extend_from_slice(&payload[start + second.len()..]);
    let error = refusal(&signed_payload(inner));
    assert_eq!(error, VerifyError::UnknownField("volumes[1].17".to_owned()));
    says(&error, "unknown field");
}

#[test]
fn refused_malformed() {
    for bytes in [&[][..], b"not an envelope", &[0xd8, 98, 0x84]] {
        assert!(matches!(refusal(bytes), VerifyError::Malformed(_)));
    }
    for payload in [vec![], vec![0xa0], vec![0xff; 9], vec![0x9f; 4000]] {
        assert!(matches!(
            refusal(&signed_payload(payload)),
            VerifyError::Malformed(_)
        ));
    }
}

/// Signing refuses it, and so does a host if it is signed all the same.
pub(super) fn refused_for_content(change: impl Fn(&mut HostBundle), expected: &str) {
    let mut bundle = bundle();
    change(&mut bundle);
    let error = sign(&bundle, &[alice()]).expect_err("must not be signed");
    assert!(error.to_string().contains(expected), "{error}");
    says(
        &refusal(&signed_payload(encoding::encode(&bundle))),
        expected,
    );
}

#[test]
fn refused_same_socket_twice() {
    refused_for_content(
        |b| b.volumes[1].socket.name = b.volumes[0].socket.name.clone(),
        "volume \"disk2\": socket: \"vm1\" is also that of volume \"disk1\"",
    );
}

#[test]
fn refused_duplicate_id() {
    refused_for_content(
        |b| b.volumes[1].id = b.volumes[0].id,
        "volume \"disk2\": id: \"01010101-0101-0101-0101-010101010101\" is also that of",
    );
}

#[test]
fn refused_duplicate_name_or_path() {
    refused_for_content(
        |b| b.volumes[1].name = "disk1".into(),
        "name: \"disk1\" is also",
    );
    refused_for_content(
        |b| b.volumes[1].path = "disk1.img".into(),
        "path: \"disk1.img\" is also",
    );
}

#[test]
fn refused_path_that_climbs() {
    for path in [
        "../x", "a/../b", "/a/..", ".", "a//b", "a/", "/", "", "a\nb",
    ] {
        refused_for_content(
            |b| b.volumes[0].path = path.into(),
            "volume \"disk1\": path:",
        );
    }
}

#[test]
fn refused_geometry() {
    type Case = (fn(&mut Volume), &'static str);
    let cases: [Case; 8] = [
        (
            |v| v.size_bytes = 0,
            "size: 0 bytes are not a positive multiple",
        ),
        (
            |v| v.size_bytes += 512,
            "not a positive multiple of the logical block of 4096",
        ),
        (|v| v.size_bytes = 1 << 63, "size: no file is that large"),
        (
            |v| v.logical_block_bytes = 1024,
            "logical_block: 1024 is neither",
        ),
        (|v| v.data_unit_bytes = Some(0), "data_unit: 0 is neither"),
        (
            |v| {
                v.logical_block_bytes = 512;
                v.data_unit_bytes = Some(4096);
            },
            "data_unit: 4096 is larger than the logical block",
        ),
        (|v| v.queues = 0, "queues: 0 is not between"),
        (|v| v.queues = 65, "queues: 65 is not between"),
    ];
    for (change, expected) in cases {
        refused_for_content(|b| change(&mut b.volumes[0]), expected);
    }
}

#[test]
fn refused_names_and_modes() {
    let long = "x".repeat(65);
    refused_for_content(|b| b.volumes[0].name = long.clone(), "is not a name");
    refused_for_content(|b| b.volumes[0].name = "a b".into(), "is not a name");
    refused_for_content(
        |b| b.volumes[0].serial = "x".repeat(21),
        "serial: at most 20",
    );
    refused_for_content(|b| b.volumes[0].serial = "é".into(), "serial: at most 20");
    refused_for_content(|b| b.volumes[0].socket.mode = 0o4777, "mode 0o4777");
    refused_for_content(|b| b.expires = b.not_before, "never be valid");
    refused_for_content(|b| b.epoch = 0, "lowest epoch is 1");
}

#[test]
fn refused_sealed_keys_that_do_not_fit() {
    let entries = |b: &mut HostBundle| b.volumes[0].sealed_keys.clone();
    refused_for_content(
        |b| b.volumes[0].sealed_keys = entries(b)[1..].to_vec(),
        "no key is sealed to the host \"host-a\"",
    );
    refused_for_content(
        |b| b.volumes[0].data_unit_bytes = None,
        "a plain volume has no key",
    );
    refused_for_content(
        |b| {
            let again = entries(b).remove(0);
            b.volumes[0].sealed_keys.push(again);
        },
        "two keys are sealed to \"host-a\"",
    );
    refused_for_content(
        |b| b.volumes[0].sealed_keys[0].enc.clear(),
        "the enc of the key sealed to \"host-a\" has 0 bytes",
    );
}

#[test]
fn refused_force_remove_of_what_is_kept() {
    refused_for_content(
        |b| b.force_remove = vec![b.volumes[0].id],
        "is also among the volumes",
    );
    refused_for_content(|b| b.force_remove.push(b.force_remove[0]), "is named twice");
}

#[test]
fn refused_shred_of_what_is_kept() {
    refused_for_content(
        |b| b.shred = vec![b.volumes[0].id],
        "it can't be both kept and destroyed",
    );
    refused_for_content(
        |b| b.shred = vec![VolumeId([8; 16]); 2],
        "shred: volume 08080808-0808-0808-0808-080808080808 is named twice",
    );
}

#[test]
fn refused_every_single_byte_flip() {
    let trust = trust(1);
    let policy = policy(&trust);
    let mut small = bundle();
    small.volumes.truncate(1);
    small.volumes[0].data_unit_bytes = None;
    small.volumes[0].sealed_keys.clear();
    let mut envelope = signed(&small);
    verify(&envelope, &policy).expect("as signed");
    for position in 0..envelope.len() {
        // One bit that differs from place to place, and all bits.
        for flip in [1 << (position % 8), 0xff] {
            envelope[position] ^= flip;
            assert!(
                verify(&envelope, &policy).is_err(),
                "byte {position} ^ {flip:#x} was taken"
            );
            envelope[position] ^= flip;
        }
    }
    for length in 0..envelope.len() {
        assert!(verify(&envelope[..length], &policy).is_err());
    }
    verify(&envelope, &policy).expect("unchanged again");
}
