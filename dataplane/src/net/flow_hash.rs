//! The hash of a flow: what queue pairs are chosen by.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// The secret that flows are hashed with: guests can't tell which flows share a place in a table.
///
/// The hash is symmetric. A guest answers on the queue that its own kernel chose, so that a card which
/// remembers by hash where a flow was sent from finds there where to receive it (virtio 1.2, 5.1.6.5.6.1), and one
/// entry of a cache serves both directions where that is wanted. Each end (address and port) is mixed by itself and
/// the two are added: unlike an exclusive or of both, pairs of neighbours don't fall together. Two
/// multiplications for each end and one for the sum cost a few nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct HashKey([u64; 2]);

impl HashKey {
    /// Of random bits.
    #[must_use]
    pub fn new(secret: u64) -> Self {
        let other = folded(secret ^ 0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93);
        // Odd: a multiplication by it loses nothing.
        Self([secret | 1, other | 1])
    }

    /// Mixes an address of 16 bytes and a port. Whoever doesn't know the key can't make a factor zero.
    #[inline]
    pub(super) fn end(self, high: u64, low: u64, port: u16) -> u64 {
        let Self([key, other]) = self;
        let mixed = folded(high ^ key, low ^ other);
        folded(mixed ^ u64::from(port), key)
    }

    #[inline]
    pub(super) fn pair(self, a: u64, b: u64, kind: u64) -> u32 {
        let Self([_, other]) = self;
        let mixed = folded(a.wrapping_add(b) ^ kind, other);
        // The upper half of the word is no worse than the lower.
        u32::try_from(mixed >> 32).unwrap_or(0)
    }
}

/// Both halves of a product: each bit of it depends on all of the factors'.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "halves of a word")]
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}
