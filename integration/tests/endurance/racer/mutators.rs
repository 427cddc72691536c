//! What rewrites the device's input, and with what.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use bulkhead_integration::arena::FILE_BYTES;
use bulkhead_integration::disk::{DATA, HIGH, HIGH_BYTES};
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::memory::{GuestMemory, OutOfMemory};
use bulkhead_integration::driver::ring::{DESC_BYTES, Ring};
use bulkhead_integration::random::Random;

use super::{BATCH, SLOTS, header_addr, table_addr};

/// A field that mutators rewrite.
#[derive(Debug, Clone, Copy)]
pub enum Field {
    /// Address of a descriptor.
    Addr(u64),
    /// Its length.
    Len(u64),
    /// Its flags and next (split), its id and flags (packed).
    Shape(u64),
    /// An entry of the avail ring.
    Head(u64),
    /// The avail index.
    Index(u64),
    /// Type of a request.
    Kind(u64),
    /// Sector of a request.
    Sector(u64),
}

/// Threads' work, and when they rest.
pub struct Mutators<'a> {
    pub memory: &'a GuestMemory,
    pub fields: Vec<Field>,
    pub size: u16,
    /// Held while rewriting.
    pub gate: RwLock<()>,
    pub ended: AtomicBool,
    pub flips: AtomicU64,
}

impl Mutators<'_> {
    /// Rewrites until the race is over.
    pub fn work(&self, mut random: Random) {
        while !self.ended.load(Ordering::Relaxed) {
            {
                let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
                let burst = 1 + random.below(256);
                for _ in 0..burst {
                    // Fields lie in memory: the list is made of what was written there before.
                    let _ = self.flip(&mut random);
                }
                self.flips.fetch_add(burst, Ordering::Relaxed);
            }
            std::thread::yield_now();
        }
    }

    /// Rewrites a field, and half of the time puts back what it had.
    fn flip(&self, random: &mut Random) -> Result<(), OutOfMemory> {
        let field = self.fields[random.index(self.fields.len())];
        let back = random.below(2) == 0;
        match field {
            Field::Addr(at) => {
                let old = self.memory.swap_u64(at, address(random))?;
                if back {
                    self.memory.swap_u64(at, old)?;
                }
            }
            Field::Sector(at) => {
                let old = self.memory.swap_u64(at, sector(random))?;
                if back {
                    self.memory.swap_u64(at, old)?;
                }
            }
            Field::Len(at) => self.word(at, length(random), back)?,
            Field::Kind(at) => self.word(at, kind_of(random), back)?,
            Field::Shape(at) => {
                let index = u32::try_from(random.below(u64::from(self.size) + 2)).unwrap_or(0);
                let noise = if random.below(8) == 0 { 0xfff8 } else { 0x8080 };
                let flags = u32::try_from(random.below(0x1_0000)).unwrap_or(0) & (noise | 7);
                // Either half may be the flags: both formats get both.
                let value = if random.below(2) == 0 {
                    flags | index << 16
                } else {
                    index | flags << 16
                };
                self.word(at, value, back)?;
            }
            Field::Head(at) => {
                let head = random.below(u64::from(self.size) + 1);
                let old = self.memory.load_u16(at)?;
                self.memory
                    .store_u16(at, u16::try_from(head).unwrap_or(0))?;
                if back {
                    self.memory.store_u16(at, old)?;
                }
            }
            Field::Index(at) => {
                // Rarely: most values break the queue.
                if random.below(256) == 0 {
                    let old = self.memory.load_u16(at)?;
                    let by = u16::try_from(random.below(u64::from(self.size))).unwrap_or(0);
                    self.memory.store_u16(at, old.wrapping_add(by))?;
                }
            }
        }
        Ok(())
    }

    fn word(&self, at: u64, value: u32, back: bool) -> Result<(), OutOfMemory> {
        let old = self.memory.swap_u32(at, value)?;
        if back {
            self.memory.swap_u32(at, old)?;
        }
        Ok(())
    }
}

/// An address in the zone, or one that is in no region.
fn address(random: &mut Random) -> u64 {
    let slot = SLOTS + random.below(BATCH) * 4096;
    match random.below(8) {
        0 => 0x1000,
        1 => HIGH + HIGH_BYTES,
        2 => u64::MAX - 15,
        3 => slot,
        4 => slot + 64,
        5 => slot + 1024,
        _ => DATA + random.below(256) * 8192,
    }
}

/// A length that stays in the zone from any address there, or leaves all of memory.
fn length(random: &mut Random) -> u32 {
    [0, 1, 15, 16, 48, 512, 4096, 8192, 0x8000_0000, u32::MAX][random.index(10)]
}

fn sector(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => u64::MAX - 7,
        1 => 1 << 55,
        // Where the file would grow.
        2 | 3 => FILE_BYTES as u64 / 512,
        _ => random.below(128) * 8,
    }
}

fn kind_of(random: &mut Random) -> u32 {
    let known = [
        kind::IN,
        kind::OUT,
        kind::IN,
        kind::OUT,
        kind::FLUSH,
        kind::GET_ID,
        kind::DISCARD,
        kind::WRITE_ZEROES,
    ];
    match random.below(9) {
        8 => 99,
        known_one => known[usize::try_from(known_one).unwrap_or(0)],
    }
}

/// Everything that the device reads.
pub fn fields(ring: &Ring) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut descriptor = |at: u64| {
        fields.extend([Field::Addr(at), Field::Len(at + 8), Field::Shape(at + 12)]);
    };
    for index in 0..u64::from(ring.size) {
        descriptor(ring.desc + index * DESC_BYTES);
    }
    for slot in 0..BATCH {
        for entry in 0..6 {
            descriptor(table_addr(slot) + entry * DESC_BYTES);
        }
    }
    // As often as all of the descriptors: each of them decides about a whole request.
    for slot in (0..10 * BATCH).map(|i| i % BATCH) {
        fields.extend([
            Field::Kind(header_addr(slot)),
            Field::Sector(header_addr(slot) + 8),
        ]);
    }
    if ring.is_packed() {
        fields.extend([Field::Head(ring.avail), Field::Head(ring.avail + 2)]);
    } else {
        let entries = 0..u64::from(ring.size) + 1;
        fields.extend(entries.map(|i| Field::Head(ring.avail + 4 + 2 * i)));
        fields.extend([Field::Head(ring.avail), Field::Index(ring.avail + 2)]);
    }
    fields
}
