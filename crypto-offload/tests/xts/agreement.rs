//! Every kernel does the same as AWS-LC, whatever the data unit, numbers, lengths, places and segments.
//!
//! UNSAFETY: buffers of this test by raw address, with their lengths.
#![expect(unsafe_code, reason = "raw functions under test")]

use std::ptr::NonNull;

use bulkhead_crypto::xts::Kernel;
use bulkhead_crypto::{DataUnit, Extent, SecretArena, XtsKey};

use crate::oracle::{self, AwsLc};
use crate::random::Random;
use crate::{each_kernel, expand};

const UNITS: [DataUnit; 2] = [DataUnit::B512, DataUnit::B4096];

/// Numbers near the ends of what a word holds, and any.
fn first_unit(random: &mut Random) -> u128 {
    let low = match random.below(4) {
        0 => u64::MAX - random.next() % 70,
        1 => random.next() % 70,
        _ => random.next(),
    };
    let high = match random.below(4) {
        0 => random.next(),
        1 => u64::MAX,
        _ => 0,
    };
    u128::from(high) << 64 | u128::from(low)
}

/// A run of units between buffers, both directions.
fn both_ways(key: &XtsKey, unit: DataUnit, first: u128, plain: &[u8], cipher: &[u8], name: &str) {
    let mut output = vec![0; plain.len()];
    key.encrypt_slices(unit, first, &[plain], &mut [&mut output])
        .expect("whole units");
    assert!(output == cipher, "{name} encrypts {first:#x} otherwise");
    key.decrypt_slices(unit, first, &[cipher], &mut [&mut output])
        .expect("whole units");
    assert!(output == plain, "{name} decrypts {first:#x} otherwise");
}

#[test]
fn a_hundred_thousand_random_units_agree() {
    const TOTAL: usize = 100_000;
    let mut random = Random::new(1);
    let arena = SecretArena::new(Kernel::ALL.len()).expect("arena");
    let (mut done, mut plain) = (0, vec![0; 80 * 512]);
    each_kernel("a_hundred_thousand_random_units_agree", |_| {});
    while done < TOTAL {
        let key = random.key();
        let keys: Vec<_> = Kernel::available()
            .into_iter()
            .map(|kernel| XtsKey::with_kernel(&arena, &key, kernel).expect("key"))
            .collect();
        let oracle = AwsLc::new(&key, true);
        for _ in 0..20 {
            // Mostly small ones, some large.
            let unit = UNITS[usize::from(random.below(8) == 0)];
            let bytes = unit.bytes() as usize;
            let units = 1 + random.below(plain.len() / bytes);
            let plain = &mut plain[..units * bytes];
            random.fill(plain);
            let first = first_unit(&mut random);
            let mut cipher = vec![0; plain.len()];
            let mut number = first;
            for (plain, cipher) in plain.chunks(bytes).zip(cipher.chunks_mut(bytes)) {
                oracle.unit(number, plain, cipher);
                number = number.wrapping_add(1);
            }
            for key in &keys {
                both_ways(key, unit, first, plain, &cipher, key.kernel().name());
            }
            // RustCrypto is slow: the first unit of each run.
            let mut unit = plain[..bytes].to_vec();
            oracle::rust_crypto(&key, first, &mut unit);
            assert!(unit == cipher[..bytes], "the oracles differ at {first:#x}");
            done += units;
        }
    }
}

#[test]
fn any_length_place_and_alignment() {
    each_kernel("any_length_place_and_alignment", |kernel| {
        let mut random = Random::new(2);
        let key = random.key();
        let xts = expand(&key, kernel);
        for unit in UNITS {
            // Past a batch of 64 groups, and past two.
            for units in (0..=20).chain([63, 64, 65, 130]) {
                let bytes = units * unit.bytes() as usize;
                let shift = random.below(64);
                let mut buffer = vec![0; bytes + shift];
                random.fill(&mut buffer);
                let plain = buffer[shift..].to_vec();
                let first = random.next();
                let cipher = oracle::units(&key, unit, u128::from(first), &plain, true);
                both_ways(
                    &xts,
                    unit,
                    u128::from(first),
                    &plain,
                    &cipher,
                    kernel.name(),
                );
                let at = buffer[shift..].as_mut_ptr();
                // SAFETY: one buffer of `bytes` bytes as source and destination.
                unsafe { xts.encrypt_raw(unit, first, at, at, bytes) }.expect("whole units");
                assert!(
                    buffer[shift..] == cipher,
                    "{kernel}: {units} units in place"
                );
                let at = buffer[shift..].as_mut_ptr();
                // SAFETY: as above.
                unsafe { xts.decrypt_raw(unit, first, at, at, bytes) }.expect("whole units");
                assert!(buffer[shift..] == plain, "{kernel}: {units} units in place");
            }
        }
    });
}

/// Cuts a length into segments, some of them empty.
fn cut(random: &mut Random, bytes: usize) -> Vec<usize> {
    let (mut lengths, mut left) = (Vec::new(), bytes);
    while left > 0 {
        let most = [3, 16, 100, 513, 4096, 70_000][random.below(6)];
        let here = random.below(most + 1).min(left);
        lengths.push(here);
        left -= here;
    }
    lengths
}

/// The slices of a buffer that lengths cut it into, apart from each other in memory.
fn scattered(bytes: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut at = 0;
    lengths
        .iter()
        .map(|length| {
            at += length;
            bytes[at - length..at].to_vec()
        })
        .collect()
}

#[test]
fn units_may_straddle_segments_anywhere() {
    each_kernel("units_may_straddle_segments_anywhere", |kernel| {
        let mut random = Random::new(3);
        let key = random.key();
        let xts = expand(&key, kernel);
        for round in 0..300 {
            let unit = UNITS[round % 2];
            let mut plain = vec![0; unit.bytes() as usize * random.below(20)];
            random.fill(&mut plain);
            let first = first_unit(&mut random);
            let cipher = oracle::units(&key, unit, first, &plain, true);
            let from = cut(&mut random, plain.len());
            let to = cut(&mut random, plain.len());
            for (encrypt, input, expected) in [(true, &plain, &cipher), (false, &cipher, &plain)] {
                let source = scattered(input, &from);
                let mut destination = scattered(&vec![0xee; input.len()], &to);
                let source: Vec<_> = source.iter().map(Vec::as_slice).collect();
                let mut slices: Vec<_> = destination.iter_mut().map(Vec::as_mut_slice).collect();
                if encrypt {
                    xts.encrypt_slices(unit, first, &source, &mut slices)
                } else {
                    xts.decrypt_slices(unit, first, &source, &mut slices)
                }
                .expect("whole units");
                assert!(
                    destination.concat() == *expected,
                    "{kernel}: {from:?} to {to:?}"
                );
            }
        }
    });
}

#[test]
fn segments_in_place() {
    each_kernel("segments_in_place", |kernel| {
        let mut random = Random::new(4);
        let key = random.key();
        let xts = expand(&key, kernel);
        for round in 0..100 {
            let unit = UNITS[round % 2];
            let mut plain = vec![0; unit.bytes() as usize * random.below(12)];
            random.fill(&mut plain);
            let cipher = oracle::units(&key, unit, 5, &plain, true);
            let lengths = cut(&mut random, plain.len());
            let mut buffers = scattered(&plain, &lengths);
            let segments: Vec<_> = buffers
                .iter_mut()
                .map(|b| (NonNull::from(b.as_mut_slice()).cast::<u8>(), b.len()))
                .collect();
            let each = || segments.iter().copied();
            // SAFETY: buffers of this test, the same on both sides.
            unsafe { xts.encrypt_segments(unit, 5, each(), each()) }.expect("whole units");
            assert!(buffers.concat() == cipher, "{kernel}: {lengths:?}");
            // SAFETY: as above.
            unsafe { xts.decrypt_segments(unit, 5, each(), each()) }.expect("whole units");
            assert!(buffers.concat() == plain, "{kernel}: {lengths:?}");
        }
    });
}

#[test]
fn segments_that_do_not_fit_are_refused_unwritten() {
    let key = Random::new(5).key();
    let xts = expand(&key, Kernel::chosen());
    let source = [1; 1024];
    for (from, to) in [(1024, 1023), (1023, 1023), (512, 1024), (0, 512)] {
        let mut destination = [0xee; 1024];
        let (one, two) = destination[..to].split_at_mut(to / 3);
        let refused = xts.encrypt_slices(
            DataUnit::B512,
            0,
            &[&source[..from / 2], &source[from / 2..from]],
            &mut [one, two],
        );
        let error = refused.expect_err("not the same whole units");
        assert_eq!((error.source_bytes, error.destination_bytes), (from, to));
        assert_eq!(destination, [0xee; 1024]);
    }
}

/// Extents of one call are what each is by itself: short and long ones, next to each other and far apart, with
/// numbers up to the end of what there is.
#[test]
fn extents_are_what_each_is_alone() {
    each_kernel("extents_are_what_each_is_alone", |kernel| {
        let mut random = Random::new(11);
        let key = random.key();
        let xts = expand(&key, kernel);
        for round in 0..60 {
            let unit = UNITS[round % 2];
            let bytes = |random: &mut Random| {
                let most = [1, 2, 9, 40][random.below(4)];
                unit.bytes() as usize * random.below(most + 1)
            };
            let runs: Vec<(u64, Vec<u8>)> = (0..random.below(12))
                .map(|_| {
                    let mut plain = vec![0; bytes(&mut random)];
                    random.fill(&mut plain);
                    let near_end = random.below(4) == 0;
                    let number = if near_end {
                        u64::MAX - 3
                    } else {
                        random.next()
                    };
                    (number, plain)
                })
                .collect();
            let mut expected = Vec::new();
            for (number, plain) in &runs {
                let mut cipher = vec![0; plain.len()];
                xts.encrypt_slices(unit, u128::from(*number), &[plain], &mut [&mut cipher])
                    .expect("whole units");
                expected.push(cipher);
            }
            let mut outputs: Vec<Vec<u8>> = runs.iter().map(|(_, p)| vec![0; p.len()]).collect();
            let extents = |from: &[Vec<u8>], to: &mut [Vec<u8>]| -> Vec<Extent> {
                let both = from.iter().zip(to).zip(&runs);
                both.map(|((from, to), (number, _))| Extent {
                    first_unit: *number,
                    source: NonNull::from(from.as_slice()).cast(),
                    destination: NonNull::from(to.as_mut_slice()).cast(),
                    bytes: from.len(),
                })
                .collect()
            };
            let plains: Vec<Vec<u8>> = runs.iter().map(|(_, plain)| plain.clone()).collect();
            let to_do = extents(&plains, &mut outputs);
            // SAFETY: buffers of this test, as long on both sides, none of them twice.
            unsafe { xts.encrypt_extents(unit, &to_do) }.expect("whole units");
            assert!(outputs == expected, "{kernel}: round {round}");
            let ciphers = std::mem::take(&mut outputs);
            outputs = runs.iter().map(|(_, p)| vec![0; p.len()]).collect();
            let to_do = extents(&ciphers, &mut outputs);
            // SAFETY: as above.
            unsafe { xts.decrypt_extents(unit, &to_do) }.expect("whole units");
            assert!(outputs == plains, "{kernel}: round {round}");
        }
    });
}

#[test]
fn an_extent_that_is_no_whole_units_is_refused_with_all_others() {
    let xts = expand(&Random::new(12).key(), Kernel::chosen());
    let (from, mut to) = (vec![7; 1024], vec![0; 1024]);
    let mut extent = |bytes: usize| Extent {
        first_unit: 0,
        source: NonNull::from(from.as_slice()).cast(),
        destination: NonNull::from(to.as_mut_slice()).cast(),
        bytes,
    };
    let extents = [extent(512), extent(513)];
    // SAFETY: buffers of this test, as long as said.
    unsafe { xts.encrypt_extents(DataUnit::B512, &extents) }.expect_err("513 bytes");
    assert_eq!(to, [0; 1024], "nothing was written");
}
