//! Reproducible pseudo-random numbers for tests (SplitMix64). Not for keys.

/// A generator; the same seed gives the same numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a number.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From a name, so that each test has its own numbers (FNV-1a).
    #[must_use]
    pub fn named(name: &str) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// As [`Random::below`], for sizes and indexes.
    pub fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap_or(0)
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// Bytes of a block that [`stamp`] fills.
pub const STAMP_BLOCK: usize = 4096;

/// Fills blocks with what a stamp puts into each: other bytes for each block and each stamp.
pub fn stamp(bytes: &mut [u8], first_block: usize, stamp: u64) {
    for (index, block) in bytes.chunks_exact_mut(STAMP_BLOCK).enumerate() {
        let mut random = Random::new(stamp ^ ((first_block + index) as u64).rotate_left(40));
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers() {
        let (mut a, mut b) = (Random::named("x"), Random::named("x"));
        assert_eq!(a.bytes(33), b.bytes(33));
        assert_ne!(a.next_u64(), Random::named("y").next_u64());
    }
}
