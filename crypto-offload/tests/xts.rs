//! AES-256-XTS against AWS-LC, the vectors of IEEE 1619, and what must be refused.
//!
//! UNSAFETY: the oracle is a C library called with live buffers and their lengths; the raw
//! functions get slices of this test.
#![expect(unsafe_code, reason = "the oracle is C; raw functions under test")]

use std::os::raw::c_int;
use std::sync::Arc;

use bulkhead_crypto::{DataUnit, KeyError, SecretArena, XtsKey};
use proptest::prelude::*;

/// Encrypts or decrypts one data unit with AWS-LC.
fn oracle(key: &[u8; 64], unit: u128, input: &[u8], encrypt: bool) -> Vec<u8> {
    let iv = unit.to_le_bytes();
    let mut output = vec![0u8; input.len()];
    let mut written: c_int = 0;
    // SAFETY: key has 64 bytes, iv 16, both buffers the length given; the context is freed once.
    unsafe {
        let context = aws_lc_sys::EVP_CIPHER_CTX_new();
        assert!(!context.is_null());
        let rc = aws_lc_sys::EVP_CipherInit_ex(
            context,
            aws_lc_sys::EVP_aes_256_xts(),
            std::ptr::null_mut(),
            key.as_ptr(),
            iv.as_ptr(),
            c_int::from(encrypt),
        );
        assert_eq!(rc, 1);
        let rc = aws_lc_sys::EVP_CipherUpdate(
            context,
            output.as_mut_ptr(),
            &raw mut written,
            input.as_ptr(),
            c_int::try_from(input.len()).expect("small"),
        );
        assert_eq!(rc, 1);
        aws_lc_sys::EVP_CIPHER_CTX_free(context);
    }
    assert_eq!(usize::try_from(written).expect("positive"), input.len());
    output
}

fn oracle_units(
    key: &[u8; 64],
    unit: DataUnit,
    first: u64,
    input: &[u8],
    encrypt: bool,
) -> Vec<u8> {
    input
        .chunks(unit.bytes() as usize)
        .zip(0u128..)
        .flat_map(|(bytes, i)| oracle(key, u128::from(first) + i, bytes, encrypt))
        .collect()
}

fn expand(key: &[u8; 64]) -> (Arc<SecretArena>, XtsKey) {
    let arena = SecretArena::new(1).expect("arena");
    let key = XtsKey::new(&arena, key).expect("key");
    (arena, key)
}

fn unit_sizes() -> impl Strategy<Value = DataUnit> {
    prop_oneof![Just(DataUnit::B512), Just(DataUnit::B4096)]
}

fn first_units() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..64u64,
        Just((1 << 32) - 2),
        any::<u64>(),
        Just(u64::MAX - 1),
        Just(u64::MAX)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn agrees_with_the_oracle(
        key in prop::array::uniform32(any::<u8>()),
        tweak_key in prop::array::uniform32(any::<u8>()),
        unit in unit_sizes(),
        first in first_units(),
        units in 0usize..40,
        seed in any::<u8>(),
        shift in 0usize..16,
    ) {
        prop_assume!(key != tweak_key);
        let mut both = [0u8; 64];
        both[..32].copy_from_slice(&key);
        both[32..].copy_from_slice(&tweak_key);
        let (_arena, xts) = expand(&both);
        let len = units * unit.bytes() as usize;
        // Shifted by up to 15 bytes: guest buffers have any alignment.
        let plain: Vec<u8> = (0..len + shift)
            .map(|i| u8::try_from((i * 31 + usize::from(seed)) % 251).expect("small"))
            .collect();
        let plain = &plain[shift..];
        let mut cipher = vec![0u8; len];
        xts.encrypt(unit, first, plain, &mut cipher).expect("lengths");
        prop_assert_eq!(&cipher, &oracle_units(&both, unit, first, plain, true));
        let mut back = vec![0u8; len];
        xts.decrypt(unit, first, &cipher, &mut back).expect("lengths");
        prop_assert_eq!(&back[..], plain);
        // In place, both ways.
        let mut own = plain.to_vec();
        let at = own.as_mut_ptr();
        // SAFETY: one buffer of `len` bytes as source and destination.
        unsafe { xts.encrypt_raw(unit, first, at, at, len) }.expect("lengths");
        prop_assert_eq!(&own, &cipher);
        // SAFETY: as above.
        unsafe { xts.decrypt_raw(unit, first, at, at, len) }.expect("lengths");
        prop_assert_eq!(&own[..], plain);
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .map(|d| u8::try_from(d).expect("digit"))
        .collect();
    digits.chunks(2).map(|d| (d[0] << 4) | d[1]).collect()
}

/// IEEE 1619-2007, annex B, vectors 10 and 11: AES-256, data unit 0xff and 0xffff, 512 bytes.
/// Only the first 64 bytes of each ciphertext are listed; the oracle checks the rest.
#[test]
fn ieee_1619_vectors() {
    let key: [u8; 64] = hex(
        "2718281828459045235360287471352662497757247093699959574966967627 \
         3141592653589793238462643383279502884197169399375105820974944592",
    )
    .try_into()
    .expect("64 bytes");
    let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
    let (_arena, xts) = expand(&key);
    for (unit, expected) in [
        (
            0xff_u64,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b \
             5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd",
        ),
        (
            0xffff,
            "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11 \
             e1d0225438e093242d6db274fde801d4cae06f2092c728b2478559df58e837c2",
        ),
    ] {
        let mut cipher = vec![0u8; 512];
        xts.encrypt(DataUnit::B512, unit, &plain, &mut cipher)
            .expect("lengths");
        assert_eq!(cipher[..64], hex(expected)[..], "unit {unit:#x}");
        assert_eq!(
            cipher,
            oracle_units(&key, DataUnit::B512, unit, &plain, true)
        );
    }
}

#[test]
fn a_key_is_told_from_one_that_differs_in_any_half() {
    let bytes: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
    let arena = SecretArena::new(4).expect("arena");
    let key = XtsKey::new(&arena, &bytes).expect("key");
    let again = XtsKey::new(&arena, &bytes).expect("key");
    assert!(key.is_same(&again) && key.is_same(&key));
    for at in [0, 31, 32, 63] {
        let mut other = bytes;
        other[at] ^= 0x80;
        let other = XtsKey::new(&arena, &other).expect("key");
        assert!(!key.is_same(&other) && !other.is_same(&key), "byte {at}");
    }
}

#[test]
fn equal_halves_are_refused() {
    let arena = SecretArena::new(1).expect("arena");
    assert!(matches!(
        XtsKey::new(&arena, &[7; 64]),
        Err(KeyError::EqualHalves)
    ));
    let mut key = [7; 64];
    key[63] = 8;
    let held = XtsKey::new(&arena, &key).expect("halves differ by a bit");
    assert!(matches!(
        XtsKey::new(&arena, &key),
        Err(KeyError::ArenaFull(_))
    ));
    drop(held);
    assert!(XtsKey::new(&arena, &key).is_ok());
}

#[test]
fn lengths_that_do_not_fit_are_refused_unwritten() {
    let mut key = [1; 64];
    key[0] = 2;
    let (_arena, xts) = expand(&key);
    for (unit, src, dst) in [
        (DataUnit::B512, 512, 1024),
        (DataUnit::B512, 513, 513),
        (DataUnit::B4096, 512, 512),
        (DataUnit::B4096, 4096, 0),
    ] {
        let source = vec![1; src];
        let mut destination = vec![0xee; dst];
        assert!(xts.encrypt(unit, 0, &source, &mut destination).is_err());
        assert!(xts.decrypt(unit, 0, &source, &mut destination).is_err());
        assert!(destination.iter().all(|&b| b == 0xee));
    }
    assert!(DataUnit::new(1024).is_none());
    assert_eq!(DataUnit::new(4096), Some(DataUnit::B4096));
}

/// A guest that rewrites the source meanwhile gets one version of each block encrypted, and the
/// destination never holds plaintext.
#[test]
fn a_source_that_changes_meanwhile_gives_whole_blocks() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut key = [1; 64];
    key[0] = 2;
    let (_arena, xts) = expand(&key);
    let mut memory = vec![0u8; 4096];
    let at = memory.as_mut_ptr().expose_provenance();
    let stop = AtomicBool::new(false);
    let versions: Vec<Vec<u8>> = [0u8, 0xff]
        .iter()
        .map(|&v| oracle_units(&key, DataUnit::B4096, 9, &[v; 4096], true))
        .collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0u64;
            while !stop.load(Ordering::Relaxed) {
                value = !value;
                for i in 0..256 {
                    // SAFETY: inside the buffer, which lives through the scope; volatile.
                    unsafe {
                        std::ptr::with_exposed_provenance_mut::<[u64; 2]>(at)
                            .add(i)
                            .write_volatile([value; 2]);
                    }
                }
            }
        });
        for _ in 0..2000 {
            let mut cipher = vec![0u8; 4096];
            // SAFETY: both buffers have 4096 bytes; the source is changed by the other thread.
            unsafe {
                xts.encrypt_raw(
                    DataUnit::B4096,
                    9,
                    std::ptr::with_exposed_provenance(at),
                    cipher.as_mut_ptr(),
                    4096,
                )
            }
            .expect("lengths");
            for (i, block) in cipher.chunks(16).enumerate() {
                // A block may be torn between its two words; it is never left in the clear.
                let range = i * 16..i * 16 + 16;
                let clear = block == [0; 16] || block == [0xff; 16];
                assert!(!clear || versions.iter().any(|v| v[range.clone()] == *block));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
