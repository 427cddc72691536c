//! Packets out of memory that somebody else changes: cut in segments anywhere, and while they are
//! sealed.
//!
//! UNSAFETY: segments point into vectors that outlive the packets and are not reallocated.
#![expect(unsafe_code, reason = "segments are raw")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    Kernel, LengthError, OpenPacket, Opener, PacketKey, SealPacket, Sealer, Segment, TAG_BYTES,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn key(kernel: Kernel) -> PacketKey {
    let arena = SecretArena::new(1).expect("arena");
    PacketKey::with_kernel(&arena, &[0x42; 32], kernel).expect("key")
}

/// What the peer makes of it.
fn opened(opener: &Opener, sequence: u64, sealed: &mut [u8]) -> Option<Vec<u8>> {
    let mut batch = [OpenPacket::in_place(sequence, b"header", sealed).expect("packet")];
    opener.open_batch(&mut batch);
    batch[0].plaintext().ok().map(|bytes| bytes.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn segments_are_joined(pieces in vec(vec(any::<u8>(), 0..400), 0..6)) {
        for kernel in Kernel::available() {
            let segments: Vec<_> = pieces
                .iter()
                .map(|piece| Segment { address: piece.as_ptr(), bytes: piece.len() })
                .collect();
            let mut output = vec![0xdd; pieces.concat().len() + TAG_BYTES];
            // SAFETY: the pieces outlive the packet and lie apart from the output.
            let packet = unsafe { SealPacket::from_segments(b"header", &segments, &mut output) };
            let mut sealer = Sealer::new(key(kernel), [0; 4], 1);
            prop_assert_eq!(sealer.seal_batch(&mut [packet.expect("packet")]), Ok(1));
            let opener = Opener::new(key(kernel), [0; 4]);
            prop_assert_eq!(opened(&opener, 1, &mut output), Some(pieces.concat()));
        }
    }
}

#[test]
fn segments_of_another_length_are_refused() {
    let bytes = [0; 50];
    let segment = Segment {
        address: bytes.as_ptr(),
        bytes: 50,
    };
    let mut output = [0; 100];
    // SAFETY: the segments outlive the packet and lie apart from the output.
    let refused = unsafe { SealPacket::from_segments(&[], &[segment, segment], &mut output) };
    assert_eq!(
        refused.err(),
        Some(LengthError::Output {
            needed: 116,
            given: 100
        })
    );
    let segments = [
        segment,
        Segment {
            bytes: usize::MAX,
            ..segment
        },
    ];
    // SAFETY: refused before anything is read.
    let refused = unsafe { SealPacket::from_segments(&[], &segments, &mut output) };
    assert!(matches!(refused.err(), Some(LengthError::Output { .. })));
}

/// A kernel that reads a byte twice makes a tag that its ciphertext doesn't have, or one that
/// lets a plaintext through that was never there.
#[test]
fn a_packet_that_changes_while_it_is_sealed_still_opens() {
    const BYTES: usize = 1500;
    let guest: Arc<Vec<AtomicU8>> = Arc::new((0..BYTES).map(|_| AtomicU8::new(0)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (guest, done) = (Arc::clone(&guest), Arc::clone(&done));
        move || {
            let mut value = 0u8;
            while !done.load(Ordering::Relaxed) {
                value ^= 0xff;
                guest
                    .iter()
                    .for_each(|byte| byte.store(value, Ordering::Relaxed));
            }
        }
    });
    for kernel in Kernel::available() {
        let mut sealer = Sealer::new(key(kernel), [0; 4], 1);
        let opener = Opener::new(key(kernel), [0; 4]);
        // Until enough of them were caught in the middle of a change; on a machine that never
        // runs both threads at once that may not come, hence the end.
        let mut caught = 0;
        for _ in 0..100_000 {
            if caught == 100 {
                break;
            }
            let segment = Segment {
                address: guest.as_ptr().cast(),
                bytes: BYTES,
            };
            let mut output = [0; BYTES + TAG_BYTES];
            // SAFETY: the bytes live on in the Arc; the output lies elsewhere.
            let packet = unsafe { SealPacket::from_segments(b"header", &[segment], &mut output) };
            let sequence = sealer
                .seal_batch(&mut [packet.expect("packet")])
                .expect("sealed");
            let plaintext = opened(&opener, sequence, &mut output).expect("authentic");
            assert!(plaintext.iter().all(|&byte| byte == 0 || byte == 0xff));
            caught += usize::from(plaintext.iter().any(|&byte| byte != plaintext[0]));
        }
    }
    done.store(true, Ordering::Relaxed);
    writer.join().expect("writer");
}
