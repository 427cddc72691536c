//! After a key was sealed and unsealed, it is nowhere in the process but where the caller has it:
//! every writable page is searched for it. A test of its own binary, with one test, so that no
//! other thread's memory is in the way.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bulkhead_protocol::VolumeId;
use bulkhead_sealing::{RecipientKey, VolumeContext, seal, unseal};
use zeroize::Zeroize;

/// XORed over what is searched for, so that the search does not find itself.
const MASK: u8 = 0xa5;
/// Bytes of a secret that count as finding it.
const FOUND_BYTES: usize = 16;

fn masked(secret: &[u8]) -> Vec<u8> {
    secret.iter().map(|byte| byte ^ MASK).collect()
}

/// In how many places of this process's writable memory the secret's first bytes are.
fn occurrences(masked_secret: &[u8]) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let memory = File::open("/proc/self/mem").expect("mem");
    let mut found = 0;
    // Read into a buffer that holds one page at a time and is wiped, so that it adds no copy.
    let mut page = vec![0u8; 4096 + FOUND_BYTES - 1];
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, flags) = (fields.next().expect("range"), fields.next().expect("flags"));
        if !flags.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').expect("range");
        let start = u64::from_str_radix(start, 16).expect("hex");
        let end = u64::from_str_radix(end, 16).expect("hex");
        let own = page.as_ptr() as u64;
        for at in (start..end).step_by(4096) {
            let length = (end - at).min(page.len() as u64);
            let length = usize::try_from(length).expect("small");
            if memory.read_exact_at(&mut page[..length], at).is_err() {
                continue; // a guard page
            }
            for (offset, window) in page[..length].windows(FOUND_BYTES).enumerate() {
                let address = at + offset as u64;
                let in_own_buffer = (own..own + page.len() as u64).contains(&address);
                let equal = window
                    .iter()
                    .zip(masked_secret)
                    .all(|(a, b)| *a == b ^ MASK);
                found += usize::from(equal && !in_own_buffer && offset < 4096);
            }
            page.fill(0);
        }
    }
    found
}

/// A key at a known place, and its masked copy.
fn secret_key() -> (Box<[u8; 64]>, Vec<u8>) {
    let mut key = Box::new([0; 64]);
    std::io::Read::read_exact(
        &mut File::open("/dev/urandom").expect("urandom"),
        key.as_mut_slice(),
    )
    .expect("read");
    let copy = masked(key.as_slice());
    (key, copy)
}

/// The seed in a key file, masked; nothing of it stays behind.
fn masked_seed(path: &Path) -> Vec<u8> {
    let mut text = std::fs::read_to_string(path).expect("read");
    let base64 = text.split('"').rev().nth(1).expect("last field");
    let mut seed = bulkhead_files::text::from_base64(base64).expect("base64");
    let copy = masked(&seed);
    seed.zeroize();
    text.zeroize();
    copy
}

#[test]
fn keys_are_only_where_their_owners_have_them() {
    let context = VolumeContext {
        id: VolumeId([7; 16]),
        size_bytes: 64 << 20,
        data_unit_bytes: 512,
        logical_block_bytes: 4096,
    };
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("host.key");
    let public = {
        let host = RecipientKey::generate("host-a").expect("key");
        host.save(&path).expect("save");
        host.public().clone()
    };
    let seed = masked_seed(&path);
    assert_eq!(
        occurrences(&seed),
        0,
        "making a recipient's key left a copy"
    );
    let (mut key, needle) = secret_key();
    assert_eq!(occurrences(&needle), 1, "the search finds the key");
    let sealed = seal(&key, &public, &context).expect("seal");
    key.fill(0);
    assert_eq!(occurrences(&needle), 0, "sealing left a copy");

    {
        let host = RecipientKey::load(&path).expect("load");
        assert_eq!(occurrences(&seed), 1, "the key that was loaded, once");
        unseal(&sealed, &host, &context, &mut key).expect("unseal");
    }
    assert_eq!(occurrences(&seed), 0, "a recipient's key was not wiped");
    assert_eq!(masked(key.as_slice()), needle);
    assert_eq!(occurrences(&needle), 1, "unsealing left a copy");
    key.fill(0);
    assert_eq!(occurrences(&needle), 0);
}
