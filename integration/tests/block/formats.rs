//! What a driver may expect of packed rings, of use in order, and of rings of any size.

use bulkhead_integration::arena::{Arena, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, HIGH, Options, Request, feature};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::random::Random;

use crate::queues::many_in_flight;
use crate::requests::random_io;
use crate::support::{collect, ensure};
use crate::{OURS, Outcome, Test, row};

/// The table; `virtio-queue`, under the reference, and `qemu-storage-daemon` know split rings only.
pub const TESTS: &[Test] = &[
    row("random_io_in_order", 1, OURS, |a, r| {
        random_io(a, r, feature::IN_ORDER, false)
    }),
    row("random_io_packed", 1, OURS, |a, r| {
        random_io(a, r, feature::RING_PACKED, false)
    }),
    row("random_io_packed_event_idx_indirect", 1, OURS, |a, r| {
        random_io(a, r, feature::RING_PACKED | feature::EVENT_IDX, true)
    }),
    row("random_io_packed_in_order", 1, OURS, |a, r| {
        random_io(a, r, feature::RING_PACKED | feature::IN_ORDER, true)
    }),
    row("many_in_flight_in_order", 1, OURS, |a, r| {
        many_in_flight(a, r, feature::IN_ORDER)
    }),
    row("many_in_flight_packed", 1, OURS, |a, r| {
        many_in_flight(a, r, feature::RING_PACKED)
    }),
    row("many_in_flight_packed_event_idx", 1, OURS, |a, r| {
        many_in_flight(a, r, feature::RING_PACKED | feature::EVENT_IDX)
    }),
    row("many_in_flight_packed_in_order", 1, OURS, |a, r| {
        let all = feature::RING_PACKED | feature::IN_ORDER | feature::EVENT_IDX;
        many_in_flight(a, r, all)
    }),
    row("stop_and_restart_packed", 1, OURS, stop_and_restart),
    row("queue_sizes", 1, OURS, |a, _| queue_sizes(a, 0)),
    row("queue_sizes_packed", 1, OURS, |a, _| {
        queue_sizes(a, feature::RING_PACKED)
    }),
    row("calls_suppressed_packed", 1, OURS, calls_suppressed),
];

/// A packed ring goes on at the base that GET_VRING_BASE gave, avail and used place alike, in either
/// round; what was offered to the stopped queue is served then.
fn stop_and_restart(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut options = Options::default();
    options.features |= feature::RING_PACKED;
    let mut disk = arena.attach(&options)?;
    for round in 0..100 {
        let sector = random.below(FILE_SECTORS / 8 - 1) * 8;
        let at = usize::try_from(sector * SECTOR_BYTES)?;
        let expected = arena.contents[at..at + 4096].to_vec();
        ensure(disk.read(0, sector, 4096)? == expected, || {
            format!("round {round}: read differently")
        })?;
        let base = disk.stop_queue_at(0)?;
        ensure(base == disk.rings[0].base(), || {
            let own = disk.rings[0].base();
            format!("round {round}: GET_VRING_BASE said {base:#x}, the ring is at {own:#x}")
        })?;
        // `start_queue` says where the driver is: before this offer.
        let place = disk.rings[0].base();
        let request = Request {
            kind: kind::IN,
            sector,
            segments: vec![(DATA, 4096)],
        };
        disk.memory.fill(DATA, 4096, 0xdd)?;
        disk.push(0, 0, &request)?;
        disk.publish(0)?;
        std::thread::sleep(std::time::Duration::from_millis(2));
        let early = disk.rings[0].poll_used(&disk.memory)?;
        ensure(early.is_none() && place == disk.rings[0].base(), || {
            format!("round {round}: a stopped queue used {early:?}")
        })?;
        disk.start_queue(0)?;
        collect(&mut disk, 0, &[request], 0)?;
        ensure(disk.memory.read(DATA, 4096)? == expected, || {
            format!("round {round}: read differently after the start")
        })?;
    }
    Ok(())
}

/// Rings of every power of two, packed ones of other sizes too, up to the specification's limit.
fn queue_sizes(arena: &mut Arena, features: u64) -> Outcome {
    let mut sizes: Vec<u16> = (0..16).map(|bits| 1 << bits).collect();
    if features & feature::RING_PACKED != 0 {
        sizes.extend([3, 100, 1000, 32767]);
    }
    for size in sizes {
        let mut options = Options {
            queue_size: size,
            indirect: true,
            ..Options::default()
        };
        options.features |= features;
        let mut disk = Disk::negotiate(&arena.socket, &options)?;
        let ring = &mut disk.rings[0];
        // All of the third region, which has room for the largest.
        (ring.desc, ring.avail, ring.used) = (HIGH, HIGH + 0x8_0000, HIGH + 0xa_0000);
        disk.share_memory()?;
        disk.start_queue(0)?;
        for _ in 0..3 * u32::from(size.min(64)) {
            ensure(disk.read(0, 8, 4096)? == arena.contents[4096..8192], || {
                format!("a ring of {size}: read differently")
            })?;
        }
    }
    Ok(())
}

/// A driver of a packed ring that polls and wants no calls gets none.
fn calls_suppressed(arena: &mut Arena, _: &mut Random) -> Outcome {
    let mut options = Options::default();
    options.features |= feature::RING_PACKED;
    let mut disk = arena.attach(&options)?;
    let _ = disk.rings[0].call.read();
    disk.rings[0].suppress_calls(&disk.memory)?;
    for _ in 0..100 {
        let request = Request {
            kind: kind::IN,
            sector: 0,
            segments: vec![(DATA, 4096)],
        };
        disk.push(0, 0, &request)?;
        disk.publish(0)?;
        let deadline = std::time::Instant::now() + bulkhead_integration::disk::PATIENCE;
        let used = loop {
            if let Some(used) = disk.rings[0].poll_used(&disk.memory)? {
                break used;
            }
            ensure(std::time::Instant::now() < deadline, || {
                "nothing used".to_owned()
            })?;
        };
        disk.check(0, &request, used.len)?;
    }
    let calls = disk.rings[0].call.read().unwrap_or(0);
    ensure(calls == 0, || format!("{calls} calls that nobody wanted"))
}
