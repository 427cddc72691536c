//! Ethernet's header, and the VLAN tags behind it (802.1Q, 802.1ad).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::parse::{Mac, ethertype, word};

/// Bytes of a VLAN tag.
const TAG_BYTES: u16 = 4;
/// VLAN tags that are looked behind: a customer's inside of a provider's.
pub const MOST_TAGS: usize = 2;

/// What Ethernet's header says, with the tags behind it: all that is needed to know where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Where it goes, and where it says that it comes from: an address in the upper six bytes of each, and the VLAN in
    /// the lower two. They are looked at as words alone.
    pub(crate) to: u64,
    pub(crate) from: u64,
    /// Tag control information of the outer VLAN tag: priority in the upper 4 bits, identifier in the others.
    pub tag: Option<u16>,
    /// The EtherType behind the tags.
    pub ethertype: u16,
    /// Where what it carries begins.
    pub l3: u16,
}

impl Link {
    /// Of a frame that nobody has looked at.
    pub(crate) const UNKNOWN: Self = Self {
        to: 0,
        from: 0,
        tag: None,
        ethertype: 0,
        l3: 14,
    };

    /// Of the head of a frame; none if it is shorter than Ethernet's header.
    #[must_use]
    #[inline(always)]
    pub fn of(head: &[u8]) -> Option<Self> {
        const VLAN_BITS: u64 = 0xffff;
        let to = u64::from_be_bytes(*head.first_chunk()?) & !VLAN_BITS;
        let (_, behind) = head.split_at_checked(6)?;
        let behind = u64::from_be_bytes(*behind.first_chunk()?);
        let from = behind & !VLAN_BITS;
        let [.., t0, t1] = behind.to_be_bytes();
        let link = Self {
            to,
            from,
            tag: None,
            ethertype: u16::from_be_bytes([t0, t1]),
            l3: 14,
        };
        Some(match link.ethertype {
            ethertype::VLAN | ethertype::PROVIDER_VLAN => link.behind_tags(head),
            _ => link,
        })
    }

    #[inline(never)]
    fn behind_tags(mut self, head: &[u8]) -> Self {
        for _ in 0..MOST_TAGS {
            if !matches!(self.ethertype, ethertype::VLAN | ethertype::PROVIDER_VLAN) {
                break;
            }
            let at = usize::from(self.l3);
            let (Some(tag), Some(inner)) = (word(head, at), word(head, at + 2)) else {
                break;
            };
            self.tag = self.tag.or(Some(tag));
            self.ethertype = inner;
            self.l3 += TAG_BYTES;
        }
        let vlan = u64::from(self.vlan());
        (self.to, self.from) = (self.to | vlan, self.from | vlan);
        self
    }

    /// Whether it has the same addresses, in the same VLAN.
    #[must_use]
    #[inline(always)]
    pub fn is_same_way(&self, other: &Self) -> bool {
        self.to == other.to && self.from == other.from
    }

    /// Where it goes.
    #[must_use]
    #[inline]
    pub fn dst(&self) -> Mac {
        let [a, b, c, d, e, f, _, _] = self.to.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// Where it says that it comes from.
    #[must_use]
    #[inline]
    pub fn src(&self) -> Mac {
        let [a, b, c, d, e, f, _, _] = self.from.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// The VLAN that the frame is in; 0 of one without a tag, and of one that only has a priority.
    #[must_use]
    #[inline]
    pub fn vlan(&self) -> u16 {
        self.tag.unwrap_or(0) & 0x0fff
    }

    /// Whether nothing behind its EtherType is looked at: no IP, no ARP, and no length in the EtherType's place.
    #[must_use]
    #[inline]
    pub fn is_opaque(&self) -> bool {
        match self.ethertype {
            ethertype::IPV4 | ethertype::IPV6 | ethertype::ARP | ethertype::RARP => false,
            other => other >= ethertype::FIRST,
        }
    }

    /// Whether it goes to more than one station.
    #[must_use]
    #[inline]
    pub fn is_multicast(&self) -> bool {
        is_multicast(&self.dst())
    }
}

/// Whether an address names more than one station; no frame comes from such a one.
#[must_use]
#[inline]
pub fn is_multicast(mac: &Mac) -> bool {
    let [first, ..] = mac;
    first & 1 != 0
}
