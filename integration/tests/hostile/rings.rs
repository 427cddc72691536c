//! Rings that lie: indexes that jump, heads out of range or twice, addresses and sizes that can't be.

use std::time::Duration;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{
    DATA, Disk, HIGH, HIGH_BYTES, LOW, LOW_BYTES, Options, Request, feature,
};
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::ring::Ring;
use bulkhead_integration::frontend::message::{self, request};

use crate::End::{Accepted, Closed, Refused, Retired, Silent, Status, Used};
use crate::guest::{attach, descriptors, fate, offer_head, probe, wait_for_end};
use crate::{Attack, Case, End};

const JUMP: &str = "the driver broke the ring: the queue retires";
const PLACE: &str = "a ring that is not in guest memory is refused when named or when started";
const SIZE: &str = "virtio 2.7: a queue size is a power of two, at most 32768";
const NUMBER: &str = "there is no such queue";
const GARBAGE: &str = "hints of the driver may cost it notifications, nothing else";

/// The table.
pub const CASES: &[Case] = &[
    Case::split("head_out_of_range", &[Retired], JUMP, |a| head(a, 128)),
    Case::split("head_far_out_of_range", &[Retired], JUMP, |a| {
        head(a, 0xffff)
    }),
    Case::split("avail_jumps_past_queue_size", &[Retired], JUMP, |a| {
        jump(a, 129)
    }),
    Case::split("avail_jumps_half_way_round", &[Retired], JUMP, |a| {
        jump(a, 0x8000)
    }),
    Case::split("avail_goes_back", &[Retired], JUMP, |a| jump(a, 0xffff)),
    Case::split(
        "avail_full_of_the_same_head",
        &[Retired, Used, Status(0)],
        "a head that is in flight can't be offered again; one that is done can",
        |a| twice(a, 128),
    ),
    Case::new(
        "same_head_twice",
        &[Retired, Used, Status(0)],
        "a head that is in flight can't be offered again; one that is done can",
        |a| twice(a, 2),
    ),
    Case::split(
        "base_far_from_avail_index",
        &[Retired, Refused, Closed],
        JUMP,
        base_far_from_avail,
    ),
    Case::new(
        "base_past_u16",
        &[Refused, Closed, Accepted],
        "a split index has 16 bits; a packed base has two halves; a device may cut it",
        |a| vring_state(a, request::SET_VRING_BASE, 0, 0x1_0000),
    ),
    Case::split("garbage_flags_and_events", &[Status(0)], GARBAGE, garbage),
    Case::new(
        "ring_desc_in_hole",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[0] = 0x1000),
    ),
    Case::new(
        "ring_used_in_hole",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[1] = 0x1000),
    ),
    Case::new(
        "ring_avail_in_hole",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[2] = 0x1000),
    ),
    Case::new("ring_desc_wraps", &[Refused, Closed, Retired], PLACE, |a| {
        place(a, |r| r[0] = u64::MAX - 15)
    }),
    Case::new("ring_used_wraps", &[Refused, Closed, Retired], PLACE, |a| {
        place(a, |r| r[1] = u64::MAX - 3)
    }),
    Case::new(
        "ring_desc_leaves_memory",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place_in_high(a, 0, 64),
    ),
    Case::split(
        "ring_used_leaves_memory",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place_in_high(a, 1, 64),
    ),
    Case::split(
        "ring_avail_leaves_memory",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place_in_high(a, 2, 64),
    ),
    Case::new(
        "ring_desc_misaligned",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[0] += 8),
    ),
    Case::new(
        "ring_used_misaligned",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[1] += 2),
    ),
    Case::new(
        "ring_avail_misaligned",
        &[Refused, Closed, Retired],
        PLACE,
        |a| place(a, |r| r[2] += 1),
    ),
    Case::new(
        "rings_over_each_other",
        &[Refused, Closed, Retired, Silent, Used],
        "the guest spoils its own rings",
        |a| place(a, |r| *r = [r[0]; 3]),
    ),
    Case::new("queue_size_zero", &[Refused, Closed], SIZE, |a| {
        vring_state(a, request::SET_VRING_NUM, 0, 0)
    }),
    Case::split("queue_size_three", &[Refused, Closed], SIZE, |a| {
        vring_state(a, request::SET_VRING_NUM, 0, 3)
    }),
    Case::split("queue_size_hundred", &[Refused, Closed], SIZE, |a| {
        vring_state(a, request::SET_VRING_NUM, 0, 100)
    }),
    Case::new("queue_size_past_limit", &[Refused, Closed], SIZE, |a| {
        vring_state(a, request::SET_VRING_NUM, 0, 0x1_0000)
    }),
    Case::new(
        "queue_size_cut_to_a_good_one",
        &[Refused, Closed],
        SIZE,
        |a| vring_state(a, request::SET_VRING_NUM, 0, 0x1_0080),
    ),
    Case::new("queue_size_all_ones", &[Refused, Closed], SIZE, |a| {
        vring_state(a, request::SET_VRING_NUM, 0, u32::MAX)
    }),
    Case::new("queue_number_in_num", &[Refused, Closed], NUMBER, |a| {
        vring_state(a, request::SET_VRING_NUM, 200, 128)
    }),
    Case::new("queue_number_in_base", &[Refused, Closed], NUMBER, |a| {
        vring_state(a, request::SET_VRING_BASE, 2, 0)
    }),
    Case::new("queue_number_in_enable", &[Refused, Closed], NUMBER, |a| {
        vring_state(a, request::SET_VRING_ENABLE, u32::MAX, 1)
    }),
    Case::new(
        "queue_number_in_addresses",
        &[Refused, Closed],
        NUMBER,
        |a| {
            let disk = a.negotiate(&Options::default())?;
            disk.share_memory()?;
            let body = message::vring_addresses(77, 0, 0, 0);
            fate(disk.frontend.set(request::SET_VRING_ADDR, &body, &[]))
        },
    ),
    Case::new("queue_number_in_kick", &[Refused, Closed], NUMBER, |a| {
        let disk = a.negotiate(&Options::default())?;
        fate(
            disk.frontend
                .set_vring_fd(request::SET_VRING_KICK, 255, None),
        )
    }),
    Case::new(
        "queue_number_in_get_base",
        &[Refused, Closed, Accepted],
        NUMBER,
        |a| {
            let disk = a.negotiate(&Options::default())?;
            fate(disk.frontend.get_vring_base(9999).map(drop))
        },
    ),
    Case::new(
        "enable_neither_zero_nor_one",
        &[Refused, Closed, Accepted],
        "the specification names 0 and 1",
        |a| vring_state(a, request::SET_VRING_ENABLE, 0, 2),
    ),
    Case::new(
        "geometry_changed_while_running",
        &[Refused, Closed, Accepted],
        "the geometry of a running ring is fixed: refused, or kept for the next start",
        geometry_changed,
    ),
    Case::new(
        "started_twice",
        &[Refused, Closed, Accepted],
        "a second start of a running queue is refused or changes nothing",
        started_twice,
    ),
];

fn head(arena: &mut Arena, head: u16) -> Attack {
    let mut disk = attach(arena)?;
    offer_head(&mut disk, head, &[])
}

fn jump(arena: &mut Arena, by: u16) -> Attack {
    let mut disk = attach(arena)?;
    // Good requests under every index, so that nothing but the jump is wrong.
    disk.rings[0].write_chain(
        &disk.memory,
        0,
        &descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?,
    )?;
    disk.rings[0].publish_index(&disk.memory, by)?;
    disk.rings[0].kick.write(1)?;
    let end = wait_for_end(&mut disk, None)?;
    probe(&mut disk, 1)?;
    Ok(end)
}

/// The same head `count` times in one batch, a large read.
fn twice(arena: &mut Arena, count: u16) -> Attack {
    let mut disk = attach(arena)?;
    let request = Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 1 << 20)],
    };
    for _ in 0..count {
        disk.push(0, 0, &request)?;
    }
    disk.publish(0)?;
    let mut end = wait_for_end(&mut disk, None)?;
    for _ in 1..count {
        if end != Used {
            break;
        }
        end = wait_for_end(&mut disk, None)?;
    }
    probe(&mut disk, 1)?;
    Ok(end)
}

fn base_far_from_avail(arena: &mut Arena) -> Attack {
    let mut disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    disk.rings[0].last_used = 100;
    if let Err(bulkhead_integration::disk::DiskError::Frontend(e)) = disk.start_queue(0) {
        return fate(Err(e));
    }
    disk.rings[0].last_used = 0;
    disk.rings[0].kick.write(1)?;
    wait_for_end(&mut disk, None)
}

fn garbage(arena: &mut Arena) -> Attack {
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.features |= feature::EVENT_IDX;
    let mut disk = arena.attach(&options)?;
    let ring = &disk.rings[0];
    for (flags, event) in [(0xffff, 0x1234), (1, 0xffff), (0xaaaa, 0x7fff)] {
        disk.memory.store_u16(ring.avail, flags)?;
        disk.memory
            .store_u16(ring.avail + 4 + 2 * u64::from(ring.size), event)?;
        // The device's own fields, which it must not read back.
        disk.memory.store_u16(ring.used, flags)?;
    }
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    disk.rings[0].write_chain(&disk.memory, 0, &descs)?;
    disk.rings[0].push(&disk.memory, 0)?;
    disk.rings[0].publish_index(&disk.memory, 1)?;
    disk.rings[0].kick.write(1)?;
    wait_for_end(&mut disk, Some((0, &descs)))
}

pub fn vring_state(arena: &mut Arena, request: u32, queue: u32, value: u32) -> Attack {
    let disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    fate(disk.frontend.set_vring_state(request, queue, value))
}

/// Starts queue 0 with descriptor table, used ring and avail ring where `spoil` puts them (user
/// addresses), and offers something.
pub fn place(arena: &mut Arena, spoil: fn(&mut [u64; 3])) -> Attack {
    let mut disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    let ring = &disk.rings[0];
    let mut at = [
        disk.memory.user_addr(ring.desc)?,
        disk.memory.user_addr(ring.used)?,
        disk.memory.user_addr(ring.avail)?,
    ];
    spoil(&mut at);
    start_at(&mut disk, at)
}

/// As [`place`], with ring number `which` reaching over the end of memory.
pub fn place_in_high(arena: &mut Arena, which: usize, before_end: u64) -> Attack {
    let mut disk = arena.negotiate(&Options::default())?;
    disk.share_memory()?;
    let ring = &disk.rings[0];
    let mut at = [
        disk.memory.user_addr(ring.desc)?,
        disk.memory.user_addr(ring.used)?,
        disk.memory.user_addr(ring.avail)?,
    ];
    at[which] = disk.memory.user_addr(HIGH)? + HIGH_BYTES - before_end;
    start_at(&mut disk, at)
}

fn start_at(disk: &mut Disk, at: [u64; 3]) -> Attack {
    let frontend = &disk.frontend;
    let body = message::vring_addresses(0, at[0], at[1], at[2]);
    frontend.set_vring_state(request::SET_VRING_NUM, 0, 128)?;
    frontend.set_vring_state(request::SET_VRING_BASE, 0, 0)?;
    let named = fate(frontend.set(request::SET_VRING_ADDR, &body, &[]))?;
    if named != Accepted {
        return Ok(named);
    }
    let started = disk.give_events(0).and_then(|()| disk.enable(0));
    if let Err(bulkhead_integration::disk::DiskError::Frontend(e)) = started {
        return fate(Err(e));
    }
    if disk.rings[0].is_packed() {
        let descs = descriptors(disk, kind::IN, 0, &[(DATA, 4096)])?;
        disk.rings[0].offer(&disk.memory, 0, &descs)?;
        disk.rings[0].publish(&disk.memory)?;
    } else {
        disk.rings[0].publish_index(&disk.memory, 1)?;
    }
    disk.rings[0].kick.write(1)?;
    // A misaligned ring can't be polled from here: only the other ends are told apart.
    wait_for_end(disk, None)
}

/// Another size and other addresses, in memory full of noise, while the queue runs.
fn geometry_changed(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    probe(&mut disk, 0)?;
    let mut ends = vec![fate(disk.frontend.set_vring_state(
        request::SET_VRING_NUM,
        0,
        256,
    ))?];
    if ends[0] != Closed {
        let other = LOW + LOW_BYTES - Ring::SPAN_BYTES;
        let user = disk.memory.user_addr(other)?;
        let body = message::vring_addresses(0, user, user + 0x5000, user + 0x4000);
        ends.push(fate(disk.frontend.set(
            request::SET_VRING_ADDR,
            &body,
            &[],
        ))?);
    }
    let closed = ends.contains(&Closed);
    if !closed {
        std::thread::sleep(Duration::from_millis(10));
        probe(&mut disk, 1)?;
    }
    Ok(if closed { Closed } else { worst(&ends) })
}

fn worst(ends: &[End]) -> End {
    if ends.contains(&Refused) {
        Refused
    } else {
        Accepted
    }
}

fn started_twice(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    probe(&mut disk, 0)?;
    let end = match disk.give_events(0) {
        Ok(()) => Accepted,
        Err(bulkhead_integration::disk::DiskError::Frontend(e)) => fate(Err(e))?,
        Err(other) => return Err(other.into()),
    };
    if end != Closed {
        probe(&mut disk, 0)?;
        probe(&mut disk, 1)?;
    }
    Ok(end)
}
