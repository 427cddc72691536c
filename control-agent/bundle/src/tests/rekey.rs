//! The re-key of a volume in its bundle: what was signed before there was one stays what it was, and a
//! bundle that can't be carried out is refused.

use bulkhead_protocol::keys::EnvelopeDigest;

use super::refusals::refused_for_content;
use super::*;
use crate::{digest_of, encoding, key_scope, source, text, validate, verify};

/// Signed by a version that knew of no re-key.
const FIRST_FORMAT: &[u8] = include_bytes!("fixtures/first-format.cose");
const FIRST_FORMAT_TRUST: &str = include_str!("fixtures/first-format-trust.toml");
const FIRST_FORMAT_DIGEST: &str = "432b8eb22486907f3964661cbc44fa16cffaded8a83b79bcc579d979f1582949\
                                   a7eda090df54d45c1106245f974d6681";

#[test]
fn an_envelope_of_the_first_format_still_holds() {
    let trust = TrustRoot::from_text("trust.toml", FIRST_FORMAT_TRUST).expect("trust root");
    let policy = Policy {
        now: 1_800_000_000,
        ..policy(&trust)
    };
    let bundle = verify(FIRST_FORMAT, &policy).expect("holds");
    assert_eq!(bundle.volumes[0].rekey, None);
    let digest: EnvelopeDigest = digest_of(FIRST_FORMAT).into();
    assert_eq!(text::to_hex(&digest[..]), FIRST_FORMAT_DIGEST);
}

#[test]
fn a_volume_without_a_rekey_has_the_encoding_that_it_had() {
    // 14 fields of a volume, and not 15: a map header of 0xae.
    let one = HostBundle {
        volumes: vec![encrypted(1)],
        ..bundle()
    };
    let with = HostBundle {
        volumes: vec![rekeyed(1)],
        ..bundle()
    };
    let (plain, more) = (encoding::encode(&one), encoding::encode(&with));
    assert_eq!(encoding::decode(&more).expect("decodes"), with);
    let at = plain.iter().zip(&more).position(|(a, b)| a != b);
    let at = at.expect("they differ");
    assert_eq!((plain[at], more[at]), (0xae, 0xaf));
}

#[test]
fn a_rekey_is_signed_and_verified() {
    let mut wanted = bundle();
    wanted.volumes[1] = rekeyed(2);
    let trust = trust(1);
    let verified = verify(&signed(&wanted), &policy(&trust)).expect("holds");
    assert_eq!(*verified, wanted);
    let volume = &verified.volumes[1];
    let (new, old) = (
        volume.sealed_for("recovery"),
        volume.previous_sealed_for("recovery"),
    );
    assert_eq!(new.expect("sealed").ciphertext, [3; 80]);
    assert_eq!(old.expect("sealed").ciphertext, [4; 80]);
}

#[test]
fn refused_rekeys_that_can_not_be_done() {
    let refused = |change: fn(&mut Volume), expected: &str| {
        let mut volume = rekeyed(1);
        change(&mut volume);
        let bundle = HostBundle {
            volumes: vec![volume],
            ..bundle()
        };
        let error = validate(&bundle).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(
        |v| v.read_only = true,
        "rekey: a read-only volume can't be re-keyed",
    );
    refused(
        |v| {
            v.data_unit_bytes = None;
            v.sealed_keys.clear();
        },
        "rekey: a plain volume has no key to replace",
    );
    let previous = |v: &mut Volume| v.rekey.take().expect("a re-key");
    refused(
        |v| v.rekey.as_mut().expect("a re-key").previous_keys.clear(),
        "the previous key is not sealed to the host \"host-a\"",
    );
    refused_for_content(
        |b| {
            let mut rekey = previous(&mut rekeyed(1));
            rekey.previous_keys.push(rekey.previous_keys[0].clone());
            b.volumes[0].rekey = Some(rekey);
        },
        "previous_key: two keys are sealed to \"host-a\"",
    );
    refused(
        |v| {
            let same = v.sealed_keys.clone();
            v.rekey.as_mut().expect("a re-key").previous_keys = same;
        },
        "what is sealed to \"host-a\" as the previous key is the key itself",
    );
    refused(
        |v| v.size_bytes = i64::MAX as u64 & !4095,
        "size: 9223372036854771712 bytes are more than one key may encrypt",
    );
}

#[test]
fn a_key_has_at_most_the_scope_that_the_standard_gives_it() {
    let sized = |size_bytes, data_unit_bytes: Option<u32>| {
        let mut volume = encrypted(1);
        volume.size_bytes = size_bytes;
        volume.data_unit_bytes = data_unit_bytes;
        if data_unit_bytes.is_none() {
            volume.sealed_keys.clear();
        }
        volume
    };
    let check = |volume| {
        validate(&HostBundle {
            volumes: vec![volume],
            ..bundle()
        })
    };
    assert_eq!(key_scope::MAX_BYTES, 256 << 40);
    assert_eq!(check(sized(256 << 40, Some(4096))), Ok(()));
    let error = check(sized((256 << 40) + 4096, Some(4096))).expect_err("refused");
    assert!(
        error.to_string().contains("make several volumes"),
        "{error}"
    );
    assert_eq!(check(sized(512 << 40, None)), Ok(()), "a plain one");

    assert_eq!(key_scope::warning(&sized(1 << 40, Some(512))), None);
    assert_eq!(key_scope::warning(&sized(2 << 40, None)), None);
    let warning = key_scope::warning(&sized((1 << 40) + 4096, Some(512)));
    assert!(
        warning
            .expect("a warning")
            .contains("\"disk1\" has 1099511631872")
    );
}

#[test]
fn mistakes_in_a_rekey_are_named_with_file_line_and_field() {
    let folder = tempfile::tempdir().expect("folder");
    let stanza = source::volume_to_toml(&rekeyed(1));
    let line_of = |text: &str| {
        let at = stanza.lines().position(|line| line.starts_with(text));
        at.expect("there") + 1
    };
    let previous = line_of("[[volume.rekey.previous_key]]");
    for (from, to, line, expected) in [
        (
            "id = \"c1",
            "id = \"x1",
            line_of("[volume.rekey]") + 1,
            "volume[0].rekey.id: re-key id \"x1",
        ),
        (
            "[[volume.rekey.previous_key]]\nrecipient",
            "[[volume.rekey.previous_key]]\nrecipent",
            previous,
            "volume[0].rekey.previous_key[0].recipient: is missing",
        ),
        (
            "[volume.rekey]\n",
            "[volume.rekey]\nold = 1\n",
            line_of("[volume.rekey]") + 1,
            "volume[0].rekey.old: is an unknown field",
        ),
    ] {
        assert!(stanza.contains(from), "{from}");
        let path = folder.path().join("disk.toml");
        std::fs::write(&path, stanza.replacen(from, to, 1)).expect("write");
        let error = source::load_stanza(&path).expect_err("refused").to_string();
        let wanted = format!("disk.toml:{line}: {expected}");
        assert!(error.contains(&wanted), "{error} is not {wanted}");
    }
}
