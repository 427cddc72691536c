//! A descriptor chain as checked buffers.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::RingError;
use crate::memory::{GuestBuffer, Lease};

/// The chain continues at `next`.
pub const NEXT: u16 = 1;
/// Device-writable.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor as the driver wrote it (virtio 1.2, 2.7.5), little-endian, 16 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// 1: the chain continues; 2: device-writable; 4: a table of descriptors.
    pub flags: u16,
    /// Where the chain continues.
    pub next: u16,
}

impl Descriptor {
    pub(super) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What a driver made available: the buffers of one request.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the device reads, in order.
    pub readable: GuestBuffer,
    /// What the device writes, in order.
    pub writable: GuestBuffer,
}

impl Chain {
    /// An empty chain with room for `pieces` ranges in each direction.
    #[must_use]
    pub fn with_capacity(pieces: usize) -> Self {
        Self {
            readable: GuestBuffer::with_capacity(pieces),
            writable: GuestBuffer::with_capacity(pieces),
        }
    }

    #[inline]
    pub(super) fn reset(&mut self, lease: &Lease) {
        self.readable.reset(lease);
        self.writable.reset(lease);
    }

    /// Adds a descriptor's buffer.
    #[inline]
    pub(super) fn push(&mut self, descriptor: Descriptor) -> Result<(), RingError> {
        let buffer = if descriptor.has(WRITE) {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(RingError::ReadableAfterWritable);
        };
        buffer
            .push(descriptor.addr, descriptor.len)
            .map_err(|e| RingError::OutsideMemory {
                guest_addr: e.guest_addr,
                bytes: e.bytes,
            })?;
        if self.readable.bytes() + self.writable.bytes() > u64::from(u32::MAX) + 1 {
            return Err(RingError::TooManyBytes);
        }
        Ok(())
    }

    /// Lets go of the memory.
    pub fn release(&mut self) {
        self.readable.release();
        self.writable.release();
    }
}
