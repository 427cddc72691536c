//! One packet: counter mode and GHASH in one pass over its bytes, 256 bytes at a time. A group is
//! hashed while the next one is encrypted, so that the units for both are busy.
//!
//! UNSAFETY: loads and stores go through raw pointers and must stay inside the packet's ranges; the
//! last vector's are masked. Sources are loaded in assembly, each byte once, because they may be
//! changed by others meanwhile, which to the compiler would be a data race.
#![expect(unsafe_code, reason = "vector loads and stores on raw ranges")]

use std::arch::asm;
use std::arch::x86_64::*;

use super::hash::{Hash, associated};
use super::{Schedule, counter_block, encrypt, reverse};
use crate::packet::Ranges;

/// Bytes of a vector: four cipher blocks.
const VECTOR: usize = 64;
/// Vectors of a group: as many as keep the AES unit busy (latency 4, one each cycle).
const VECTORS: usize = 4;
const GROUP_BYTES: usize = VECTORS * VECTOR;

/// Encrypts (`SEAL`) or decrypts a packet, and returns its hash: the tag without its mask.
///
/// # Safety
/// The ranges are valid for their lengths; source and output are the same or apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
pub(super) unsafe fn run<const SEAL: bool>(
    schedule: &Schedule,
    salt: [u8; 4],
    packet: &Ranges,
) -> __m128i {
    // SAFETY: the packet's associated data; then the caller's promise is passed on, and the
    // cursor stays inside the ranges, as it goes on by what is left at most.
    unsafe {
        let powers = &schedule.powers;
        let first = associated(powers, packet.associated, packet.associated_bytes);
        let hash = Hash::new(powers, first, lengths(packet), packet.bytes.div_ceil(16));
        let mut pass = Pass::<SEAL> {
            schedule,
            hash,
            counters: first_counters(salt, packet.sequence),
            source: packet.source,
            output: packet.output,
        };
        let mut left = packet.bytes;
        if left < GROUP_BYTES {
            pass.rest(left, &[]);
            return pass.hash.finish();
        }
        let mut group = pass.step::<VECTORS, 0, false>(0, &[]);
        left -= GROUP_BYTES;
        while left >= GROUP_BYTES {
            group = pass.step::<VECTORS, VECTORS, false>(0, &group);
            pass.hash.end_run();
            left -= GROUP_BYTES;
        }
        pass.rest(left, &group);
        pass.hash.finish()
    }
}

/// A place in a packet, and what goes on from there.
struct Pass<'k, const SEAL: bool> {
    schedule: &'k Schedule,
    hash: Hash<'k>,
    /// The next four counter blocks, bytes reversed.
    counters: __m512i,
    source: *const u8,
    output: *mut u8,
}

impl<const SEAL: bool> Pass<'_, SEAL> {
    /// What is left behind the last whole group, with that group to be hashed.
    ///
    /// # Safety
    /// Source and output have `bytes`, fewer than a group.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    unsafe fn rest<const HASHED: usize>(&mut self, bytes: usize, group: &[__m512i; HASHED]) {
        // SAFETY: as many vectors as hold the bytes.
        unsafe {
            match bytes.div_ceil(VECTOR) {
                0 => {
                    for &blocks in group {
                        self.hash.add(blocks);
                    }
                }
                1 => self.last::<1, HASHED>(bytes, group),
                2 => self.last::<2, HASHED>(bytes, group),
                3 => self.last::<3, HASHED>(bytes, group),
                _ => self.last::<4, HASHED>(bytes, group),
            }
        }
    }

    /// # Safety
    /// Source and output have `bytes`, which lie in `COUNT` vectors and not in fewer.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    unsafe fn last<const COUNT: usize, const HASHED: usize>(
        &mut self,
        bytes: usize,
        group: &[__m512i; HASHED],
    ) {
        // SAFETY: whole vectors, or a mask of what is in the last.
        let blocks = unsafe {
            if bytes == COUNT * VECTOR {
                self.step::<COUNT, HASHED, false>(0, group)
            } else {
                self.step::<COUNT, HASHED, true>((1 << (bytes % VECTOR)) - 1, group)
            }
        };
        for blocks in blocks {
            self.hash.add(blocks);
        }
    }

    /// Encrypts or decrypts `COUNT` vectors, of which the last may be `PARTIAL` with only the bytes
    /// of `mask`, and hashes those given meanwhile. Returns the ciphertext, zeroes behind its end.
    ///
    /// # Safety
    /// Source and output have those bytes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    unsafe fn step<const COUNT: usize, const HASHED: usize, const PARTIAL: bool>(
        &mut self,
        mask: __mmask64,
        group: &[__m512i; HASHED],
    ) -> [__m512i; COUNT] {
        let keystream = self.keystream::<COUNT, HASHED>(group);
        let mut ciphertext = [_mm512_setzero_si512(); COUNT];
        for i in 0..COUNT {
            // SAFETY: the caller's promise, for the i-th vector; the mask goes for the last.
            unsafe {
                let (from, to) = (self.source.add(i * VECTOR), self.output.add(i * VECTOR));
                let (input, output);
                if PARTIAL && i == COUNT - 1 {
                    input = load_masked(from, mask);
                    output = _mm512_maskz_mov_epi8(mask, _mm512_xor_si512(keystream[i], input));
                    _mm512_mask_storeu_epi8(to.cast(), mask, output);
                } else {
                    input = load(from);
                    output = _mm512_xor_si512(keystream[i], input);
                    _mm512_storeu_si512(to.cast(), output);
                }
                ciphertext[i] = if SEAL { output } else { input };
            }
        }
        self.source = self.source.wrapping_add(COUNT * VECTOR);
        self.output = self.output.wrapping_add(COUNT * VECTOR);
        ciphertext
    }

    /// Encrypts the next counter blocks, and hashes a group between the rounds.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    fn keystream<const COUNT: usize, const HASHED: usize>(
        &mut self,
        group: &[__m512i; HASHED],
    ) -> [__m512i; COUNT] {
        let mut blocks = [_mm512_setzero_si512(); COUNT];
        for block in &mut blocks {
            *block = _mm512_shuffle_epi8(self.counters, reverse());
            self.counters = _mm512_add_epi32(self.counters, four());
        }
        let hash = &mut self.hash;
        encrypt(self.schedule, &mut blocks, |round| {
            if round <= HASHED {
                hash.add(group[round - 1]);
            }
        });
        blocks
    }
}

/// The counter blocks of a packet's first four cipher blocks, which begin with 2, bytes reversed.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
fn first_counters(salt: [u8; 4], sequence: u64) -> __m512i {
    let first = _mm512_broadcast_i32x4(counter_block(salt, sequence, 2));
    let lanes = _mm512_set_epi32(0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0);
    _mm512_add_epi32(first, lanes)
}

/// Four, to the counter of each block. A packet is far too short for a counter to overflow.
#[target_feature(enable = "avx512f")]
#[inline]
fn four() -> __m512i {
    _mm512_set_epi32(0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4)
}

/// The last block of a hash: both lengths in bits (SP 800-38D section 7.1, step 5).
#[target_feature(enable = "avx512f")]
#[inline]
fn lengths(packet: &Ranges) -> __m128i {
    let bits = |bytes: usize| (bytes as u64 * 8).cast_signed();
    _mm_set_epi64x(bits(packet.associated_bytes), bits(packet.bytes))
}

/// # Safety
/// `from` is readable for a vector.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(from: *const u8) -> __m512i {
    let vector;
    // SAFETY: reads those bytes, once.
    unsafe {
        asm!(
            "vmovdqu64 {vector}, [{from}]",
            vector = out(zmm_reg) vector,
            from = in(reg) from,
            options(nostack, preserves_flags, readonly),
        );
    }
    vector
}

/// # Safety
/// `from` is readable for the bytes of the mask.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn load_masked(from: *const u8, mask: __mmask64) -> __m512i {
    let vector;
    // SAFETY: reads the bytes of the mask, once; the others are zero.
    unsafe {
        asm!(
            "vmovdqu8 {vector}{{{mask}}}{{z}}, [{from}]",
            vector = out(zmm_reg) vector,
            mask = in(kreg) mask,
            from = in(reg) from,
            options(nostack, preserves_flags, readonly),
        );
    }
    vector
}
