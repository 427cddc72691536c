//! A place in a packed ring, and what flags say there.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::virtqueue::chain::WRITE;

/// Available, where it is the driver's wrap counter (2.8.1).
pub(super) const AVAIL: u16 = 1 << 7;
/// Used, where it is the device's wrap counter.
pub(super) const USED: u16 = 1 << 15;

/// A place in the ring, with the wrap counter that holds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtqueue) struct Cursor {
    pub(in crate::virtqueue) index: u16,
    pub(in crate::virtqueue) wrap: bool,
}

impl Cursor {
    /// From half of a vring base: 15 bits of index, and the wrap counter.
    pub(super) fn from_base(base: u16) -> Self {
        Self {
            index: base & 0x7fff,
            wrap: base & 0x8000 != 0,
        }
    }

    pub(in crate::virtqueue) fn base(self) -> u16 {
        self.index | (u16::from(self.wrap) << 15)
    }

    /// `by` places further in a ring of `size`; at most once around.
    #[inline]
    pub(in crate::virtqueue) fn advanced(self, by: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(by);
        match u16::try_from(index) {
            Ok(index) if index < size => Self { index, ..self },
            _ => Self {
                // Below the size: the index was, and at most a size was added.
                index: u16::try_from(index - u32::from(size)).unwrap_or(0),
                wrap: !self.wrap,
            },
        }
    }

    /// `by` places back in a ring of `size`; at most once around.
    pub(in crate::virtqueue) fn retreated(self, by: u16, size: u16) -> Self {
        let wrap = self.wrap ^ (by > self.index);
        let index = if by > self.index {
            // Below the size: a size at most was taken off.
            (size - by).saturating_add(self.index)
        } else {
            self.index - by
        };
        Self { index, wrap }
    }

    /// Whether flags say that the driver has made the descriptor here available.
    #[inline]
    pub(in crate::virtqueue) fn is_available(self, flags: u16) -> bool {
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == self.wrap && used != self.wrap
    }

    /// Whether flags say that the driver has made it available in this turn: it may be used since.
    pub(in crate::virtqueue) fn was_made_available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap
    }

    /// What shows a descriptor here as used.
    #[inline]
    pub(super) fn used_flags(self, len: u32) -> u16 {
        let bits = if self.wrap { AVAIL | USED } else { 0 };
        bits | if len > 0 { WRITE } else { 0 }
    }
}
