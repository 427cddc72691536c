//! A descriptor chain as checked buffers.
//!
//! UNSAFETY: entries of an indirect table are read at addresses inside a span that was looked up, of
//! memory that the walk holds.
#![expect(unsafe_code, reason = "tables in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;

use super::{QueueFeatures, RingError};
use crate::blk::config_space::SEG_MAX;
use crate::memory::{GuestBuffer, Lease, read_words};

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
    /// Where the chain continues; of a packed ring, the buffer ID.
    pub next: u16,
}

/// Bytes of a descriptor, split or packed.
pub(super) const DESCRIPTOR_BYTES: u32 = 16;

/// Longest chain that is followed in a queue of that size.
pub(super) fn longest(size: u16) -> u32 {
    // A driver may put SEG_MAX segments into an indirect table of a shorter queue.
    u32::from(size).max(SEG_MAX + 2)
}

impl Descriptor {
    /// From the words of a split queue's table.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "fields of a word")]
    pub(super) fn of_split([addr, rest]: [u64; 2]) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// From the words of a packed ring (2.8.13), whose buffer ID is kept as `next`.
    #[inline]
    pub(super) fn of_packed([addr, rest]: [u64; 2]) -> Self {
        let Self {
            len, flags, next, ..
        } = Self::of_split([addr, rest]);
        Self {
            addr,
            len,
            flags: next,
            next: flags,
        }
    }

    #[inline]
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
        Ok(())
    }

    /// Looks at the length of a chain, when all of it was added.
    #[inline]
    pub(super) fn check_bytes(&self) -> Result<(), RingError> {
        // The sum fits: 32768 descriptors of 2^32 bytes each, in a ring and in a table.
        if self.readable.bytes() + self.writable.bytes() > u64::from(u32::MAX) + 1 {
            return Err(RingError::TooManyBytes);
        }
        Ok(())
    }

    /// Has the CPU fetch what a request needs first: its header, and the line that its status goes to.
    #[inline]
    pub fn announce(&self) {
        self.writable.announce_last();
        self.readable.announce_first();
    }

    /// Lets go of the memory.
    pub fn release(&mut self) {
        self.readable.release();
        self.writable.release();
    }
}

/// An indirect table in guest memory (virtio 1.2, 2.7.5.3 and 2.8.7).
#[derive(Debug)]
pub(super) struct Table<'a> {
    _lease: &'a Lease,
    entries: NonNull<[u8; DESCRIPTOR_BYTES as usize]>,
    size: u32,
    longest: u32,
}

/// The table that a descriptor names.
///
/// # Errors
/// [`RingError::Indirect`].
pub(super) fn table<'a>(
    lease: &'a Lease,
    descriptor: &Descriptor,
    features: QueueFeatures,
    longest: u32,
) -> Result<Table<'a>, RingError> {
    if !features.indirect {
        return Err(RingError::Indirect("it was not negotiated"));
    }
    if descriptor.has(NEXT) {
        return Err(RingError::Indirect("a descriptor follows it"));
    }
    if descriptor.len == 0 || !descriptor.len.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(RingError::Indirect("its length is not whole descriptors"));
    }
    let entries = lease
        .span(descriptor.addr, u64::from(descriptor.len))
        .ok_or(RingError::Indirect("it is not in guest memory"))?
        .cast();
    Ok(Table {
        _lease: lease,
        entries,
        size: descriptor.len / DESCRIPTOR_BYTES,
        longest,
    })
}

impl Table<'_> {
    /// An entry's bytes, read once; `index` is below the size.
    fn entry(&self, index: u32) -> [u64; 2] {
        debug_assert!(index < self.size);
        // SAFETY: the entry lies inside the span that was looked up; the lease keeps it. Bytes
        // need no alignment.
        unsafe { read_words(self.entries.add(index as usize).cast()) }
    }

    /// Follows the chain in the table of a split queue.
    pub(super) fn walk(&self, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = 0u16;
        for _ in 0..self.longest {
            if u32::from(index) >= self.size {
                return Err(RingError::OutOfTable {
                    index,
                    size: self.size,
                });
            }
            let descriptor = Descriptor::of_split(self.entry(u32::from(index)));
            if descriptor.has(INDIRECT) {
                return Err(RingError::Indirect("it holds another one"));
            }
            chain.push(descriptor)?;
            if !descriptor.has(NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingError::ChainTooLong(self.longest))
    }

    /// Takes all entries of the table of a packed queue, one after the other: there, only the
    /// WRITE flag means something.
    pub(super) fn take_all(&self, chain: &mut Chain) -> Result<(), RingError> {
        if self.size > self.longest {
            return Err(RingError::ChainTooLong(self.longest));
        }
        for index in 0..self.size {
            let descriptor = Descriptor::of_packed(self.entry(index));
            if descriptor.has(INDIRECT) {
                return Err(RingError::Indirect("it holds another one"));
            }
            chain.push(descriptor)?;
        }
        Ok(())
    }
}
