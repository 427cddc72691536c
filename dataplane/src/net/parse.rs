//! What a frame's first bytes say: Ethernet, VLAN tags (802.1Q, 802.1ad), ARP, IPv4, IPv6 with its extension
//! headers, and where the transport begins.
//!
//! Everything here reads a copy that nobody changes any more, and nothing behind its end: what does not lie in
//! the copy is not known ([`Transport::Hidden`]). Nothing panics, whatever the bytes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::flow_hash::HashKey;
pub use super::link::{Link, MOST_TAGS, is_multicast};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// EtherTypes (IEEE 802).
pub mod ethertype {
    /// The first one: what is below is the length of an IEEE 802.3 frame.
    pub const FIRST: u16 = 0x0600;
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP (RFC 826).
    pub const ARP: u16 = 0x0806;
    /// RARP (RFC 903), as hypervisors announce a guest that has moved.
    pub const RARP: u16 = 0x8035;
    /// A VLAN tag (802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// MAC control (IEEE 802.3, 31): pauses, which are for the next link alone.
    pub const MAC_CONTROL: u16 = 0x8808;
    /// A provider's VLAN tag (802.1ad).
    pub const PROVIDER_VLAN: u16 = 0x88a8;
}

/// IP protocol numbers.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
}

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// IPv6 extension headers that are followed.
const MOST_EXTENSIONS: usize = 8;
/// Bytes of an IPv6 header.
pub const IPV6_BYTES: usize = 40;
/// Bytes of the shortest IPv4 header.
pub const IPV4_BYTES: usize = 20;

/// What is in the frame, behind Ethernet's header and the tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// ARP or RARP between Ethernet and IPv4 addresses.
    Arp,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// The EtherType is one of these, and what follows is not, or lies behind a third tag or a SNAP header.
    Malformed,
    /// Anything else.
    Other,
}

/// What is in the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP, at `l4`.
    Tcp,
    /// UDP, at `l4`.
    Udp,
    /// ICMPv6, at `l4`.
    Icmpv6,
    /// Another protocol of IP, at `l4`.
    Other(u8),
    /// A fragment: the transport's header is not there, or only its beginning is.
    Fragment,
    /// Behind more extension headers than are followed, or than lie in the frame's head.
    Hidden,
    /// No IP.
    None,
}

/// What a frame's head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameInfo {
    /// In Ethernet's header.
    pub link: Link,
    /// What it carries.
    pub network: Network,
    /// What that carries.
    pub transport: Transport,
    /// Where that begins, if it is there.
    pub l4: u16,
    /// An IPv6 routing header comes before it: its destination is not the header's.
    pub routed: bool,
    /// The same for all frames of a flow, in both directions, and evenly spread over flows: see [`HashKey`].
    pub hash: u32,
}

impl FrameInfo {
    /// Of a frame of which nothing but this is known.
    pub(super) fn of_link(link: Link) -> Self {
        Self {
            link,
            network: Network::Other,
            transport: Transport::None,
            l4: 0,
            routed: false,
            hash: 0,
        }
    }
}

/// `N` bytes at an offset, if they lie in the head.
#[inline]
pub(super) fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    let part = head.get(at..)?.get(..N)?;
    part.try_into().ok()
}

/// A field of two bytes in network order.
#[inline]
pub(super) fn word(head: &[u8], at: usize) -> Option<u16> {
    bytes(head, at).map(u16::from_be_bytes)
}

/// What the head of a frame says; none if it is shorter than Ethernet's header.
#[must_use]
pub fn parse(head: &[u8], key: HashKey) -> Option<FrameInfo> {
    Link::of(head).map(|link| behind(link, head, key))
}

/// What the head of a frame says whose Ethernet header says this.
#[must_use]
pub(super) fn behind(link: Link, head: &[u8], key: HashKey) -> FrameInfo {
    let mut info = FrameInfo::of_link(link);
    let l3 = usize::from(link.l3);
    let hash = match link.ethertype {
        ethertype::IPV4 => ipv4(head, l3, &mut info, key),
        ethertype::IPV6 => ipv6(head, l3, &mut info, key),
        ethertype::ARP | ethertype::RARP => {
            // Ethernet (1) and IPv4 addresses of 6 and 4 bytes.
            let is_arp = bytes(head, l3) == Some([0, 1, 8, 0, 6, 4]) && head.len() >= l3 + 28;
            info.network = if is_arp {
                Network::Arp
            } else {
                Network::Malformed
            };
            None
        }
        ethertype::VLAN | ethertype::PROVIDER_VLAN => {
            info.network = Network::Malformed;
            None
        }
        length if length < ethertype::FIRST && hides_network(head, l3) => {
            info.network = Network::Malformed;
            None
        }
        _ => None,
    };
    info.hash = hash.unwrap_or_else(|| by_stations(&link, key));
    info
}

/// Whether an IEEE 802.3 frame has IP, ARP or a VLAN tag behind LLC and SNAP headers (RFC 1042, 802.1H): nobody sends
/// them so on Ethernet, and some receivers, Windows among them, take them all the same, whatever the length says.
#[cold]
fn hides_network(head: &[u8], l3: usize) -> bool {
    let Some([dsap, ssap, control, 0, 0, oui, inner @ ..]) = bytes::<8>(head, l3) else {
        return false;
    };
    // The lowest bit is not the service's: individual or group, command or response.
    let is_snap = (dsap | 1, ssap | 1, control) == (0xab, 0xab, 3) && matches!(oui, 0 | 0xf8);
    is_snap
        && matches!(
            u16::from_be_bytes(inner),
            ethertype::IPV4
                | ethertype::IPV6
                | ethertype::ARP
                | ethertype::RARP
                | ethertype::VLAN
                | ethertype::PROVIDER_VLAN
        )
}

/// The hash of what has no addresses of IP.
#[inline(never)]
fn by_stations(link: &Link, key: HashKey) -> u32 {
    let station = |[a, b, c, d, e, f]: Mac| u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    let (a, b) = (station(link.src()), station(link.dst()));
    let kind = u64::from(link.ethertype) | u64::from(link.vlan()) << 16;
    key.pair(key.end(0, a, 0), key.end(0, b, 0), kind)
}

/// The ports of a transport that has such.
#[inline]
fn ports(head: &[u8], info: &FrameInfo) -> (u16, u16) {
    let l4 = usize::from(info.l4);
    match info.transport {
        Transport::Tcp | Transport::Udp => {
            let ports = bytes(head, l4).map(|[a, b, c, d]: [u8; 4]| {
                (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
            });
            ports.unwrap_or((0, 0))
        }
        _ => (0, 0),
    }
}

fn transport(protocol: u8) -> Transport {
    match protocol {
        protocol::TCP => Transport::Tcp,
        protocol::UDP => Transport::Udp,
        protocol::ICMPV6 => Transport::Icmpv6,
        other => Transport::Other(other),
    }
}

/// An IPv4 header (RFC 791) at `l3`: its flow's hash.
#[inline]
fn ipv4(head: &[u8], l3: usize, info: &mut FrameInfo, key: HashKey) -> Option<u32> {
    info.network = Network::Malformed;
    let header: [u8; IPV4_BYTES] = bytes(head, l3)?;
    let [version, _, _, _, _, _, f0, f1, _, proto, _, _, source @ ..] = header;
    let length = usize::from(version & 0xf) * 4;
    if version >> 4 != 4 || length < IPV4_BYTES || head.len() < l3 + length {
        return None;
    }
    info.network = Network::Ipv4;
    // More fragments, or an offset.
    let is_fragment = u16::from_be_bytes([f0, f1]) & 0x3fff != 0;
    info.l4 = u16::try_from(l3 + length).ok()?;
    info.transport = if is_fragment {
        Transport::Fragment
    } else {
        transport(proto)
    };
    let [s0, s1, s2, s3, d0, d1, d2, d3] = source;
    let (from, to) = ports(head, info);
    let source = u64::from(u32::from_be_bytes([s0, s1, s2, s3]));
    let destination = u64::from(u32::from_be_bytes([d0, d1, d2, d3]));
    let kind = u64::from(proto) | 4 << 8;
    Some(key.pair(key.end(0, source, from), key.end(0, destination, to), kind))
}

/// An IPv6 header (RFC 8200) at `l3`: its flow's hash.
#[inline(never)]
fn ipv6(head: &[u8], l3: usize, info: &mut FrameInfo, key: HashKey) -> Option<u32> {
    info.network = Network::Malformed;
    let header: [u8; 8] = bytes(head, l3)?;
    let [version, .., next, _] = header;
    let source: [u8; 16] = bytes(head, l3 + 8)?;
    let destination: [u8; 16] = bytes(head, l3 + 24)?;
    if version >> 4 != 6 {
        return None;
    }
    info.network = Network::Ipv6;
    let proto = extensions(head, l3 + IPV6_BYTES, next, info);
    let (from, to) = ports(head, info);
    let end = |address: [u8; 16], port: u16| {
        let both = u128::from_be_bytes(address);
        let high = u64::try_from(both >> 64).unwrap_or(0);
        let low = u64::try_from(both & u128::from(u64::MAX)).unwrap_or(0);
        key.end(high, low, port)
    };
    let kind = u64::from(proto) | 6 << 8;
    Some(key.pair(end(source, from), end(destination, to), kind))
}

/// Follows extension headers (RFC 8200, 4), and says what is behind them; the protocol, for the hash: of a
/// fragment the same for the first and the others.
#[inline]
pub(super) fn extensions(head: &[u8], mut at: usize, mut next: u8, info: &mut FrameInfo) -> u8 {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    for _ in 0..=MOST_EXTENSIONS {
        let unit = match next {
            HOP_BY_HOP | ROUTING | DESTINATION => 8,
            AUTHENTICATION => 4,
            FRAGMENT => {
                let follows: Option<[u8; 8]> = bytes(head, at);
                info.transport = Transport::Fragment;
                info.l4 = u16::try_from(at + 8).unwrap_or(0);
                return follows.map_or(FRAGMENT, |[inner, ..]| inner);
            }
            _ => {
                info.transport = transport(next);
                info.l4 = u16::try_from(at).unwrap_or(0);
                return next;
            }
        };
        let Some([following, length]) = bytes(head, at) else {
            break;
        };
        info.routed |= next == ROUTING;
        // In units, not counting the first 8 bytes.
        at += 8 + unit * usize::from(length);
        next = following;
    }
    info.transport = Transport::Hidden;
    0
}
