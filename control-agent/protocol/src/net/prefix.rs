//! Prefixes of IP addresses (RFC 4632, RFC 4291 section 2.3).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use minicbor::{Decode, Encode};

use crate::identity::InvalidName;

/// All addresses that begin with some bits of one; the other bits of that one are zero, so that a
/// prefix is written in one way. An IPv4 address within IPv6 (`::ffff:0:0/96`) is no IPv4 prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpPrefix {
    address: IpAddr,
    bits: u8,
}

impl IpPrefix {
    /// The prefix; none if the address has not so many bits, or others than these are set.
    #[must_use]
    pub fn new(address: IpAddr, bits: u8) -> Option<Self> {
        let left = match address {
            IpAddr::V4(a) if bits <= 32 => a.to_bits().checked_shl(bits.into()).unwrap_or(0) != 0,
            IpAddr::V6(a) if bits <= 128 => a.to_bits().checked_shl(bits.into()).unwrap_or(0) != 0,
            _ => return None,
        };
        (!left).then_some(Self { address, bits })
    }

    /// The first address.
    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits are those of the address.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Whether an address is one of them.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        let bits = u32::from(self.bits);
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(other)) => {
                let differ = ours.to_bits() ^ other.to_bits();
                differ.leading_zeros() >= bits
            }
            (IpAddr::V6(ours), IpAddr::V6(other)) => {
                let differ = ours.to_bits() ^ other.to_bits();
                differ.leading_zeros() >= bits
            }
            _ => false,
        }
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl fmt::Debug for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpPrefix({self})")
    }
}

impl FromStr for IpPrefix {
    type Err = InvalidName;

    /// `10.0.0.0/24`, or an address alone for all of its bits.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = || {
            let expected =
                "10.1.2.0/24, fd00::/64 or one address, with nothing set behind its bits";
            InvalidName::new("IP prefix", text, expected)
        };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let bits = match bits {
            None if address.is_ipv4() => 32,
            None => 128,
            // Digits alone: no sign.
            Some(bits) if bits.bytes().all(|c| c.is_ascii_digit()) => {
                bits.parse().map_err(|_| invalid())?
            }
            Some(_) => return Err(invalid()),
        };
        Self::new(address, bits).ok_or_else(invalid)
    }
}

impl<C> Encode<C> for IpPrefix {
    /// A byte string: the address, then one byte with the number of bits.
    fn encode<W: Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        let mut bytes = match self.address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        bytes.push(self.bits);
        e.bytes(&bytes)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for IpPrefix {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        let problem = || decode::Error::message("an IP prefix is an address and its bits");
        let (bits, address) = d.bytes()?.split_last().ok_or_else(problem)?;
        let v4 = <[u8; 4]>::try_from(address).map(Ipv4Addr::from);
        let v6 = <[u8; 16]>::try_from(address).map(Ipv6Addr::from);
        let address = match (v4, v6) {
            (Ok(address), _) => IpAddr::V4(address),
            (_, Ok(address)) => IpAddr::V6(address),
            _ => return Err(problem()),
        };
        Self::new(address, *bits).ok_or_else(problem)
    }
}
