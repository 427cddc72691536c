//! The bundle's tests: a signed example, and what they share.

mod limits;
mod net;
mod refusals;
mod rekey;
mod releases;
mod roundtrip;
mod source_errors;

use std::sync::LazyLock;

use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::{DiscardPolicy, RekeyId, VolumeId};

use crate::{
    HostBundle, OperatorKey, Policy, Rekey, SealedKeyEntry, SocketSpec, TrustRoot, Volume, sign,
};

/// The operators of these tests: alice and bob are trusted, mallory is not.
static KEYS: LazyLock<[OperatorKey; 3]> = LazyLock::new(|| {
    ["alice", "bob", "mallory"].map(|name| OperatorKey::generate(name).expect("key"))
});

fn alice() -> &'static OperatorKey {
    &KEYS[0]
}

fn bob() -> &'static OperatorKey {
    &KEYS[1]
}

fn mallory() -> &'static OperatorKey {
    &KEYS[2]
}

fn trust(threshold: usize) -> TrustRoot {
    let operators = vec![alice().public().clone(), bob().public().clone()];
    TrustRoot::new(operators, threshold).expect("consistent")
}

fn encrypted(number: u8) -> Volume {
    let sealed = |recipient: &str| SealedKeyEntry {
        recipient: recipient.to_owned(),
        fingerprint: vec![1; 48],
        enc: vec![2; 1120],
        ciphertext: vec![3; 80],
    };
    Volume {
        id: VolumeId([number; 16]),
        name: format!("disk{number}"),
        path: format!("disk{number}.img"),
        size_bytes: 64 << 20,
        data_unit_bytes: Some(512),
        logical_block_bytes: 4096,
        read_only: false,
        serial: format!("serial {number}"),
        discard: DiscardPolicy::Ignore,
        queues: 2,
        socket: SocketSpec {
            name: format!("vm{number}").parse().expect("name"),
            uid: 1000,
            gid: 1000,
            mode: 0o660,
        },
        allowed_uid: 1000,
        force_removal: false,
        sealed_keys: vec![sealed("host-a"), sealed("recovery")],
        rekey: None,
        limits: Limits::default(),
        group: None,
    }
}

/// An encrypted volume whose key takes the place of another.
fn rekeyed(number: u8) -> Volume {
    let mut volume = encrypted(number);
    let mut previous_keys = volume.sealed_keys.clone();
    for entry in &mut previous_keys {
        entry.ciphertext = vec![4; 80];
    }
    volume.rekey = Some(Rekey {
        id: RekeyId([0xc0 + number; 16]),
        previous_keys,
    });
    volume
}

fn bundle() -> HostBundle {
    HostBundle {
        host: "host-a".to_owned(),
        epoch: 7,
        supersedes: Vec::new(),
        not_before: 1_000,
        expires: 2_000,
        volumes: vec![encrypted(1), encrypted(2)],
        force_remove: vec![VolumeId([9; 16])],
        shred: Vec::new(),
        groups: Vec::new(),
        workers: None,
        switches: Vec::new(),
        nics: Vec::new(),
        force_remove_nics: Vec::new(),
    }
}

fn policy(trust: &TrustRoot) -> Policy<'_> {
    Policy {
        trust,
        host: "host-a",
        epoch_floor: 6,
        last_digest: None,
        now: 1_500,
    }
}

fn signed(bundle: &HostBundle) -> Vec<u8> {
    sign(bundle, &[alice()]).expect("valid")
}

/// What a verifier says of a payload that was signed as a release, whatever it says.
fn verify_payload_as_release(
    payload: Vec<u8>,
) -> Result<crate::Verified<crate::ReleaseStatement>, crate::VerifyError> {
    let envelope = crate::sign::sign_as(crate::cose::Kind::Release, payload, &[alice()]);
    crate::verify_release(&envelope.expect("signed"), &trust(1))
}
