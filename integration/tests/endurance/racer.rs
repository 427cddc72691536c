//! T21: threads rewrite descriptors, avail entries, headers and indirect tables while the device
//! serves them. Whatever the device reads at whatever time, it may only lead to what the guest
//! granted at some time: all of that lies in one zone, and everything else keeps its bytes.

use std::error::Error;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bulkhead_integration::arena::{Arena, FILE_BYTES};
use bulkhead_integration::disk::{
    DATA, DATA_BYTES, Disk, HIGH, HIGH_BYTES, LOW, LOW_BYTES, Options, PATIENCE, feature,
};
use bulkhead_integration::driver::memory::{GuestMemory, OutOfMemory};
use bulkhead_integration::driver::ring::{DESC_BYTES, Desc, Ring};
use bulkhead_integration::driver::{header, kind, status};
use bulkhead_integration::frontend::message::{self, protocol_feature, request};
use bulkhead_integration::random::Random;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::Outcome;

/// What descriptors may lead to, and only they: data, headers, tables, status bytes.
const ZONE: Range<u64> = DATA..DATA + 0x30_0000;
/// Header, status byte and table of each slot: 4096 bytes each.
const SLOTS: u64 = DATA + 0x28_0000;
/// Requests offered at once, at most.
const BATCH: u64 = 8;
const MUTATORS: u64 = 4;
/// Sectors below which everything may be written: 1024 and the longest chain of the largest
/// segments.
const WRITTEN_SECTORS: usize = 3400;
/// The part of the disk that nobody writes.
const KEPT: Range<usize> = WRITTEN_SECTORS * 512..FILE_BYTES;
const GUARD: u8 = 0x5a;

/// A field that mutators rewrite.
#[derive(Debug, Clone, Copy)]
enum Field {
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

struct Mutators<'a> {
    memory: &'a GuestMemory,
    fields: Vec<Field>,
    size: u16,
    /// Held while rewriting.
    gate: RwLock<()>,
    ended: AtomicBool,
    flips: AtomicU64,
}

impl Mutators<'_> {
    fn work(&self, mut random: Random) {
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

fn header_addr(slot: u64) -> u64 {
    SLOTS + slot * 4096
}

fn status_addr(slot: u64) -> u64 {
    header_addr(slot) + 64
}

fn table_addr(slot: u64) -> u64 {
    header_addr(slot) + 1024
}

/// Everything that the device reads.
fn fields(ring: &Ring) -> Vec<Field> {
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

/// The race, until so many requests were offered: the first half over rings alone, the second with
/// use in order, a dirty log and an in-flight region beside them.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options {
        queue_size: 64,
        ..Options::default()
    };
    options.features |= feature::EVENT_IDX | feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
    arena.touch(0..KEPT.start);
    let alone = arena.attach(&options)?;
    let first = race(arena, random, rounds / 2, alone)?;
    options.features |= feature::IN_ORDER | feature::LOG_ALL;
    options.protocol_features |= protocol_feature::LOG_SHMFD | protocol_feature::INFLIGHT_SHMFD;
    let beside = attach_with_files(arena, &options)?;
    let second = race(arena, random, rounds - rounds / 2, beside)?;
    Ok(format!("{first}; and in order: {second}"))
}

/// A disk whose device keeps a log and an in-flight region.
fn attach_with_files(arena: &Arena, options: &Options) -> Result<Disk, Box<dyn Error>> {
    let disk = arena.negotiate(options)?;
    let (region, file) = disk.frontend.get_inflight(1, options.queue_size)?;
    let fds = [file.as_fd()];
    disk.frontend
        .set(request::SET_INFLIGHT_FD, &region.body(), &fds)?;
    let log = memfd_create("log", MFdFlags::MFD_CLOEXEC)?;
    let bytes = (HIGH + HIGH_BYTES) / 4096 / 8;
    ftruncate(&log, i64::try_from(bytes)?)?;
    let body = message::words(&[bytes, 0]);
    disk.frontend
        .ask(request::SET_LOG_BASE, &body, &[log.as_fd()])?;
    disk.share_memory()?;
    disk.start_queue(0)?;
    Ok(disk)
}

fn race(arena: &mut Arena, random: &mut Random, rounds: u64, disk: Disk) -> Outcome {
    let guards = guards(&disk.rings[0]);
    for guard in &guards {
        let len = usize::try_from(guard.end - guard.start)?;
        disk.memory.fill(guard.start, len, GUARD)?;
    }
    let memory = Arc::clone(&disk.memory);
    let mutators = Mutators {
        memory: &memory,
        fields: fields(&disk.rings[0]),
        size: disk.rings[0].size,
        gate: RwLock::new(()),
        ended: AtomicBool::new(false),
        flips: AtomicU64::new(0),
    };
    let mut race = Race {
        disk,
        guards,
        offered: 0,
        answered: 0,
        restarts: 0,
    };
    let outcome = std::thread::scope(|scope| {
        for _ in 0..MUTATORS {
            let own = Random::new(random.next_u64());
            let mutators = &mutators;
            scope.spawn(move || mutators.work(own));
        }
        let outcome = race.all(&mutators, random, rounds, arena);
        mutators.ended.store(true, Ordering::Relaxed);
        outcome
    });
    outcome?;
    let flips = mutators.flips.load(Ordering::Relaxed);
    let did = format!(
        "{} requests, {} answered, {} restarts, {flips} flips",
        race.offered, race.answered, race.restarts
    );
    if race.answered < race.offered / 20 || flips < race.offered {
        return Err(format!("it was no race: {did}").into());
    }
    Ok(did)
}

/// What the device has no right to, at any time.
fn guards(ring: &Ring) -> Vec<Range<u64>> {
    let [desc, avail, used] = ring.parts();
    vec![
        desc.end..avail.start,
        avail.end..used.start,
        used.end..LOW + LOW_BYTES,
        ZONE.end..DATA + DATA_BYTES,
        HIGH..HIGH + HIGH_BYTES,
    ]
}

struct Race {
    disk: Disk,
    guards: Vec<Range<u64>>,
    offered: u64,
    /// Requests whose status byte was written.
    answered: u64,
    restarts: u64,
}

impl Race {
    fn all(
        &mut self,
        mutators: &Mutators<'_>,
        random: &mut Random,
        rounds: u64,
        arena: &Arena,
    ) -> Result<(), Box<dyn Error>> {
        let mut look_at = 0;
        while self.offered < rounds {
            if self.offered >= look_at {
                let _closed = mutators
                    .gate
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                self.look(arena)?;
                look_at = self.offered + rounds / 8;
            }
            let count = 1 + random.below(BATCH);
            if !self.batch(random, count)? {
                self.restart()?;
            }
        }
        let _closed = mutators
            .gate
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.look(arena)
    }

    /// Offers a batch and waits until it is answered; false where that does not happen.
    fn batch(&mut self, random: &mut Random, count: u64) -> Result<bool, Box<dyn Error>> {
        for slot in 0..count {
            let descs = self.descriptors(random, slot)?;
            let id = u16::try_from(slot * 8)?;
            let ring = &mut self.disk.rings[0];
            if random.below(3) == 0 {
                ring.offer_table(&self.disk.memory, id, table_addr(slot), &descs)?;
            } else {
                ring.offer(&self.disk.memory, id, &descs)?;
            }
        }
        let ring = &mut self.disk.rings[0];
        ring.publish_quietly(&self.disk.memory)?;
        ring.kick.write(1)?;
        self.offered += count;
        let done = self.wait(count)?;
        self.disk.rings[0].forget();
        Ok(done)
    }

    fn wait(&mut self, count: u64) -> Result<bool, Box<dyn Error>> {
        let mut seen = 0;
        let mut last = Instant::now();
        loop {
            let mut now = 0;
            for slot in 0..count {
                let byte = self.disk.memory.read(status_addr(slot), 1)?[0];
                now += u64::from(byte != status::UNTOUCHED);
            }
            if now > seen {
                (seen, last) = (now, Instant::now());
            }
            let failed = seen < count && self.disk.rings[0].has_failed(Duration::ZERO);
            if seen == count || failed || last.elapsed() > Duration::from_millis(2) {
                self.answered += seen;
                return Ok(seen == count);
            }
            std::thread::yield_now();
        }
    }

    fn descriptors(&self, random: &mut Random, slot: u64) -> Result<Vec<Desc>, Box<dyn Error>> {
        let kind = [kind::IN, kind::OUT][random.index(2)];
        let bytes = header(kind, random.below(128) * 8);
        self.disk.memory.write(header_addr(slot), &bytes)?;
        self.disk
            .memory
            .write(status_addr(slot), &[status::UNTOUCHED])?;
        let mut descs = vec![Desc::readable(header_addr(slot), 16)];
        for _ in 0..1 + random.below(3) {
            let addr = DATA + random.below(256) * 8192;
            descs.push(if kind == kind::IN {
                Desc::writable(addr, 4096)
            } else {
                Desc::readable(addr, 4096)
            });
        }
        descs.push(Desc::writable(status_addr(slot), 1));
        Ok(descs)
    }

    /// A new start, as after a reset of the device. It must always be possible.
    fn restart(&mut self) -> Result<(), Box<dyn Error>> {
        self.restarts += 1;
        self.disk.stop_queue_at(0)?;
        let ring = &mut self.disk.rings[0];
        let _ = ring.err.read();
        ring.restart(&self.disk.memory)?;
        Ok(self.disk.start_queue(0)?)
    }

    /// With the mutators at rest: a good request succeeds, and the guards stand.
    fn look(&mut self, arena: &Arena) -> Result<(), Box<dyn Error>> {
        self.restart()?;
        let (slot, len) = (0, 8192);
        let first = u64::try_from(KEPT.start)?;
        let header = header(kind::IN, first / 512);
        let memory = &self.disk.memory;
        memory.write(header_addr(slot), &header)?;
        memory.write(status_addr(slot), &[status::UNTOUCHED])?;
        let descs = [
            Desc::readable(header_addr(slot), 16),
            Desc::writable(DATA, len),
            Desc::writable(status_addr(slot), 1),
        ];
        let ring = &mut self.disk.rings[0];
        ring.offer(memory, 5, &descs)?;
        ring.publish(memory)?;
        let used = ring.wait_used(memory, PATIENCE)?;
        let bytes = memory.read(DATA, usize::try_from(len)?)?;
        let kept = &arena.contents[KEPT];
        if (used.id, used.len) != (5, len + 1) || bytes != kept[..bytes.len()] {
            return Err(format!("a good request among bad ones ended as {used:?}").into());
        }
        self.restart()?;
        self.check_guards()
    }

    fn check_guards(&self) -> Result<(), Box<dyn Error>> {
        for guard in &self.guards {
            let len = usize::try_from(guard.end - guard.start)?;
            let bytes = self.disk.memory.read(guard.start, len)?;
            if let Some(at) = bytes.iter().position(|byte| *byte != GUARD) {
                let at = guard.start + at as u64;
                return Err(format!("guest memory at {at:#x} was written").into());
            }
        }
        Ok(())
    }
}
