//! The head of a driver's frame: copied once, and what was found out about it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::asked::Offload;
use super::flow_hash::HashKey;
use super::frame::{Body, Frame, HEAD_BYTES, MOST_FRAME_BYTES};
use super::header::{DATA_VALID, GSO_NONE, Header, HeaderSize, MOST_BYTES};
use super::parse::{ETHERNET_BYTES, Link};
use crate::memory::{GuestBuffer, GuestSlice};
use crate::port::DropReason;

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
    /// Copies the header and the first bytes of what is readable of a driver's chain.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] without a whole header and a whole Ethernet header, [`DropReason::TooLong`].
    #[inline(always)]
    pub(crate) fn copy<'a>(
        &mut self,
        readable: impl Readable<'a>,
        size: HeaderSize,
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
        (self.begin, self.end) = (begin, end);
        self.body_bytes = u32::try_from(total - end).unwrap_or(0);
        Ok(())
    }

    /// Holds what was copied against each other. [`HeadBuffer::frame`] is that frame then. Where there are several, all
    /// are copied before the first is looked at: what is read right behind a copy, across its chunks, waits until all of
    /// it is in the cache.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`].
    #[inline(always)]
    pub(crate) fn look(&mut self, key: HashKey) -> Result<(), DropReason> {
        let head = self.bytes.get(self.begin..self.end).unwrap_or_default();
        self.link = Link::of(head).ok_or(DropReason::Malformed)?;
        self.offload = match self.bytes.first_chunk() {
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
