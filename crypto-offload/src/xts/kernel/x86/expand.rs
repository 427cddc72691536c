//! The round keys as all kernels of this architecture use them, and their expansion (FIPS 197, 5.2).
//!
//! UNSAFETY: the expansion writes a schedule through a raw pointer into secret memory, and runs AES-NI
//! instructions; whoever takes it from this module has asked the CPU for them.

use std::arch::asm;

use crate::xts::KEY_BYTES;

/// A round key.
type RoundKey = [u8; 16];

/// Rounds of AES-256, with the whitening before the first.
const ROUND_KEYS: usize = 15;

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

/// The next round key in `$to` (two round keys before it until now), from the one before in `$from`:
/// each word is added to those above it, then the substituted last word of the key before.
macro_rules! next_key {
    ($to:literal, $from:literal, $round:literal, $word:literal, $at:literal) => {
        concat!(
            "aeskeygenassist xmm2, ",
            $from,
            ", ",
            $round,
            "\n",
            "pshufd xmm2, xmm2, ",
            $word,
            "\n",
            "movdqa xmm3, ",
            $to,
            "\n",
            "pslldq xmm3, 4\n",
            "pxor ",
            $to,
            ", xmm3\n",
            "pslldq xmm3, 4\n",
            "pxor ",
            $to,
            ", xmm3\n",
            "pslldq xmm3, 4\n",
            "pxor ",
            $to,
            ", xmm3\n",
            "pxor ",
            $to,
            ", xmm2\n",
            "movdqu [{to} + ",
            $at,
            "], ",
            $to,
            "\n",
        )
    };
}

/// # Safety
/// `key` has 32 bytes, `to` room for all round keys.
#[target_feature(enable = "aes,sse2")]
unsafe fn forward(key: *const u8, to: *mut u8) {
    // SAFETY: as the caller vouches.
    unsafe {
        asm!(
            "movdqu xmm0, [{key}]",
            "movdqu xmm1, [{key} + 16]",
            "movdqu [{to}], xmm0",
            "movdqu [{to} + 16], xmm1",
            next_key!("xmm0", "xmm1", 1, 255, 32),
            next_key!("xmm1", "xmm0", 0, 170, 48),
            next_key!("xmm0", "xmm1", 2, 255, 64),
            next_key!("xmm1", "xmm0", 0, 170, 80),
            next_key!("xmm0", "xmm1", 4, 255, 96),
            next_key!("xmm1", "xmm0", 0, 170, 112),
            next_key!("xmm0", "xmm1", 8, 255, 128),
            next_key!("xmm1", "xmm0", 0, 170, 144),
            next_key!("xmm0", "xmm1", 16, 255, 160),
            next_key!("xmm1", "xmm0", 0, 170, 176),
            next_key!("xmm0", "xmm1", 32, 255, 192),
            next_key!("xmm1", "xmm0", 0, 170, 208),
            next_key!("xmm0", "xmm1", 64, 255, 224),
            "pxor xmm0, xmm0",
            "pxor xmm1, xmm1",
            "pxor xmm2, xmm2",
            "pxor xmm3, xmm3",
            key = in(reg) key,
            to = in(reg) to,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            options(nostack, preserves_flags),
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
