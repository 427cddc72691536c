//! Packed rings that lie: wrap counters, ids, chains that don't end, descriptors that change after
//! they were taken, event suppression structures full of noise, rings at the edge of memory.

use std::error::Error;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, HIGH, HIGH_BYTES, Options, Request, feature};
use bulkhead_integration::driver::packed::{START, WRAP, advance, available_bits, used_bits};
use bulkhead_integration::driver::ring::{Desc, INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::frontend::message::{self, request};
use bulkhead_integration::frontend::wait_readable;

use crate::End::{Accepted, Closed, Refused, Retired, Silent, Status, Used};
use crate::guest::{
    Watch, after_end, attach, descriptors, fate, judge, offer_other, probe, wait_for_end,
};
use crate::rings::place;
use crate::{Attack, Case, End};

const OK: End = Status(status::OK);
const IOERR: End = Status(status::IOERR);

const ROUND: &str = "2.8.1: a descriptor of another round is not available";
const ID: &str = "an id tells chains apart: a device refuses one that it can't keep, or two alike";
const ENDLESS: &str = "a chain ends within its ring, or the queue retires";
const TAKEN: &str = "a chain is read once: what is written there later changes nothing";
const EVENTS: &str = "hints of the driver may cost it notifications, nothing else";
const PLACE: &str = "a ring that is not in guest memory is refused when named or when started";
const TABLE: &str = "2.8.8: in a table ids, NEXT, AVAIL and USED mean nothing";
const SPOILT: &str = "the guest spoils its own ring";
const BASE: &str = "a base that can't be is refused, or breaks the queue";
const SIZE: &str = "virtio 2.8.10.1: at most 32768 entries; a power of two is not demanded";

/// The table.
pub const CASES: &[Case] = &[
    Case::packed("wrap_counter_of_the_next_round", &[Silent], ROUND, |a| {
        by_hand(a, |place, flags| flags | available_bits(place ^ WRAP))
    }),
    Case::packed("wrap_counter_says_used", &[Silent], ROUND, |a| {
        by_hand(a, |place, flags| flags | used_bits(place))
    }),
    Case::packed("wrap_counter_bits_clear", &[Silent], ROUND, |a| {
        by_hand(a, |_, flags| flags)
    }),
    Case::packed(
        "wrap_counter_changes_inside_a_chain",
        &[Retired, OK, IOERR, Silent],
        "2.8.21: the driver makes the first available last; a device may look at the first only",
        |a| {
            by_hand(a, |place, flags| {
                let first = place & !WRAP == 0;
                flags | available_bits(if first { place } else { place ^ WRAP })
            })
        },
    ),
    Case::packed("available_behind_a_hole", &[Silent], ROUND, behind_a_hole),
    Case::packed("available_everywhere", &[Retired, Used], ENDLESS, |a| {
        everywhere(a, 0)
    }),
    Case::packed(
        "available_everywhere_noise",
        &[Retired, Used],
        ENDLESS,
        |a| everywhere(a, 0xff78),
    ),
    Case::packed("chain_longer_than_its_ring", &[Retired], ENDLESS, |a| {
        everywhere(a, NEXT)
    }),
    Case::packed(
        "chain_longer_than_its_ring_writable",
        &[Retired],
        ENDLESS,
        |a| everywhere(a, NEXT | WRITE),
    ),
    Case::packed(
        "chain_goes_on_where_nothing_is",
        &[Retired, IOERR, Silent],
        ENDLESS,
        unfinished,
    ),
    Case::packed(
        "chain_over_the_end_of_its_ring",
        &[OK],
        "a chain may begin in one round and end in the next",
        over_the_end,
    ),
    Case::packed(
        "chain_as_long_as_its_ring",
        &[OK],
        "2.8.5: a chain may have as many descriptors as its ring",
        as_long_as_the_ring,
    ),
    Case::packed("id_out_of_range", &[Retired, OK], ID, |a| id(a, 128)),
    Case::packed("id_far_out_of_range", &[Retired, OK], ID, |a| id(a, 0xffff)),
    Case::packed("id_top_bit", &[Retired, OK], ID, |a| id(a, 0x8000)),
    Case::packed(
        "id_differs_inside_a_chain",
        &[OK, Retired],
        "2.8.6: the id stands in the last descriptor; the others' are reserved",
        id_differs,
    ),
    Case::packed("id_in_flight_many_times", &[Retired, Used], ID, |a| {
        let mut disk = attach(a)?;
        for _ in 0..40 {
            disk.push(0, 0, &large_read())?;
        }
        all_used_or_retired(&mut disk, 40)
    }),
    Case::packed(
        "more_offered_than_the_ring_has",
        &[Retired, Used],
        "2.8.21: a driver may not overwrite descriptors that are in flight",
        overcommitted,
    ),
    Case::packed(
        "address_changed_after_taken",
        &[Retired, Used],
        TAKEN,
        |a| changed(a, |desc| desc.addr = 0x1000),
    ),
    Case::packed("length_changed_after_taken", &[Retired, Used], TAKEN, |a| {
        changed(a, |desc| desc.len = u32::MAX)
    }),
    Case::packed("flags_changed_after_taken", &[Retired, Used], TAKEN, |a| {
        changed(a, |desc| desc.flags ^= WRITE | NEXT | INDIRECT)
    }),
    Case::packed("id_changed_after_taken", &[Retired, Used], TAKEN, |a| {
        changed(a, |desc| desc.next = 77)
    }),
    Case::packed("flags_used_after_taken", &[Retired, Used], TAKEN, |a| {
        changed(a, |desc| desc.flags |= used_bits(START))
    }),
    Case::packed("event_flags_reserved", &[OK], EVENTS, |a| event(a, 0, 3)),
    Case::packed("event_flags_all_ones", &[OK], EVENTS, |a| {
        event(a, 0xffff, 0xffff)
    }),
    Case::packed("event_disabled", &[OK], EVENTS, |a| event(a, 0, 1)),
    Case::packed("event_at_a_place_behind", &[OK], EVENTS, |a| {
        event(a, 127, 2)
    }),
    Case::packed("event_at_a_place_that_is_not", &[OK], EVENTS, |a| {
        event(a, 0x7fff, 2)
    }),
    Case::packed("event_wrap_counter_lies", &[OK], EVENTS, |a| event(a, 3, 2)),
    Case::packed("event_flags_not_negotiated", &[OK], EVENTS, event_unasked),
    Case::packed(
        "device_event_overwritten",
        &[OK],
        "the device does not read its own structure back",
        |a| {
            let mut disk = attach(a)?;
            let used = disk.rings[0].used;
            // Its flags still say that kicks are wanted.
            disk.memory.write(used, &[0xa4; 4])?;
            good(&mut disk)
        },
    ),
    Case::packed(
        "event_structures_over_each_other",
        &[OK, Refused, Closed],
        SPOILT,
        |a| started_at(a, |ring| ring[1] = ring[2]),
    ),
    Case::packed(
        "event_structures_over_the_ring",
        &[OK, IOERR, Refused, Closed, Retired, Silent, Used],
        SPOILT,
        |a| started_at(a, |ring| *ring = [ring[0]; 3]),
    ),
    Case::packed("ring_ends_with_memory", &[OK], "it is inside", |a| {
        started_at(a, |ring| ring[0] = HIGH + HIGH_BYTES - 128 * 16)
    }),
    Case::packed("events_end_with_memory", &[OK], "they are inside", |a| {
        started_at(a, |ring| {
            ring[1] = HIGH + HIGH_BYTES - 4;
            ring[2] = HIGH + HIGH_BYTES - 8;
        })
    }),
    Case::packed(
        "ring_one_descriptor_too_far",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |user| user[0] += 15 * 0x10_0000_0000),
    ),
    Case::packed(
        "device_event_misaligned",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |user| user[1] += 1),
    ),
    Case::packed(
        "driver_event_misaligned",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |user| user[2] += 2),
    ),
    Case::packed(
        "device_event_in_hole",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |user| user[1] = u64::MAX - 3),
    ),
    Case::packed("size_three", &[OK, Refused, Closed], SIZE, |a| sized(a, 3)),
    Case::packed("size_hundred", &[OK, Refused, Closed], SIZE, |a| {
        sized(a, 100)
    }),
    Case::packed("size_one", &[OK], SIZE, |a| sized(a, 1)),
    Case::packed("size_past_the_limit", &[Refused, Closed], SIZE, |a| {
        let disk = a.negotiate(&Options::default())?;
        fate(
            disk.frontend
                .set_vring_state(request::SET_VRING_NUM, 0, 32769),
        )
    }),
    Case::packed(
        "base_outside_the_ring",
        &[Refused, Closed, Retired],
        BASE,
        |a| base(a, 0x80c8_80c8),
    ),
    Case::packed("base_all_ones", &[Refused, Closed, Retired], BASE, |a| {
        base(a, u32::MAX)
    }),
    Case::packed(
        "base_halves_that_differ",
        &[OK, Refused, Closed, Retired, Silent, Used],
        BASE,
        |a| base(a, 0x8003_8000),
    ),
    Case::packed(
        "base_in_the_second_round",
        &[OK],
        "a ring may start anywhere, also with the wrap counter at 0",
        |a| base(a, 0x0005_0005),
    ),
    Case::packed("table_with_noise_in_its_flags", &[OK], TABLE, |a| {
        table(a, |descs| {
            for desc in descs {
                desc.flags |= 0xff78;
                desc.next = 0xffff;
            }
        })
    }),
    Case::packed("table_with_next_flags", &[OK], TABLE, |a| {
        table(a, |descs| {
            for desc in descs {
                desc.flags |= NEXT;
            }
        })
    }),
    Case::packed(
        "table_inside_the_ring",
        &[OK, IOERR, Retired, Used],
        SPOILT,
        |a| {
            let mut disk = attach(a)?;
            let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
            let at = disk.rings[0].desc + 64 * 16;
            let len = disk.rings[0].write_table(&disk.memory, at, &descs)?;
            offer_other(&mut disk, &[Desc::indirect(at, len)], &descs)
        },
    ),
    Case::packed(
        "table_is_the_ring",
        &[OK, IOERR, Retired, Used],
        SPOILT,
        |a| {
            let mut disk = attach(a)?;
            let at = disk.rings[0].desc;
            offer_other(&mut disk, &[Desc::indirect(at, 48)], &[])
        },
    ),
    Case::packed(
        "read_into_the_ring",
        &[OK, IOERR, Retired, Used, Silent],
        SPOILT,
        |a| into_the_ring(a, |disk| disk.rings[0].desc),
    ),
    Case::packed(
        "read_over_the_event_structures",
        &[OK, IOERR, Retired, Used, Silent],
        SPOILT,
        |a| into_the_ring(a, |disk| disk.rings[0].used),
    ),
    Case::packed(
        "status_in_its_own_descriptor",
        &[OK, IOERR, Retired, Used, Silent],
        SPOILT,
        status_in_the_ring,
    ),
    Case::packed(
        "ring_of_the_other_queue",
        &[OK, IOERR, Retired, Used, Silent, Refused, Closed],
        SPOILT,
        two_queues_one_ring,
    ),
    Case::packed(
        "driven_as_a_split_ring",
        &[Silent, Retired, Used],
        "a driver that forgot what it negotiated",
        as_split,
    ),
    Case::packed(
        "format_changed_while_running",
        &[Refused, Closed],
        "features are fixed while a queue runs",
        |a| {
            let disk = attach(a)?;
            let other = disk.features & !feature::RING_PACKED;
            let body = message::words(&[other]);
            fate(disk.frontend.set(request::SET_FEATURES, &body, &[]))
        },
    ),
    Case::packed(
        "place_of_the_ring_changed_while_running",
        &[Refused, Closed, Accepted],
        "the geometry of a running ring is fixed: refused, or kept for the next start",
        |a| {
            let mut disk = attach(a)?;
            probe(&mut disk, 0)?;
            let ring = &disk.rings[0];
            let moved = disk.set_addresses(0, ring.desc + 0x1000, ring.used, ring.avail);
            let end = match moved {
                Ok(()) => Accepted,
                Err(bulkhead_integration::disk::DiskError::Frontend(e)) => fate(Err(e))?,
                Err(other) => return Err(other.into()),
            };
            if end != Closed {
                probe(&mut disk, 0)?;
            }
            Ok(end)
        },
    ),
];

fn large_read() -> Request {
    Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 1 << 20)],
    }
}

/// A good read through queue 0, from offer to end.
fn good(disk: &mut Disk) -> Attack {
    let descs = descriptors(disk, kind::IN, 0, &[(DATA, 4096)])?;
    offer_other(disk, &descs, &descs)
}

/// A good chain written by hand, with the AVAIL and USED bits that `bits` adds at each place.
fn by_hand(arena: &mut Arena, bits: fn(u16, u16) -> u16) -> Attack {
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

fn behind_a_hole(arena: &mut Arena) -> Attack {
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
fn everywhere(arena: &mut Arena, flags: u16) -> Attack {
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
fn unfinished(arena: &mut Arena) -> Attack {
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
fn over_the_end(arena: &mut Arena) -> Attack {
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

fn as_long_as_the_ring(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let segments: Vec<_> = (0..126).map(|i| (DATA + i * 8192, 4096)).collect();
    let descs = descriptors(&disk, kind::IN, 0, &segments)?;
    offer_other(&mut disk, &descs, &descs)
}

fn id(arena: &mut Arena, id: u16) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, id, &descs)?;
    judge(&mut disk, id, &descs)
}

fn id_differs(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].offer(&disk.memory, 9, &descs)?;
    for index in 0..2 {
        let at = disk.rings[0].slot_addr(START | index) + 12;
        disk.memory.write(at, &[0xff, 0xff])?;
    }
    judge(&mut disk, 9, &descs)
}

fn all_used_or_retired(disk: &mut Disk, count: usize) -> Attack {
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
fn overcommitted(arena: &mut Arena) -> Attack {
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
fn changed(arena: &mut Arena, change: fn(&mut Desc)) -> Attack {
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
fn event(arena: &mut Arena, off_wrap: u16, flags: u16) -> Attack {
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.features |= feature::EVENT_IDX;
    with_event(arena, &options, off_wrap, flags)
}

/// As [`event`], with the flag for places where it was not negotiated.
fn event_unasked(arena: &mut Arena) -> Attack {
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
fn started_at(arena: &mut Arena, spoil: fn(&mut [u64; 3])) -> Attack {
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

fn sized(arena: &mut Arena, size: u16) -> Attack {
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

fn base(arena: &mut Arena, base: u32) -> Attack {
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
fn table(arena: &mut Arena, spoil: fn(&mut [Desc])) -> Attack {
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
fn into_the_ring(arena: &mut Arena, at: fn(&Disk) -> u64) -> Attack {
    let mut disk = attach(arena)?;
    let target = at(&disk);
    let descs = descriptors(&disk, kind::IN, 0, &[(target, 4096)])?;
    disk.rings[0].offer(&disk.memory, 0, &descs)?;
    spoilt_end(
        &mut disk,
        &[target..target + 4096, descs[2].addr..descs[2].addr + 1],
    )
}

fn status_in_the_ring(arena: &mut Arena) -> Attack {
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
    if disk.rings[0].has_failed(Duration::ZERO) {
        after_end(disk, Retired)?;
        return Ok(Retired);
    }
    Ok(Used)
}

fn two_queues_one_ring(arena: &mut Arena) -> Attack {
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

fn as_split(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    let ring = &disk.rings[0];
    ring.write_chain(&disk.memory, 0, &descs)?;
    disk.memory.write(ring.avail, &[0, 0, 1, 0, 0, 0])?;
    ring.kick.write(1)?;
    quick_end(&mut disk, &descs)
}
