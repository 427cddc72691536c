//! `block_*`: what a well-behaved driver may expect of a disk, from every backend.
//!
//! Each row of [`TESTS`] runs against `serve` in its forms and, where installed, against
//! `qemu-storage-daemon`, which shows that frontend and driver here follow the specification.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;

use bulkhead_integration::arena::{Arena, Backend, FILE_BYTES, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, GROUP, HIGH, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::frontend::message::protocol_feature;
use bulkhead_integration::processes::installed;
use bulkhead_integration::random::Random;
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Box<dyn Error>>;

/// A test of the table.
struct Test {
    name: &'static str,
    queues: u16,
    backends: &'static [Backend],
    run: fn(&mut Arena, &mut Random) -> Outcome,
}

const ALL: &[Backend] = &[
    Backend::Plain,
    Backend::Xts(512),
    Backend::Xts(4096),
    Backend::Reference,
    Backend::Qemu,
];
/// Ours.
const OURS: &[Backend] = &[Backend::Plain, Backend::Xts(512), Backend::Xts(4096)];
/// `serve --reference` is a baseline for speed and for well-formed requests, no more.
const NOT_REFERENCE: &[Backend] = &[
    Backend::Plain,
    Backend::Xts(512),
    Backend::Xts(4096),
    Backend::Qemu,
];

const TESTS: &[Test] = &[
    row("random_io", 1, ALL, |a, r| random_io(a, r, 0, false)),
    row("random_io_event_idx", 1, ALL, |a, r| {
        random_io(a, r, feature::EVENT_IDX, false)
    }),
    row("random_io_indirect", 1, ALL, |a, r| {
        random_io(a, r, 0, true)
    }),
    row("random_io_event_idx_indirect", 1, ALL, |a, r| {
        random_io(a, r, feature::EVENT_IDX, true)
    }),
    row("random_io_memory_disk", 1, ALL, random_io_memory),
    row("many_in_flight", 1, ALL, |a, r| many_in_flight(a, r, 0)),
    row("many_in_flight_event_idx", 1, ALL, |a, r| {
        many_in_flight(a, r, feature::EVENT_IDX)
    }),
    row("several_queues", 4, ALL, several_queues),
    row("several_devices_queues_at_once", 2, ALL, two_at_once),
    row("unaligned_segments", 1, ALL, unaligned_segments),
    row("many_segments", 1, OURS, many_segments),
    row("flush", 1, ALL, flush),
    row("get_id", 1, ALL, get_id),
    row("config_space", 1, NOT_REFERENCE, config_space),
    row("stop_and_restart", 1, ALL, stop_and_restart),
    row("stop_drains", 1, OURS, stop_drains),
    row("index_wraps", 1, ALL, index_wraps),
    row("first_index_near_wrap", 1, ALL, first_index_near_wrap),
    row("no_acknowledgements", 1, ALL, no_acknowledgements),
    row("calls_suppressed", 1, ALL, calls_suppressed),
    row("reconnect_keeps_data", 1, ALL, reconnect_keeps_data),
    row("file_holds_what_was_written", 1, ALL, file_bytes),
];

const fn row(
    name: &'static str,
    queues: u16,
    backends: &'static [Backend],
    run: fn(&mut Arena, &mut Random) -> Outcome,
) -> Test {
    Test {
        name,
        queues,
        backends,
        run,
    }
}

fn main() {
    let args = Arguments::from_args();
    let qemu = installed("qemu-storage-daemon").is_some();
    let mut trials = Vec::new();
    for test in TESTS {
        for &backend in test.backends {
            let name = format!("block_{}_{}", test.name, label(backend));
            let skipped = backend == Backend::Qemu && !qemu;
            let trial = Trial::test(name.clone(), move || trial(test, backend, &name));
            trials.push(trial.with_ignored_flag(skipped));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn label(backend: Backend) -> String {
    match backend {
        Backend::Plain => "plain".to_owned(),
        Backend::Xts(unit) => format!("xts{unit}"),
        Backend::Reference => "reference".to_owned(),
        Backend::Qemu => "qemu".to_owned(),
    }
}

fn trial(test: &Test, backend: Backend, name: &str) -> Result<(), Failed> {
    let mut arena = Arena::start(backend, test.queues, name)?;
    let mut random = Random::named(name);
    (test.run)(&mut arena, &mut random)
        .map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    Ok(arena.check()?)
}

fn ensure(holds: bool, what: impl Fn() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}

/// A run of whole logical blocks of `block` sectors, of at most `most` sectors: first sector
/// and bytes.
fn run_of_blocks(random: &mut Random, block: u64, most: u64, sectors: u64) -> (u64, usize) {
    let count = (1 + random.below(most)).next_multiple_of(block);
    let sector = random.below(sectors - count) / block * block;
    (
        sector,
        usize::try_from(count * SECTOR_BYTES).expect("small"),
    )
}

/// Cuts `len` bytes into 1 to 6 segments of whole sectors, apart from each other.
fn segments(random: &mut Random, base: u64, len: usize) -> Vec<(u64, u32)> {
    let mut left = u32::try_from(len).expect("small") / 512;
    let mut at = base;
    let mut list = Vec::new();
    while left > 0 {
        let count = if list.len() == 5 {
            left
        } else {
            1 + u32::try_from(random.below(u64::from(left))).expect("small")
        };
        list.push((at, count * 512));
        at += u64::from(count) * 512 + random.below(4) * 512;
        left -= count;
    }
    list
}

fn scatter(disk: &Disk, list: &[(u64, u32)], bytes: &[u8]) -> Outcome {
    let mut at = 0;
    for &(addr, len) in list {
        disk.memory.write(addr, &bytes[at..at + len as usize])?;
        at += len as usize;
    }
    Ok(())
}

fn gather(disk: &Disk, list: &[(u64, u32)]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = Vec::new();
    for &(addr, len) in list {
        bytes.extend(disk.memory.read(addr, len as usize)?);
    }
    Ok(bytes)
}

/// Reads and writes at random against a shadow copy.
fn against_shadow(
    disk: &mut Disk,
    random: &mut Random,
    block: u64,
    shadow: &mut [u8],
    rounds: usize,
) -> Outcome {
    let sectors = shadow.len() as u64 / SECTOR_BYTES;
    for round in 0..rounds {
        let (sector, len) = run_of_blocks(random, block, 200, sectors);
        let at = usize::try_from(sector * SECTOR_BYTES)?;
        let segments = segments(random, DATA, len);
        let mut request = Request {
            kind: kind::OUT,
            sector,
            segments,
        };
        if random.below(2) == 0 {
            let bytes = random.bytes(len);
            scatter(disk, &request.segments, &bytes)?;
            disk.run(0, &request)?;
            shadow[at..at + len].copy_from_slice(&bytes);
        } else {
            request.kind = kind::IN;
            for &(addr, len) in &request.segments {
                disk.memory.fill(addr, len as usize, 0xdd)?;
            }
            disk.run(0, &request)?;
            ensure(
                gather(disk, &request.segments)? == shadow[at..at + len],
                || format!("round {round}: sector {sector}, {len} bytes read back differently"),
            )?;
        }
    }
    Ok(())
}

fn random_io(arena: &mut Arena, random: &mut Random, features: u64, indirect: bool) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut options = Options::default();
    options.features |= features;
    options.indirect = indirect;
    let mut disk = arena.attach(&options)?;
    ensure(disk.features & features == features, || {
        format!("features {features:#x} are not offered")
    })?;
    let mut shadow = arena.contents.clone();
    against_shadow(&mut disk, random, block, &mut shadow, 200)?;
    disk.flush(0)?;
    arena.contents = shadow;
    arena.touch(0..FILE_BYTES);
    // `touch` frees the file from comparison; the contents are compared here instead.
    let all = disk.read_all(FILE_SECTORS)?;
    ensure(all == arena.contents, || {
        "the whole disk reads back differently".to_owned()
    })
}

fn random_io_memory(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = Disk::attach(&arena.other_socket, &Options::default())?;
    let sectors = disk.capacity_sectors()?;
    ensure(sectors == 131_072, || format!("{sectors} sectors"))?;
    let mut shadow = disk.read_all(8192)?;
    against_shadow(&mut disk, random, block, &mut shadow, 200)
}

/// Fills a group of slots at once, eight different places, and checks each completion once.
fn burst(
    disk: &mut Disk,
    queue: usize,
    kind: u32,
    places: &[(u64, u64, u32)],
    first_slot: u16,
) -> Outcome {
    let requests: Vec<_> = places
        .iter()
        .map(|&(sector, addr, len)| Request {
            kind,
            sector,
            segments: vec![(addr, len)],
        })
        .collect();
    for (request, slot) in requests.iter().zip(first_slot..) {
        disk.push(queue, slot, request)?;
    }
    disk.publish(queue)?;
    collect(disk, queue, &requests, first_slot)
}

fn collect(disk: &mut Disk, queue: usize, requests: &[Request], first_slot: u16) -> Outcome {
    let mut open: BTreeSet<u16> = (first_slot..).take(requests.len()).collect();
    while !open.is_empty() {
        let used = disk.rings[queue].wait_used(&disk.memory, PATIENCE)?;
        let slot = open
            .iter()
            .copied()
            .find(|&slot| u32::from(Disk::head(slot)) == used.id)
            .ok_or_else(|| format!("head {} was used and not in flight", used.id))?;
        open.remove(&slot);
        let request = &requests[usize::from(slot - first_slot)];
        disk.check(slot, request, used.len)?;
    }
    Ok(())
}

/// Eight places in memory and on disk that don't overlap.
fn places(random: &mut Random, block: u64, lane: u64) -> Vec<(u64, u64, u32)> {
    (0..u64::from(GROUP))
        .map(|i| {
            let sectors = (1 + random.below(32)).next_multiple_of(block);
            let len = u32::try_from(sectors * SECTOR_BYTES).expect("small");
            let sector = lane * 512 + i * 64 + random.below(32) / block * block;
            (sector, DATA + lane * 0x10_0000 + i * 0x8000, len)
        })
        .collect()
}

fn many_in_flight(arena: &mut Arena, random: &mut Random, features: u64) -> Outcome {
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

fn several_queues(arena: &mut Arena, random: &mut Random) -> Outcome {
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

fn first_slot(queue: usize) -> u16 {
    GROUP * u16::try_from(queue).expect("few queues")
}

fn two_at_once(arena: &mut Arena, random: &mut Random) -> Outcome {
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

/// Segments at odd addresses and of odd lengths, whole sectors only in their sum.
fn unaligned_segments(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    arena.touch(0..FILE_BYTES);
    for round in 0..100 {
        let (sector, len) = run_of_blocks(random, block, 40, FILE_SECTORS);
        let mut list = Vec::new();
        let (mut left, mut at) = (len, DATA);
        while left > 0 {
            let piece = if list.len() == 7 {
                left
            } else {
                1 + random.index(left)
            };
            at += random.below(9);
            list.push((at, u32::try_from(piece)?));
            at += piece as u64;
            left -= piece;
        }
        let bytes = random.bytes(len);
        scatter(&disk, &list, &bytes)?;
        let mut request = Request {
            kind: kind::OUT,
            sector,
            segments: list,
        };
        disk.run(0, &request)?;
        for &(addr, len) in &request.segments {
            disk.memory.fill(addr, len as usize, 0xdd)?;
        }
        request.kind = kind::IN;
        disk.run(0, &request)?;
        ensure(gather(&disk, &request.segments)? == bytes, || {
            format!("round {round}: {request:?} read back differently")
        })?;
        let aligned = disk.read(0, sector, u32::try_from(len)?)?;
        ensure(aligned == bytes, || {
            format!("round {round}: an aligned read of sector {sector} differs")
        })?;
    }
    Ok(())
}

/// As many segments as the device says it takes, in both memory files.
fn many_segments(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    let seg_max = disk.frontend.get_config(12, 4)?;
    let seg_max = u32::from_le_bytes(seg_max.try_into().unwrap_or_default());
    ensure(
        disk.features & feature::BLK_SEG_MAX != 0 && seg_max > 0,
        || "SEG_MAX is not offered".to_owned(),
    )?;
    let count = u64::from(seg_max.min(126));
    let bytes_each = u32::try_from(block * SECTOR_BYTES)?;
    let list: Vec<_> = (0..count)
        .map(|i| {
            if i % 2 == 0 {
                (DATA + i * 4096, bytes_each)
            } else {
                (HIGH + i * 4096, bytes_each)
            }
        })
        .collect();
    let bytes = random.bytes(usize::try_from(count * u64::from(bytes_each))?);
    scatter(&disk, &list, &bytes)?;
    arena.touch(0..bytes.len());
    let mut request = Request {
        kind: kind::OUT,
        sector: 0,
        segments: list,
    };
    disk.run(0, &request)?;
    request.kind = kind::IN;
    for &(addr, len) in &request.segments {
        disk.memory.fill(addr, len as usize, 0xdd)?;
    }
    disk.run(0, &request)?;
    ensure(gather(&disk, &request.segments)? == bytes, || {
        format!("{count} segments read back differently")
    })
}

fn flush(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    ensure(disk.features & feature::BLK_FLUSH != 0, || {
        "FLUSH is not offered".to_owned()
    })?;
    arena.touch(0..4096);
    for _ in 0..10 {
        disk.write(0, 0, &random.bytes(4096))?;
        disk.flush(0)?;
    }
    Ok(())
}

fn get_id(arena: &mut Arena, _: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    let id = disk.id(0)?;
    let text = id.iter().position(|b| *b == 0).unwrap_or(id.len());
    ensure(
        id[..text].iter().all(u8::is_ascii_graphic) && id[text..].iter().all(|b| *b == 0),
        || format!("the id is not text and zeroes: {id:?}"),
    )
}

/// Reads of up to 256 bytes at any offset: the same bytes, zeroes behind them.
fn config_space(arena: &mut Arena, _: &mut Random) -> Outcome {
    let disk = arena.attach(&Options::default())?;
    ensure(disk.capacity_sectors()? == FILE_SECTORS, || {
        "capacity".to_owned()
    })?;
    if arena.backend == Backend::Qemu {
        return Ok(());
    }
    let all = disk.frontend.get_config(0, 256)?;
    for (offset, size) in [
        (0, 60),
        (8, 8),
        (20, 4),
        (34, 2),
        (0, 1),
        (200, 56),
        (255, 1),
    ] {
        let part = disk.frontend.get_config(offset, size)?;
        let (from, to) = (offset as usize, (offset + size) as usize);
        ensure(part == all[from..to], || {
            format!("{size} bytes at {offset} differ from those of the whole")
        })?;
    }
    ensure(all[100..].iter().all(|b| *b == 0), || {
        "what follows the configuration is not zero".to_owned()
    })
}

fn stop_and_restart(arena: &mut Arena, random: &mut Random) -> Outcome {
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
fn stop_drains(arena: &mut Arena, random: &mut Random) -> Outcome {
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

fn index_wraps(arena: &mut Arena, random: &mut Random) -> Outcome {
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

fn first_index_near_wrap(arena: &mut Arena, random: &mut Random) -> Outcome {
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

fn no_acknowledgements(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut options = Options::default();
    options.protocol_features &= !protocol_feature::REPLY_ACK;
    let mut disk = arena.attach(&options)?;
    arena.touch(0..4096);
    let bytes = random.bytes(4096);
    disk.write(0, 0, &bytes)?;
    ensure(disk.read(0, 0, 4096)? == bytes, || "data".to_owned())
}

/// A driver that polls and wants no calls gets its completions, and few or no calls.
fn calls_suppressed(arena: &mut Arena, _: &mut Random) -> Outcome {
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

fn reconnect_keeps_data(arena: &mut Arena, random: &mut Random) -> Outcome {
    let bytes = random.bytes(64 << 10);
    arena.touch(0..bytes.len());
    for _ in 0..5 {
        let mut disk = arena.attach(&Options::default())?;
        disk.write(0, 0, &bytes)?;
        drop(disk);
        let mut disk = arena.attach(&Options::default())?;
        let back = disk.read(0, 0, u32::try_from(bytes.len())?)?;
        ensure(back == bytes, || "the data is gone".to_owned())?;
    }
    arena.contents[..bytes.len()].copy_from_slice(&bytes);
    Ok(())
}

/// Plain: the file holds the bytes. Encrypted: none of them, and equal sectors differ.
fn file_bytes(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    let bytes = random.bytes(4096).repeat(16);
    arena.touch(0..bytes.len());
    disk.write(0, 0, &bytes)?;
    disk.flush(0)?;
    let file = fs::read(&arena.file)?;
    let file = &file[..bytes.len()];
    if !matches!(arena.backend, Backend::Xts(_)) {
        return ensure(file == bytes, || "the file differs".to_owned());
    }
    let plain: BTreeSet<&[u8]> = bytes.chunks_exact(16).collect();
    let cipher: BTreeSet<&[u8]> = file.chunks_exact(16).collect();
    ensure(plain.is_disjoint(&cipher), || {
        "plaintext in the file".to_owned()
    })?;
    ensure(cipher.len() == file.len() / 16, || {
        "equal plaintext blocks make equal ciphertext blocks".to_owned()
    })
}
