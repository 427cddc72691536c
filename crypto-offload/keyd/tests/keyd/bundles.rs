//! Bundles for these tests: real operators, real host keys, random volume keys.

use std::fs::File;
use std::io::Read;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::{
    HostBundle, OperatorKey, Rekey, SealedKeyEntry, SocketSpec, TrustRoot, Volume, sign,
};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::{DiscardPolicy, RekeyId, VolumeId};
use bulkhead_sealing::{RecipientKey, RecipientPublicKey, VolumeContext, seal};

pub const HOST: &str = "host-a";

/// alice and bob are trusted, mallory is not.
static OPERATORS: LazyLock<[OperatorKey; 3]> = LazyLock::new(|| {
    ["alice", "bob", "mallory"].map(|name| OperatorKey::generate(name).expect("key"))
});
static HOST_KEY: LazyLock<RecipientKey> =
    LazyLock::new(|| RecipientKey::generate(HOST).expect("key"));

pub fn alice() -> &'static OperatorKey {
    &OPERATORS[0]
}

pub fn mallory() -> &'static OperatorKey {
    &OPERATORS[2]
}

pub fn host_key() -> &'static RecipientKey {
    &HOST_KEY
}

pub fn trust() -> TrustRoot {
    let operators = OPERATORS[..2].iter().map(|key| key.public().clone());
    TrustRoot::new(operators.collect(), 1).expect("consistent")
}

pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}

pub fn id(number: u8) -> VolumeId {
    VolumeId([number; 16])
}

pub fn random_key() -> [u8; 64] {
    let mut key = [0; 64];
    let mut random = File::open("/dev/urandom").expect("open");
    random.read_exact(&mut key).expect("random");
    key
}

/// A plain volume, `disk<n>` on listener `vm<n>`.
pub fn plain(number: u8) -> Volume {
    Volume {
        id: id(number),
        name: format!("disk{number}"),
        path: format!("disk{number}.img"),
        size_bytes: u64::from(number) << 20,
        data_unit_bytes: None,
        logical_block_bytes: 4096,
        read_only: number.is_multiple_of(2),
        serial: format!("serial {number}"),
        discard: DiscardPolicy::Pass,
        queues: 3,
        socket: SocketSpec {
            name: format!("vm{number}").parse().expect("name"),
            uid: 1,
            gid: 2,
            mode: 0o660,
        },
        allowed_uid: 1000 + u32::from(number),
        force_removal: false,
        sealed_keys: Vec::new(),
        rekey: None,
        limits: Limits::default(),
        group: None,
    }
}

/// An encrypted one.
pub fn encrypted(number: u8, key: &[u8; 64]) -> Volume {
    let mut volume = Volume {
        data_unit_bytes: Some(512),
        ..plain(number)
    };
    volume.sealed_keys = vec![sealed(key, host_key().public(), &volume)];
    volume
}

/// An encrypted one, whose key takes the place of a previous one.
pub fn rekeyed(number: u8, key: &[u8; 64], previous: &[u8; 64]) -> Volume {
    let mut volume = encrypted(number, key);
    volume.read_only = false;
    volume.rekey = Some(Rekey {
        id: RekeyId([0xc0 | number; 16]),
        previous_keys: vec![sealed(previous, host_key().public(), &volume)],
    });
    volume
}

pub fn sealed(key: &[u8; 64], to: &RecipientPublicKey, volume: &Volume) -> SealedKeyEntry {
    let context = VolumeContext {
        id: volume.id,
        size_bytes: volume.size_bytes,
        data_unit_bytes: volume.data_unit_bytes.expect("encrypted"),
        logical_block_bytes: volume.logical_block_bytes,
    };
    let sealed = seal(key, to, &context).expect("sealed");
    SealedKeyEntry {
        recipient: sealed.recipient,
        fingerprint: sealed.fingerprint,
        enc: sealed.enc,
        ciphertext: sealed.ciphertext,
    }
}

pub fn bundle(epoch: u64, volumes: Vec<Volume>) -> HostBundle {
    HostBundle {
        host: HOST.to_owned(),
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
