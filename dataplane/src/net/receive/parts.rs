//! A frame as a driver gets it: a header, what was looked at, and the rest.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::MOST_BYTES;
use crate::memory::GuestBuffer;
use crate::net::frame::{Body, Offload};

/// The header of a frame in one buffer.
#[inline]
pub(super) fn header_of(offload: &Offload) -> [u8; MOST_BYTES] {
    // Most frames have this one. Put together field by field it would be copied only once all of them are in the cache.
    const PLAIN: [u8; MOST_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    if let Offload::None = offload {
        return PLAIN;
    }
    let mut header = offload.header();
    header.num_buffers = 1;
    header.bytes()
}

/// A frame as the driver gets it.
pub(super) struct Parts<'a> {
    pub(super) header: &'a [u8],
    pub(super) head: &'a [u8],
    pub(super) body: Body<'a>,
}

impl Parts<'_> {
    #[inline]
    pub(super) fn bytes(&self) -> u64 {
        (self.header.len() + self.head.len() + self.body.bytes()) as u64
    }

    /// Writes all of it to the front of `to`, which has room for it.
    #[inline]
    pub(super) fn write_whole(&self, to: &GuestBuffer) {
        // Drivers give each buffer as one range, unless they have the header apart.
        if !to.copy_front(self.header, self.head) {
            self.write(0, to);
            return;
        }
        let at = (self.header.len() + self.head.len()) as u64;
        match self.body {
            _ if self.body.is_empty() => true,
            Body::Guest {
                buffer,
                at: begin,
                bytes,
            } => to.copy_from(at, buffer, begin, bytes as usize),
            Body::Slice(slice) => to.copy_from_slice(at, slice),
            Body::Bytes(own) => to.copy_in(at, own),
        };
        to.mark_front(self.header.len() + self.head.len() + self.body.bytes());
    }

    /// Writes from byte `from` on to the front of `to`: as much as there is, or has room.
    #[inline]
    pub(super) fn write(&self, from: u64, to: &GuestBuffer) -> u64 {
        let bytes = (self.bytes() - from).min(to.bytes());
        // Below 2^17.
        let (mut skip, bytes) = (
            usize::try_from(from).unwrap_or(0),
            usize::try_from(bytes).unwrap_or(0),
        );
        let mut done = 0;
        for part in [self.header, self.head] {
            let left = part.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(part.len());
            let here = left.get(..bytes - done).unwrap_or(left);
            to.copy_in(done as u64, here);
            done += here.len();
        }
        let (at, left) = (done as u64, bytes - done);
        match self.body {
            Body::Guest {
                buffer, at: begin, ..
            } => to.copy_from(at, buffer, begin + skip as u64, left),
            Body::Slice(slice) => slice
                .part(skip, left)
                .is_some_and(|part| to.copy_from_slice(at, part)),
            Body::Bytes(own) => to.copy_in(at, own.get(skip..skip + left).unwrap_or_default()),
        };
        to.mark_front(bytes);
        bytes as u64
    }
}
