//! T23: chains that loop, lengths that sum past 2^32, indexes that jump, discards of a million
//! segments. None costs more than a bounded walk, and a neighbour on the same worker is served
//! throughout.

use std::error::Error;
use std::time::Duration;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, HIGH, Options, feature};
use bulkhead_integration::driver::ring::{Desc, NEXT, linked};
use bulkhead_integration::driver::{header, kind, status};
use bulkhead_integration::frontend::wait_readable;
use bulkhead_integration::random::Random;

use crate::Outcome;
use std::os::fd::AsFd;

/// How long one chain may keep the device: far more than a bounded walk, on any machine.
const END_WITHIN: Duration = Duration::from_secs(5);
/// Rounds between two looks at the neighbour.
const LOOK: u64 = 50;

/// So many bad chains.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options::default();
    options.features |= feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
    let mut disk = arena.attach(&options)?;
    let before = cpu_ticks(arena)?;
    let mut retired = 0;
    for round in 0..rounds {
        let which = random.below(6);
        offer(&mut disk, random, which)?;
        disk.rings[0].kick.write(1)?;
        match end(&disk).map_err(|e| format!("round {round}, attack {which}: {e}"))? {
            End::Answered(status::OK) => {
                return Err(format!("round {round}, attack {which}: it succeeded").into());
            }
            End::Answered(_) => {}
            End::Retired => retired += 1,
        }
        disk.stop_queue_at(0)?;
        let _ = disk.rings[0].err.read();
        disk.rings[0].restart(&disk.memory)?;
        disk.start_queue(0)?;
        if round % LOOK == 0 {
            arena.check_other()?;
        }
    }
    disk.read(0, 0, 4096)?;
    let ticks = cpu_ticks(arena)? - before;
    Ok(format!(
        "{rounds} chains, {retired} queues retired, {ticks} ticks of 10 ms on the processor"
    ))
}

enum End {
    Answered(u8),
    Retired,
}

/// The status byte of slot 0, or the error descriptor.
fn end(disk: &Disk) -> Result<End, Box<dyn Error>> {
    let deadline = std::time::Instant::now() + END_WITHIN;
    loop {
        let byte = disk.memory.read(Disk::status_addr(0), 1)?[0];
        if byte != status::UNTOUCHED {
            return Ok(End::Answered(byte));
        }
        if wait_readable(disk.rings[0].err.as_fd(), Duration::from_micros(100)) {
            return Ok(End::Retired);
        }
        if std::time::Instant::now() > deadline {
            return Err("neither an answer nor an error".into());
        }
    }
}

fn offer(disk: &mut Disk, random: &mut Random, which: u64) -> Result<(), Box<dyn Error>> {
    let memory = &disk.memory;
    let kind = [kind::IN, kind::OUT][random.index(2)];
    memory.write(Disk::header_addr(0), &header(kind, 0))?;
    memory.write(Disk::status_addr(0), &[status::UNTOUCHED])?;
    let head = Desc::readable(Disk::header_addr(0), 16);
    let tail = Desc::writable(Disk::status_addr(0), 1);
    let data = |addr: u64, len: u32| {
        if kind == kind::IN {
            Desc::writable(addr, len)
        } else {
            Desc::readable(addr, len)
        }
    };
    match which {
        0 => looped(disk, random, &[head, data(DATA, 512), tail])?,
        1 => jumped(disk, random)?,
        // 2^32 and more: 4 MiB again and again.
        2 => {
            let mut descs = vec![head];
            descs.extend((0..1100).map(|_| data(DATA, 4 << 20)));
            descs.push(tail);
            in_table(disk, &descs)?;
        }
        3 => in_table(
            disk,
            &[head, data(DATA, u32::MAX), data(DATA, u32::MAX), tail],
        )?,
        // Two million segments of 16 bytes: none is read.
        4 | 5 => {
            let kind = [kind::DISCARD, kind::WRITE_ZEROES][random.index(2)];
            memory.write(Disk::header_addr(0), &header(kind, 0))?;
            let mut descs = vec![head];
            descs.extend((0..4 + random.below(4)).map(|_| Desc::readable(DATA, 4 << 20)));
            descs.push(tail);
            in_table(disk, &descs)?;
        }
        _ => return Err("no such attack".into()),
    }
    Ok(())
}

fn in_table(disk: &mut Disk, descs: &[Desc]) -> Result<(), Box<dyn Error>> {
    disk.rings[0].offer_table(&disk.memory, 0, HIGH, descs)?;
    disk.rings[0].publish_quietly(&disk.memory)?;
    Ok(())
}

/// A chain that ends where it begins (split), or goes round its whole ring (packed).
fn looped(disk: &mut Disk, random: &mut Random, descs: &[Desc]) -> Result<(), Box<dyn Error>> {
    if disk.rings[0].is_packed() {
        return endless(disk);
    }
    let mut table = linked(descs, 0);
    let from = random.index(table.len());
    table[from].flags |= NEXT;
    table[from].next = u16::try_from(random.index(from + 1))?;
    let ring = &mut disk.rings[0];
    for (desc, index) in table.iter().zip(0..) {
        ring.write_desc(&disk.memory, index, desc)?;
    }
    ring.push(&disk.memory, 0)?;
    ring.publish_quietly(&disk.memory)?;
    Ok(())
}

fn endless(disk: &mut Disk) -> Result<(), Box<dyn Error>> {
    let ring = &mut disk.rings[0];
    let descs = vec![Desc::readable(DATA, 16); usize::from(ring.size)];
    ring.offer(&disk.memory, 0, &descs)?;
    let last = ring.slot_addr(bulkhead_integration::driver::packed::START | (ring.size - 1));
    let flags = disk.memory.load_u16(last + 14)?;
    disk.memory.store_u16(last + 14, flags | NEXT)?;
    ring.publish_quietly(&disk.memory)?;
    Ok(())
}

/// An avail index far ahead (split), ids far outside (packed).
fn jumped(disk: &mut Disk, random: &mut Random) -> Result<(), Box<dyn Error>> {
    let ring = &mut disk.rings[0];
    if ring.is_packed() {
        let id = ring.size + u16::try_from(random.below(0x8000))?;
        ring.offer(&disk.memory, id, &[Desc::writable(DATA, 16)])?;
        ring.publish_quietly(&disk.memory)?;
    } else {
        let by = ring.size + 1 + u16::try_from(random.below(0x7000))?;
        ring.publish_index(&disk.memory, by)?;
    }
    Ok(())
}

/// Clock ticks that the backend was on a processor.
fn cpu_ticks(arena: &Arena) -> Result<u64, Box<dyn Error>> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", arena.process.pid()))?;
    let fields = stat.rsplit(')').next().ok_or("no name")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || -> Result<u64, Box<dyn Error>> { Ok(fields.next().ok_or("short")?.parse()?) };
    Ok(next()? + next()?)
}
