//! AES-256-XTS with VAES on 256-bit registers (AVX2), for CPUs without AVX-512: eight vectors of two
//! cipher blocks in flight, two such batches a group.
//!
//! The tweaks of the first four vectors are made side by side from the group's base, by shifts that differ from
//! lane to lane; those of each later one are the tweaks of the fourth before it times x^8. With the last round
//! key in it each waits on the stack for the end of its vector's rounds; that room is wiped.
//! Everything else stays in registers.
//!
//! UNSAFETY: the functions read and write through raw pointers as [`super::super::Functions`] says,
//! and run instructions that the CPU must have; whoever takes them from this module has asked it.

use std::arch::asm;
use std::mem::{MaybeUninit, offset_of};

use super::super::{Base, GROUP_BYTES};
use super::expand::Schedule;
use crate::raw;

/// Vectors in flight.
const VECTORS: usize = 8;

const _: () = assert!(GROUP_BYTES == 2 * VECTORS * 32);

/// Constants of the loop, each a whole register.
#[repr(C, align(32))]
struct Constants {
    /// By how many bits the halves of each lane move up, and down from the other half, for each of four vectors.
    bits: [[[u64; 4]; 2]; 4],
    /// x^7 + x^2 + x + 1, by which x^128 is replaced.
    reduction: [u64; 4],
    /// All of the lanes' high halves.
    high: [u64; 4],
}

static CONSTANTS: Constants = Constants {
    bits: [bits(0), bits(2), bits(4), bits(6)],
    reduction: [0x87, 0, 0x87, 0],
    high: [0, u64::MAX, 0, u64::MAX],
};

const fn bits(first: u64) -> [[u64; 4]; 2] {
    let next = first + 1;
    [
        [first, first, next, next],
        [64 - first, 64 - first, 64 - next, 64 - next],
    ]
}

/// A key's register for each of the eight vectors.
macro_rules! round {
    ($op:literal $at:literal) => {
        concat!(
            "vbroadcasti128 ymm15, [{keys} + ", $at, "]\n",
            round!(@each $op: 0 1 2 3 4 5 6 7)
        )
    };
    (@each $op:literal: $($data:literal)*) => {
        concat!($($op, " ymm", $data, ", ymm", $data, ", ymm15\n",)*)
    };
}

/// Tweaks of one of the first four vectors, from the base in ymm0 and its halves swapped in ymm1.
macro_rules! first_tweaks {
    ($($to:literal $up:literal $down:literal,)*) => {
        concat!($(
            "vpsrlvq ymm2, ymm1, [{constants} + ", $down, "]\n",
            "vpsllvq ymm", $to, ", ymm0, [{constants} + ", $up, "]\n",
            // What fell off the top goes to the low half, what fell off that one to the other.
            "vpclmulqdq ymm3, ymm2, ymm14, 0\n",
            "vpand ymm2, ymm2, [{constants} + 288]\n",
            "vpxor ymm", $to, ", ymm", $to, ", ymm2\n",
            "vpxor ymm", $to, ", ymm", $to, ", ymm3\n",
        )*)
    };
}

/// Data with tweak and first round key added, the tweak put aside, and the one four vectors later made.
macro_rules! whiten {
    ($($data:literal $tweak:literal $at:literal,)*) => {
        concat!($(
            "vpxor ymm", $data, ", ymm", $tweak, ", [{src} + ", $at, "]\n",
            "vpxor ymm15, ymm", $tweak, ", ymm13\n",
            "vmovdqa [{aside} + ", $at, "], ymm15\n",
            "vpxor ymm", $data, ", ymm", $data, ", ymm12\n",
            "vpsrldq ymm15, ymm", $tweak, ", 15\n",
            "vpslldq ymm", $tweak, ", ymm", $tweak, ", 1\n",
            "vpclmulqdq ymm15, ymm15, ymm14, 0\n",
            "vpxor ymm", $tweak, ", ymm", $tweak, ", ymm15\n",
        )*)
    };
}

macro_rules! last_round {
    ($op:literal: $($data:literal $at:literal,)*) => {
        concat!($(
            $op, " ymm", $data, ", ymm", $data, ", [{aside} + ", $at, "]\n",
            "vmovdqu [{dst} + ", $at, "], ymm", $data, "\n",
        )*)
    };
}

macro_rules! groups {
    ($name:ident, $round:literal, $last:literal, $keys:ident) => {
        /// See [`super::super::Crypt`].
        #[target_feature(enable = "avx2,vaes,vpclmulqdq")]
        pub(super) unsafe fn $name(
            schedule: *const u8,
            bases: *mut Base,
            groups: usize,
            src: *const u8,
            dst: *mut u8,
        ) {
            /// Room for the tweaks of a batch.
            #[repr(C, align(32))]
            struct Aside([u8; VECTORS * 32]);
            if groups == 0 {
                return;
            }
            let mut aside = MaybeUninit::<Aside>::uninit();
            // SAFETY: as the caller vouches: a schedule, `groups` bases and as many groups to read and write;
            // room for the tweaks of a batch is ours. The loop touches exactly these.
            unsafe {
                asm!(
                    "vbroadcasti128 ymm12, [{keys}]",
                    "vbroadcasti128 ymm13, [{keys} + 224]",
                    "vmovdqa ymm14, [{constants} + 256]",
                    "2:",
                    "vbroadcasti128 ymm0, [{bases}]",
                    "vpshufd ymm1, ymm0, 0x4e",
                    first_tweaks!(8 0 32, 9 64 96, 10 128 160, 11 192 224,),
                    "mov {batch:e}, 2",
                    "3:",
                    whiten!(0 8 0, 1 9 32, 2 10 64, 3 11 96, 4 8 128, 5 9 160, 6 10 192, 7 11 224,),
                    inner_rounds!(round $round),
                    last_round!($last: 0 0, 1 32, 2 64, 3 96, 4 128, 5 160, 6 192, 7 224,),
                    "add {src}, 256",
                    "add {dst}, 256",
                    "dec {batch:e}",
                    "jnz 3b",
                    "mov qword ptr [{bases}], 0",
                    "mov qword ptr [{bases} + 8], 0",
                    "add {bases}, 16",
                    "dec {groups}",
                    "jnz 2b",
                    "vzeroall",
                    keys = in(reg) schedule.add(offset_of!(Schedule, $keys)),
                    constants = in(reg) &raw const CONSTANTS,
                    aside = in(reg) aside.as_mut_ptr(),
                    batch = out(reg) _,
                    bases = inout(reg) bases => _,
                    groups = inout(reg) groups => _,
                    src = inout(reg) src => _,
                    dst = inout(reg) dst => _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nostack),
                );
                raw::wipe(aside.as_mut_ptr().cast(), size_of::<Aside>());
            }
        }
    };
}

groups!(encrypt, "vaesenc", "vaesenclast", data_encrypt);
groups!(decrypt, "vaesdec", "vaesdeclast", data_decrypt);
