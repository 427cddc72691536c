//! AES-256-XTS with AES-NI (SSE2), for CPUs that have nothing wider: eight cipher blocks in flight.
//!
//! Tweaks are made one after the other. With the last round key in it each waits on the stack for the
//! end of its block's rounds; that room is wiped. Everything else stays in registers.
//!
//! UNSAFETY: the functions read and write through raw pointers as [`super::super::Functions`] says,
//! and run instructions that the CPU must have; whoever takes them from this module has asked it.

use std::arch::asm;
use std::mem::{MaybeUninit, offset_of};

use super::super::{Base, GROUP_BYTES};
use super::expand::Schedule;
use crate::raw;
use crate::xts::types::DataUnit;

/// Blocks in flight.
const BLOCKS: usize = 8;

/// What a doubled tweak is added where a bit fell off: at the low half's bottom x^7 + x^2 + x + 1 for the top
/// bit, at the high half's bottom the low half's top bit.
#[repr(C, align(16))]
struct Carries([u32; 4]);

static CARRIES: Carries = Carries([0x87, 0, 1, 0]);

/// A key's register for each of the eight blocks.
macro_rules! round {
    ($op:literal $at:literal) => {
        concat!(
            "movdqu xmm14, [{keys} + ", $at, "]\n",
            round!(@each $op: 0 1 2 3 4 5 6 7)
        )
    };
    (@each $op:literal: $($data:literal)*) => {
        concat!($($op, " xmm", $data, ", xmm14\n",)*)
    };
}

/// Data with tweak and first round key added, the tweak put aside, and the next one made.
macro_rules! whiten {
    ($($data:literal $at:literal,)*) => {
        concat!($(
            "movdqu xmm", $data, ", [{src} + ", $at, "]\n",
            "movdqa xmm9, xmm8\n",
            "pxor xmm9, xmm11\n",
            "movdqa [{aside} + ", $at, "], xmm9\n",
            "pxor xmm", $data, ", xmm8\n",
            "pxor xmm", $data, ", xmm12\n",
            "pshufd xmm9, xmm8, 0x13\n",
            "paddq xmm8, xmm8\n",
            "psrad xmm9, 31\n",
            "pand xmm9, xmm13\n",
            "pxor xmm8, xmm9\n",
        )*)
    };
}

macro_rules! last_round {
    ($op:literal: $($data:literal $at:literal,)*) => {
        concat!($(
            $op, " xmm", $data, ", [{aside} + ", $at, "]\n",
            "movdqu [{dst} + ", $at, "], xmm", $data, "\n",
        )*)
    };
}

macro_rules! wipe {
    ($($register:literal)*) => {
        concat!($("pxor xmm", $register, ", xmm", $register, "\n",)*)
    };
}

macro_rules! groups {
    ($name:ident, $round:literal, $last:literal, $keys:ident) => {
        /// See [`super::super::Crypt`].
        #[target_feature(enable = "aes,sse2")]
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
            let mut aside = MaybeUninit::<[Base; BLOCKS]>::uninit();
            // SAFETY: as the caller vouches: a schedule, `groups` bases and as many groups to read and write;
            // room for the tweaks of a batch is ours. The loop touches exactly these.
            unsafe {
                asm!(
                    "movdqu xmm12, [{keys}]",
                    "movdqu xmm11, [{keys} + 224]",
                    "movdqa xmm13, [{carries}]",
                    "2:",
                    "movdqu xmm8, [{bases}]",
                    "mov {batch:e}, 4",
                    "3:",
                    whiten!(0 0, 1 16, 2 32, 3 48, 4 64, 5 80, 6 96, 7 112,),
                    inner_rounds!(round $round),
                    last_round!($last: 0 0, 1 16, 2 32, 3 48, 4 64, 5 80, 6 96, 7 112,),
                    "add {src}, 128",
                    "add {dst}, 128",
                    "dec {batch:e}",
                    "jnz 3b",
                    "mov qword ptr [{bases}], 0",
                    "mov qword ptr [{bases} + 8], 0",
                    "add {bases}, 16",
                    "dec {groups}",
                    "jnz 2b",
                    wipe!(0 1 2 3 4 5 6 7 8 9 11 12 14),
                    keys = in(reg) schedule.add(offset_of!(Schedule, $keys)),
                    carries = in(reg) &raw const CARRIES,
                    aside = in(reg) aside.as_mut_ptr(),
                    batch = out(reg) _,
                    bases = inout(reg) bases => _,
                    groups = inout(reg) groups => _,
                    src = inout(reg) src => _,
                    dst = inout(reg) dst => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm11") _, out("xmm12") _,
                    out("xmm13") _, out("xmm14") _,
                    options(nostack),
                );
                raw::wipe(aside.as_mut_ptr().cast(), BLOCKS * size_of::<Base>());
            }
        }
    };
}

groups!(encrypt, "aesenc", "aesenclast", data_encrypt);
groups!(decrypt, "aesdec", "aesdeclast", data_decrypt);

const _: () = assert!(GROUP_BYTES == 4 * BLOCKS * 16);

/// See [`super::super::Functions::bases`].
#[target_feature(enable = "aes,sse2")]
pub(super) unsafe fn bases(
    schedule: *const u8,
    unit: DataUnit,
    first: u128,
    units: usize,
    to: *mut Base,
) -> usize {
    let rounded = units.next_multiple_of(BLOCKS);
    let mut number = first;
    for at in 0..rounded {
        // SAFETY: room is rounded up to more than this.
        unsafe { to.add(at).write(Base(number.to_le_bytes())) };
        number = number.wrapping_add(1);
    }
    for at in (0..rounded).step_by(BLOCKS) {
        // SAFETY: eight numbers were written from here on; the tweak key of a schedule.
        unsafe { encrypt_numbers(schedule.add(offset_of!(Schedule, tweak)), to.add(at)) };
    }
    let groups = unit.groups();
    if groups == 1 {
        return rounded;
    }
    // From the last on, since each needs more room than it had: unit `at` lies in front of its own room.
    for at in (0..units).rev() {
        // SAFETY: `at` is encrypted, and there is room for all groups of as many units.
        unsafe { spread(to.add(at), to.add(at * groups), groups) };
    }
    rounded.max(units * groups)
}

/// Encrypts eight numbers in place.
///
/// # Safety
/// `keys` has all round keys, `at` eight blocks.
#[target_feature(enable = "aes,sse2")]
unsafe fn encrypt_numbers(keys: *const u8, at: *mut Base) {
    macro_rules! each {
        ($before:literal $mid:literal $after:literal: $($data:literal $at:literal,)*) => {
            concat!($($before, $data, $mid, $at, $after, "\n",)*)
        };
    }
    // SAFETY: as the caller vouches.
    unsafe {
        asm!(
            "movdqu xmm14, [{keys}]",
            each!("movdqu xmm" ", [{at} + " "]": 0 0, 1 16, 2 32, 3 48, 4 64, 5 80, 6 96, 7 112,),
            round!(@each "pxor": 0 1 2 3 4 5 6 7),
            inner_rounds!(round "aesenc"),
            round!("aesenclast" 224),
            "movdqu [{at}], xmm0",
            "movdqu [{at} + 16], xmm1",
            "movdqu [{at} + 32], xmm2",
            "movdqu [{at} + 48], xmm3",
            "movdqu [{at} + 64], xmm4",
            "movdqu [{at} + 80], xmm5",
            "movdqu [{at} + 96], xmm6",
            "movdqu [{at} + 112], xmm7",
            wipe!(0 1 2 3 4 5 6 7 14),
            keys = in(reg) keys,
            at = in(reg) at,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
            out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm14") _,
            options(nostack),
        );
    }
}

/// Writes a unit's first tweak and those after it, each times x^32.
///
/// # Safety
/// `from` has a tweak, `to` room for `groups` (at least one).
#[target_feature(enable = "sse2")]
unsafe fn spread(from: *const Base, to: *mut Base, groups: usize) {
    // SAFETY: as the caller vouches.
    unsafe {
        asm!(
            "movdqu xmm0, [{from}]",
            "2:",
            "movdqu [{to}], xmm0",
            "movdqa xmm1, xmm0",
            "psrldq xmm1, 12",
            "pslldq xmm0, 4",
            // What fell off, times x^7 + x^2 + x + 1.
            "pxor xmm0, xmm1",
            "psllq xmm1, 1",
            "pxor xmm0, xmm1",
            "psllq xmm1, 1",
            "pxor xmm0, xmm1",
            "psllq xmm1, 5",
            "pxor xmm0, xmm1",
            "add {to}, 16",
            "dec {groups}",
            "jnz 2b",
            wipe!(0 1),
            from = in(reg) from,
            to = inout(reg) to => _,
            groups = inout(reg) groups => _,
            out("xmm0") _, out("xmm1") _,
            options(nostack),
        );
    }
}
