//! What is left to do with a frame: what the header in front of it asks for, held against the frame itself.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::flow_hash::HashKey;
use super::frame::MOST_PACKET_BYTES;
use super::header::{DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Header, NEEDS_CSUM};
use super::parse::{self, FrameInfo, Link, Network, Transport, protocol, word};
use crate::port::DropReason;

/// Datagrams that one of UDP may be cut into, as Linux has it.
pub const MOST_DATAGRAMS: usize = 128;
/// Shortest payload of a TCP segment that is to be cut, as Linux has it: the smallest segment that every host takes
/// (RFC 9293), less all options. A guest could otherwise have a single frame become 65,000.
pub const LEAST_TCP_SEGMENT: u16 = 48;

/// A checksum that is to be completed (virtio 1.2, 5.1.6.2): it goes over everything from `start` to the frame's end,
/// and the pseudo header's is in its place already. Both lie in the frame's head, behind all that is decided by: whoever
/// completes it writes two bytes into a frame that was judged before, and what they will be is the guest's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Csum {
    /// Where the checksummed bytes begin, from the frame's first.
    pub start: u16,
    /// Where behind that it stands.
    pub offset: u16,
}

impl Csum {
    /// Where the checksum stands, from the frame's first byte.
    #[must_use]
    #[inline]
    pub fn at(self) -> usize {
        usize::from(self.start) + usize::from(self.offset)
    }

    /// Whether it may stand there: of a transport that is known where its checksum is, else behind everything that is
    /// looked at. Elsewhere it would turn an address or a type that was found good into another one.
    #[inline]
    fn is_transports(self, info: &FrameInfo) -> bool {
        let at = |offset| self.start == info.l4 && self.offset == offset;
        match info.transport {
            Transport::Tcp => at(16),
            Transport::Udp => at(6),
            Transport::Icmpv6 | Transport::Other(protocol::ICMP) => at(2),
            Transport::Other(_) => self.start >= info.l4,
            Transport::Fragment | Transport::Hidden => false,
            Transport::None => self.start >= info.link.l3 && info.link.is_opaque(),
        }
    }
}

/// What a frame is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4 (USO).
    Udp4,
    /// UDP over IPv6 (USO).
    Udp6,
}

/// A frame that is to become several, or that is several in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// Of what.
    pub kind: GsoKind,
    /// Bytes of payload of each but the last.
    pub mss: u16,
    /// Bytes of all headers: Ethernet's, IP's and the transport's. They lie in the frame's head, and payload follows.
    pub header_bytes: u16,
    /// Of the transport.
    pub csum: Csum,
}

/// What is left to do with a frame, as its own bytes allow it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Offload {
    /// Nothing.
    #[default]
    None,
    /// Nothing: the checksum was found good by whoever gave the frame. Guests are not asked.
    Valid,
    /// A checksum.
    NeedsCsum(Csum),
    /// To be cut; the checksum of each is to be completed.
    Gso(Gso),
}

impl Offload {
    /// What a header asks for, held against the frame that it describes. Whether the driver negotiated it does not
    /// matter: what is asked for is within the frame, or refused.
    #[inline]
    pub(super) fn of(
        header: &Header,
        head: &[u8],
        body_bytes: usize,
        (link, key): (Link, HashKey),
    ) -> Result<Self, DropReason> {
        if header.flags & NEEDS_CSUM == 0 {
            return match (header.gso_type, header.flags & DATA_VALID) {
                (GSO_NONE, 0) => Ok(Self::None),
                (GSO_NONE, _) => Ok(Self::Valid),
                // There is no cutting without checksums (5.1.6.2).
                _ => Err(DropReason::BadOffload),
            };
        }
        let csum = Csum {
            start: header.csum_start,
            offset: header.csum_offset,
        };
        let info = parse::behind(link, head, key);
        if csum.at() + 2 > head.len() || !csum.is_transports(&info) {
            return Err(DropReason::BadOffload);
        }
        if header.gso_type == GSO_NONE {
            return Ok(Self::NeedsCsum(csum));
        }
        Gso::of(header, csum, head, body_bytes, &info)
            .map(Self::Gso)
            .ok_or(DropReason::BadOffload)
    }

    /// The header that says so to a driver, or to an interface of the host's.
    #[must_use]
    #[inline]
    pub fn header(&self) -> Header {
        let with = |csum: Csum| Header {
            flags: NEEDS_CSUM,
            csum_start: csum.start,
            csum_offset: csum.offset,
            ..Header::default()
        };
        match *self {
            Self::None => Header::default(),
            Self::Valid => Header {
                flags: DATA_VALID,
                ..Header::default()
            },
            Self::NeedsCsum(csum) => with(csum),
            Self::Gso(gso) => Header {
                gso_type: match gso.kind {
                    GsoKind::Tcp4 => GSO_TCPV4,
                    GsoKind::Tcp6 => GSO_TCPV6,
                    GsoKind::Udp4 | GsoKind::Udp6 => GSO_UDP_L4,
                },
                gso_size: gso.mss,
                hdr_len: gso.header_bytes,
                ..with(gso.csum)
            },
        }
    }
}

impl Gso {
    /// What is to be cut, if the head says the same as the header: the protocols, where the transport begins and where
    /// its checksum is. The headers' length is what they say themselves, not what the driver's hint says.
    fn of(
        header: &Header,
        csum: Csum,
        head: &[u8],
        body_bytes: usize,
        info: &FrameInfo,
    ) -> Option<Self> {
        let kind = match (header.gso_type, info.network, info.transport) {
            (GSO_TCPV4, Network::Ipv4, Transport::Tcp) => GsoKind::Tcp4,
            (GSO_TCPV6, Network::Ipv6, Transport::Tcp) => GsoKind::Tcp6,
            (GSO_UDP_L4, Network::Ipv4, Transport::Udp) => GsoKind::Udp4,
            (GSO_UDP_L4, Network::Ipv6, Transport::Udp) => GsoKind::Udp6,
            _ => return None,
        };
        let l4 = usize::from(info.l4);
        let (transport_bytes, offset) = match info.transport {
            Transport::Tcp => {
                let words = usize::from(word(head, l4 + 12)? >> 12);
                (words * 4, 16)
            }
            _ => (8, 6),
        };
        let header_bytes = l4 + transport_bytes;
        // Behind a routing header the destination that is checksummed is another than the header's.
        if info.routed
            || csum.start != info.l4
            || csum.offset != offset
            || (offset == 16 && transport_bytes < 20)
            || header_bytes > head.len()
        {
            return None;
        }
        let payload = head.len() + body_bytes - header_bytes;
        if header_bytes + payload - usize::from(info.link.l3) > MOST_PACKET_BYTES {
            return None;
        }
        let mss = header.gso_size;
        let is_cuttable = match info.transport {
            Transport::Tcp => mss >= LEAST_TCP_SEGMENT,
            _ => mss > 0 && payload <= usize::from(mss) * MOST_DATAGRAMS,
        };
        (payload > 0 && is_cuttable).then_some(Self {
            kind,
            mss,
            header_bytes: u16::try_from(header_bytes).ok()?,
            csum,
        })
    }
}
