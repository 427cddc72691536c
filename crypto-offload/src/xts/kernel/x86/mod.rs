//! Kernels for x86-64: the only place that knows its instructions and features.
//!
//! UNSAFETY: the functions of a kernel run instructions that not every CPU has. They leave this
//! module only through [`functions`], which asks the CPU first.
#![expect(
    unsafe_code,
    reason = "assembly on raw memory; instructions that not every CPU has"
)]

/// All rounds but the last, by a macro that takes an instruction and where the round's key lies.
macro_rules! inner_rounds {
    ($round:ident $op:literal) => {
        concat!(
            $round!($op 16), $round!($op 32), $round!($op 48), $round!($op 64), $round!($op 80),
            $round!($op 96), $round!($op 112), $round!($op 128), $round!($op 144), $round!($op 160),
            $round!($op 176), $round!($op 192), $round!($op 208),
        )
    };
}

mod aesni;
mod expand;
mod vaes256;
mod vaes512;
mod vaes512_bases;

use super::{Functions, Kernel};
use crate::secret::SLOT_BYTES;

const _: () =
    assert!(size_of::<expand::Schedule>() <= SLOT_BYTES && align_of::<expand::Schedule>() <= 64);

/// A kernel from functions that need features of the CPU.
macro_rules! kernel {
    ($bases:path, $encrypt:path, $decrypt:path) => {
        Functions {
            expand: |key, schedule| {
                // SAFETY: passed on to the caller; the CPU was asked for AES-NI.
                unsafe { expand::expand(key, schedule) }
            },
            bases: |schedule, unit, first, units, to| {
                // SAFETY: passed on to the caller; the CPU was asked for what the kernel needs.
                unsafe { $bases(schedule, unit, first, units, to) }
            },
            encrypt: |schedule, bases, groups, src, dst| {
                // SAFETY: as above.
                unsafe { $encrypt(schedule, bases, groups, src, dst) }
            },
            decrypt: |schedule, bases, groups, src, dst| {
                // SAFETY: as above.
                unsafe { $decrypt(schedule, bases, groups, src, dst) }
            },
        }
    };
}

static VAES512: Functions = kernel!(vaes512_bases::bases, vaes512::encrypt, vaes512::decrypt);
static VAES256: Functions = kernel!(aesni::bases, vaes256::encrypt, vaes256::decrypt);
static AESNI: Functions = kernel!(aesni::bases, aesni::encrypt, aesni::decrypt);

/// What a kernel consists of, if this CPU can run it.
pub(super) fn functions(kernel: Kernel) -> Option<&'static Functions> {
    match kernel {
        Kernel::Vaes512 => has_vaes512().then_some(&VAES512),
        Kernel::Vaes256 => has_vaes256().then_some(&VAES256),
        Kernel::Aesni => has_aesni().then_some(&AESNI),
        _ => None,
    }
}

fn has_aesni() -> bool {
    is_x86_feature_detected!("aes")
}

fn has_vaes256() -> bool {
    has_aesni()
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
}

fn has_vaes512() -> bool {
    has_vaes256()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
}
