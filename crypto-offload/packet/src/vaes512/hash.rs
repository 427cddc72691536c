//! GHASH (SP 800-38D section 6.4) as POLYVAL computes it (RFC 8452 appendix A): blocks with their
//! bytes reversed, the hash key times x, and products of 256 bits reduced from below, which saves
//! shifting each product by a bit.
//!
//! A block of a packet is multiplied by the power of the hash key that it ends up with, and only
//! the sum of all products is reduced. Powers that a vector of blocks needs stand in a row in
//! memory, the highest first.
//!
//! UNSAFETY: powers are loaded by a computed place in the table, which must lie in it.
#![expect(unsafe_code, reason = "vector loads at computed places of a table")]

use std::arch::asm;
use std::arch::x86_64::*;

/// The highest power of the hash key: so many blocks at most are summed up before a reduction. As many as
/// a slot has room for.
pub(super) const POWERS: usize = 66;

/// Blocks behind the first power: a vector of data begins at the second power at the latest.
const BEHIND: usize = 2;

/// Powers of the hash key, [`POWERS`] first, then zeroes.
#[repr(C, align(64))]
pub(super) struct Powers(pub(super) [[u8; 16]; POWERS + BEHIND]);

impl Powers {
    /// Computes them from the encrypted zero block.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    pub(super) fn fill(&mut self, zero_encrypted: __m128i) {
        let mut bytes = [0u8; 16];
        // SAFETY: 16 bytes; the store is unaligned.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), zero_encrypted) };
        let hash_key = times_x(u128::from_be_bytes(bytes)).to_le_bytes();
        self.0[POWERS - 1] = hash_key;
        for power in 2..=POWERS {
            let mut product = Sum::zero();
            let next = &mut self.0[POWERS - power..=POWERS - power + 1];
            // SAFETY: each has 16 bytes; loads and store are unaligned.
            unsafe {
                let last = _mm_loadu_si128(next[1].as_ptr().cast());
                let key = _mm_loadu_si128(hash_key.as_ptr().cast());
                product.add(_mm512_zextsi128_si512(last), _mm512_zextsi128_si512(key));
                _mm_storeu_si128(next[0].as_mut_ptr().cast(), product.reduced());
            }
        }
    }

    /// The power, alone.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    pub(super) fn one(&self, power: usize) -> __m128i {
        debug_assert!((1..=POWERS).contains(&power), "{power}");
        // SAFETY: one of the table's entries.
        unsafe { _mm_loadu_si128(self.0.as_ptr().add(POWERS - power).cast()) }
    }

    /// Where the power and the three below it stand. Below the first are none: what is multiplied by
    /// them is zero.
    #[inline]
    fn four(&self, power: usize) -> *const [u8; 16] {
        debug_assert!((2..=POWERS).contains(&power), "{power}");
        self.0.as_ptr().wrapping_add(POWERS - power)
    }
}

/// A sum of products of 256 bits, not yet reduced: their low, middle and high parts, in four
/// lanes.
#[derive(Clone, Copy)]
struct Sum {
    low: __m512i,
    middle: __m512i,
    high: __m512i,
}

impl Sum {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn zero() -> Self {
        let zero = _mm512_setzero_si512();
        Self {
            low: zero,
            middle: zero,
            high: zero,
        }
    }

    /// Adds the products of four pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    fn add(&mut self, a: __m512i, b: __m512i) {
        self.low = _mm512_xor_si512(self.low, _mm512_clmulepi64_epi128::<0x00>(a, b));
        self.middle = xor3(
            self.middle,
            _mm512_clmulepi64_epi128::<0x01>(a, b),
            _mm512_clmulepi64_epi128::<0x10>(a, b),
        );
        self.high = _mm512_xor_si512(self.high, _mm512_clmulepi64_epi128::<0x11>(a, b));
    }

    /// The sum over all lanes, times x^-128, modulo x^128 + x^127 + x^126 + x^121 + 1: twice the
    /// lowest 64 bits are made zero by adding a multiple of the modulus, and dropped.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    fn reduced(self) -> __m128i {
        let modulus = _mm512_set1_epi64(0xc200_0000_0000_0000_u64.cast_signed());
        let fold = |low: __m512i| {
            let swapped = _mm512_shuffle_epi32::<0x4e>(low);
            (swapped, _mm512_clmulepi64_epi128::<0x10>(low, modulus))
        };
        let (swapped, product) = fold(self.low);
        let (swapped, product) = fold(xor3(self.middle, swapped, product));
        let lanes = xor3(self.high, swapped, product);
        let halves = _mm256_xor_si256(
            _mm512_castsi512_si256(lanes),
            _mm512_extracti64x4_epi64::<1>(lanes),
        );
        _mm_xor_si128(
            _mm256_castsi256_si128(halves),
            _mm256_extracti128_si256::<1>(halves),
        )
    }
}

/// The hash of a packet in the making.
pub(super) struct Hash<'k> {
    powers: &'k Powers,
    sum: Sum,
    /// Power for the next block.
    power: usize,
    /// Blocks that are still to be added, with the one of the lengths, as of the last reduction.
    left: usize,
    lengths: __m128i,
    /// The lengths' block is not in the sum yet.
    lengths_due: bool,
}

/// Blocks between two reductions of a packet that is too long for one. Whole groups of the pass,
/// and so many below [`POWERS`] that a packet's last run never ends before its last whole group.
const RUN: usize = 48;

impl<'k> Hash<'k> {
    /// Begins with the associated data, reduced to one block.
    ///
    /// `data_blocks` follow, then [`Hash::finish`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    pub(super) fn new(
        powers: &'k Powers,
        associated: __m128i,
        lengths: __m128i,
        data_blocks: usize,
    ) -> Self {
        let left = data_blocks + 1;
        let (mut sum, long) = (Sum::zero(), left + 1 > POWERS);
        let power = if long {
            let power = _mm512_zextsi128_si512(powers.one(RUN + 1));
            sum.add(_mm512_zextsi128_si512(associated), power);
            RUN
        } else {
            // The first and the last block in one go.
            let ends = _mm256_set_m128i(lengths, associated);
            let power = _mm256_set_m128i(powers.one(1), powers.one(left + 1));
            sum.add(_mm512_zextsi256_si512(ends), _mm512_zextsi256_si512(power));
            left
        };
        Self {
            powers,
            sum,
            power,
            left,
            lengths,
            lengths_due: long,
        }
    }

    /// Adds four blocks of data, or the last of a packet with zeroes behind them. In assembly for the
    /// reasons that the cipher's rounds are.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    pub(super) fn add(&mut self, blocks: __m512i) {
        let Sum { low, middle, high } = &mut self.sum;
        let (_powers, _blocks, _p, _q): (__m512i, __m512i, __m512i, __m512i);
        // SAFETY: reads four of the table's entries; else registers only.
        unsafe {
            asm!(
                "vpshufb {blocks}, {blocks}, {reverse}",
                "vmovdqu64 {powers}, [{from}]",
                "vpclmulqdq {p}, {blocks}, {powers}, 0x00",
                "vpclmulqdq {q}, {blocks}, {powers}, 0x01",
                "vpxorq {low}, {low}, {p}",
                "vpclmulqdq {p}, {blocks}, {powers}, 0x10",
                "vpclmulqdq {blocks}, {blocks}, {powers}, 0x11",
                "vpternlogq {middle}, {p}, {q}, 0x96",
                "vpxorq {high}, {high}, {blocks}",
                blocks = inout(zmm_reg) blocks => _blocks,
                reverse = in(zmm_reg) super::reverse(),
                powers = out(zmm_reg) _powers,
                from = in(reg) self.powers.four(self.power),
                p = out(zmm_reg) _p,
                q = out(zmm_reg) _q,
                low = inout(zmm_reg) *low,
                middle = inout(zmm_reg) *middle,
                high = inout(zmm_reg) *high,
                options(nostack, preserves_flags, readonly),
            );
        }
        self.power = self.power.wrapping_sub(4);
    }

    /// At the end of a run: reduces the sum and begins the next run with it. To be called after
    /// each group.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    pub(super) fn end_run(&mut self) {
        if self.power != 0 {
            return;
        }
        self.left -= RUN;
        self.power = if self.left > POWERS { RUN } else { self.left };
        let reduced = _mm512_zextsi128_si512(self.sum.reduced());
        self.sum = Sum::zero();
        let power = _mm512_zextsi128_si512(self.powers.one(self.power));
        self.sum.add(reduced, power);
    }

    /// The hash, in the order of bytes that a tag has.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
    #[inline]
    pub(super) fn finish(mut self) -> __m128i {
        if self.lengths_due {
            let power = _mm512_zextsi128_si512(self.powers.one(1));
            self.sum.add(_mm512_zextsi128_si512(self.lengths), power);
        }
        let reverse = _mm512_castsi512_si128(super::reverse());
        _mm_shuffle_epi8(self.sum.reduced(), reverse)
    }
}

/// Associated data as one block: all but the last hashed, the last added.
///
/// # Safety
/// `from` is readable for `bytes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,aes,vaes,vpclmulqdq")]
#[inline]
pub(super) unsafe fn associated(powers: &Powers, mut from: *const u8, mut bytes: usize) -> __m128i {
    let reverse = _mm512_castsi512_si128(super::reverse());
    let mut hash = _mm_setzero_si128();
    // SAFETY: whole blocks while there are more than one, then what is left, by a masked load.
    unsafe {
        while bytes > 16 {
            let block = _mm_shuffle_epi8(_mm_loadu_si128(from.cast()), reverse);
            let mut sum = Sum::zero();
            sum.add(
                _mm512_zextsi128_si512(_mm_xor_si128(hash, block)),
                _mm512_zextsi128_si512(powers.one(1)),
            );
            hash = sum.reduced();
            (from, bytes) = (from.add(16), bytes - 16);
        }
        let there = u16::MAX.checked_shr(16 - u32::try_from(bytes).unwrap_or(16));
        let last = _mm_maskz_loadu_epi8(there.unwrap_or(0), from.cast());
        _mm_xor_si128(hash, _mm_shuffle_epi8(last, reverse))
    }
}

/// Times x modulo x^128 + x^127 + x^126 + x^121 + 1 (RFC 8452 appendix A), without a branch.
fn times_x(element: u128) -> u128 {
    const MODULUS: u128 = 0xc200_0000_0000_0000_0000_0000_0000_0001;
    (element << 1) ^ ((element >> 127).wrapping_neg() & MODULUS)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(a, b, c)
}
