//! Queues are moved from worker to worker all the time (`serve --shuffle`) while two of them are under
//! verified load: no request is lost or done twice, no kick and no call either, and what the frontend says
//! in between holds: memory tables, eventfds, SET_VRING_ENABLE, stops, the end of the connection.
//!
//! A round is a move. Each life of the connection negotiates something else.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};

use bulkhead_integration::arena::{Arena, FILE_BYTES};
use bulkhead_integration::disk::{DATA, Disk, GROUP, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::message::{Inflight, protocol_feature, request};
use bulkhead_integration::random::Random;

use crate::Outcome;

/// Both of the connection.
const QUEUES: u16 = 2;
/// What the load overwrites: from here on.
const FIRST_BYTE: usize = FILE_BYTES / 2;
/// Each slot has so many bytes of the disk for itself, and of guest memory.
const SLOT_BYTES: usize = FILE_BYTES / 2 / (QUEUES * GROUP) as usize;
const BLOCK_BYTES: usize = 4096;
/// Groups of requests in one life of the connection.
const GROUPS: u64 = 24;

/// At least so many moves.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    arena.touch(FIRST_BYTE..FILE_BYTES);
    let (mut done, mut lives, mut interruptions) = (0, 0u64, [0u64; 6]);
    while moves(arena) < rounds {
        lives += 1;
        let mut disk = attach(arena, random)?;
        for _ in 0..1 + random.below(GROUPS) {
            done += group(arena, &mut disk, random, &mut interruptions)
                .map_err(|e| format!("life {lives}, after {done} requests: {e}"))?;
        }
        if random.below(2) == 0 {
            leave_in_flight(&mut disk, random)?;
        }
    }
    // What was acknowledged is there, for the next connection.
    let mut disk = arena.attach(&Options::default())?;
    let sectors = (FILE_BYTES / 512) as u64;
    if disk.read_all(sectors)? != arena.contents {
        return Err("the disk does not hold what was written".into());
    }
    let moves = moves(arena);
    Ok(format!(
        "{moves} moves, {done} requests in {lives} lives, {interruptions:?} interruptions"
    ))
}

/// How many there were, as `serve` says every hundred.
fn moves(arena: &Arena) -> u64 {
    let log = arena.process.log();
    let counts = log.rsplit("queues moved ").next();
    let count = counts.and_then(|text| text.split(' ').next());
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn attach(arena: &Arena, random: &mut Random) -> Result<Disk, Box<dyn Error>> {
    let mut options = Options {
        queues: QUEUES,
        indirect: random.below(2) == 0,
        ..Options::default()
    };
    for feature in [feature::EVENT_IDX, feature::IN_ORDER] {
        options.features |= feature * random.below(2);
    }
    options.protocol_features |= protocol_feature::INFLIGHT_SHMFD;
    let disk = arena.negotiate(&options)?;
    if random.below(2) == 0 {
        let asked = Inflight::question(QUEUES, options.queue_size);
        let (region, fd) = disk.frontend.get_inflight(&asked)?;
        let set = request::SET_INFLIGHT_FD;
        disk.frontend.set(set, &region.body(), &[fd.as_fd()])?;
    }
    disk.share_memory()?;
    for queue in 0..usize::from(QUEUES) {
        disk.start_queue(queue)?;
    }
    Ok(disk)
}

/// Eight requests on each queue, something said in between, and all that has to come of it.
fn group(
    arena: &mut Arena,
    disk: &mut Disk,
    random: &mut Random,
    interruptions: &mut [u64; 6],
) -> Result<u64, Box<dyn Error>> {
    let mut requests = Vec::new();
    for queue in 0..QUEUES {
        for slot in queue * GROUP..(queue + 1) * GROUP {
            let request = offer(arena, disk, random, slot)?;
            disk.push(usize::from(queue), slot, &request)?;
            requests.push(request);
        }
        disk.publish(usize::from(queue))?;
    }
    let which = random.index(interruptions.len());
    interruptions[which] += 1;
    interrupt(disk, random, which)?;
    for queue in 0..QUEUES {
        collect(arena, disk, queue, &requests)?;
    }
    Ok(requests.len() as u64)
}

/// A read, a write or a flush of a slot's part of the disk; a write is in the model from now on.
fn offer(
    arena: &mut Arena,
    disk: &Disk,
    random: &mut Random,
    slot: u16,
) -> Result<Request, Box<dyn Error>> {
    let addr = DATA + u64::from(slot) * SLOT_BYTES as u64;
    let kind = [kind::IN, kind::OUT, kind::OUT, kind::FLUSH][random.index(4)];
    if kind == kind::FLUSH {
        return Ok(Request {
            kind,
            sector: 0,
            segments: Vec::new(),
        });
    }
    let blocks = 1 + random.index(SLOT_BYTES / BLOCK_BYTES);
    let len = blocks * BLOCK_BYTES;
    let skipped = random.index((SLOT_BYTES - len) / BLOCK_BYTES + 1) * BLOCK_BYTES;
    let at = FIRST_BYTE + usize::from(slot) * SLOT_BYTES + skipped;
    if kind == kind::OUT {
        let bytes = random.bytes(len);
        disk.memory.write(addr, &bytes)?;
        arena.contents[at..at + len].copy_from_slice(&bytes);
    } else {
        disk.memory.fill(addr, len, 0xdd)?;
    }
    Ok(Request {
        kind,
        sector: (at / 512) as u64,
        segments: vec![(addr, u32::try_from(len)?)],
    })
}

/// Something is said about the queues while requests are in flight.
fn interrupt(disk: &Disk, random: &mut Random, which: usize) -> Result<(), Box<dyn Error>> {
    let queue = random.index(usize::from(QUEUES));
    let number = u32::try_from(queue)?;
    match which {
        0 => Ok(()),
        1 => {
            let regions = disk.memory.regions();
            let entries: Vec<_> = regions.iter().rev().map(|r| r.entry()).collect();
            let fds: Vec<BorrowedFd<'_>> = regions.iter().rev().map(|r| r.file()).collect();
            Ok(disk.frontend.set_memory_table(&entries, &fds)?)
        }
        2 => Ok(disk.give_events(queue)?),
        3 => {
            let set = |on| {
                disk.frontend
                    .set_vring_state(request::SET_VRING_ENABLE, number, on)
            };
            set(0)?;
            Ok(set(1)?)
        }
        4 => stop_and_start(disk, queue),
        _ => {
            for queue in 0..usize::from(QUEUES) {
                stop_and_start(disk, queue)?;
            }
            Ok(())
        }
    }
}

/// What was taken is used when it has stopped; what was not is taken when it goes on there.
fn stop_and_start(disk: &Disk, queue: usize) -> Result<(), Box<dyn Error>> {
    let base = disk.stop_queue_at(queue)?;
    let number = u32::try_from(queue)?;
    let frontend = &disk.frontend;
    frontend.set_vring_state(request::SET_VRING_BASE, number, base)?;
    disk.give_events(queue)?;
    Ok(disk.enable(queue)?)
}

fn collect(
    arena: &Arena,
    disk: &mut Disk,
    queue: u16,
    requests: &[Request],
) -> Result<(), Box<dyn Error>> {
    let ring = usize::from(queue);
    let mut open: Vec<u16> = (queue * GROUP..(queue + 1) * GROUP).collect();
    while !open.is_empty() {
        let left = open.len();
        let used = disk.rings[ring].wait_used(&disk.memory, PATIENCE);
        let used = used.map_err(|e| format!("queue {queue}, {left} requests open: {e}"))?;
        let known = open
            .iter()
            .position(|&s| u32::from(Disk::head(s)) == used.id);
        let slot = open.swap_remove(known.ok_or("a head that is not in flight was used")?);
        let request = &requests[usize::from(slot)];
        disk.check(slot, request, used.len)?;
        let at = usize::try_from(request.sector * 512)?;
        for &(addr, len) in &request.segments {
            let len = len as usize;
            if disk.memory.read(addr, len)? != arena.contents[at..at + len] {
                return Err(format!("queue {queue}, slot {slot}: other bytes").into());
            }
        }
    }
    Ok(())
}

/// Reads that nobody waits for: the connection ends with them in flight.
fn leave_in_flight(disk: &mut Disk, random: &mut Random) -> Result<(), Box<dyn Error>> {
    for queue in 0..QUEUES {
        for slot in queue * GROUP..(queue + 1) * GROUP {
            let request = Request {
                kind: kind::IN,
                sector: random.below((FIRST_BYTE / BLOCK_BYTES) as u64) * 8,
                segments: vec![(DATA + u64::from(slot) * SLOT_BYTES as u64, 4096)],
            };
            disk.push(usize::from(queue), slot, &request)?;
        }
        disk.publish(usize::from(queue))?;
    }
    Ok(())
}
