//! Nothing that comes of a key, and no data that went between segments, stays on the stack after a call.
//!
//! UNSAFETY: reads the thread's own stack below the frames in use.
#![expect(unsafe_code, reason = "looks at the stack that a call has left")]

use std::arch::asm;
use std::collections::HashSet;

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use bulkhead_crypto::{DataUnit, XtsKey};

use crate::oracle;
use crate::random::Random;
use crate::{each_kernel, expand};

const DEPTH: usize = 32 * 1024;

/// Copies the stack below this function's caller.
#[inline(never)]
fn below() -> Vec<u8> {
    let mut bytes = vec![0u8; DEPTH];
    // SAFETY: `bytes` has room; a thread's stack is mapped much further down than this.
    unsafe {
        asm!(
            "lea rsi, [rsp - {depth}]",
            "rep movsb",
            depth = const DEPTH,
            inout("rcx") DEPTH => _,
            inout("rdi") bytes.as_mut_ptr() => _,
            out("rsi") _,
        );
    }
    bytes
}

/// What must not be found: tweaks of the groups of a unit, and blocks of the data in the clear.
fn secrets(key: &[u8; 64], unit: DataUnit, first: u64, units: u64, plain: &[u8]) -> Vec<[u8; 16]> {
    let cipher = aes::Aes256::new_from_slice(&key[32..]).expect("32 bytes");
    let mut secrets = Vec::new();
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

/// Runs the test's own work with secrets on another stack.
fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().expect("no panic"))
}

/// Decrypts what straddles segments, and copies what lies on the stack afterwards.
#[inline(never)]
fn leaves(xts: &XtsKey, unit: DataUnit, first: u64, cipher: &[u8], plain: &mut [u8]) -> Vec<u8> {
    let (one, two) = cipher.split_at(300);
    xts.decrypt_slices(unit, u128::from(first), &[one, two], &mut [plain])
        .expect("whole units");
    below()
}

#[test]
fn nothing_stays_on_the_stack() {
    each_kernel("nothing_stays_on_the_stack", |kernel| {
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
            let left = leaves(&xts, unit, first, &cipher, &mut output);
            assert_eq!(output, plain);
            // A kernel makes tweaks of a few more units than it needs.
            let secrets = elsewhere(|| secrets(&key, unit, first, units + 16, &plain));
            let left: HashSet<&[u8]> = left.windows(16).collect();
            let found = secrets.iter().filter(|s| left.contains(&s[..])).count();
            assert_eq!(found, 0, "{kernel}: {units} units of {}", unit.bytes());
        }
    });
}
