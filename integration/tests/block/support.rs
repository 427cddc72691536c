//! Requests at random, several at once, and what they are compared with.

use std::collections::BTreeSet;
use std::error::Error;

use bulkhead_integration::disk::{DATA, Disk, GROUP, PATIENCE, Request};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::random::Random;

/// How a check ended.
pub type Outcome = Result<(), Box<dyn Error>>;

pub fn ensure(holds: bool, what: impl Fn() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}

/// A run of whole logical blocks of `block` sectors, of at most `most` sectors: first sector
/// and bytes.
pub fn run_of_blocks(random: &mut Random, block: u64, most: u64, sectors: u64) -> (u64, usize) {
    let count = (1 + random.below(most)).next_multiple_of(block);
    let sector = random.below(sectors - count) / block * block;
    (
        sector,
        usize::try_from(count * SECTOR_BYTES).expect("small"),
    )
}

/// Cuts `len` bytes into 1 to 6 segments of whole sectors, apart from each other.
pub fn segments(random: &mut Random, base: u64, len: usize) -> Vec<(u64, u32)> {
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

pub fn scatter(disk: &Disk, list: &[(u64, u32)], bytes: &[u8]) -> Outcome {
    let mut at = 0;
    for &(addr, len) in list {
        disk.memory.write(addr, &bytes[at..at + len as usize])?;
        at += len as usize;
    }
    Ok(())
}

pub fn gather(disk: &Disk, list: &[(u64, u32)]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = Vec::new();
    for &(addr, len) in list {
        bytes.extend(disk.memory.read(addr, len as usize)?);
    }
    Ok(bytes)
}

/// Reads and writes at random against a shadow copy.
pub fn against_shadow(
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

/// Fills a group of slots at once, eight different places, and checks each completion once.
pub fn burst(
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

pub fn collect(disk: &mut Disk, queue: usize, requests: &[Request], first_slot: u16) -> Outcome {
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
pub fn places(random: &mut Random, block: u64, lane: u64) -> Vec<(u64, u64, u32)> {
    (0..u64::from(GROUP))
        .map(|i| {
            let sectors = (1 + random.below(32)).next_multiple_of(block);
            let len = u32::try_from(sectors * SECTOR_BYTES).expect("small");
            let sector = lane * 512 + i * 64 + random.below(32) / block * block;
            (sector, DATA + lane * 0x10_0000 + i * 0x8000, len)
        })
        .collect()
}

pub fn first_slot(queue: usize) -> u16 {
    GROUP * u16::try_from(queue).expect("few queues")
}
