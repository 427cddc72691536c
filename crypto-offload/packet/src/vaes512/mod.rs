//! The kernel of our own: AVX-512 with VAES and VPCLMULQDQ, four cipher blocks to a register.
//!
//! What a batch saves beside AWS-LC: the blocks that mask the tags of 16 packets are encrypted
//! together instead of one by one; a packet's sum is reduced once (up to 1008 bytes); associated data
//! and lengths go through the multiplier together; nothing of the key is copied; and since packets
//! have no state in common, the processor works on several at a time.
//!
//! Each byte of a source is loaded once, into a register from which it is both encrypted and (as
//! ciphertext) hashed, so that a source may change meanwhile. Nothing branches or indexes by key
//! or data: only by lengths.
//!
//! | module | owns |
//! | --- | --- |
//! | [`hash`] | GHASH: powers of the hash key, products, their sum and its reduction |
//! | [`pass`] | one packet: counter mode and GHASH in one pass |
//!
//! UNSAFETY: the code needs CPU features with which every function is marked; they leave this module
//! only through [`functions`], which asks the CPU first. It reads and writes a packet's ranges, exactly for their lengths.
#![expect(
    unsafe_code,
    reason = "a vector kernel over raw ranges and secret memory"
)]

mod hash;
mod pass;

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::transmute;
use std::ptr::NonNull;

use bulkhead_crypto::secret::SLOT_BYTES;
use bulkhead_crypto::{raw, round_keys};

use crate::kernel::Functions;
use crate::key::KEY_BYTES;
use crate::packet::{Job, OpenPacket, SealPacket};
use hash::Powers;

/// Rounds of AES-256 (FIPS 197, section 5).
const ROUNDS: usize = round_keys::ROUND_KEYS - 1;

/// Packets whose tags are masked by one run of the cipher.
const GROUP: usize = 16;

/// What lies in the slot.
#[repr(C, align(64))]
struct Schedule {
    /// Each round key as often as a vector has blocks: a load that broadcasts would cost the units
    /// that encrypt a tenth of their time.
    round_keys: [[[u8; 16]; 4]; ROUNDS + 1],
    powers: Powers,
}

const _: () = assert!(size_of::<Schedule>() <= SLOT_BYTES && align_of::<Schedule>() <= 64);

/// How deep the kernel's frame is, in vectors: sums and masks are spilled there, round keys and powers
/// are not.
const STACK_VECTORS: usize = 32;

/// What the kernel consists of, if this CPU can run it.
pub(crate) fn functions() -> Option<&'static Functions> {
    let available = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq");
    available.then_some(&FUNCTIONS)
}

static FUNCTIONS: Functions = Functions {
    expand: |slot, key| {
        // SAFETY: passed on to the caller; the CPU was asked for what the kernel needs.
        unsafe { expand(slot, key) };
        raw::wipe_left::<4096>();
        true
    },
    seal: |slot, salt, packets| {
        // SAFETY: as above.
        unsafe {
            seal(slot, salt, packets);
            wipe_left();
        }
        true
    },
    open: |slot, salt, packets| {
        // SAFETY: as above.
        unsafe {
            open(slot, salt, packets);
            wipe_left();
        }
    },
};

/// Overwrites the kernel's frame and registers when it is done.
#[target_feature(enable = "avx512f")]
#[inline(never)]
fn wipe_left() {
    std::hint::black_box(&mut [_mm512_setzero_si512(); STACK_VECTORS]);
    raw::wipe_registers();
}

/// Expands `key` into the slot.
///
/// # Safety
/// As [`Functions`] says, on a CPU with the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline(never)]
unsafe fn expand(slot: NonNull<u8>, key: &[u8; KEY_BYTES]) {
    // SAFETY: the slot is large and aligned enough (asserted above), zeroed, and ours; a schedule
    // is bytes.
    let schedule = unsafe { slot.cast::<Schedule>().as_mut() };
    expand_round_keys(key, schedule);
    let mut hash_key = [_mm512_setzero_si512()];
    encrypt(schedule, &mut hash_key, |_| ());
    schedule.powers.fill(_mm512_castsi512_si128(hash_key[0]));
}

/// The key schedule of AES-256. The round keys come to lie where the powers will, and from there four times
/// where they stay.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
fn expand_round_keys(key: &[u8; KEY_BYTES], schedule: &mut Schedule) {
    // SAFETY: the key has 32 bytes, and there are more powers than round keys.
    unsafe { round_keys::expand(key.as_ptr(), schedule.powers.0.as_mut_ptr().cast()) };
    for (once, everywhere) in schedule.powers.0.iter().zip(&mut schedule.round_keys) {
        // SAFETY: one block, and four; loads and stores are unaligned.
        unsafe {
            let key = _mm_loadu_si128(once.as_ptr().cast());
            let keys = _mm512_broadcast_i32x4(key);
            _mm512_storeu_si512(everywhere.as_mut_ptr().cast(), keys);
        }
    }
}

/// One instruction for up to four vectors of blocks, with a round key.
macro_rules! each {
    ($instruction:literal, $blocks:ident, $key:expr, $($register:ident $at:literal),+) => {{
        // (A register of no type would be printed as one of another size.)
        let _key: __m512i;
        asm!(
            "vmovdqa64 {key}, [{from}]",
            $(concat!($instruction, " {", stringify!($register), "}, {", stringify!($register), "}, {key}"),)+
            key = out(zmm_reg) _key,
            from = in(reg) $key,
            $($register = inout(zmm_reg) $blocks[$at],)+
            options(nostack, preserves_flags, readonly),
        );
    }};
}

/// The same instruction for however many vectors there are.
macro_rules! all {
    ($instruction:literal, $blocks:ident, $key:expr) => {{
        let key = $key.as_ptr();
        // SAFETY: reads a round key, aligned as the schedule is; else registers only.
        unsafe {
            match $blocks.len() {
                1 => each!($instruction, $blocks, key, a 0),
                2 => each!($instruction, $blocks, key, a 0, b 1),
                3 => each!($instruction, $blocks, key, a 0, b 1, c 2),
                _ => each!($instruction, $blocks, key, a 0, b 1, c 2, d 3),
            }
        }
    }};
}

/// Encrypts up to four vectors of four cipher blocks, and does `between` after each round but the
/// last.
///
/// Rounds are assembly for two reasons. The compiler neither keeps round keys in registers from packet to
/// packet nor spills them: they stay in secret memory. And instructions stay in the order in which
/// they are written here, which keeps the units for AES and for products busy; left to itself the
/// compiler puts one vector's rounds behind all others.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
fn encrypt<const VECTORS: usize>(
    schedule: &Schedule,
    blocks: &mut [__m512i; VECTORS],
    mut between: impl FnMut(usize),
) {
    const { assert!(VECTORS >= 1 && VECTORS <= 4) };
    let keys = &schedule.round_keys;
    all!("vpxorq", blocks, keys[0]);
    // Written out, because a loop would keep what `between` works on in memory.
    macro_rules! rounds {
        ($($round:literal)+) => {
            $(
                all!("vaesenc", blocks, keys[$round]);
                between($round);
            )+
        };
    }
    rounds!(1 2 3 4 5 6 7 8 9 10 11 12 13);
    all!("vaesenclast", blocks, keys[ROUNDS]);
}

/// Seals packets that have their numbers.
///
/// # Safety
/// As [`Functions`] says, on a CPU with the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline(never)]
unsafe fn seal(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [SealPacket<'_>]) {
    // SAFETY: filled by `expand`, and nobody changes it.
    let schedule = unsafe { slot.cast::<Schedule>().as_ref() };
    for group in packets.chunks_mut(GROUP) {
        let masks = tag_masks(schedule, salt, group);
        for (packet, mask) in group.iter().zip(masks) {
            let ranges = packet.ranges();
            // SAFETY: a packet's ranges are valid for their lengths, the output for a tag more.
            unsafe {
                let hash = pass::run::<true>(schedule, salt, ranges);
                let tag = _mm_xor_si128(hash, mask);
                _mm_storeu_si128(ranges.output.add(ranges.bytes).cast(), tag);
            }
        }
    }
}

/// Opens packets; each says how it went.
///
/// # Safety
/// As [`Functions`] says, on a CPU with the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline(never)]
unsafe fn open(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [OpenPacket<'_>]) {
    // SAFETY: filled by `expand`, and nobody changes it.
    let schedule = unsafe { slot.cast::<Schedule>().as_ref() };
    for group in packets.chunks_mut(GROUP) {
        let masks = tag_masks(schedule, salt, group);
        for (packet, mask) in group.iter_mut().zip(masks) {
            if !packet.is_unopened() {
                continue;
            }
            let ranges = packet.ranges();
            // SAFETY: a packet's ranges are valid for their lengths, the source for a tag more,
            // which is behind what is overwritten when output and source are the same.
            let difference = unsafe {
                let hash = pass::run::<false>(schedule, salt, ranges);
                let tag = _mm_loadu_si128(ranges.source.add(ranges.bytes).cast());
                _mm_xor_si128(_mm_xor_si128(hash, mask), tag)
            };
            // All bits at once: how many of them are right doesn't show.
            if _mm_test_all_zeros(difference, difference) == 1 {
                packet.opened();
            } else {
                packet.refuse();
            }
        }
    }
}

/// What the hashes of a group's packets are added to: the encrypted first counter block of each
/// (SP 800-38D section 7.1, step 6).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
fn tag_masks<J: Job>(schedule: &Schedule, salt: [u8; 4], group: &[J]) -> [__m128i; GROUP] {
    let mut blocks = [_mm512_setzero_si512(); GROUP / 4];
    if group.len() > 4 {
        for (i, block) in blocks.iter_mut().enumerate() {
            *block = first_counters(salt, group, 4 * i);
        }
        encrypt(schedule, &mut blocks, |_| ());
    } else {
        let mut few = [first_counters(salt, group, 0)];
        encrypt(schedule, &mut few, |_| ());
        blocks[0] = few[0];
    }
    // SAFETY: the same bits: four vectors of four blocks.
    unsafe { transmute::<[__m512i; GROUP / 4], [__m128i; GROUP]>(blocks) }
}

/// The first counter blocks of four packets, from one on; of packets that aren't there, any.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
fn first_counters<J: Job>(salt: [u8; 4], group: &[J], from: usize) -> __m512i {
    let one = |i: usize| {
        let sequence = group.get(from + i).map_or(0, |job| job.ranges().sequence);
        counter_block(salt, sequence, 1)
    };
    let low = _mm256_set_m128i(one(1), one(0));
    let high = _mm256_set_m128i(one(3), one(2));
    let blocks = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
    _mm512_shuffle_epi8(blocks, reverse())
}

/// Salt, number, counter as one number: the bytes of a counter block in reverse.
#[target_feature(enable = "avx512f")]
#[inline]
fn counter_block(salt: [u8; 4], sequence: u64, counter: u32) -> __m128i {
    let high = u64::from(u32::from_be_bytes(salt)) << 32 | sequence >> 32;
    let low = sequence << 32 | u64::from(counter);
    _mm_set_epi64x(high.cast_signed(), low.cast_signed())
}

/// For `pshufb`: the bytes of each block in reverse.
#[target_feature(enable = "avx512f")]
#[inline]
fn reverse() -> __m512i {
    _mm512_broadcast_i32x4(_mm_set_epi8(
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
    ))
}
