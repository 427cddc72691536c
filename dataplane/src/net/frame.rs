//! A frame on its way: what a driver or a port gave, copied and checked once.
//!
//! The header and the first [`HEAD_BYTES`] bytes are copied out of guest memory by one read, and whatever is decided
//! about a frame (its offloads, who sent it, where it goes) is decided by that copy. What goes on is the copy, too:
//! the guest's own bytes there are never read again, so that it can't change them in between. The rest stays where it
//! is until it is copied to where it goes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub use super::asked::{Csum, Gso, GsoKind, LEAST_TCP_SEGMENT, MOST_DATAGRAMS, Offload};
use super::claims::{self, Claims};
use super::flow_hash::HashKey;
pub use super::head::HeadBuffer;
pub(crate) use super::head::Readable;
use super::header::{Header, HeaderSize};
use super::parse::{self, ETHERNET_BYTES, FrameInfo, Link, MOST_TAGS};
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

/// What follows a frame's head.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// Guest memory, which its guest may change at any time: to be copied once, and only the copy to be looked at.
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

    /// Copies all of it to the front of `to`, to be looked at there when all of it is there; false, with nothing copied, where that is too short.
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
    pub(super) key: HashKey,
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
        copy.copy(readable, size)?;
        copy.look(key)?;
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
