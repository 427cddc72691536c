//! T21: threads rewrite descriptors, avail entries, headers and indirect tables while the device
//! serves them. Whatever the device reads at whatever time, it may only lead to what the guest
//! granted at some time: all of that lies in one zone, and everything else keeps its bytes.

mod mutators;

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
use bulkhead_integration::driver::ring::{Desc, Ring};
use bulkhead_integration::driver::{header, kind, status};
use bulkhead_integration::frontend::message::{self, Inflight, protocol_feature, request};
use bulkhead_integration::random::Random;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::Outcome;
use mutators::{Mutators, fields};

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

pub fn header_addr(slot: u64) -> u64 {
    SLOTS + slot * 4096
}

pub fn status_addr(slot: u64) -> u64 {
    header_addr(slot) + 64
}

pub fn table_addr(slot: u64) -> u64 {
    header_addr(slot) + 1024
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
    let (region, file) = disk
        .frontend
        .get_inflight(&Inflight::question(1, options.queue_size))?;
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
    // How many get through whole depends on how the machine shares its cores out among device, driver and
    // mutators: from 3 to 99 of a hundred were seen. Without any, nothing was tried.
    if race.answered < race.offered / 200 || flips < race.offered {
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
