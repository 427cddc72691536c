//! What a switch knows a frame's ends by: stations, and the members that they are behind.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::hash::{BuildHasher, RandomState};

use crate::port::Nic;

/// A MAC address in a VLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Station(u64);

impl Station {
    /// No station: no frame comes from the MAC address of zeroes.
    pub const NONE: Self = Self(0);

    /// Of a MAC address and a VLAN; 0: none.
    #[must_use]
    #[inline]
    pub fn new([a, b, c, d, e, f]: [u8; 6], vlan: u16) -> Self {
        let [v, w] = vlan.to_be_bytes();
        Self(u64::from_be_bytes([a, b, c, d, e, f, v, w]))
    }

    /// Of a word that has both: the MAC address in the upper six bytes, the VLAN in the lower two.
    #[must_use]
    #[inline]
    pub(crate) fn of_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The same MAC address outside any VLAN.
    #[must_use]
    #[inline]
    pub fn untagged(self) -> Self {
        Self(self.0 & !0xffff)
    }

    /// Whether a frame can come from it: not from all zeroes, and not from an address of many.
    #[must_use]
    #[inline]
    pub fn is_single(self) -> bool {
        !self.is_group() && self.untagged() != Self::NONE
    }

    /// Whether it stands for several.
    #[must_use]
    #[inline]
    pub fn is_group(self) -> bool {
        self.0 >> 56 & 1 != 0
    }

    /// Whether frames for it stay with who got them: 01-80-C2-00-00-00 to -0F, the addresses of spanning tree, LACP
    /// and the like (IEEE 802.1Q, 8.6.3).
    #[must_use]
    #[inline]
    pub fn is_reserved(self) -> bool {
        self.0 & !0xf_ffff == 0x0180_c200_0000_0000
    }

    /// A hash that only who knows the seeds can know.
    #[must_use]
    #[inline]
    pub fn hash(self, [add, times]: Seeds) -> usize {
        folded(self.0 ^ add, times)
    }

    /// The same of two.
    #[must_use]
    #[inline]
    pub fn hash_with(self, other: Self, [one, two]: Seeds) -> usize {
        folded(self.0 ^ one, other.0 ^ two)
    }
}

/// What hashes are seeded with.
pub type Seeds = [u64; 2];

/// Seeds that nobody outside can know.
#[must_use]
pub fn seeds() -> Seeds {
    let random = RandomState::new();
    // Odd: a multiplication by it loses nothing.
    [random.hash_one(1), random.hash_one(2) | 1]
}

/// Both halves of a product, as one word.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "halves of a word, and a hash"
)]
fn folded(a: u64, b: u64) -> usize {
    let product = u128::from(a) * u128::from(b);
    ((product >> 64) as u64 ^ product as u64) as usize
}

/// Who a switch gets frames from and gives them to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member(u16);

impl Member {
    /// The way out of the host.
    pub const UPLINK: Self = Self(u16::MAX);

    /// The NIC, or none: it is the uplink.
    #[must_use]
    #[inline]
    pub fn nic(self) -> Option<Nic> {
        (self != Self::UPLINK).then_some(Nic(self.0))
    }
}

impl From<Nic> for Member {
    /// There is no NIC of the uplink's number: a switch has [`super::MOST_NICS`] at most.
    #[inline]
    fn from(nic: Nic) -> Self {
        Self(nic.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_addresses_are_those_of_the_standard() {
        let reserved = |last| Station::new([1, 0x80, 0xc2, 0, 0, last], 7).is_reserved();
        assert!(reserved(0) && reserved(0x0e) && reserved(0x0f));
        assert!(!reserved(0x10) && !reserved(0x21));
        assert!(!Station::new([1, 0x80, 0xc2, 0, 1, 0], 0).is_reserved());
        assert!(!Station::new([0x33, 0x33, 0, 0, 0, 1], 0).is_reserved());
    }

    #[test]
    fn no_frame_comes_from_many_or_from_nobody() {
        assert!(Station::new([2, 0, 0, 0, 0, 1], 4094).is_single());
        assert!(!Station::new([0; 6], 5).is_single());
        assert!(!Station::new([0xff; 6], 0).is_single());
        assert!(!Station::new([0x33, 0x33, 0, 0, 0, 1], 0).is_single());
        let tagged = Station::new([2, 0, 0, 0, 0, 1], 5);
        assert_eq!(tagged.untagged(), Station::new([2, 0, 0, 0, 0, 1], 0));
    }
}
