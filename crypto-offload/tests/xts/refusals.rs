//! What a key refuses, and memory that changes under it.
//!
//! UNSAFETY: buffers of this test by raw address.
#![expect(unsafe_code, reason = "raw functions under test")]

use bulkhead_crypto::xts::Kernel;
use bulkhead_crypto::{DataUnit, KeyError, SecretArena, XtsKey};

use crate::oracle;
use crate::{each_kernel, expand};

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
    let xts = expand(&key, Kernel::chosen());
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
    each_kernel(
        "a_source_that_changes_meanwhile_gives_whole_blocks",
        |kernel| {
            let mut key = [1; 64];
            key[0] = 2;
            changing_source(&expand(&key, kernel), &key);
        },
    );
}

fn changing_source(xts: &XtsKey, key: &[u8; 64]) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut memory = vec![0u8; 4096];
    let at = memory.as_mut_ptr().expose_provenance();
    let stop = AtomicBool::new(false);
    let versions: Vec<Vec<u8>> = [0u8, 0xff]
        .iter()
        .map(|&v| oracle::units(key, DataUnit::B4096, 9, &[v; 4096], true))
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
        for _ in 0..500 {
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

#[test]
fn a_kernel_that_the_cpu_lacks_is_refused() {
    let mut key = [7; 64];
    key[63] = 8;
    let arena = SecretArena::new(1).expect("arena");
    let available = Kernel::available();
    assert_eq!(available.first(), Some(&Kernel::chosen()));
    assert_eq!(available.last(), Some(&Kernel::Portable));
    for kernel in Kernel::ALL {
        let made = XtsKey::with_kernel(&arena, &key, kernel);
        match made {
            Ok(key) => assert!(available.contains(&kernel) && key.kernel() == kernel),
            Err(error) => {
                assert_eq!(error, KeyError::NoSuchKernel(kernel));
                assert!(!available.contains(&kernel));
            }
        }
    }
}
