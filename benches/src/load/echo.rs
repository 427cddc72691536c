//! The device's side that does nothing: the floor under every back-end's figures.
//!
//! It walks each chain, checks its bounds, reads the header, writes the status byte, and publishes.
//! What a back-end takes longer than this is its own; what both take is the price of two CPUs that
//! share memory, and the driver's side.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use bulkhead_integration::driver::desc::{INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::packed::{EVENT_DISABLE, START, WRAP, is_available, used_bits};

use super::LoadError;
use super::error::QueueError;
use super::memory::Memory;
use super::requests::{DESC_BYTES, Layout, Shape};

/// Published this often while more is there: the driver's side goes on meanwhile.
const PUBLISH_EVERY: u16 = 8;
const NO_NOTIFY: u16 = 1;
const SECTOR_SHIFT: u32 = 9;

/// One queue's other end.
#[derive(Debug)]
pub struct Echo<'m> {
    memory: &'m Memory,
    table: &'m [AtomicU64],
    ring: Other<'m>,
    size: u16,
    capacity_bytes: u64,
    place: u16,
}

#[derive(Debug)]
enum Other<'m> {
    Split {
        avail: &'m [AtomicU16],
        used_index: &'m AtomicU16,
        used: &'m [AtomicU32],
    },
    Packed,
}

/// How a chain's descriptors follow each other.
#[derive(Debug, Clone, Copy)]
struct Chain {
    split: bool,
    /// In an indirect table; of a packed ring, that is as long as the chain.
    in_table: bool,
    /// Of the table or ring.
    entries: usize,
}

/// What a chain has come to.
#[derive(Debug, Clone, Copy)]
struct Done {
    written: u32,
    descriptors: u16,
}

impl<'m> Echo<'m> {
    /// The other end of a queue of this shape.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(
        memory: &'m Memory,
        layout: &Layout,
        shape: &Shape,
        packed: bool,
        capacity_bytes: u64,
    ) -> Result<Self, LoadError> {
        let size = usize::from(shape.ring_size);
        let head = memory.slice::<AtomicU16>(layout.device, 2)?;
        let [first, second] = head else {
            return Err(LoadError::OutOfMemory {
                at: layout.device,
                count: 2,
            });
        };
        let ring = if packed {
            second.store(EVENT_DISABLE, Release);
            Other::Packed
        } else {
            first.store(NO_NOTIFY, Release);
            Other::Split {
                avail: memory.slice(layout.driver, size + 3)?,
                used_index: second,
                used: memory.slice(layout.device + 4, 2 * size)?,
            }
        };
        Ok(Self {
            memory,
            table: memory.slice(layout.desc, 2 * size)?,
            ring,
            size: shape.ring_size,
            capacity_bytes,
            place: if packed { START } else { 0 },
        })
    }

    /// Answers what is there now; whether there was anything.
    ///
    /// # Errors
    /// [`QueueError::Echo`].
    #[inline]
    pub fn step(&mut self) -> Result<bool, QueueError> {
        match self.ring {
            Other::Split {
                avail,
                used_index,
                used,
            } => self.step_split(avail, used_index, used),
            Other::Packed => self.step_packed(),
        }
    }

    fn step_split(
        &mut self,
        avail: &[AtomicU16],
        used_index: &AtomicU16,
        used: &[AtomicU32],
    ) -> Result<bool, QueueError> {
        let index = avail.get(1).map_or(self.place, |index| index.load(Acquire));
        if index == self.place {
            return Ok(false);
        }
        let mask = self.size.wrapping_sub(1);
        while self.place != index {
            let at = usize::from(self.place & mask);
            let head = avail
                .get(2 + at)
                .ok_or(QueueError::Echo("ring"))?
                .load(Relaxed);
            let done = self.answer(self.table, head, true)?;
            if let Some([id, len]) = used.get(2 * at..2 * at + 2) {
                id.store(u32::from(head), Relaxed);
                len.store(done.written, Relaxed);
            }
            self.place = self.place.wrapping_add(1);
            if self.place.is_multiple_of(PUBLISH_EVERY) {
                used_index.store(self.place, Release);
            }
        }
        used_index.store(self.place, Release);
        Ok(true)
    }

    /// Descriptors are used in the driver's order: as long as the first of a batch isn't, it sees none of them.
    /// So that one is written last, as the others are then.
    fn step_packed(&mut self) -> Result<bool, QueueError> {
        let mut held = None;
        let mut count = 0u32;
        loop {
            let index = self.place & !WRAP;
            let table = self.table;
            let word = table.get(2 * usize::from(index) + 1);
            let word = word.ok_or(QueueError::Echo("place"))?;
            let flags = u16::try_from(word.load(Acquire) >> 48).unwrap_or(0);
            if !is_available(flags, self.place) {
                publish(&mut held);
                return Ok(count > 0);
            }
            let done = self.answer(self.table, index, false)?;
            let id = (word.load(Relaxed) >> 32) & 0xffff;
            let used = u64::from(used_bits(self.place)) << 48;
            let value = u64::from(done.written) | id << 32 | used;
            if held.is_some() {
                word.store(value, Release);
            } else {
                held = Some((word, value));
            }
            count = count.saturating_add(1);
            if count.is_multiple_of(u32::from(PUBLISH_EVERY)) {
                publish(&mut held);
            }
            let next = index + done.descriptors;
            self.place = if next < self.size {
                self.place + done.descriptors
            } else {
                (next - self.size) | ((self.place & WRAP) ^ WRAP)
            };
        }
    }

    /// Walks a chain, reads its header, writes its status.
    #[inline]
    fn answer(&self, table: &[AtomicU64], first: u16, split: bool) -> Result<Done, QueueError> {
        let (addr, len, flags, _) = entry(table, first, split)?;
        if flags & INDIRECT != 0 {
            let inner = self.inside(addr, len)?;
            let words = self.memory.slice(inner, len as usize / 8);
            let words = words.map_err(|_| QueueError::Echo("table"))?;
            let entries = len as usize / DESC_BYTES;
            let mut done = self.walk(
                words,
                0,
                Chain {
                    split,
                    in_table: true,
                    entries,
                },
            )?;
            done.descriptors = 1;
            return Ok(done);
        }
        let entries = usize::from(self.size);
        self.walk(
            table,
            first,
            Chain {
                split,
                in_table: false,
                entries,
            },
        )
    }

    #[inline]
    fn walk(&self, table: &[AtomicU64], first: u16, chain: Chain) -> Result<Done, QueueError> {
        let Chain {
            split,
            in_table,
            entries,
        } = chain;
        let (addr, len, _, mut next) = entry(table, first, split)?;
        let (mut index, mut descriptors) = (first, 1);
        let header = self.inside(addr, len)?;
        let mut data_bytes = 0u64;
        let mut written = 0u32;
        loop {
            index = if split {
                next
            } else {
                let following = index + 1;
                if usize::from(following) < entries {
                    following
                } else {
                    0
                }
            };
            let (addr, len, flags, link) = entry(table, index, split)?;
            let at = self.inside(addr, len)?;
            descriptors += 1;
            let last = if !split && in_table {
                usize::from(descriptors) == entries
            } else {
                flags & NEXT == 0
            };
            if last {
                self.finish(header, data_bytes, at)?;
                let done = Done {
                    written: written + 1,
                    descriptors,
                };
                return Ok(done);
            }
            data_bytes += u64::from(len);
            if flags & WRITE != 0 {
                written = written.saturating_add(len);
            }
            if usize::from(descriptors) > entries {
                return Err(QueueError::Echo("chain without end"));
            }
            next = link;
        }
    }

    #[inline]
    fn finish(&self, header: usize, data_bytes: u64, status: usize) -> Result<(), QueueError> {
        let words = self.memory.slice::<AtomicU64>(header, 2);
        let Ok([kind, sector]) = words else {
            return Err(QueueError::Echo("header"));
        };
        let start = sector.load(Relaxed) << SECTOR_SHIFT;
        let within = start
            .checked_add(data_bytes)
            .is_some_and(|end| end <= self.capacity_bytes);
        let known = kind.load(Relaxed) & 0xffff_ffff <= 1;
        let bytes = self.memory.slice::<AtomicU8>(status, 1);
        let Ok([status]) = bytes else {
            return Err(QueueError::Echo("status byte"));
        };
        status.store(u8::from(!(within && known)), Relaxed);
        Ok(())
    }

    /// Offset of a range of guest memory.
    #[inline]
    fn inside(&self, addr: u64, len: u32) -> Result<usize, QueueError> {
        let end = addr.checked_add(u64::from(len).saturating_sub(1));
        let both = self
            .memory
            .offset_of(addr)
            .zip(end.and_then(|end| self.memory.offset_of(end)));
        both.map(|(offset, _)| offset)
            .ok_or(QueueError::Echo("address"))
    }
}

/// Writes the descriptor that was held back.
#[inline]
fn publish(held: &mut Option<(&AtomicU64, u64)>) {
    if let Some((word, value)) = held.take() {
        word.store(value, Release);
    }
}

/// Address, length, flags and, of a split ring, the next index.
#[inline]
fn entry(table: &[AtomicU64], index: u16, split: bool) -> Result<(u64, u32, u16, u16), QueueError> {
    let at = 2 * usize::from(index);
    let Some([addr, rest]) = table.get(at..at + 2) else {
        return Err(QueueError::Echo("descriptor"));
    };
    let rest = rest.load(Relaxed);
    let half = |shift: u32| u16::try_from((rest >> shift) & 0xffff).unwrap_or(0);
    let len = u32::try_from(rest & 0xffff_ffff).unwrap_or(0);
    let (low, high) = (half(32), half(48));
    let (flags, next) = if split { (low, high) } else { (high, 0) };
    Ok((addr.load(Relaxed), len, flags, next))
}
