//! What the rows of packed rings do.

use std::error::Error;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, Request, feature};
use bulkhead_integration::driver::packed::{START, WRAP, advance, available_bits};
use bulkhead_integration::driver::ring::{Desc, INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::frontend::message::request;
use bulkhead_integration::frontend::wait_readable;

use crate::End::{Accepted, Retired, Silent, Status, Used};
use crate::guest::{Watch, attach, descriptors, fate, judge, offer_other, probe, wait_for_end};
use crate::{Attack, End};

const OK: End = Status(status::OK);

pub fn large_read() -> Request {
    Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 1 << 20)],
    }
}

/// A good read through queue 0, from offer to end.
pub fn good(disk: &mut Disk) -> Attack {
    let descs = descriptors(disk, kind::IN, 0, &[(DATA, 4096)])?;
    offer_other(disk, &descs, &descs)
}

/// A good chain written by hand, with the AVAIL and USED bits that `bits` adds at each place.
pub fn by_hand(arena: &mut Arena, bits: fn(u16, u16) -> u16) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    write_by_hand(&mut disk, &descs, 0, bits)?;
    disk.rings[0].kick.write(1)?;
    quick_end(&mut disk, &descs)
}

/// Writes a chain at the next place, the first descriptor last.
fn write_by_hand(
    disk: &mut Disk,
    descs: &[Desc],
    id: u16,
    bits: fn(u16, u16) -> u16,
) -> Result<(), Box<dyn Error>> {
    let ring = &mut disk.rings[0];
    let first = ring.next_avail;
    let count = u16::try_from(descs.len())?;
    for (desc, i) in descs.iter().zip(0..count).rev() {
        let place = advance(first, i, ring.size);
        let next = if i + 1 < count { NEXT } else { 0 };
        let desc = Desc {
            flags: bits(place, desc.flags | next),
            next: id,
            ..*desc
        };
        ring.write_slot(&disk.memory, place, &desc)?;
    }
    ring.expect(id, count, 0);
    Ok(())
}

/// The end of what was written by hand. Silence is told from an end that is late by two good
/// rounds on the other queue, which the same worker serves.
fn quick_end(disk: &mut Disk, descs: &[Desc]) -> Attack {
    let watch = Watch::of(disk, &[])?;
    for _ in 0..2 {
        probe(disk, 1)?;
    }
    // The ring can't say it: what was written by hand may look used already.
    let byte = disk.memory.read(Disk::status_addr(0), 1)?[0];
    if byte == status::UNTOUCHED && !disk.rings[0].has_failed(Duration::ZERO) {
        let closed = wait_readable(disk.frontend.stream().as_fd(), Duration::ZERO);
        if !closed {
            watch.compare_but(disk, &[probe_data()])?;
            return Ok(Silent);
        }
    }
    wait_for_end(disk, Some((0, descs)))
}

fn span(at: u64, bytes: u64) -> Range<u64> {
    at..at + bytes
}

/// Where probes read to.
fn probe_data() -> Range<u64> {
    span(DATA + 0x40_0000, 4096)
}

pub fn behind_a_hole(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].next_avail = START | 5;
    write_by_hand(&mut disk, &descs, 0, |place, flags| {
        flags | available_bits(place)
    })?;
    disk.rings[0].kick.write(1)?;
    quick_end(&mut disk, &descs)
}

/// Every descriptor of the ring is available, with these flags, and leads to 16 bytes.
pub fn everywhere(arena: &mut Arena, flags: u16) -> Attack {
    let mut disk = attach(arena)?;
    let ring = &mut disk.rings[0];
    for index in (0..ring.size).rev() {
        let place = START | index;
        let desc = Desc {
            flags: flags & !(1 << 7 | 1 << 15) | available_bits(place),
            next: index,
            ..Desc::readable(DATA, 16)
        };
        ring.write_slot(&disk.memory, place, &desc)?;
        ring.expect(index, 1, 16);
    }
    let watch = Watch::of(&disk, &[span(DATA, 16)])?;
    disk.rings[0].kick.write(1)?;
    let end = wait_for_end(&mut disk, None)?;
    watch.compare(&disk)?;
    probe(&mut disk, 1)?;
    Ok(end)
}

/// Header and data with NEXT, and behind them nothing that is available.
pub fn unfinished(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    let ring = &disk.rings[0];
    for (place, desc) in (START..).zip(&descs[..2]) {
        let desc = Desc {
            flags: desc.flags | NEXT | available_bits(place),
            ..*desc
        };
        ring.write_slot(&disk.memory, place, &desc)?;
    }
    ring.kick.write(1)?;
    quick_end(&mut disk, &descs)
}

/// Good requests until the place is near the end, then one that goes over it.
pub fn over_the_end(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let mut end = Silent;
    // 128 = 42 * 3 + 2: the 43rd chain begins two before the end.
    for _ in 0..90 {
        end = good(&mut disk)?;
        if end != OK {
            break;
        }
    }
    Ok(end)
}

pub fn as_long_as_the_ring(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let segments: Vec<_> = (0..126).map(|i| (DATA + i * 8192, 4096)).collect();
    let descs = descriptors(&disk, kind::IN, 0, &segments)?;
    offer_other(&mut disk, &descs, &descs)
}

pub fn id(arena: &mut Arena, id: u16) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, id, &descs)?;
    judge(&mut disk, id, &descs)
}

pub fn id_differs(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, 9, &descs)?;
    for index in 0..2 {
        let at = disk.rings[0].slot_addr(START | index) + 12;
        disk.memory.write(at, &[0xff, 0xff])?;
    }
    judge(&mut disk, 9, &descs)
}

pub fn all_used_or_retired(disk: &mut Disk, count: usize) -> Attack {
    disk.publish(0)?;
    let mut end = Used;
    for _ in 0..count {
        end = wait_for_end(disk, None)?;
        if end != Used {
            break;
        }
    }
    probe(disk, 1)?;
    Ok(end)
}

/// A ring full of large reads, and over the first of them, still in flight, the next round's.
pub fn overcommitted(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 1 << 20)])?;
    for id in 0..42 {
        disk.rings[0].offer(&disk.memory, id, &descs)?;
    }
    disk.publish(0)?;
    let ring = &mut disk.rings[0];
    for i in 0..128 {
        let place = advance(ring.next_avail, i, ring.size);
        let desc = Desc {
            flags: available_bits(place) | WRITE,
            next: 100,
            ..descs[2]
        };
        ring.write_slot(&disk.memory, place, &desc)?;
    }
    ring.kick.write(1)?;
    // What was used can't be read from a ring that is written over: only its end can.
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        if disk.rings[0].has_failed(Duration::from_millis(1)) {
            probe(&mut disk, 1)?;
            return Ok(Retired);
        }
    }
    // The large reads were done before: then nothing was written over.
    probe(&mut disk, 1)?;
    Ok(Used)
}

/// Changes the data descriptor of a large read again and again while it is served.
pub fn changed(arena: &mut Arena, change: fn(&mut Desc)) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 1 << 20)])?;
    disk.rings[0].offer(&disk.memory, 3, &descs)?;
    let mut data = Desc {
        flags: descs[1].flags | NEXT | available_bits(START),
        next: 3,
        ..descs[1]
    };
    change(&mut data);
    let watch = Watch::of(
        &disk,
        &[DATA..DATA + (1 << 20), descs[2].addr..descs[2].addr + 1],
    )?;
    disk.rings[0].publish(&disk.memory)?;
    // It is taken when the worker has seen it: soon after the kick, at the latest with its end.
    std::thread::sleep(Duration::from_micros(50));
    disk.rings[0].write_slot(&disk.memory, START | 1, &data)?;
    let end = wait_for_end(&mut disk, None)?;
    watch.compare(&disk)?;
    probe(&mut disk, 1)?;
    Ok(end)
}

/// A driver event structure that says this, with EVENT_IDX.
pub fn event(arena: &mut Arena, off_wrap: u16, flags: u16) -> Attack {
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.features |= feature::EVENT_IDX;
    with_event(arena, &options, off_wrap, flags)
}

/// As [`event`], with the flag for places where it was not negotiated.
pub fn event_unasked(arena: &mut Arena) -> Attack {
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    with_event(arena, &options, 0x1234, 2)
}

fn with_event(arena: &mut Arena, options: &Options, off_wrap: u16, flags: u16) -> Attack {
    let mut disk = arena.attach(options)?;
    for _ in 0..50 {
        let ring = &disk.rings[0];
        disk.memory.store_u16(ring.avail, off_wrap)?;
        disk.memory.store_u16(ring.avail + 2, flags)?;
        let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
        disk.rings[0].offer(&disk.memory, 0, &descs)?;
        disk.rings[0].publish(&disk.memory)?;
        disk.rings[0].kick.write(1)?;
        let end = wait_for_end(&mut disk, Some((0, &descs)))?;
        if end != OK {
            return Ok(end);
        }
    }
    // The structure still works once it is true again.
    probe(&mut disk, 0)?;
    Ok(OK)
}

/// Starts queue 0 with descriptor ring, device and driver event structure where `spoil` puts
/// them (guest addresses).
pub fn started_at(arena: &mut Arena, spoil: fn(&mut [u64; 3])) -> Attack {
    let mut disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    let ring = &mut disk.rings[0];
    let mut at = [ring.desc, ring.used, ring.avail];
    spoil(&mut at);
    [ring.desc, ring.used, ring.avail] = at;
    start_and_try(&mut disk)
}

/// Starts queue 0 and makes a good read of it.
fn start_and_try(disk: &mut Disk) -> Attack {
    match disk.start_queue(0) {
        Ok(()) => {}
        Err(bulkhead_integration::disk::DiskError::Frontend(e)) => return fate(Err(e)),
        Err(other) => return Err(other.into()),
    }
    let descs = descriptors(disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, 0, &descs)?;
    disk.rings[0].publish(&disk.memory)?;
    disk.rings[0].kick.write(1)?;
    wait_for_end(disk, Some((0, &descs)))
}

pub fn sized(arena: &mut Arena, size: u16) -> Attack {
    let options = Options {
        queue_size: size,
        indirect: true,
        ..Options::default()
    };
    let mut disk = arena.negotiate(&options)?;
    disk.share_memory()?;
    match disk.start_queue(0) {
        Ok(()) => {}
        Err(bulkhead_integration::disk::DiskError::Frontend(e)) => return fate(Err(e)),
        Err(other) => return Err(other.into()),
    }
    for _ in 0..10 {
        if disk.read(0, 0, 4096)? != arena.contents[..4096] {
            return Err("the read brought other bytes".into());
        }
    }
    Ok(OK)
}

pub fn base(arena: &mut Arena, base: u32) -> Attack {
    let mut disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    let ring = &disk.rings[0];
    disk.frontend
        .set_vring_state(request::SET_VRING_NUM, 0, u32::from(ring.size))?;
    let set = fate(
        disk.frontend
            .set_vring_state(request::SET_VRING_BASE, 0, base),
    )?;
    if set != Accepted {
        return Ok(set);
    }
    disk.set_addresses(0, ring.desc, ring.used, ring.avail)?;
    match disk.give_events(0).and_then(|()| disk.enable(0)) {
        Ok(()) => {}
        Err(bulkhead_integration::disk::DiskError::Frontend(e)) => return fate(Err(e)),
        Err(other) => return Err(other.into()),
    }
    let place = u16::try_from(base & 0xffff)?;
    let ring = &mut disk.rings[0];
    if place & !WRAP < ring.size {
        (ring.next_avail, ring.last_used) = (place, u16::try_from(base >> 16)?);
    }
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, 0, &descs)?;
    disk.rings[0].publish(&disk.memory)?;
    disk.rings[0].kick.write(1)?;
    wait_for_end(&mut disk, Some((0, &descs)))
}

/// A good request in a table, its descriptors spoilt.
pub fn table(arena: &mut Arena, spoil: fn(&mut [Desc])) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    let mut spoilt = descs.clone();
    spoil(&mut spoilt);
    for desc in &mut spoilt {
        desc.flags &= !INDIRECT;
    }
    let at = Disk::table_addr(0);
    let len = disk.rings[0].write_table(&disk.memory, at, &spoilt)?;
    offer_other(&mut disk, &[Desc::indirect(at, len)], &descs)
}

/// A read whose data goes over the ring: any end, and nothing beyond it.
pub fn into_the_ring(arena: &mut Arena, at: fn(&Disk) -> u64) -> Attack {
    let mut disk = attach(arena)?;
    let target = at(&disk);
    let descs = descriptors(&disk, kind::IN, 0, &[(target, 4096)])?;
    disk.rings[0].offer(&disk.memory, 0, &descs)?;
    spoilt_end(
        &mut disk,
        &[target..target + 4096, descs[2].addr..descs[2].addr + 1],
    )
}

pub fn status_in_the_ring(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let mut descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    descs[2].addr = disk.rings[0].slot_addr(START) + 14;
    disk.rings[0].offer(&disk.memory, 0, &descs)?;
    spoilt_end(&mut disk, &[span(DATA, 4096)])
}

/// Publishes, and waits for whatever end a ring has that was written over.
fn spoilt_end(disk: &mut Disk, rights: &[Range<u64>]) -> Attack {
    let watch = Watch::of(disk, rights)?;
    disk.rings[0].publish(&disk.memory)?;
    disk.rings[0].kick.write(1)?;
    for _ in 0..3 {
        probe(disk, 1)?;
    }
    let mut wide = rights.to_vec();
    wide.push(probe_data());
    watch.compare_but(disk, &wide)?;
    // What a ring that was written over says is used says nothing.
    Ok(if disk.rings[0].has_failed(Duration::ZERO) {
        Retired
    } else {
        Used
    })
}

pub fn two_queues_one_ring(arena: &mut Arena) -> Attack {
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let mut disk = arena.negotiate(&options)?;
    disk.share_memory()?;
    let [first, second] = &mut disk.rings[..] else {
        return Err("two queues".into());
    };
    (second.desc, second.used, second.avail) = (first.desc, first.used, first.avail);
    disk.start_queue(1)?;
    start_and_try(&mut disk)
}

pub fn as_split(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    let ring = &disk.rings[0];
    ring.write_chain(&disk.memory, 0, &descs)?;
    disk.memory.write(ring.avail, &[0, 0, 1, 0, 0, 0])?;
    ring.kick.write(1)?;
    quick_end(&mut disk, &descs)
}
