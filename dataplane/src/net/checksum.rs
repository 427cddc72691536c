//! The Internet checksum (RFC 1071): the ones' complement sum of 16-bit words.
//!
//! The sum does not depend on the order of bytes, but for one swap at its end, nor on how many words are added at
//! once: so it goes over words of 32 bits in lanes of 64, which can't overflow, as wide as the CPU has them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Lanes of 32 bits that are added side by side.
const LANES: usize = 16;

/// The sum of bytes as 16-bit words in network order, the last one filled with a zero byte. It fits an `u32` for
/// anything of fewer than 2^17 bytes, and is added to others by [`fold`].
#[must_use]
pub fn sum(bytes: &[u8]) -> u32 {
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, tail) = rest.as_chunks::<4>();
    let mut total: u64 = words
        .iter()
        .map(|word| u64::from(u32::from_ne_bytes(*word)))
        .sum();
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(tail) {
        *to = *from;
    }
    total += u64::from(u32::from_ne_bytes(last));
    // Each lane has at most 2^47 of a slice of any length that there is.
    for lane in lanes {
        total += (lane & 0xffff_ffff) + (lane >> 32);
    }
    let [a, b, c, d] = [
        total & 0xffff,
        (total >> 16) & 0xffff,
        (total >> 32) & 0xffff,
        total >> 48,
    ];
    u32::from(u16::from_be(folded(a + b + c + d)))
}

/// A sum of at most 2^32 words as one word.
fn folded(sum: u64) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    let thrice = (twice & 0xffff) + (twice >> 16);
    u16::try_from(thrice & 0xffff).unwrap_or(0)
}

/// Sums of parts, each but the last of an even number of bytes, as one sum.
#[must_use]
#[inline]
pub fn fold(parts: impl IntoIterator<Item = u32>) -> u16 {
    folded(parts.into_iter().map(u64::from).sum())
}

/// The checksum of a sum: what stands in a header. Never zero, which means in UDP that there is none and is the
/// same as 0xffff everywhere.
#[must_use]
#[inline]
pub fn checksum(sum: u16) -> u16 {
    match !sum {
        0 => 0xffff,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071 says it, word by word.
    fn simple(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            sum += u32::from(word);
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).expect("folded")
    }

    /// Ones' complement has two zeroes.
    fn is_same(a: u16, b: u16) -> bool {
        let is_zero = |sum: u16| [0, 0xffff].contains(&sum);
        a == b || (is_zero(a) && is_zero(b))
    }

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
        assert_eq!(checksum(0xddf2), 0x220d);
        assert_eq!(checksum(0xffff), 0xffff);
    }

    #[test]
    fn carries_of_the_longest_frames_are_not_lost() {
        for length in [0, 1, 63, 64, 65, 65_535, 65_557, 131_071] {
            let bytes = vec![0xff; length];
            assert!(is_same(fold([sum(&bytes)]), simple(&bytes)), "{length}");
        }
    }

    proptest! {
        #[test]
        fn the_wide_sum_is_the_simple_one(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..200) {
            prop_assert!(is_same(fold([sum(&bytes)]), simple(&bytes)));
            let cut = (cut * 2).min(bytes.len() & !1);
            let (front, back) = bytes.split_at(cut);
            prop_assert!(is_same(fold([sum(front), sum(back)]), simple(&bytes)));
        }
    }
}
