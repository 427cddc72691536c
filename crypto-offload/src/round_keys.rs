//! The round keys of AES-256 and their expansion (FIPS 197, 5.2), from registers straight to where they
//! shall lie, for all kernels written for this architecture.
//!
//! UNSAFETY: the expansion reads a key and writes round keys through raw pointers, into secret memory, and
//! runs AES-NI instructions.
#![expect(
    unsafe_code,
    reason = "keys go from raw memory to raw memory and nowhere else"
)]

use std::arch::asm;

/// Rounds of AES-256, with the whitening before the first.
pub const ROUND_KEYS: usize = 15;

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

/// Expands a key into [`ROUND_KEYS`] round keys of 16 bytes, in the order in which they encrypt.
///
/// # Safety
/// `key` has 32 bytes, `to` room for all round keys, and the CPU AES-NI.
#[target_feature(enable = "aes,sse2")]
pub unsafe fn expand(key: *const u8, to: *mut u8) {
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
