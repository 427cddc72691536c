//! AES-256-XTS with VAES on 512-bit registers (AVX-512, Zen 4 and later, Ice Lake and later).
//!
//! A group is eight vectors of four cipher blocks, all in flight at once; vector `k` holds blocks `4k` to
//! `4k + 3`. Their tweaks are made without a chain. With the group's base in each lane, lane `q`
//! times x^q is vector 0, times x^(4 + q) vector 1. Every other vector is one of these two
//! times x^8, x^16 or x^24: its bytes moved up by one to three, and what falls off folded back into the lowest
//! ones, which one permutation of two registers does.
//!
//! Two things make it fast on Zen 4. AES rounds fill two of the four vector pipes for good, and carry-less
//! multiplication, GFNI, multishift and funnel shifts run on the same two; plain shifts, permutations
//! and logic also run on the others, so the tweaks are made of these alone. And they are made for
//! the next group between the rounds of the present one, four instructions a round, so that the AES
//! pipes never wait (ADR 0015 has the figures). Both whitenings come with the tweaks: these carry the
//! last round key, and the data is added to both round keys' sum and a tweak in one instruction.
//!
//! Registers: data 0 to 7, tweaks of one group 8 to 15 and of the next 16 to 23, sum of the first
//! and last round key 24, last round key 25, the others two at a time 26 and 27, scratch 28 to 31.
//! Written in assembly, so that keys and tweaks never reach the stack, and each byte of memory
//! that others may change is read once.
//!
//! UNSAFETY: the functions read and write through raw pointers as [`super::super::Functions`] says,
//! and run instructions that the CPU must have; whoever takes them from this module has asked it.

use std::arch::asm;

use super::super::{Base, GROUP_BYTES};
use super::expand::Schedule;

/// Constants of the loop, in the order of their use, each a whole register.
#[repr(C, align(64))]
struct Constants {
    /// By how many bits each half of a lane moves up for vector 0, and down from the other half.
    up_0: [u64; 8],
    down_0: [u64; 8],
    /// The same for vector 1.
    up_1: [u64; 8],
    down_1: [u64; 8],
    /// A lane's last byte, last two and last three, each as a number of 32 bits.
    fallen: [u8; 64],
    /// A lane's first byte, to where it comes to lie in the lowest bytes of the product.
    lowest: [u8; 64],
    /// A vector moved up by one, two, three bytes, its lowest bytes from the second register.
    moved: [[u8; 64]; 3],
}

static CONSTANTS: Constants = Constants {
    up_0: bits(0, false),
    down_0: bits(0, true),
    up_1: bits(4, false),
    down_1: bits(4, true),
    fallen: fallen(),
    lowest: lowest(),
    moved: [moved(1), moved(2), moved(3)],
};

const fn bits(first: u64, down: bool) -> [u64; 8] {
    let mut bits = [0; 8];
    let mut at = 0;
    while at < 8 {
        let up = first + at as u64 / 2;
        bits[at] = if down { 64 - up } else { up };
        at += 1;
    }
    bits
}

/// For `vpshufb`, whose index 0x80 gives zero.
const fn fallen() -> [u8; 64] {
    let mut index = [0x80; 64];
    let mut lane = 0;
    while lane < 64 {
        index[lane] = 15;
        index[lane + 4] = 14;
        index[lane + 5] = 15;
        index[lane + 8] = 13;
        index[lane + 9] = 14;
        index[lane + 10] = 15;
        lane += 16;
    }
    index
}

const fn lowest() -> [u8; 64] {
    let mut index = [0x80; 64];
    let mut lane = 0;
    while lane < 64 {
        index[lane + 1] = 0;
        index[lane + 4 + 2] = 0;
        index[lane + 8 + 3] = 0;
        lane += 16;
    }
    index
}

/// For `vpermi2b`, whose indices from 64 on are bytes of the second register.
#[expect(clippy::cast_possible_truncation, reason = "indices are below 128")]
const fn moved(by: usize) -> [u8; 64] {
    let mut index = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (lane, byte) = (at / 16 * 16, at % 16);
        index[at] = if byte <= by {
            (64 + lane + 4 * (by - 1) + byte) as u8
        } else {
            (lane + byte - by) as u8
        };
        at += 1;
    }
    index
}

/// Step `$n` of thirteen to the next group's tweaks, in the registers given by the vectors that they are for.
/// Scratch: the base in zmm28, what falls off (or its product) in zmm29, zmm30 and zmm31.
macro_rules! tweaks {
    (0: $v0:literal $($rest:literal)*) => {
        concat!(
            "vbroadcasti32x4 zmm28, [{bases} + 16]\n",
            tweaks!(@apart 64),
            "vpsllvq zmm", $v0, ", zmm28, [{constants}]\n",
        )
    };
    (1: $v0:literal $($rest:literal)*) => { tweaks!(@fold $v0) };
    (2: $v0:literal $v1:literal $($rest:literal)*) => {
        concat!(
            "vpternlogq zmm", $v0, ", zmm29, zmm31, 0x96\n",
            tweaks!(@apart 192),
            "vpsllvq zmm", $v1, ", zmm28, [{constants} + 128]\n",
        )
    };
    (3: $v0:literal $v1:literal $($rest:literal)*) => { tweaks!(@fold $v1) };
    (4: $v0:literal $v1:literal $($rest:literal)*) => {
        concat!(
            "vpternlogq zmm", $v1, ", zmm29, zmm31, 0x96\n",
            tweaks!(@fallen $v0),
            "vpslld zmm30, zmm29, 1\n",
        )
    };
    (5: $($rest:literal)*) => {
        concat!(tweaks!(@product), "vpternlogd zmm29, zmm31, zmm30, 0x96\n")
    };
    (6: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $($rest:literal)*) => {
        concat!(
            "vmovdqa64 zmm", $v2, ", [{constants} + 384]\n",
            "vpermi2b zmm", $v2, ", zmm", $v0, ", zmm29\n",
            "vmovdqa64 zmm", $v4, ", [{constants} + 448]\n",
            "vpermi2b zmm", $v4, ", zmm", $v0, ", zmm29\n",
        )
    };
    (7: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $v5:literal $v6:literal $v7:literal) => {
        concat!(
            "vmovdqa64 zmm", $v6, ", [{constants} + 512]\n",
            "vpermi2b zmm", $v6, ", zmm", $v0, ", zmm29\n",
            tweaks!(@fallen $v1),
        )
    };
    (8: $($rest:literal)*) => {
        concat!("vpslld zmm30, zmm29, 1\n", tweaks!(@product))
    };
    (9: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $v5:literal $($rest:literal)*) => {
        concat!(
            "vpternlogd zmm29, zmm31, zmm30, 0x96\n",
            "vmovdqa64 zmm", $v3, ", [{constants} + 384]\n",
            "vpermi2b zmm", $v3, ", zmm", $v1, ", zmm29\n",
            "vmovdqa64 zmm", $v5, ", [{constants} + 448]\n",
        )
    };
    (10: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $v5:literal $v6:literal $v7:literal) => {
        concat!(
            "vpermi2b zmm", $v5, ", zmm", $v1, ", zmm29\n",
            "vmovdqa64 zmm", $v7, ", [{constants} + 512]\n",
            "vpermi2b zmm", $v7, ", zmm", $v1, ", zmm29\n",
            tweaks!(@last_key $v0),
        )
    };
    (11: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $($rest:literal)*) => {
        tweaks!(@last_key $v1 $v2 $v3 $v4)
    };
    (12: $v0:literal $v1:literal $v2:literal $v3:literal $v4:literal $v5:literal $v6:literal $v7:literal) => {
        tweaks!(@last_key $v5 $v6 $v7)
    };
    // What falls off each lane's halves, to the other half.
    (@apart $down:literal) => {
        concat!(
            "vpshufd zmm29, zmm28, 0x4e\n",
            "vpsrlvq zmm29, zmm29, [{constants} + ", $down, "]\n",
        )
    };
    // What came off the top goes times x^7 + x^2 + x + 1 to the low half; what came off that one, as it is to the other.
    (@fold $v:literal) => {
        concat!(
            "vpsllq zmm30 {{k1}}{{z}}, zmm29, 1\n",
            "vpsllq zmm31 {{k1}}{{z}}, zmm29, 2\n",
            "vpternlogq zmm", $v, ", zmm29, zmm30, 0x96\n",
            "vpsllq zmm29 {{k1}}{{z}}, zmm29, 7\n",
        )
    };
    // The bytes that fall off a vector as it moves up, and those that come to lie where they are folded back.
    (@fallen $v:literal) => {
        concat!(
            "vpshufb zmm29, zmm", $v, ", [{constants} + 256]\n",
            "vpshufb zmm31, zmm", $v, ", [{constants} + 320]\n",
        )
    };
    (@product) => {
        concat!(
            "vpternlogd zmm31, zmm29, zmm30, 0x96\n",
            "vpslld zmm30, zmm29, 2\n",
            "vpslld zmm29, zmm29, 7\n",
        )
    };
    (@last_key $($v:literal)*) => {
        concat!($("vpxorq zmm", $v, ", zmm", $v, ", zmm25\n",)*)
    };
}

/// The tweaks of the first group, with nothing to do them between.
macro_rules! all_tweaks {
    ($($v:literal)*) => {
        concat!(
            tweaks!(0: $($v)*), tweaks!(1: $($v)*), tweaks!(2: $($v)*), tweaks!(3: $($v)*),
            tweaks!(4: $($v)*), tweaks!(5: $($v)*), tweaks!(6: $($v)*), tweaks!(7: $($v)*),
            tweaks!(8: $($v)*), tweaks!(9: $($v)*), tweaks!(10: $($v)*), tweaks!(11: $($v)*),
            tweaks!(12: $($v)*),
        )
    };
}

/// Adds data, tweak (with the last round key in it) and the sum of the first and last round key.
macro_rules! whiten {
    ($($data:literal $tweak:literal $at:literal,)*) => {
        concat!($(
            "vmovdqa64 zmm", $data, ", zmm", $tweak, "\n",
            "vpternlogq zmm", $data, ", zmm24, [{src} + ", $at, "], 0x96\n",
        )*)
    };
}

/// A round with the key in one register, meanwhile the load of the next round's key to another, then a
/// step to the next group's tweaks.
macro_rules! round {
    ($op:literal $key:literal, $next:literal $at:literal, $step:expr) => {
        concat!(
            round!(@some $op $key: 0 1 2),
            "vbroadcasti32x4 zmm", $next, ", [{keys} + ", $at, "]\n",
            round!(@some $op $key: 3 4 5 6 7),
            $step,
        )
    };
    (@some $op:literal $key:literal: $($data:literal)*) => {
        concat!($($op, " zmm", $data, ", zmm", $data, ", zmm", $key, "\n",)*)
    };
}

/// The last round, whose key is in the tweak.
macro_rules! last_round {
    ($op:literal: $($data:literal $tweak:literal $at:literal,)*) => {
        concat!($(
            $op, " zmm", $data, ", zmm", $data, ", zmm", $tweak, "\n",
            "vmovdqu64 [{dst} + ", $at, "], zmm", $data, "\n",
        )*)
    };
}

/// A group with its tweaks in the first eight registers given, which leaves the next group's in the other eight.
macro_rules! group {
    ($round:literal $last:literal: $a:literal $b:literal $c:literal $d:literal $e:literal $f:literal
     $g:literal $h:literal, $($next:literal)*) => {
        concat!(
            "vbroadcasti32x4 zmm26, [{keys} + 16]\n",
            whiten!(0 $a 0, 1 $b 64, 2 $c 128, 3 $d 192, 4 $e 256, 5 $f 320, 6 $g 384, 7 $h 448,),
            round!($round 26, 27 32, tweaks!(0: $($next)*)),
            round!($round 27, 26 48, tweaks!(1: $($next)*)),
            round!($round 26, 27 64, tweaks!(2: $($next)*)),
            round!($round 27, 26 80, tweaks!(3: $($next)*)),
            round!($round 26, 27 96, tweaks!(4: $($next)*)),
            round!($round 27, 26 112, tweaks!(5: $($next)*)),
            round!($round 26, 27 128, tweaks!(6: $($next)*)),
            round!($round 27, 26 144, tweaks!(7: $($next)*)),
            round!($round 26, 27 160, tweaks!(8: $($next)*)),
            round!($round 27, 26 176, tweaks!(9: $($next)*)),
            round!($round 26, 27 192, tweaks!(10: $($next)*)),
            round!($round 27, 26 208, tweaks!(11: $($next)*)),
            round!(@some $round 26: 0 1 2 3 4 5 6 7),
            tweaks!(12: $($next)*),
            last_round!($last: 0 $a 0, 1 $b 64, 2 $c 128, 3 $d 192, 4 $e 256, 5 $f 320, 6 $g 384, 7 $h 448,),
            "mov qword ptr [{bases}], 0\n",
            "mov qword ptr [{bases} + 8], 0\n",
            "add {bases}, 16\n",
            "add {src}, {group}\n",
            "add {dst}, {group}\n",
        )
    };
}

/// Zeroes whole registers, and leaves the CPU as code without AVX likes it.
macro_rules! wipe {
    ($($register:literal)*) => {
        concat!(
            $("vpxord xmm", $register, ", xmm", $register, ", xmm", $register, "\n",)*
            "vzeroupper\n",
        )
    };
}

macro_rules! groups {
    ($name:ident, $round:literal, $last:literal, $keys:ident) => {
        /// See [`super::super::Crypt`].
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,vaes")]
        pub(super) unsafe fn $name(
            schedule: *const u8,
            bases: *mut Base,
            groups: usize,
            src: *const u8,
            dst: *mut u8,
        ) {
            if groups == 0 {
                return;
            }
            // SAFETY: as the caller vouches: a schedule, `groups` bases and one more that is not used, and as many
            // groups to read and write. The loop touches exactly these.
            unsafe {
                asm!(
                    "mov {mask:e}, 0x55",
                    "kmovb k1, {mask:e}",
                    "vbroadcasti32x4 zmm24, [{keys}]",
                    "vbroadcasti32x4 zmm25, [{keys} + 224]",
                    "vpxorq zmm24, zmm24, zmm25",
                    "sub {bases}, 16",
                    all_tweaks!(8 9 10 11 12 13 14 15),
                    "add {bases}, 16",
                    ".p2align 6",
                    "2:",
                    group!($round $last: 8 9 10 11 12 13 14 15, 16 17 18 19 20 21 22 23),
                    "dec {groups}",
                    "jz 3f",
                    group!($round $last: 16 17 18 19 20 21 22 23, 8 9 10 11 12 13 14 15),
                    "dec {groups}",
                    "jnz 2b",
                    "3:",
                    wipe!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
                    keys = in(reg) schedule.add(std::mem::offset_of!(Schedule, $keys)),
                    constants = in(reg) &raw const CONSTANTS,
                    mask = out(reg) _,
                    bases = inout(reg) bases => _,
                    groups = inout(reg) groups => _,
                    src = inout(reg) src => _,
                    dst = inout(reg) dst => _,
                    group = const GROUP_BYTES,
                    out("k1") _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                    out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                    out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                    out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                    options(nostack),
                );
            }
        }
    };
}

groups!(encrypt, "vaesenc", "vaesenclast", data_encrypt);
groups!(decrypt, "vaesdec", "vaesdeclast", data_decrypt);
