//! Queues: several requests at once, several queues, stops, indices, calls.

use bulkhead_integration::arena::{Arena, Backend, FILE_BYTES, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, GROUP, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::frontend::message::protocol_feature;
use bulkhead_integration::random::Random;

use crate::support::{Outcome, burst, collect, ensure, first_slot, places, run_of_blocks};

pub fn many_in_flight(arena: &mut Arena, random: &mut Random, features: u64) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut options = Options::default();
    options.features |= features;
    let mut disk = arena.attach(&options)?;
    arena.touch(0..FILE_BYTES);
    for _ in 0..50 {
        let places = places(random, block, 0);
        let data: Vec<_> = places.iter().map(|p| random.bytes(p.2 as usize)).collect();
        for (place, bytes) in places.iter().zip(&data) {
            disk.memory.write(place.1, bytes)?;
        }
        burst(&mut disk, 0, kind::OUT, &places, 0)?;
        for place in &places {
            disk.memory.fill(place.1, place.2 as usize, 0xdd)?;
        }
        burst(&mut disk, 0, kind::IN, &places, 0)?;
        for (place, bytes) in places.iter().zip(&data) {
            ensure(
                disk.memory.read(place.1, place.2 as usize)? == *bytes,
                || format!("sector {} read back differently", place.0),
            )?;
        }
    }
    Ok(())
}

pub fn several_queues(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let options = Options {
        queues: 4,
        ..Options::default()
    };
    let mut disk = arena.attach(&options)?;
    arena.touch(0..FILE_BYTES);
    for _ in 0..20 {
        let lanes: Vec<_> = (0..4).map(|lane| places(random, block, lane)).collect();
        for kind in [kind::OUT, kind::IN] {
            let mut all = Vec::new();
            for (queue, places) in lanes.iter().enumerate() {
                let requests: Vec<_> = places
                    .iter()
                    .map(|&(sector, addr, len)| Request {
                        kind,
                        sector,
                        segments: vec![(addr, len)],
                    })
                    .collect();
                for place in places {
                    let byte = if kind == kind::OUT { place.0 } else { 0xdd };
                    disk.memory
                        .fill(place.1, place.2 as usize, byte.to_le_bytes()[0])?;
                }
                for (request, slot) in requests.iter().zip(first_slot(queue)..) {
                    disk.push(queue, slot, request)?;
                }
                all.push(requests);
            }
            for queue in 0..4 {
                disk.publish(queue)?;
            }
            for (queue, requests) in all.iter().enumerate() {
                collect(&mut disk, queue, requests, first_slot(queue))?;
            }
        }
        for place in lanes.iter().flatten() {
            let byte = place.0.to_le_bytes()[0];
            ensure(
                disk.memory.read(place.1, place.2 as usize)? == vec![byte; place.2 as usize],
                || format!("sector {} read back differently", place.0),
            )?;
        }
    }
    Ok(())
}

pub fn two_at_once(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut a = arena.attach(&Options::default())?;
    let mut b = Disk::attach(&arena.other_socket, &Options::default())?;
    arena.touch(0..FILE_BYTES);
    for _ in 0..50 {
        let (sector, len) = run_of_blocks(random, block, 64, FILE_SECTORS);
        let (left, right) = (random.bytes(len), random.bytes(len));
        a.write(0, sector, &left)?;
        b.write(0, sector, &right)?;
        let len = u32::try_from(len)?;
        ensure(a.read(0, sector, len)? == left, || {
            format!("the first device at sector {sector}")
        })?;
        ensure(b.read(0, sector, len)? == right, || {
            format!("the second device at sector {sector}")
        })?;
    }
    Ok(())
}

pub fn stop_and_restart(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    arena.touch(0..FILE_BYTES);
    let mut requests = 0u16;
    for round in 0..10 {
        let (sector, len) = run_of_blocks(random, block, 16, FILE_SECTORS);
        let bytes = random.bytes(len);
        disk.write(0, sector, &bytes)?;
        requests += 1;
        let base = disk.stop_queue(0)?;
        ensure(base == requests, || {
            format!("round {round}: GET_VRING_BASE said {base}, {requests} were served")
        })?;
        // Offered to a stopped queue: not served before it starts again.
        let request = Request {
            kind: kind::IN,
            sector,
            segments: vec![(DATA, u32::try_from(len)?)],
        };
        disk.memory.fill(DATA, len, 0xdd)?;
        disk.push(0, 0, &request)?;
        disk.publish(0)?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        ensure(disk.rings[0].poll_used(&disk.memory)?.is_none(), || {
            format!("round {round}: a stopped queue served a request")
        })?;
        disk.start_queue(0)?;
        requests += 1;
        collect(&mut disk, 0, &[request], 0)?;
        ensure(disk.memory.read(DATA, len)? == bytes, || {
            format!("round {round}: read back differently")
        })?;
    }
    Ok(())
}

/// GET_VRING_BASE answers when what was taken is done: everything below the base is used.
/// Only ours: `qemu-storage-daemon` 10.0 answers with requests still in flight.
pub fn stop_drains(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    arena.touch(0..FILE_BYTES);
    for round in 0..30 {
        let places = places(random, block, 0);
        let requests: Vec<_> = places
            .iter()
            .map(|&(sector, addr, len)| Request {
                kind: kind::OUT,
                sector,
                segments: vec![(addr, len)],
            })
            .collect();
        for (request, slot) in requests.iter().zip(0..) {
            disk.push(0, slot, request)?;
        }
        disk.publish(0)?;
        let base = disk.stop_queue(0)?;
        let ring = &disk.rings[0];
        let used = disk.memory.load_u16(ring.used + 2)?;
        ensure(used == base, || {
            format!("round {round}: stopped at {base} with {used} used")
        })?;
        let frontend = &disk.frontend;
        frontend.set_vring_state(
            bulkhead_integration::frontend::message::request::SET_VRING_BASE,
            0,
            u32::from(base),
        )?;
        disk.set_addresses(0, ring.desc, ring.used, ring.avail)?;
        disk.give_events(0)?;
        disk.enable(0)?;
        collect(&mut disk, 0, &requests, 0)?;
    }
    Ok(())
}

pub fn index_wraps(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut options = Options::default();
    options.features |= feature::EVENT_IDX;
    let mut disk = arena.attach(&options)?;
    let places: Vec<_> = (0..u64::from(GROUP))
        .map(|i| {
            let len = block * SECTOR_BYTES;
            let sector = random.below(4096) / block * block;
            (sector, DATA + i * len, u32::try_from(len).expect("small"))
        })
        .collect();
    for _ in 0..(66_000 / u32::from(GROUP)) {
        burst(&mut disk, 0, kind::IN, &places, 0)?;
    }
    for &(sector, addr, len) in &places {
        let at = usize::try_from(sector * SECTOR_BYTES)?;
        ensure(
            disk.memory.read(addr, len as usize)? == arena.contents[at..at + len as usize],
            || format!("sector {sector} read differently"),
        )?;
    }
    Ok(())
}

pub fn first_index_near_wrap(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let options = Options::default();
    let mut disk = Disk::negotiate(&arena.socket, &options)?;
    disk.rings[0].rebase(&disk.memory, 0xfffb)?;
    disk.share_memory()?;
    disk.start_queue(0)?;
    for _ in 0..20 {
        let sector = random.below(FILE_SECTORS - 8) / block * block;
        let at = usize::try_from(sector * SECTOR_BYTES)?;
        ensure(
            disk.read(0, sector, 4096)? == arena.contents[at..at + 4096],
            || format!("sector {sector}"),
        )?;
    }
    Ok(())
}

pub fn no_acknowledgements(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut options = Options::default();
    options.protocol_features &= !protocol_feature::REPLY_ACK;
    let mut disk = arena.attach(&options)?;
    arena.touch(0..4096);
    let bytes = random.bytes(4096);
    disk.write(0, 0, &bytes)?;
    ensure(disk.read(0, 0, 4096)? == bytes, || "data".to_owned())
}

/// A driver that polls and wants no calls gets its completions, and few or no calls.
pub fn calls_suppressed(arena: &mut Arena, _: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    let _ = disk.rings[0].call.read();
    disk.rings[0].suppress_calls(&disk.memory)?;
    for _ in 0..100 {
        let request = Request {
            kind: kind::IN,
            sector: 0,
            segments: vec![(DATA, u32::try_from(block * SECTOR_BYTES)?)],
        };
        disk.push(0, 0, &request)?;
        disk.publish(0)?;
        let deadline = std::time::Instant::now() + PATIENCE;
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
    // `virtio-queue`, under the reference, ignores the flag; the specification makes it a hint.
    ensure(calls == 0 || arena.backend == Backend::Reference, || {
        format!("{calls} calls that nobody wanted")
    })
}
