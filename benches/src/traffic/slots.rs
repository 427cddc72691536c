//! A queue's chains and where their bytes lie: each slot has one buffer, in pieces of at most a page of a guest's.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_integration::driver::desc::{NEXT, WRITE};

use crate::load::memory::guest_addr;
use crate::load::requests::{Descriptor, Layout, Shape};
use crate::load::ring::Chains;
use crate::load::source::Kind;

/// Longest piece: guests' memory is not contiguous beyond a page.
pub const PIECE_BYTES: u32 = 4096;
/// Where a frame's header begins in its buffer, so that its number behind IPv4 and UDP or TCP is aligned.
pub const START: usize = 2;
/// Buffers begin at multiples of this.
const ALIGNED: usize = 128;

/// A queue: rings, then buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// Where its rings lie.
    pub rings: Layout,
    ring_size: u16,
    depth: u16,
    /// Bytes of each chain: header and frame, or room for them.
    bytes: u32,
}

impl Slots {
    /// A queue with a ring of so many entries, from byte `start` of the memory on (a multiple of 4096), with as many
    /// chains of so many bytes as fit into the ring.
    #[must_use]
    pub fn new(start: usize, ring_size: u16, bytes: u32) -> Self {
        let pieces = u16::try_from(bytes.div_ceil(PIECE_BYTES)).unwrap_or(u16::MAX);
        let depth = ring_size / pieces.max(1);
        // Of a layout for requests only the rings are wanted.
        let rings = Layout::new(
            start,
            &Shape {
                depth,
                block_bytes: 0,
                segments: 1,
                indirect: false,
                ring_size,
            },
        );
        Self {
            rings,
            ring_size,
            depth,
            bytes,
        }
    }

    /// The first byte behind it all.
    #[must_use]
    pub fn end(&self) -> usize {
        (self.rings.end + self.stride() * usize::from(self.depth)).next_multiple_of(4096)
    }

    /// Where the header of a slot's frame lies.
    #[must_use]
    #[inline]
    pub fn at(&self, slot: u16) -> usize {
        self.rings.end + self.stride() * usize::from(slot) + START
    }

    fn stride(&self) -> usize {
        (START + self.bytes as usize).next_multiple_of(ALIGNED)
    }
}

impl Chains for Slots {
    fn ring_size(&self) -> u16 {
        self.ring_size
    }

    fn depth(&self) -> u16 {
        self.depth
    }

    #[inline]
    fn chain(&self) -> u16 {
        u16::try_from(self.bytes.div_ceil(PIECE_BYTES)).unwrap_or(u16::MAX)
    }

    fn indirect(&self) -> bool {
        false
    }

    #[inline]
    fn descriptor(&self, slot: u16, place: u16, kind: Kind) -> Descriptor {
        let from = u32::from(place) * PIECE_BYTES;
        let len = self.bytes.saturating_sub(from).min(PIECE_BYTES);
        let next = if place + 1 < self.chain() { NEXT } else { 0 };
        let write = if kind == Kind::Read { WRITE } else { 0 };
        Descriptor {
            addr: guest_addr(self.at(slot) + from as usize),
            len,
            flags: next | write,
        }
    }

    fn table(&self, _slot: u16) -> usize {
        0
    }

    fn table_descriptor(&self, slot: u16) -> Descriptor {
        self.descriptor(slot, 0, Kind::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_up_a_chain_and_chains_do_not_overlap() {
        let slots = Slots::new(4096, 64, 10_000);
        assert_eq!((slots.chain(), slots.depth()), (3, 21));
        let mut end = slots.rings.end;
        for slot in 0..slots.depth() {
            let pieces: Vec<_> = (0..3)
                .map(|place| slots.descriptor(slot, place, Kind::Write))
                .collect();
            assert_eq!(pieces[0].addr, guest_addr(slots.at(slot)));
            assert_eq!(pieces[1].addr, pieces[0].addr + 4096);
            assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u32>(), 10_000);
            let flags: Vec<_> = pieces.iter().map(|piece| piece.flags).collect();
            assert_eq!(flags, [NEXT, NEXT, 0]);
            assert!(slots.at(slot) >= end);
            end = slots.at(slot) + 10_000;
        }
        assert!(slots.end() >= end);
        let room = Slots::new(0, 64, 1526).descriptor(0, 0, Kind::Read);
        assert_eq!((room.len, room.flags), (1526, WRITE));
    }
}
