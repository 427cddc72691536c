//! Prepared requests: where in shared memory a queue's rings, headers, status bytes, indirect tables
//! and buffers lie, and what the descriptors say.
//!
//! Header and status of a request share a cache line that nothing else is in: it goes to the device
//! once and comes back once.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU64};

use bulkhead_integration::driver::desc::{INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::kind as wire;
use bulkhead_integration::random::Random;

use super::LoadError;
use super::memory::{Memory, guest_addr};
use super::ring::Chains;
use super::source::Kind;

/// What a status byte says before the device writes it.
pub const UNTOUCHED: u8 = 0xff;
/// Bytes of a descriptor.
pub const DESC_BYTES: usize = 16;
/// Largest ring that vhost-user back-ends take.
pub const MAX_RING: u16 = 1024;
const HEADER_BYTES: u32 = 16;
/// From one request's header to the next one's.
const LINE_BYTES: usize = 64;
/// Words from one header to the next.
const LINE_WORDS: usize = LINE_BYTES / 8;
/// Where the status byte lies behind a header.
const STATUS_AT: usize = 16;
const PAGE_BYTES: usize = 4096;

/// What the requests of a queue look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Requests in flight at most.
    pub depth: u16,
    /// Bytes of each.
    pub block_bytes: u32,
    /// Pieces that the data of each is in.
    pub segments: u16,
    /// Each chain lies in a table of its own.
    pub indirect: bool,
    /// Entries of the ring.
    pub ring_size: u16,
}

impl Shape {
    /// Descriptors of a request: header, data, status.
    #[must_use]
    pub fn chain(&self) -> u16 {
        self.segments.saturating_add(2)
    }

    /// Entries of the ring that a request takes.
    #[must_use]
    pub fn slots_of_ring(&self) -> u16 {
        if self.indirect { 1 } else { self.chain() }
    }

    /// Entries that the ring must have.
    #[must_use]
    pub fn ring_needed(&self) -> u32 {
        u32::from(self.depth) * u32::from(self.slots_of_ring())
    }
}

/// Entries that a ring for this shape has: a power of two, and no smaller than drivers make them.
///
/// # Errors
/// [`LoadError::Options`] if no ring is that large.
pub fn ring_size(shape: &Shape) -> Result<u16, LoadError> {
    let needed = shape.ring_needed();
    let size = needed.max(128).checked_next_power_of_two();
    let size = size
        .and_then(|size| u16::try_from(size).ok())
        .filter(|size| *size <= MAX_RING);
    size.ok_or_else(|| {
        LoadError::Options(format!(
            "--depth {} with --segments {} needs a ring of {needed} entries, and rings have {MAX_RING} \
             at most: use less, or --indirect",
            shape.depth, shape.segments
        ))
    })
}

/// Offsets in shared memory of what a queue consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Descriptor table or ring.
    pub desc: usize,
    /// What the driver writes: avail ring, or event suppression.
    pub driver: usize,
    /// What the device writes: used ring, or event suppression.
    pub device: usize,
    lines: usize,
    tables: usize,
    buffers: usize,
    /// The first byte behind it all.
    pub end: usize,
}

impl Layout {
    /// For a queue from `start` on, a multiple of 4096.
    #[must_use]
    pub fn new(start: usize, shape: &Shape) -> Self {
        let (size, depth) = (usize::from(shape.ring_size), usize::from(shape.depth));
        let mut next = start;
        let mut take = |bytes: usize| {
            let at = next;
            next = (at + bytes).next_multiple_of(PAGE_BYTES);
            at
        };
        let desc = take(DESC_BYTES * size);
        let driver = take(2 * size + 6);
        let device = take(8 * size + 6);
        let lines = take(LINE_BYTES * depth);
        let tables = take(table_bytes(shape) * depth);
        let buffers = take(buffer_bytes(shape) * depth);
        Self {
            desc,
            driver,
            device,
            lines,
            tables,
            buffers,
            end: next,
        }
    }
}

fn table_bytes(shape: &Shape) -> usize {
    if shape.indirect {
        (DESC_BYTES * usize::from(shape.chain())).next_multiple_of(LINE_BYTES)
    } else {
        0
    }
}

fn buffer_bytes(shape: &Shape) -> usize {
    (shape.block_bytes as usize).next_multiple_of(PAGE_BYTES)
}

/// A descriptor as the driver means it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Flags: next, write, indirect.
    pub flags: u16,
}

/// The requests of a queue, as many as its depth.
#[derive(Debug)]
pub struct Requests<'m> {
    shape: Shape,
    layout: Layout,
    headers: &'m [AtomicU64],
    bytes: &'m [AtomicU8],
    buffers: &'m [AtomicU64],
}

impl<'m> Requests<'m> {
    /// At a place in memory.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(memory: &'m Memory, layout: Layout, shape: Shape) -> Result<Self, LoadError> {
        let depth = usize::from(shape.depth);
        let requests = Self {
            shape,
            layout,
            headers: memory.slice(layout.lines, LINE_WORDS * depth)?,
            bytes: memory.slice(layout.lines, LINE_BYTES * depth)?,
            buffers: memory.slice(layout.buffers, buffer_bytes(&shape) / 8 * depth)?,
        };
        Ok(requests)
    }

    /// Their shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Says in the header of a request what it does; its status byte becomes [`UNTOUCHED`].
    #[inline]
    pub fn prepare(&self, slot: u16, kind: Kind, sector: u64) {
        let at = usize::from(slot) * LINE_WORDS;
        if let Some([word, place]) = self.headers.get(at..at + 2) {
            let number = match kind {
                Kind::Read => wire::IN,
                Kind::Write => wire::OUT,
            };
            word.store(u64::from(number), Relaxed);
            place.store(sector, Relaxed);
        }
        if let Some(status) = self.status_byte(slot) {
            status.store(UNTOUCHED, Relaxed);
        }
    }

    /// What the device says of a request.
    #[inline]
    #[must_use]
    pub fn status(&self, slot: u16) -> u8 {
        let status = self.status_byte(slot);
        status.map_or(UNTOUCHED, |status| status.load(Relaxed))
    }

    #[inline]
    fn status_byte(&self, slot: u16) -> Option<&'m AtomicU8> {
        self.bytes.get(usize::from(slot) * LINE_BYTES + STATUS_AT)
    }

    /// The data of a request.
    #[must_use]
    pub fn buffer(&self, slot: u16) -> &'m [AtomicU64] {
        let at = usize::from(slot) * buffer_bytes(&self.shape) / 8;
        let words = self.shape.block_bytes as usize / 8;
        self.buffers.get(at..at + words).unwrap_or_default()
    }

    /// Fills all buffers with bytes that don't compress.
    pub fn fill(&self, seed: u64) {
        let mut random = Random::new(seed);
        for word in self.buffers {
            word.store(random.next_u64(), Relaxed);
        }
    }

    /// Bytes that the device may write into a request.
    #[inline]
    #[must_use]
    pub fn writable_bytes(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Read => self.shape.block_bytes.saturating_add(1),
            Kind::Write => 1,
        }
    }
}

impl Chains for Requests<'_> {
    fn ring_size(&self) -> u16 {
        self.shape.ring_size
    }

    fn depth(&self) -> u16 {
        self.shape.depth
    }

    fn chain(&self) -> u16 {
        self.shape.chain()
    }

    fn indirect(&self) -> bool {
        self.shape.indirect
    }

    fn descriptor(&self, slot: u16, place: u16, kind: Kind) -> Descriptor {
        let line = self.layout.lines + usize::from(slot) * LINE_BYTES;
        let last = self.shape.chain() - 1;
        if place == 0 {
            Descriptor {
                addr: guest_addr(line),
                len: HEADER_BYTES,
                flags: NEXT,
            }
        } else if place < last {
            let len = self.shape.block_bytes / u32::from(self.shape.segments.max(1));
            let at = usize::from(slot) * buffer_bytes(&self.shape)
                + usize::from(place - 1) * len as usize;
            let direction = if kind == Kind::Read { WRITE } else { 0 };
            Descriptor {
                addr: guest_addr(self.layout.buffers + at),
                len,
                flags: NEXT | direction,
            }
        } else {
            Descriptor {
                addr: guest_addr(line + STATUS_AT),
                len: 1,
                flags: WRITE,
            }
        }
    }

    fn table(&self, slot: u16) -> usize {
        self.layout.tables + usize::from(slot) * table_bytes(&self.shape)
    }

    fn table_descriptor(&self, slot: u16) -> Descriptor {
        Descriptor {
            addr: guest_addr(self.table(slot)),
            len: u32::from(self.shape.chain()) * 16,
            flags: INDIRECT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        depth: 4,
        block_bytes: 8192,
        segments: 2,
        indirect: true,
        ring_size: 16,
    };

    #[test]
    fn parts_and_requests_do_not_overlap() {
        let layout = Layout::new(4096, &SHAPE);
        let memory = Memory::new(layout.end).expect("maps");
        let requests = Requests::new(&memory, layout, SHAPE).expect("fits");
        let mut ranges = vec![
            (layout.desc, 16 * 16),
            (layout.driver, 2 * 16 + 6),
            (layout.device, 8 * 16 + 6),
        ];
        for slot in 0..4 {
            ranges.push((requests.table(slot), 4 * 16));
            for place in 0..SHAPE.chain() {
                let part = requests.descriptor(slot, place, Kind::Read);
                let at = memory.offset_of(part.addr).expect("inside");
                ranges.push((at, part.len as usize));
            }
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
        }
        let (at, len) = ranges.pop().expect("some");
        assert!(ranges[0].0 >= 4096 && at + len <= layout.end);
    }

    #[test]
    fn a_chain_is_header_data_status() {
        let layout = Layout::new(0, &SHAPE);
        let memory = Memory::new(layout.end).expect("maps");
        let requests = Requests::new(&memory, layout, SHAPE).expect("fits");
        let flags = |kind| (0..4).map(move |place| (place, kind));
        let of = |(place, kind)| {
            let descriptor = requests.descriptor(1, place, kind);
            (descriptor.len, descriptor.flags)
        };
        let read: Vec<_> = flags(Kind::Read).map(of).collect();
        assert_eq!(read, [(16, 1), (4096, 3), (4096, 3), (1, 2)]);
        let write: Vec<_> = flags(Kind::Write).map(of).collect();
        assert_eq!(write, [(16, 1), (4096, 1), (4096, 1), (1, 2)]);
        assert_eq!(requests.writable_bytes(Kind::Read), 8193);
        assert_eq!(requests.writable_bytes(Kind::Write), 1);
        requests.prepare(1, Kind::Write, 77);
        let header = memory.offset_of(requests.descriptor(1, 0, Kind::Write).addr);
        let words = memory
            .slice::<AtomicU64>(header.expect("inside"), 2)
            .expect("inside");
        assert_eq!(words[0].load(Relaxed), 1);
        assert_eq!(words[1].load(Relaxed), 77);
        assert_eq!(requests.status(1), UNTOUCHED);
        assert_eq!(requests.buffer(1).len(), 1024);
    }

    #[test]
    fn rings_are_powers_of_two_that_hold_all_requests() {
        let shape = |depth, segments, indirect| Shape {
            depth,
            block_bytes: 4096,
            segments,
            indirect,
            ring_size: 0,
        };
        assert_eq!(ring_size(&shape(1, 1, false)).expect("small"), 128);
        assert_eq!(ring_size(&shape(128, 1, false)).expect("fits"), 512);
        assert_eq!(ring_size(&shape(1024, 1, true)).expect("fits"), 1024);
        let error = ring_size(&shape(1024, 1, false))
            .expect_err("3072")
            .to_string();
        assert!(error.contains("or --indirect"), "{error}");
    }
}
