//! What a network card is, as the bundle says it, keyd grants it and the data plane keeps to it: its
//! address, its port, its limits and what it may claim to be. A value of these types is well-formed.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::str::FromStr;

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use minicbor::{Decode, Encode};

use crate::identity::{InvalidName, NicId, SocketName};

mod limits;
mod port;
mod prefix;

pub use limits::{NicLimits, TrafficLimits};
pub use port::{AF_XDP_QUEUES, MAX_AF_XDP_MTU, PortSpec, Uplink};
pub use prefix::IpPrefix;

/// Most network cards of a host.
pub const MAX_NICS: usize = 256;
/// Most switches of a host.
pub const MAX_SWITCHES: usize = 64;
/// Most queue pairs of a NIC: each is a receive and a transmit queue.
pub const MAX_QUEUE_PAIRS: u16 = 16;
/// Most source prefixes of a NIC.
pub const MAX_SOURCES: usize = 64;
/// Smallest MTU in bytes (RFC 791; virtio 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// What a mirror may keep of a frame, in bytes.
pub const SNAP_BYTES: std::ops::RangeInclusive<u32> = 64..=262_144;
/// How long a mirror's file may become, in bytes: 64 KiB to 1 TiB.
pub const MIRROR_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 40;

/// A MAC address of one station: unicast, and not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address with these bytes, as they stand in a frame; none for one of a group (its first
    /// byte is odd, IEEE 802) or of nobody (all zero).
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// Its bytes, as they stand in a frame.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

impl FromStr for Mac {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = || {
            let expected =
                "six bytes like 52:54:00:12:34:56, of one station (the first byte is even)";
            InvalidName::new("MAC address", text, expected)
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+'));
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(invalid)?;
        }
        let whole = Some(bytes).filter(|_| parts.next().is_none());
        whole.and_then(Self::new).ok_or_else(invalid)
    }
}

impl<C> Encode<C> for Mac {
    fn encode<W: Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.bytes(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Mac {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        let bytes = d.bytes()?.try_into().ok();
        let problem = || decode::Error::message("a MAC address is 6 bytes of one station");
        bytes.and_then(Self::new).ok_or_else(problem)
    }
}

/// Name of a network interface of the host: 1 to 15 characters of `A-Z a-z 0-9 . _ -`, the first a
/// letter or digit. (The kernel allows more; among it is `%`, which has it invent a name.)
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// Longest name in bytes (`IFNAMSIZ` less the zero byte).
    pub const MAX_BYTES: usize = 15;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InterfaceName({})", self.0)
    }
}

impl FromStr for InterfaceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let first_ok = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !first_ok || !text.chars().all(good) || text.len() > Self::MAX_BYTES {
            let expected = "1 to 15 characters of A-Z a-z 0-9 . _ -, the first a letter or digit";
            return Err(InvalidName::new("interface name", text, expected));
        }
        Ok(Self(text.to_owned()))
    }
}

impl<C> Encode<C> for InterfaceName {
    fn encode<W: Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.str(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for InterfaceName {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        let text = d.str()?;
        text.parse()
            .map_err(|e: InvalidName| decode::Error::message(e.to_string()))
    }
}

/// What a NIC may claim to be: frames of its guest that claim otherwise are dropped.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SpoofChecks {
    /// Their source address is the NIC's MAC.
    #[n(0)]
    pub mac: bool,
    /// Their IPv4 or IPv6 source, or what ARP and neighbour discovery claim, is in one of these; empty:
    /// any.
    #[n(1)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub sources: Vec<IpPrefix>,
    /// What it may be to others on its network.
    #[n(2)]
    #[cbor(skip_if = "Trusted::is_nothing")]
    pub trusted: Trusted,
}

impl Default for SpoofChecks {
    /// The MAC is checked, and no address; it is trusted as nothing.
    fn default() -> Self {
        Self {
            mac: true,
            sources: Vec::new(),
            trusted: Trusted::default(),
        }
    }
}

/// What a NIC's guest may be to others on its network. Who isn't trusted as something, and says that it is, is not
/// heard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Trusted {
    /// A router: it may send router advertisements and redirects.
    #[n(0)]
    pub router: bool,
    /// A DHCP server: it may answer DHCP's clients and relays.
    #[n(1)]
    pub dhcp: bool,
}

impl Trusted {
    /// What there is, as a bundle's source has it.
    pub const NAMES: [&'static str; 2] = ["router", "dhcp"];

    /// Whether it is nothing.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// What it is, by name.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let all = Self::NAMES.into_iter().zip([self.router, self.dhcp]);
        all.filter_map(|(name, is)| is.then_some(name)).collect()
    }

    /// What is named; none: something else is.
    #[must_use]
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut trusted = Self::default();
        for name in names {
            match name {
                "router" => trusted.router = true,
                "dhcp" => trusted.dhcp = true,
                _ => return None,
            }
        }
        Some(trusted)
    }
}

/// A copy of all frames of a NIC, in a pcap-ng file on the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MirrorSpec {
    /// Name of the file in the agent's mirror directory; one that is there is never written to.
    #[n(0)]
    pub file: String,
    /// Bytes kept of each frame, one of [`SNAP_BYTES`].
    #[n(1)]
    pub snap_bytes: u32,
    /// Bytes after which it ends, one of [`MIRROR_BYTES`].
    #[n(2)]
    pub most_bytes: u64,
}

/// What keyd vouches for: one NIC of the bundle it verified. The data plane serves a NIC only as its
/// grant says, whatever the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NicGrant {
    /// Which NIC.
    #[n(0)]
    pub nic: NicId,
    /// The only listener it may be served on.
    #[n(1)]
    pub socket: SocketName,
    /// The only uid whose frontend may connect (`SO_PEERCRED`).
    #[n(2)]
    pub allowed_uid: u32,
    /// Its address, which the guest reads.
    #[n(3)]
    pub mac: Mac,
    /// Its MTU in bytes, [`MIN_MTU`] or more.
    #[n(4)]
    pub mtu: u16,
    /// Queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    #[n(5)]
    pub queue_pairs: u16,
    /// What its frames go out of.
    #[n(6)]
    pub port: PortSpec,
    /// The uplink of its switch; every grant of a switch says the same about it.
    #[n(7)]
    pub uplink: Option<Uplink>,
    /// How much it may send and get.
    #[n(8)]
    pub limits: NicLimits,
    /// What it may claim to be.
    #[n(9)]
    pub checks: SpoofChecks,
    /// Its frames may be copied into a file that the agent gives.
    #[n(10)]
    pub mirror: Option<MirrorSpec>,
    /// Epoch of the bundle it stands in.
    #[n(11)]
    pub epoch: u64,
}

impl NicGrant {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub fn check(&self) -> Result<(), String> {
        if self.mtu < MIN_MTU {
            return Err(format!("an MTU of {}: it is at least {MIN_MTU}", self.mtu));
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            let pairs = self.queue_pairs;
            return Err(format!(
                "{pairs} queue pairs: it has 1 to {MAX_QUEUE_PAIRS}"
            ));
        }
        if self.uplink.is_some() && !matches!(self.port, PortSpec::Switch { .. }) {
            return Err("an uplink, and no switch".to_owned());
        }
        let uplink = self.uplink.as_ref();
        uplink.map_or(Ok(()), Uplink::check)?;
        let port = self.port.check(uplink, self.mtu, self.queue_pairs);
        port.map_err(|(field, e)| format!("its {field}: {e}"))?;
        if self.checks.sources.len() > MAX_SOURCES {
            return Err(format!("more than {MAX_SOURCES} sources"));
        }
        if let Some(mirror) = &self.mirror {
            mirror
                .check()
                .map_err(|(field, e)| format!("its mirror: {field}: {e}"))?;
        }
        let checked = self.limits.check();
        checked.map_err(|e| format!("its limits: {e}"))
    }
}

impl MirrorSpec {
    /// Checks the numbers.
    ///
    /// # Errors
    /// The field of the source that is out of bounds, and what would be right.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let (snap, most) = (self.snap_bytes, self.most_bytes);
        if !SNAP_BYTES.contains(&snap) {
            let (least, most) = (SNAP_BYTES.start(), SNAP_BYTES.end());
            return Err((
                "snap",
                format!("{snap} bytes are not between {least} and {most}"),
            ));
        }
        if !MIRROR_BYTES.contains(&most) {
            let problem = format!(
                "{most} bytes are not between {} and {}",
                MIRROR_BYTES.start(),
                MIRROR_BYTES.end()
            );
            return Err(("bytes", problem));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "net/tests.rs"]
mod tests;
