//! Bundles for these tests: real keys, real signatures, small volumes.

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::{
    HostBundle, OperatorKey, Rekey, SealedKeyEntry, SocketSpec, TrustRoot, Volume, sign,
};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::{DiscardPolicy, RekeyId, VolumeId};

/// alice is trusted, mallory is not.
static KEYS: LazyLock<[OperatorKey; 2]> =
    LazyLock::new(|| ["alice", "mallory"].map(|name| OperatorKey::generate(name).expect("key")));

pub fn alice() -> &'static OperatorKey {
    &KEYS[0]
}

pub fn mallory() -> &'static OperatorKey {
    &KEYS[1]
}

pub fn trust() -> TrustRoot {
    TrustRoot::new(vec![alice().public().clone()], 1).expect("consistent")
}

pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}

pub const SIZE_BYTES: u64 = 1 << 20;

pub fn id(number: u8) -> VolumeId {
    VolumeId([number; 16])
}

/// A plain volume, `disk<n>` on listener `vm<n>`.
pub fn volume(number: u8) -> Volume {
    Volume {
        id: id(number),
        name: format!("disk{number}"),
        path: format!("disk{number}.img"),
        size_bytes: SIZE_BYTES,
        data_unit_bytes: None,
        logical_block_bytes: 512,
        read_only: false,
        serial: format!("serial {number}"),
        discard: DiscardPolicy::Ignore,
        queues: 1,
        socket: SocketSpec {
            name: format!("vm{number}").parse().expect("name"),
            uid: 0,
            gid: 0,
            mode: 0o600,
        },
        allowed_uid: 0,
        force_removal: false,
        sealed_keys: Vec::new(),
        rekey: None,
        limits: Limits::default(),
        group: None,
    }
}

/// An encrypted one; its sealed key is of the right shape and no more.
pub fn encrypted(number: u8) -> Volume {
    Volume {
        data_unit_bytes: Some(512),
        sealed_keys: vec![SealedKeyEntry {
            recipient: "host-a".to_owned(),
            fingerprint: vec![1; 48],
            enc: vec![2; 1120],
            ciphertext: vec![3; 80],
        }],
        ..volume(number)
    }
}

/// An encrypted one with a re-key.
pub fn rekeyed(number: u8) -> Volume {
    let mut volume = encrypted(number);
    let mut previous_keys = volume.sealed_keys.clone();
    previous_keys[0].ciphertext = vec![4; 80];
    volume.rekey = Some(Rekey {
        id: RekeyId([0xc1; 16]),
        previous_keys,
    });
    volume
}

pub fn bundle(epoch: u64, volumes: Vec<Volume>) -> HostBundle {
    HostBundle {
        host: "host-a".to_owned(),
        epoch,
        supersedes: Vec::new(),
        not_before: now() - 60,
        expires: now() + 3600,
        volumes,
        force_remove: Vec::new(),
        shred: Vec::new(),
        groups: Vec::new(),
        workers: None,
        switches: Vec::new(),
        nics: Vec::new(),
        force_remove_nics: Vec::new(),
    }
}

pub fn signed(bundle: &HostBundle) -> Vec<u8> {
    sign(bundle, &[alice()]).expect("valid")
}
