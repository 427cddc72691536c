//! Sealing as its callers see it: round trips, and every way in which a sealed key must not open.

use bulkhead_protocol::VolumeId;
use bulkhead_sealing::{
    ENC_BYTES, RecipientKey, SEALED_BYTES, SealError, SealedKey, UnsealError, VolumeContext, seal,
    unseal,
};
use proptest::prelude::*;

const CONTEXT: VolumeContext = VolumeContext {
    id: VolumeId([7; 16]),
    size_bytes: 64 << 20,
    data_unit_bytes: 512,
    logical_block_bytes: 4096,
};

fn recipient(name: &str) -> RecipientKey {
    RecipientKey::generate(name).expect("key")
}

fn volume_key() -> [u8; 64] {
    std::array::from_fn(|i| u8::try_from(i).expect("small"))
}

/// Unseals, and checks that after a refusal the caller's memory holds nothing.
fn try_unseal(
    sealed: &SealedKey,
    with: &RecipientKey,
    context: &VolumeContext,
) -> Result<[u8; 64], UnsealError> {
    let mut out = [0x5a; 64];
    match unseal(sealed, with, context, &mut out) {
        Ok(()) => Ok(out),
        Err(error) => {
            assert_eq!(out, [0; 64], "after {error}");
            Err(error)
        }
    }
}

#[test]
fn a_sealed_key_opens_for_its_recipient() {
    let host = recipient("host-a");
    let sealed = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    assert_eq!(sealed.recipient, "host-a");
    assert_eq!(sealed.fingerprint, host.public().fingerprint());
    assert_eq!(sealed.enc.len(), ENC_BYTES);
    assert_eq!(sealed.ciphertext.len(), SEALED_BYTES);
    assert_eq!(
        try_unseal(&sealed, &host, &CONTEXT).expect("open"),
        volume_key()
    );
}

#[test]
fn sealing_twice_shares_nothing() {
    let host = recipient("host-a");
    let a = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    let b = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    assert_ne!(a.enc, b.enc);
    assert_ne!(a.ciphertext, b.ciphertext);
}

#[test]
fn equal_halves_are_not_sealed() {
    let mut key = volume_key();
    key.copy_within(..32, 32);
    let refused = seal(&key, recipient("host-a").public(), &CONTEXT);
    assert!(matches!(refused, Err(SealError::EqualHalves)));
}

#[test]
fn another_recipient_is_told_whose_it_is() {
    let sealed = seal(&volume_key(), recipient("host-a").public(), &CONTEXT).expect("seal");
    assert_eq!(
        try_unseal(&sealed, &recipient("host-b"), &CONTEXT),
        Err(UnsealError::OtherRecipient {
            sealed_to: "host-a".to_owned(),
            ours: "host-b".to_owned()
        })
    );
    // The same name with a new key: a host that was set up again.
    assert!(matches!(
        try_unseal(&sealed, &recipient("host-a"), &CONTEXT),
        Err(UnsealError::OtherKey { .. })
    ));
}

#[test]
fn a_relabelled_key_does_not_open() {
    let (a, b) = (recipient("host-a"), recipient("host-b"));
    let sealed = seal(&volume_key(), a.public(), &CONTEXT).expect("seal");
    // To b, as if it had been sealed to b.
    let to_b = SealedKey {
        recipient: "host-b".to_owned(),
        fingerprint: b.public().fingerprint().to_vec(),
        ..sealed.clone()
    };
    assert!(matches!(
        try_unseal(&to_b, &b, &CONTEXT),
        Err(UnsealError::DoesNotOpen { .. })
    ));
}

#[test]
fn the_name_is_bound_and_not_only_the_key() {
    // One secret under two names: only `info` differs.
    let folder = tempfile::tempdir().expect("folder");
    let a = recipient("host-a");
    let path = folder.path().join("a.key");
    a.save(&path).expect("save");
    let renamed = std::fs::read_to_string(&path)
        .expect("read")
        .replace("name = \"host-a\"", "name = \"host-b\"");
    std::fs::write(&path, renamed).expect("write");
    let b = RecipientKey::load(&path).expect("load");
    assert_eq!(a.public().fingerprint(), b.public().fingerprint());

    let mut sealed = seal(&volume_key(), a.public(), &CONTEXT).expect("seal");
    sealed.recipient = "host-b".to_owned();
    assert!(matches!(
        try_unseal(&sealed, &b, &CONTEXT),
        Err(UnsealError::DoesNotOpen { .. })
    ));
}

#[test]
fn each_field_of_the_context_is_bound() {
    let host = recipient("host-a");
    let sealed = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    let others = [
        VolumeContext {
            id: VolumeId([8; 16]),
            ..CONTEXT
        },
        VolumeContext {
            size_bytes: CONTEXT.size_bytes + 4096,
            ..CONTEXT
        },
        VolumeContext {
            data_unit_bytes: 4096,
            ..CONTEXT
        },
        VolumeContext {
            logical_block_bytes: 512,
            ..CONTEXT
        },
    ];
    for other in others {
        assert_eq!(
            try_unseal(&sealed, &host, &other),
            Err(UnsealError::DoesNotOpen {
                recipient: "host-a".to_owned(),
                volume: other.id
            }),
            "{other:?}"
        );
    }
}

#[test]
fn other_lengths_are_refused_by_name() {
    let host = recipient("host-a");
    let sealed = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    for length in [0, ENC_BYTES - 1, ENC_BYTES + 1] {
        let mut other = sealed.clone();
        other.enc.resize(length, 0);
        assert!(matches!(
            try_unseal(&other, &host, &CONTEXT),
            Err(UnsealError::WrongLength {
                part: "encapsulated key",
                ..
            })
        ));
    }
    for length in [0, 64, SEALED_BYTES - 1, SEALED_BYTES + 1] {
        let mut other = sealed.clone();
        other.ciphertext.resize(length, 0);
        assert!(matches!(
            try_unseal(&other, &host, &CONTEXT),
            Err(UnsealError::WrongLength {
                part: "ciphertext",
                ..
            })
        ));
    }
}

#[test]
fn every_changed_byte_of_the_ciphertext_is_noticed() {
    let host = recipient("host-a");
    let sealed = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
    for index in 0..SEALED_BYTES {
        let mut changed = sealed.clone();
        changed.ciphertext[index] ^= 1;
        assert!(
            try_unseal(&changed, &host, &CONTEXT).is_err(),
            "byte {index}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_changed_bit_of_the_encapsulated_key_is_noticed(index in 0..ENC_BYTES, bit in 0..8) {
        // The highest bit of an X25519 point is not part of it (RFC 7748 section 5), but X-Wing
        // hashes the bytes as they are sent.
        let host = recipient("host-a");
        let mut sealed = seal(&volume_key(), host.public(), &CONTEXT).expect("seal");
        sealed.enc[index] ^= 1u8 << bit;
        prop_assert!(try_unseal(&sealed, &host, &CONTEXT).is_err());
    }

    #[test]
    fn any_key_and_context_round_trip(
        halves: ([u8; 32], [u8; 32]),
        id: [u8; 16],
        size_bytes: u64,
        data_unit_bytes: u32,
        logical_block_bytes: u32,
    ) {
        prop_assume!(halves.0 != halves.1);
        let mut key = [0; 64];
        key[..32].copy_from_slice(&halves.0);
        key[32..].copy_from_slice(&halves.1);
        let context = VolumeContext { id: VolumeId(id), size_bytes, data_unit_bytes, logical_block_bytes };
        let host = recipient("host-a");
        let sealed = seal(&key, host.public(), &context).expect("seal");
        prop_assert_eq!(try_unseal(&sealed, &host, &context).expect("open"), key);
    }
}
