//! The round keys as all kernels of this architecture use them, and their expansion (FIPS 197, 5.2).
//!
//! UNSAFETY: the expansion writes a schedule through a raw pointer into secret memory, and runs AES-NI
//! instructions; whoever takes it from this module has asked the CPU for them.

use std::arch::asm;

use crate::round_keys::{ROUND_KEYS, expand as forward};
use crate::xts::KEY_BYTES;

/// A round key.
type RoundKey = [u8; 16];

/// Expanded keys, in the order in which they are used.
#[repr(C, align(64))]
pub(super) struct Schedule {
    /// The data key, to encrypt.
    pub data_encrypt: [RoundKey; ROUND_KEYS],
    /// The data key, to decrypt: backwards, and all but the first and last through the inverse of
    /// MixColumns (the equivalent inverse cipher, FIPS 197, 5.3.5).
    pub data_decrypt: [RoundKey; ROUND_KEYS],
    /// The tweak key, which only ever encrypts.
    pub tweak: [RoundKey; ROUND_KEYS],
}

/// See [`super::super::Functions::expand`].
#[target_feature(enable = "aes,sse2")]
pub(super) unsafe fn expand(key: &[u8; KEY_BYTES], schedule: *mut u8) {
    use std::mem::offset_of;
    // SAFETY: as the caller vouches: room for a schedule, written in its fields.
    unsafe {
        let data = schedule.add(offset_of!(Schedule, data_encrypt));
        forward(key.as_ptr(), data);
        backward(data, schedule.add(offset_of!(Schedule, data_decrypt)));
        forward(
            key.as_ptr().add(KEY_BYTES / 2),
            schedule.add(offset_of!(Schedule, tweak)),
        );
    }
}

/// # Safety
/// `from` has all round keys, `to` room for them.
#[target_feature(enable = "aes,sse2")]
unsafe fn backward(from: *const u8, to: *mut u8) {
    // SAFETY: as the caller vouches: `count` goes from 13 to 1, so that both ends stay inside.
    unsafe {
        asm!(
            "movdqu xmm0, [{from}]",
            "movdqu [{to} + 224], xmm0",
            "movdqu xmm0, [{from} + 224]",
            "movdqu [{to}], xmm0",
            "add {to}, 16",
            "mov {at:e}, 208",
            "2:",
            "movdqu xmm0, [{from} + {at}]",
            "aesimc xmm0, xmm0",
            "movdqu [{to}], xmm0",
            "add {to}, 16",
            "sub {at:e}, 16",
            "jnz 2b",
            "pxor xmm0, xmm0",
            from = in(reg) from,
            to = inout(reg) to => _,
            at = out(reg) _,
            out("xmm0") _,
            options(nostack),
        );
    }
}
