//! T22: a head or id that is in flight is made available again, and more descriptors than the ring
//! has, while a slow disk keeps everything in flight. Each time the queue retires and nothing is
//! used twice.

use std::collections::BTreeSet;
use std::error::Error;
use std::time::Duration;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::DriverError;
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::packed::{advance, available_bits};
use bulkhead_integration::driver::ring::{Desc, linked};
use bulkhead_integration::random::Random;

use crate::Outcome;

/// Slots of 16 descriptors that a queue of 128 has.
const SLOTS: u16 = 8;

/// So many attempts on one connection.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    let (mut completed, mut overcommitted) = (0, 0);
    for round in 0..rounds {
        let before = 1 + u16::try_from(random.below(u64::from(SLOTS)))?;
        for slot in 0..before {
            disk.push(0, slot, &read(slot))?;
        }
        if disk.rings[0].is_packed() && random.below(3) == 0 {
            // All of the ring, then one more over the first that is in flight.
            overcommit(&mut disk)?;
            overcommitted += 1;
        } else {
            let again = u16::try_from(random.below(u64::from(before)))?;
            disk.push(0, again, &read(again))?;
        }
        disk.publish(0)?;
        if !disk.rings[0].has_failed(Duration::from_secs(5)) {
            return Err(format!("round {round}: the queue goes on").into());
        }
        completed += used_once(&mut disk)?;
        disk.stop_queue_at(0)?;
        disk.rings[0].err.read()?;
        disk.rings[0].restart(&disk.memory)?;
        disk.start_queue(0)?;
    }
    disk.read(0, 0, 4096)?;
    Ok(format!(
        "{rounds} of {rounds} refused ({overcommitted} for room), {completed} chains used before"
    ))
}

fn read(slot: u16) -> Request {
    Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA + u64::from(slot) * 0x1_0000, 4096)],
    }
}

/// Fills the ring with chains until none fits, and then writes one that goes over what is in flight.
fn overcommit(disk: &mut Disk) -> Result<(), Box<dyn Error>> {
    let segments = (0..16).map(|i| (DATA + 0x10_0000 + i * 512, 512));
    let request = Request {
        kind: kind::IN,
        sector: 8,
        segments: segments.collect(),
    };
    let descs = disk.descriptors(7, &request)?;
    for id in 16 * SLOTS / 2 + 1.. {
        match disk.rings[0].offer(&disk.memory, id, &descs) {
            Ok(()) => {}
            Err(DriverError::Full) => break,
            Err(other) => return Err(other.into()),
        }
    }
    let ring = &disk.rings[0];
    let mut place = ring.next_avail;
    for desc in linked(&descs, 0) {
        let desc = Desc {
            flags: desc.flags | available_bits(place),
            next: 1,
            ..desc
        };
        ring.write_slot(&disk.memory, place, &desc)?;
        place = advance(place, 1, ring.size);
    }
    Ok(())
}

/// What was used before the queue failed: each chain at most once.
fn used_once(disk: &mut Disk) -> Result<u64, Box<dyn Error>> {
    let mut seen = BTreeSet::new();
    while let Some(used) = disk.rings[0].poll_used(&disk.memory)? {
        if !seen.insert(used.id) {
            return Err(format!("{used:?} came twice").into());
        }
    }
    Ok(seen.len() as u64)
}
