//! First tweaks of groups, with VAES on 512-bit registers: unit numbers encrypted under the tweak
//! key, four a register, and in units of 4096 bytes the seven that follow, each times x^32.
//!
//! UNSAFETY: as in the kernel that this belongs to (`vaes512`); the output has room for what is
//! rounded up, as [`super::super::Functions`] says.

use std::arch::asm;

use super::super::Base;
use super::expand::Schedule;
use crate::xts::DataUnit;

/// What is added to a unit number for each lane of the first register, and for the next register.
#[repr(C, align(64))]
struct Steps([u64; 8], [u64; 8]);

static STEPS: Steps = Steps([0, 0, 1, 0, 2, 0, 3, 0], [4, 0, 4, 0, 4, 0, 4, 0]);

/// x^7 + x^2 + x + 1, by which x^128 is replaced.
const REDUCTION: u64 = 0x87;

/// See [`super::super::Functions::bases`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,vaes,vpclmulqdq")]
pub(super) unsafe fn bases(
    schedule: *const u8,
    unit: DataUnit,
    first: u128,
    units: usize,
    to: *mut Base,
) -> usize {
    // SAFETY: as the caller vouches: room is rounded up to 32 bases.
    unsafe {
        let keys = schedule.add(std::mem::offset_of!(Schedule, tweak));
        match (unit, units) {
            (DataUnit::B512, 0..=4) => four_small(keys, first, to),
            (DataUnit::B512, _) => small(keys, first, units.div_ceil(16), to),
            (_, 0..=3) => {
                for at in 0..units {
                    one_large(
                        keys,
                        first.wrapping_add(at as u128),
                        to.add(at * unit.groups()),
                    );
                }
                units * unit.groups()
            }
            (_, _) => large(keys, first, units.div_ceil(4), to),
        }
    }
}

/// Where the numbers come from: the first to all lanes of zmm0, and what is added to each.
macro_rules! numbers {
    () => {
        concat!(
            "vmovq xmm0, {low}\n",
            "vpinsrq xmm0, xmm0, {high}, 1\n",
            "vshufi32x4 zmm0, zmm0, zmm0, 0\n",
            "vpaddq zmm0, zmm0, [{steps}]\n",
        )
    };
}

/// All rounds for the given registers, each with the number's own register kept.
macro_rules! rounds {
    ($size:literal, $broadcast:literal: $($data:literal)*) => {
        concat!(
            rounds!(@key $broadcast, $size, 0), $("vpxorq ", $size, $data, ", ", $size, $data, ", ", $size, "31\n",)*
            rounds!(@one $broadcast, $size, "vaesenc ", 16: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 32: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 48: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 64: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 80: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 96: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 112: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 128: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 144: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 160: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 176: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 192: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenc ", 208: $($data)*),
            rounds!(@one $broadcast, $size, "vaesenclast ", 224: $($data)*),
        )
    };
    (@key $broadcast:literal, $size:literal, $at:literal) => {
        concat!($broadcast, " ", $size, "31, [{keys} + ", $at, "]\n")
    };
    (@one $broadcast:literal, $size:literal, $op:literal, $at:literal: $($data:literal)*) => {
        concat!(
            rounds!(@key $broadcast, $size, $at),
            $($op, $size, $data, ", ", $size, $data, ", ", $size, "31\n",)*
        )
    };
}

/// Times x^32, in each lane: moved up by four bytes, what fell off folded back.
macro_rules! times_x32 {
    ($size:literal, $tweak:literal) => {
        concat!(
            "vpsrldq ",
            $size,
            "29, ",
            $size,
            $tweak,
            ", 12\n",
            "vpslldq ",
            $size,
            $tweak,
            ", ",
            $size,
            $tweak,
            ", 4\n",
            "vpclmulqdq ",
            $size,
            "29, ",
            $size,
            "29, ",
            $size,
            "30, 0\n",
            "vpxorq ",
            $size,
            $tweak,
            ", ",
            $size,
            $tweak,
            ", ",
            $size,
            "29\n",
        )
    };
}

/// The tweaks behind the one in the first register, each to where it belongs.
macro_rules! following {
    ($($at:literal)*) => {
        concat!($(times_x32!("xmm", 0), "vmovdqu64 [{to} + ", $at, "], xmm0\n",)*)
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

/// `asm!` that uses registers 0 to 15 (of which the wiping touches all) and 29 to 31.
macro_rules! registers {
    ($($body:tt)*) => {
        asm!(
            $($body)*
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
            out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
            out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _,
            out("zmm15") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack),
        )
    };
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of the number"
)]
fn halves(number: u128) -> (u64, u64) {
    (number as u64, (number >> 64) as u64)
}

/// # Safety
/// As [`super::super::Functions::bases`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,vaes")]
unsafe fn four_small(keys: *const u8, first: u128, to: *mut Base) -> usize {
    let (low, high) = halves(first);
    // SAFETY: the keys of a schedule are read, room for four is written.
    unsafe {
        registers!(
            numbers!(),
            rounds!("zmm", "vbroadcasti32x4": 0),
            "vmovdqu64 [{to}], zmm0",
            wipe!(0 31),
            keys = in(reg) keys,
            low = in(reg) low,
            high = in(reg) high,
            steps = in(reg) &raw const STEPS,
            to = in(reg) to,
        );
    }
    4
}

/// # Safety
/// As [`super::super::Functions::bases`]; `sixteens` times 16 units.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,vaes")]
unsafe fn small(keys: *const u8, first: u128, sixteens: usize, to: *mut Base) -> usize {
    let (low, high) = halves(first);
    // SAFETY: the keys of a schedule are read, room for `sixteens` times sixteen is written.
    unsafe {
        registers!(
            numbers!(),
            "vmovdqa64 zmm30, [{steps} + 64]",
            "vmovdqa64 zmm4, zmm0",
            "2:",
            "vmovdqa64 zmm0, zmm4",
            "vpaddq zmm1, zmm0, zmm30",
            "vpaddq zmm2, zmm1, zmm30",
            "vpaddq zmm3, zmm2, zmm30",
            "vpaddq zmm4, zmm3, zmm30",
            rounds!("zmm", "vbroadcasti32x4": 0 1 2 3),
            "vmovdqu64 [{to}], zmm0",
            "vmovdqu64 [{to} + 64], zmm1",
            "vmovdqu64 [{to} + 128], zmm2",
            "vmovdqu64 [{to} + 192], zmm3",
            "add {to}, 256",
            "dec {sixteens}",
            "jnz 2b",
            wipe!(0 1 2 3 4 31),
            keys = in(reg) keys,
            low = in(reg) low,
            high = in(reg) high,
            steps = in(reg) &raw const STEPS,
            sixteens = inout(reg) sixteens => _,
            to = inout(reg) to => _,
        );
    }
    sixteens * 16
}

/// # Safety
/// As [`super::super::Functions::bases`], of one unit of 4096 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,vaes,vpclmulqdq")]
unsafe fn one_large(keys: *const u8, number: u128, to: *mut Base) {
    let (low, high) = halves(number);
    // SAFETY: the keys of a schedule are read, room for the eight of a unit is written.
    unsafe {
        registers!(
            "vmovq xmm0, {low}",
            "vpinsrq xmm0, xmm0, {high}, 1",
            "vmovq xmm30, {reduction}",
            rounds!("xmm", "vmovdqu64": 0),
            "vmovdqu64 [{to}], xmm0",
            following!(16 32 48 64 80 96 112),
            wipe!(0 29 31),
            keys = in(reg) keys,
            low = in(reg) low,
            high = in(reg) high,
            reduction = in(reg) REDUCTION,
            to = in(reg) to,
        );
    }
}

/// # Safety
/// As [`super::super::Functions::bases`]; `fours` times four units.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,vaes,vpclmulqdq")]
unsafe fn large(keys: *const u8, first: u128, fours: usize, to: *mut Base) -> usize {
    let (low, high) = halves(first);
    // SAFETY: the keys of a schedule are read, room for `fours` times 32 is written.
    unsafe {
        registers!(
            numbers!(),
            "vmovdqa64 zmm1, zmm0",
            "vpbroadcastq zmm30, {reduction}",
            "2:",
            "vmovdqa64 zmm0, zmm1",
            "vpaddq zmm1, zmm1, [{steps} + 64]",
            rounds!("zmm", "vbroadcasti32x4": 0),
            "mov {group:e}, 8",
            "3:",
            "vmovdqu64 [{to}], xmm0",
            "vextracti32x4 [{to} + 128], zmm0, 1",
            "vextracti32x4 [{to} + 256], zmm0, 2",
            "vextracti32x4 [{to} + 384], zmm0, 3",
            times_x32!("zmm", 0),
            "add {to}, 16",
            "dec {group:e}",
            "jnz 3b",
            "add {to}, 384",
            "dec {fours}",
            "jnz 2b",
            wipe!(0 1 29 31),
            keys = in(reg) keys,
            low = in(reg) low,
            high = in(reg) high,
            reduction = in(reg) REDUCTION,
            steps = in(reg) &raw const STEPS,
            fours = inout(reg) fours => _,
            group = out(reg) _,
            to = inout(reg) to => _,
        );
    }
    fours * 32
}
