//! Nothing that comes of a key, and no data that went between segments, stays in registers or on the stack after a call.
//!
//! UNSAFETY: reads vector registers, and the thread's own stack below the frames in use.
#![expect(unsafe_code, reason = "looks at what a call has left")]

use std::arch::asm;
use std::collections::HashSet;
use std::ptr::NonNull;

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use bulkhead_crypto::{DataUnit, Extent, XtsKey};

use crate::oracle;
use crate::random::Random;
use crate::{each_kernel, expand};

const DEPTH: usize = 32 * 1024;

/// Vector registers in bytes, those that only AVX-512 has included.
const REGISTERS: usize = 32 * 64;

/// Copies the vector registers, on a CPU with AVX-512, and the stack below this function's caller.
#[inline(never)]
fn left(bytes: &mut [u8; REGISTERS + DEPTH]) {
    macro_rules! each {
        ($($register:literal)*) => {
            concat!($("vmovdqu64 [rdi + 64 * ", $register, "], zmm", $register, "\n",)*)
        };
    }
    let wide = u64::from(is_x86_feature_detected!("avx512f"));
    // SAFETY: `bytes` has room; a thread's stack is mapped much further down than this.
    unsafe {
        asm!(
            "test {wide}, {wide}",
            "jz 2f",
            each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            each!(16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
            "2:",
            "add rdi, {registers}",
            "lea rsi, [rsp - {depth}]",
            "rep movsb",
            wide = in(reg) wide,
            registers = const REGISTERS,
            depth = const DEPTH,
            inout("rcx") DEPTH => _,
            inout("rdi") bytes.as_mut_ptr() => _,
            out("rsi") _,
            options(nostack),
        );
    }
}

/// What must not be found: round keys, tweaks of a unit's blocks, and blocks of the data in the clear.
fn secrets(key: &[u8; 64], unit: DataUnit, first: u64, units: u64, plain: &[u8]) -> Vec<[u8; 16]> {
    let cipher = aes::Aes256::new_from_slice(&key[32..]).expect("32 bytes");
    let mut secrets = round_keys(key);
    for number in first..first + units {
        let mut block = aes::Block::from(u128::from(number).to_le_bytes());
        cipher.encrypt_block(&mut block);
        let mut tweak = u128::from_le_bytes(block.0);
        for _ in 0..unit.bytes() / 16 {
            secrets.push(tweak.to_le_bytes());
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
        }
    }
    secrets.extend(
        plain
            .chunks_exact(16)
            .map(|block| -> [u8; 16] { block.try_into().expect("sixteen bytes") }),
    );
    secrets
}

/// The round keys of both halves, in the order in which they encrypt (FIPS 197, 5.2).
fn round_keys(key: &[u8; 64]) -> Vec<[u8; 16]> {
    let sbox = |byte: u8| {
        let inverse = (0..=u8::MAX).find(|other| times(byte, *other) == 1);
        let b = inverse.unwrap_or(0);
        (1..5).fold(b ^ 0x63, |sum, by| sum ^ b.rotate_left(by))
    };
    let mut keys = Vec::new();
    for half in key.chunks(32) {
        let mut words: Vec<[u8; 4]> = half.as_chunks().0.to_vec();
        let mut constant = 1;
        for at in 8..60 {
            let mut word = words[at - 1];
            if at % 4 == 0 {
                word = word.map(sbox);
            }
            if at % 8 == 0 {
                word.rotate_left(1);
                word[0] ^= constant;
                constant = times(constant, 2);
            }
            words.push(std::array::from_fn(|i| word[i] ^ words[at - 8][i]));
        }
        let flat = words.concat();
        keys.extend_from_slice(flat.as_chunks().0);
    }
    keys
}

/// The product in the field of AES (FIPS 197, 4.2).
fn times(a: u8, b: u8) -> u8 {
    let doubled = |x: u8| (x << 1) ^ ((x >> 7) * 0x1b);
    (0..8)
        .rev()
        .fold(0, |sum, bit| doubled(sum) ^ (((b >> bit) & 1) * a))
}

/// Runs the test's own work with secrets on another stack.
fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().expect("no panic"))
}

/// Decrypts what straddles segments, and copies what that leaves.
#[inline(never)]
fn leaves(xts: &XtsKey, unit: DataUnit, first: u64, cipher: &[u8], plain: &mut [u8]) -> Vec<u8> {
    let (one, two) = cipher.split_at(300);
    // Made beforehand, because that uses registers.
    let mut bytes = Box::new([0; REGISTERS + DEPTH]);
    let done = xts.decrypt_slices(unit, u128::from(first), &[one, two], &mut [plain]);
    left(&mut bytes);
    done.expect("whole units");
    bytes.to_vec()
}

/// As [`leaves`], of as many extents as there are units, back to front.
#[inline(never)]
fn extents_leave(
    xts: &XtsKey,
    unit: DataUnit,
    first: u64,
    cipher: &[u8],
    plain: &mut [u8],
) -> Vec<u8> {
    let bytes = unit.bytes() as usize;
    let places = cipher.chunks(bytes).zip(plain.chunks_mut(bytes));
    let mut extents: Vec<Extent> = (first..)
        .zip(places)
        .map(|(first_unit, (from, to))| Extent {
            first_unit,
            source: NonNull::from(from).cast(),
            destination: NonNull::from(to).cast(),
            bytes,
        })
        .collect();
    extents.reverse();
    let mut bytes = Box::new([0; REGISTERS + DEPTH]);
    // SAFETY: units of two slices.
    let done = unsafe { xts.decrypt_extents(unit, &extents) };
    left(&mut bytes);
    done.expect("whole units");
    bytes.to_vec()
}

#[test]
fn nothing_stays_behind() {
    each_kernel("nothing_stays_behind", |kernel| {
        let mut random = Random::new(7);
        let key = random.key();
        let xts = expand(&key, kernel);
        for (unit, first, units) in [
            (DataUnit::B512, 9, 3),
            (DataUnit::B512, 100, 20),
            (DataUnit::B4096, 200, 2),
            (DataUnit::B4096, 300, 5),
        ] {
            let mut plain = vec![0; unit.bytes() as usize * usize::try_from(units).expect("few")];
            random.fill(&mut plain);
            let cipher = elsewhere(|| oracle::units(&key, unit, u128::from(first), &plain, true));
            let mut output = vec![0; plain.len()];
            // A kernel makes tweaks of a few more units than it needs.
            let secrets = elsewhere(|| secrets(&key, unit, first, units + 16, &plain));
            for call in [leaves, extents_leave] {
                output.fill(0);
                let left = call(&xts, unit, first, &cipher, &mut output);
                assert!(elsewhere(|| output == plain));
                let left: HashSet<&[u8]> = left.windows(16).collect();
                let found = secrets.iter().filter(|s| left.contains(&s[..])).count();
                assert_eq!(found, 0, "{kernel}: {units} units of {}", unit.bytes());
            }
        }
    });
}
