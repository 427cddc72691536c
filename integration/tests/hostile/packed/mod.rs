//! Packed rings that lie: wrap counters, ids, chains that don't end, descriptors that change after
//! they were taken, event suppression structures full of noise, rings at the edge of memory.

mod attacks;

use bulkhead_integration::disk::{DATA, HIGH, HIGH_BYTES, Options, feature};
use bulkhead_integration::driver::packed::{START, WRAP, available_bits, used_bits};
use bulkhead_integration::driver::ring::{Desc, INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::frontend::message::{self, request};

use crate::End::{Accepted, Closed, Refused, Retired, Silent, Status, Used};
use crate::guest::{attach, descriptors, fate, offer_other, probe};
use crate::rings::place;
use crate::{Case, End};
use attacks::{
    all_used_or_retired, as_long_as_the_ring, as_split, base, behind_a_hole, by_hand, changed,
    event, event_unasked, everywhere, good, id, id_differs, into_the_ring, large_read,
    over_the_end, overcommitted, sized, started_at, status_in_the_ring, table, two_queues_one_ring,
    unfinished,
};

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
