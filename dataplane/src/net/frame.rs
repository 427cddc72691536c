//! A frame on its way: what a driver or a port gave, copied and checked once.
//!
//! The header and the first [`HEAD_BYTES`] bytes are copied out of guest memory by one read, and whatever is decided
//! about a frame (its offloads, who sent it, where it goes) is decided by that copy. What goes on is the copy, too:
//! the guest's own bytes there are never read again, so that it can't change them in between. The rest stays where it
//! is until it is copied to where it goes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::claims::{self, Claims};
use super::flow_hash::HashKey;
use super::header::{
    DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Header, HeaderSize, MOST_BYTES,
    NEEDS_CSUM,
};
use super::parse::{
    self, ETHERNET_BYTES, FrameInfo, Link, MOST_TAGS, Network, Transport, protocol, word,
};
use super::roles::{self, Role};
use crate::memory::{GuestBuffer, GuestSlice};
use crate::port::DropReason;

/// Bytes of a frame that are copied and looked at. Ethernet with two tags, IPv6 and TCP with all their options are
/// 162; what a guest's tunnels put in front of them fits as well.
pub const HEAD_BYTES: usize = 192;
/// Bytes of the longest IP packet.
pub const MOST_PACKET_BYTES: usize = 65_535;
/// Bytes of the longest frame: such a packet in a doubly tagged Ethernet frame.
pub const MOST_FRAME_BYTES: usize = ETHERNET_BYTES + 4 * MOST_TAGS + MOST_PACKET_BYTES;
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

/// What follows a frame's head.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// Guest memory, which its guest may change at any time: to be read once.
    Guest {
        /// Where it lies.
        buffer: &'a GuestBuffer,
        /// From this byte of the buffer on.
        at: u64,
        /// So many bytes, which the buffer has.
        bytes: u32,
    },
    /// The same, of which all is to be read.
    Slice(GuestSlice<'a>),
    /// Our own memory.
    Bytes(&'a [u8]),
}

/// What a driver's frame is read from.
pub(crate) trait Readable<'a>: Copy {
    /// Bytes of it.
    fn bytes(self) -> u64;

    /// Copies its first bytes into `to`; false, with nothing copied, where there are fewer.
    fn copy_front(self, to: &mut [u8]) -> bool;

    /// What follows its first `at` bytes, which are `bytes` more.
    fn body(self, at: usize, bytes: u32) -> Body<'a>;
}

impl<'a> Readable<'a> for &'a GuestBuffer {
    #[inline(always)]
    fn bytes(self) -> u64 {
        GuestBuffer::bytes(self)
    }

    #[inline(always)]
    fn copy_front(self, to: &mut [u8]) -> bool {
        self.copy_out(0, to)
    }

    #[inline(always)]
    fn body(self, at: usize, bytes: u32) -> Body<'a> {
        Body::Guest {
            buffer: self,
            at: at as u64,
            bytes,
        }
    }
}

impl<'a> Readable<'a> for GuestSlice<'a> {
    #[inline(always)]
    fn bytes(self) -> u64 {
        GuestSlice::bytes(self) as u64
    }

    #[inline(always)]
    fn copy_front(self, to: &mut [u8]) -> bool {
        self.copy_out(0, to)
    }

    #[inline(always)]
    fn body(self, at: usize, _bytes: u32) -> Body<'a> {
        self.behind(at).map_or(Body::Bytes(&[]), Body::Slice)
    }
}

impl Body<'_> {
    /// Its length in bytes.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Guest { bytes, .. } => *bytes as usize,
            Self::Slice(slice) => slice.bytes(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    /// Copies all of it to the front of `to`, each byte read once; false, with nothing copied, where that is too short.
    #[must_use]
    #[inline]
    pub fn copy_to(&self, to: &mut [u8]) -> bool {
        let Some(to) = to.get_mut(..self.bytes()) else {
            return false;
        };
        match self {
            Self::Guest { buffer, at, .. } => buffer.copy_out(*at, to),
            Self::Slice(slice) => slice.copy_out(0, to),
            Self::Bytes(bytes) => {
                to.copy_from_slice(bytes);
                true
            }
        }
    }
}

/// A frame.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// What is left to do.
    pub offload: Offload,
    /// Its first bytes, at most [`HEAD_BYTES`]: a copy.
    pub head: &'a [u8],
    /// The others.
    pub body: Body<'a>,
    /// What Ethernet's header says.
    pub link: Link,
    /// What flows are told apart by.
    key: HashKey,
}

/// Where a frame's header and head are copied to, with what was found out about them: one for each frame that is looked
/// at together.
#[derive(Debug, Clone)]
pub struct HeadBuffer {
    bytes: [u8; MOST_BYTES + HEAD_BYTES],
    /// Where the frame begins, and where what was copied ends.
    begin: usize,
    end: usize,
    /// Bytes of the frame that were not copied.
    body_bytes: u32,
    offload: Offload,
    link: Link,
}

impl Default for HeadBuffer {
    fn default() -> Self {
        Self {
            bytes: [0; MOST_BYTES + HEAD_BYTES],
            begin: 0,
            end: 0,
            body_bytes: 0,
            offload: Offload::None,
            link: Link::UNKNOWN,
        }
    }
}

impl HeadBuffer {
    /// Copies the header and the first bytes of what is readable of a driver's chain, and holds them against each
    /// other. [`HeadBuffer::frame`] is that frame then.
    ///
    /// # Errors
    /// As [`Frame::of_chain`].
    #[inline(always)]
    pub(crate) fn look<'a>(
        &mut self,
        readable: impl Readable<'a>,
        size: HeaderSize,
        key: HashKey,
    ) -> Result<(), DropReason> {
        let total = readable.bytes();
        let begin = size.bytes();
        if total > (begin + MOST_FRAME_BYTES) as u64 {
            return Err(DropReason::TooLong);
        }
        // It fits: that is below 2^17.
        let total = usize::try_from(total).unwrap_or(0);
        if total < begin + ETHERNET_BYTES {
            return Err(DropReason::Malformed);
        }
        let end = total.min(begin + HEAD_BYTES);
        let copy = self.bytes.get_mut(..end).ok_or(DropReason::Malformed)?;
        if !readable.copy_front(copy) {
            return Err(DropReason::Malformed);
        }
        let (_, head) = copy.split_at(begin);
        self.link = Link::of(head).ok_or(DropReason::Malformed)?;
        (self.begin, self.end) = (begin, end);
        self.body_bytes = u32::try_from(total - end).unwrap_or(0);
        self.offload = match copy.first_chunk() {
            Some([0, GSO_NONE]) => Offload::None,
            _ => self.asked(key)?,
        };
        Ok(())
    }

    /// What a driver's header asks for that asks for something.
    #[inline(never)]
    fn asked(&self, key: HashKey) -> Result<Offload, DropReason> {
        let mut whole = [0; MOST_BYTES];
        for (to, from) in whole.iter_mut().zip(&self.bytes).take(self.begin) {
            *to = *from;
        }
        let mut header = Header::parse(&whole);
        // A driver must not set it (5.1.6.2.1), and can't know.
        header.flags &= !DATA_VALID;
        let head = self.bytes.get(self.begin..self.end).unwrap_or_default();
        Offload::of(&header, head, self.body_bytes as usize, (self.link, key))
    }

    /// The frame of the chain that was looked at.
    #[inline(always)]
    pub(crate) fn frame<'a>(&'a self, readable: impl Readable<'a>, key: HashKey) -> Frame<'a> {
        Frame {
            offload: self.offload,
            head: self.bytes.get(self.begin..self.end).unwrap_or_default(),
            body: readable.body(self.end, self.body_bytes),
            link: self.link,
            key,
        }
    }
}

impl<'a> Frame<'a> {
    /// The frame that a driver sends: what is readable of its chain, with a header of `size` in front. Header and
    /// frame may be split over descriptors anywhere.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] without a whole header and a whole Ethernet header, [`DropReason::TooLong`],
    /// [`DropReason::BadOffload`].
    #[inline]
    pub fn of_chain(
        readable: &'a GuestBuffer,
        size: HeaderSize,
        key: HashKey,
        copy: &'a mut HeadBuffer,
    ) -> Result<Self, DropReason> {
        copy.look(readable, size, key)?;
        Ok(copy.frame(readable, key))
    }

    /// A frame in our own memory, as an interface of the host gave it.
    ///
    /// # Errors
    /// As [`Frame::of_chain`].
    #[inline]
    pub fn of_bytes(header: &Header, bytes: &'a [u8], key: HashKey) -> Result<Self, DropReason> {
        if bytes.len() > MOST_FRAME_BYTES {
            return Err(DropReason::TooLong);
        }
        let (head, body) = bytes.split_at(bytes.len().min(HEAD_BYTES));
        let link = Link::of(head).ok_or(DropReason::Malformed)?;
        let offload = Offload::of(header, head, body.len(), (link, key))?;
        Ok(Self {
            offload,
            head,
            body: Body::Bytes(body),
            link,
            key,
        })
    }

    /// All that its head says. It is found out anew each time: most frames go where they go by their
    /// [`link`](Frame::link) alone.
    #[must_use]
    pub fn info(&self) -> FrameInfo {
        parse::behind(self.link, self.head, self.key)
    }

    /// Its length in bytes, without a header in front.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> usize {
        self.head.len() + self.body.bytes()
    }

    /// Bytes of the longest IP packet in it, once it is cut: what an MTU is compared with.
    #[must_use]
    #[inline]
    pub fn packet_bytes(&self) -> usize {
        let l3 = usize::from(self.link.l3);
        let longest = match self.offload {
            Offload::Gso(gso) => {
                let one = usize::from(gso.header_bytes) + usize::from(gso.mss);
                one.min(self.bytes())
            }
            _ => self.bytes(),
        };
        longest.saturating_sub(l3)
    }

    /// Frames that it is on a wire.
    #[must_use]
    #[inline]
    pub fn packets(&self) -> usize {
        match self.offload {
            Offload::Gso(gso) => {
                let payload = self.bytes() - usize::from(gso.header_bytes);
                payload.div_ceil(usize::from(gso.mss))
            }
            _ => 1,
        }
    }

    /// What it makes its sender to those who get it.
    #[must_use]
    #[inline]
    pub fn role(&self) -> Option<Role> {
        if roles::is_ordinary(self.head, &self.link) {
            return None;
        }
        roles::role(self.head, !self.body.is_empty(), &self.info())
    }

    /// The addresses that it claims as its sender's, beside [`Link::src`].
    #[must_use]
    pub fn claims(&self) -> Claims {
        self.claims_of(&self.info())
    }

    /// As [`Frame::claims`], of a frame whose head says this.
    #[must_use]
    pub(crate) fn claims_of(&self, info: &FrameInfo) -> Claims {
        claims::claims(self.head, !self.body.is_empty(), info)
    }

    /// Copies all of it to the front of `to`: its length; none where that is too short.
    #[must_use]
    #[inline]
    pub fn copy_to(&self, to: &mut [u8]) -> Option<usize> {
        let (head, rest) = to.split_at_mut_checked(self.head.len())?;
        head.copy_from_slice(self.head);
        self.body.copy_to(rest).then(|| self.bytes())
    }
}

impl Offload {
    /// What a header asks for, held against the frame that it describes. Whether the driver negotiated it does not
    /// matter: what is asked for is within the frame, or refused.
    #[inline]
    fn of(
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
