//! Wycheproof's vectors for AES-GCM with keys of 256, nonces of 96 and tags of 128 bits, through
//! every kernel.
#![forbid(unsafe_code)]

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer, TAG_BYTES,
};
use wycheproof::TestResult;
use wycheproof::aead::{Test, TestName, TestSet};

fn nonce(test: &Test) -> ([u8; 4], u64) {
    let (salt, sequence) = test.nonce.split_at(4);
    (
        salt.try_into().expect("96 bits"),
        u64::from_be_bytes(sequence.try_into().expect("96 bits")),
    )
}

fn key(kernel: Kernel, test: &Test) -> PacketKey {
    let arena = SecretArena::new(1).expect("arena");
    let key = test.key[..].try_into().expect("256 bits");
    PacketKey::with_kernel(&arena, key, kernel).expect("key")
}

fn seal(kernel: Kernel, test: &Test) -> Vec<u8> {
    let (salt, sequence) = nonce(test);
    let mut buffer = test.pt.to_vec();
    buffer.extend([0; TAG_BYTES]);
    let packet = SealPacket::in_place(&test.aad, &mut buffer).expect("packet");
    let mut sealer = Sealer::new(key(kernel, test), salt, sequence);
    assert_eq!(sealer.seal_batch(&mut [packet]), Ok(sequence));
    buffer
}

fn open(kernel: Kernel, test: &Test) -> Option<Vec<u8>> {
    let (salt, sequence) = nonce(test);
    let sealed = [&test.ct[..], &test.tag[..]].concat();
    let mut plaintext = vec![0xee; test.ct.len()];
    let mut packet =
        [OpenPacket::between(sequence, &test.aad, &sealed, &mut plaintext).expect("packet")];
    Opener::new(key(kernel, test), salt).open_batch(&mut packet);
    let opened = packet[0].plaintext().map(|bytes| bytes.to_vec());
    match opened {
        Ok(bytes) => Some(bytes),
        Err(_) => {
            assert!(plaintext.iter().all(|&byte| byte == 0), "plaintext is left");
            None
        }
    }
}

#[test]
fn wycheproof_agrees() {
    let set = TestSet::load(TestName::AesGcm).expect("vectors");
    let groups = set
        .test_groups
        .iter()
        .filter(|g| (g.key_size, g.nonce_size, g.tag_size) == (256, 96, 128));
    let tests: Vec<_> = groups.flat_map(|group| &group.tests).collect();
    for kernel in Kernel::available() {
        let (mut valid, mut invalid) = (0, 0);
        for test in &tests {
            let what = format!("{kernel:?}, vector {}: {}", test.tc_id, test.comment);
            if test.result == TestResult::Invalid {
                assert_eq!(open(kernel, test), None, "{what}");
                invalid += 1;
            } else {
                let sealed = [&test.ct[..], &test.tag[..]].concat();
                assert_eq!(seal(kernel, test), sealed, "{what}");
                assert_eq!(open(kernel, test), Some(test.pt.to_vec()), "{what}");
                valid += 1;
            }
        }
        // So that a change of the vectors' format can't empty the test.
        assert!(
            valid >= 39 && invalid >= 27,
            "{valid} and {invalid} vectors"
        );
    }
}
