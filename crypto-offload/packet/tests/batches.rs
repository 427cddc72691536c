//! Batches of any packets: against RustCrypto's AES-GCM, there and back, and with one of them
//! damaged.
#![forbid(unsafe_code)]

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::packet::{MAX_ASSOCIATED_BYTES, MAX_PLAINTEXT_BYTES};
use bulkhead_packet_cipher::{
    Kernel, LengthError, OpenPacket, Opener, PacketKey, Refused, SealPacket, Sealer, TAG_BYTES,
};
use proptest::collection::vec;
use proptest::prelude::*;

const KEY: [u8; 32] = *b"an AES-256 key for tests of ours";
const SALT: [u8; 4] = [0xfe, 1, 0x80, 3];

/// A packet as the tests make it.
#[derive(Debug, Clone)]
struct Plain {
    associated: Vec<u8>,
    bytes: Vec<u8>,
}

fn key(kernel: Kernel) -> PacketKey {
    let arena = SecretArena::new(1).expect("arena");
    PacketKey::with_kernel(&arena, &KEY, kernel).expect("key")
}

/// Associated data and ciphertext with tag of each packet, by our cipher.
fn seal(kernel: Kernel, first: u64, packets: &[Plain], in_place: bool) -> Vec<Vec<u8>> {
    let mut outputs: Vec<Vec<u8>> = packets
        .iter()
        .map(|plain| {
            let mut output = if in_place {
                plain.bytes.clone()
            } else {
                Vec::new()
            };
            output.resize(plain.bytes.len() + TAG_BYTES, 0xdd);
            output
        })
        .collect();
    let mut batch: Vec<_> = packets
        .iter()
        .zip(&mut outputs)
        .map(|(plain, output)| {
            if in_place {
                SealPacket::in_place(&plain.associated, output).expect("packet")
            } else {
                SealPacket::between(&plain.associated, &plain.bytes, output).expect("packet")
            }
        })
        .collect();
    let mut sealer = Sealer::new(key(kernel), SALT, first);
    assert_eq!(sealer.seal_batch(&mut batch), Ok(first));
    drop(batch);
    outputs
}

/// The same by RustCrypto.
fn peer(first: u64, packets: &[Plain]) -> Vec<Vec<u8>> {
    let cipher = Aes256Gcm::new(&KEY.into());
    (first..)
        .zip(packets)
        .map(|(sequence, plain)| {
            let nonce = [&SALT[..], &sequence.to_be_bytes()].concat();
            let payload = Payload {
                msg: &plain.bytes,
                aad: &plain.associated,
            };
            let nonce = Nonce::try_from(&nonce[..]).expect("12 bytes");
            cipher.encrypt(&nonce, payload).expect("sealed")
        })
        .collect()
}

/// What a packet became, and what its output holds.
type Opened = (Result<Vec<u8>, Refused>, Vec<u8>);

/// Opens a batch.
fn open(
    kernel: Kernel,
    first: u64,
    packets: &[Plain],
    sealed: &mut [Vec<u8>],
    in_place: bool,
) -> Vec<Opened> {
    let copies: Vec<Vec<u8>> = sealed.to_vec();
    let mut outputs: Vec<Vec<u8>> = packets.iter().map(|p| vec![0xcc; p.bytes.len()]).collect();
    let mut batch: Vec<_> = (first..)
        .zip(packets)
        .zip(sealed.iter_mut().zip(&copies).zip(&mut outputs))
        .map(|((sequence, plain), ((buffer, copy), output))| {
            if in_place {
                OpenPacket::in_place(sequence, &plain.associated, buffer).expect("packet")
            } else {
                OpenPacket::between(sequence, &plain.associated, copy, output).expect("packet")
            }
        })
        .collect();
    Opener::new(key(kernel), SALT).open_batch(&mut batch);
    let results: Vec<_> = batch
        .iter_mut()
        .map(|packet| packet.plaintext().map(|bytes| bytes.to_vec()))
        .collect();
    drop(batch);
    let left = if in_place { sealed.to_vec() } else { outputs };
    results
        .into_iter()
        .zip(left)
        .zip(packets)
        .map(|((result, left), plain)| (result, left[..plain.bytes.len()].to_vec()))
        .collect()
}

fn plain(longest: usize) -> impl Strategy<Value = Plain> {
    // Short ones, lengths around whole blocks and vectors, and any.
    let length = prop_oneof![
        0..=80usize,
        (0..=longest / 64, 0..5usize).prop_map(|(n, more)| (n * 64 + more).saturating_sub(2)),
        0..=longest,
    ];
    let associated = prop_oneof![vec(any::<u8>(), 0..=20), vec(any::<u8>(), 0..=100)];
    (associated, length, any::<u8>()).prop_map(move |(associated, length, seed)| Plain {
        associated,
        bytes: (0..length)
            .map(|i| u8::try_from((i * 7 + i / 251) % 256).expect("a byte") ^ seed)
            .collect(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn batches_are_as_rustcrypto_seals_them(
        first in any::<u64>().prop_map(|n| n >> 1),
        packets in vec(plain(2500), 0..40),
        in_place in any::<bool>(),
    ) {
        let expected = peer(first, &packets);
        for kernel in Kernel::available() {
            let mut sealed = seal(kernel, first, &packets, in_place);
            prop_assert_eq!(&sealed, &expected, "{:?}", kernel);
            let opened = open(kernel, first, &packets, &mut sealed, in_place);
            for (plain, (result, left)) in packets.iter().zip(opened) {
                prop_assert_eq!(result.as_ref(), Ok(&plain.bytes));
                prop_assert_eq!(&left, &plain.bytes);
            }
        }
    }

    #[test]
    fn a_damaged_packet_fails_alone_and_leaves_nothing(
        packets in vec(plain(1600), 1..40),
        which in any::<prop::sample::Index>(),
        bit in any::<prop::sample::Index>(),
        in_place in any::<bool>(),
    ) {
        let at = which.index(packets.len());
        for kernel in Kernel::available() {
            let mut sealed = seal(kernel, 9, &packets, true);
            let bit = bit.index(sealed[at].len() * 8);
            sealed[at][bit / 8] ^= 1 << (bit % 8);
            let opened = open(kernel, 9, &packets, &mut sealed, in_place);
            for (i, (plain, (result, left))) in packets.iter().zip(opened).enumerate() {
                if i == at {
                    prop_assert_eq!(result, Err(Refused { sequence: 9 + i as u64 }));
                    prop_assert!(left.iter().all(|&byte| byte == 0), "{:?}", kernel);
                } else {
                    prop_assert_eq!(result.as_ref(), Ok(&plain.bytes), "{:?}", kernel);
                }
            }
        }
    }
}

#[test]
fn every_length_of_a_packet() {
    let associated: Vec<u8> = (0..100).collect();
    let longer = [4096, 8192, 9000, 65_535, MAX_PLAINTEXT_BYTES];
    for length in (0..1800).chain(longer) {
        let packets = [Plain {
            associated: associated[..length % 97].to_vec(),
            bytes: (0..length)
                .map(|i| u8::try_from(i % 251).expect("a byte"))
                .collect(),
        }];
        let expected = peer(1, &packets);
        for kernel in Kernel::available() {
            let mut sealed = seal(kernel, 1, &packets, false);
            assert!(sealed == expected, "{kernel:?}, {length} bytes");
            let opened = open(kernel, 1, &packets, &mut sealed, false);
            assert!(
                opened[0].0.as_ref() == Ok(&packets[0].bytes),
                "{kernel:?}, {length} bytes"
            );
        }
    }
}

#[test]
fn number_salt_and_associated_data_are_authenticated() {
    let plain = Plain {
        associated: vec![1; 12],
        bytes: vec![2; 100],
    };
    for kernel in Kernel::available() {
        let sealed = &seal(kernel, 5, std::slice::from_ref(&plain), false)[0];
        let opens = |salt, sequence, associated: &[u8]| {
            let mut output = vec![0; 100];
            let packet = OpenPacket::between(sequence, associated, sealed, &mut output);
            let mut batch = [packet.expect("packet")];
            Opener::new(key(kernel), salt).open_batch(&mut batch);
            batch[0].plaintext().is_ok()
        };
        assert!(opens(SALT, 5, &[1; 12]));
        assert!(!opens([0; 4], 5, &[1; 12]));
        assert!(!opens(SALT, 6, &[1; 12]));
        assert!(!opens(SALT, 5, &[1; 11]));
        assert!(!opens(SALT, 5, &[]));
    }
}

#[test]
fn a_packet_is_opened_once() {
    for kernel in Kernel::available() {
        let plain = Plain {
            associated: vec![],
            bytes: vec![3; 70],
        };
        let mut sealed = seal(kernel, 1, std::slice::from_ref(&plain), false);
        let packet = OpenPacket::in_place(1, &[], &mut sealed[0]).expect("packet");
        let mut batch = [packet];
        assert!(batch[0].plaintext().is_err(), "not opened yet");
        let opener = Opener::new(key(kernel), SALT);
        opener.open_batch(&mut batch);
        opener.open_batch(&mut batch);
        assert_eq!(batch[0].plaintext(), Ok(&mut [3; 70][..]));
    }
}

#[test]
fn lengths_that_make_no_packet_are_refused() {
    let (mut short, mut buffer) = ([0; TAG_BYTES - 1], [0; 100]);
    assert_eq!(
        SealPacket::in_place(&[], &mut short).err(),
        Some(LengthError::NoTag { bytes: 15 })
    );
    assert_eq!(
        OpenPacket::in_place(1, &[], &mut short).err(),
        Some(LengthError::NoTag { bytes: 15 })
    );
    assert_eq!(
        SealPacket::between(&[], &[0; 100], &mut buffer).err(),
        Some(LengthError::Output {
            needed: 116,
            given: 100
        })
    );
    assert_eq!(
        OpenPacket::between(1, &[], &[0; 100], &mut buffer).err(),
        Some(LengthError::Output {
            needed: 84,
            given: 100
        })
    );
    let mut long = vec![0; MAX_PLAINTEXT_BYTES + 1 + TAG_BYTES];
    assert_eq!(
        SealPacket::in_place(&[], &mut long).err(),
        Some(LengthError::TooLong {
            bytes: MAX_PLAINTEXT_BYTES + 1
        })
    );
    let long = vec![0; MAX_ASSOCIATED_BYTES + 1];
    assert_eq!(
        SealPacket::in_place(&long, &mut buffer).err(),
        Some(LengthError::AssociatedTooLong { bytes: long.len() })
    );
}
