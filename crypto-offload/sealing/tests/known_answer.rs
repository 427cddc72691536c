//! Known answers: the published X-Wing vector, and a volume key sealed by an implementation of
//! RFC 9180 that shares nothing with ours (`known_answer.py`). They pin the formats of
//! `docs/formats/keys.md`: what was sealed once opens for ever.

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::VolumeId;
use bulkhead_sealing::{RecipientKey, SealedKey, VolumeContext, unseal};

fn vector() -> HashMap<&'static str, &'static str> {
    let lines = include_str!("known_answer.txt").lines();
    lines.filter_map(|line| line.split_once(" = ")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    bulkhead_files::text::from_hex(text).expect("hex")
}

/// The secret key file of the vector's seed, as the format's description has it.
fn key_file(folder: &Path, vector: &HashMap<&str, &str>) -> PathBuf {
    use std::io::Write as _;
    let path = folder.join("host.key");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .expect("create");
    write!(
        file,
        "kind = \"bulkhead recipient private key v1\"\nname = \"host-a\"\n\
         fingerprint = \"{}\"\nxwing_seed = \"{}\"\n",
        vector["fingerprint"], vector["seed_base64"]
    )
    .expect("write");
    path
}

#[test]
fn the_published_seed_gives_the_published_public_key() {
    let vector = vector();
    let folder = tempfile::tempdir().expect("folder");
    // Loading compares the fingerprint, which was made from the published public key elsewhere.
    let key = RecipientKey::load(&key_file(folder.path(), &vector)).expect("load");
    let text = key.public().to_text();
    let public = bulkhead_files::text::to_base64(&unhex(vector["public"]));
    assert!(text.contains(&public), "{text}");
}

#[test]
fn a_key_sealed_elsewhere_opens() {
    let vector = vector();
    let folder = tempfile::tempdir().expect("folder");
    let key = RecipientKey::load(&key_file(folder.path(), &vector)).expect("load");
    let sealed = SealedKey {
        recipient: "host-a".to_owned(),
        fingerprint: unhex(vector["fingerprint"]),
        enc: unhex(vector["enc"]),
        ciphertext: unhex(vector["ciphertext"]),
    };
    let context = VolumeContext {
        id: VolumeId(std::array::from_fn(|i| u8::try_from(i).expect("small"))),
        size_bytes: 64 << 20,
        data_unit_bytes: 512,
        logical_block_bytes: 4096,
    };
    let mut out = [0; 64];
    unseal(&sealed, &key, &context, &mut out).expect("open");
    let expected: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
    assert_eq!(out, expected);
}
