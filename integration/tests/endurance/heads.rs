//! T22: a head or id that is in flight is made available again, and more descriptors than the ring
//! has, while a slow disk keeps everything in flight. Each time the queue retires and nothing is
//! used twice.

use std::collections::BTreeSet;
use std::error::Error;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::packed::{advance, available_bits};
use bulkhead_integration::driver::ring::{Desc, NEXT, WRITE};
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::random::Random;

use crate::Outcome;

/// Slots of 16 descriptors that a queue of 128 has.
const SLOTS: u16 = 8;

/// So many attempts, the second half with use in order.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options::default();
    options.features |= feature::EVENT_IDX;
    let first = attempts(arena, random, rounds / 2, &options)?;
    options.features |= feature::IN_ORDER;
    let second = attempts(arena, random, rounds - rounds / 2, &options)?;
    Ok(format!("{first}; and in order: {second}"))
}

fn attempts(arena: &Arena, random: &mut Random, rounds: u64, options: &Options) -> Outcome {
    let mut disk = arena.attach(options)?;
    let (mut completed, mut overcommitted, mut late) = (0, 0, 0);
    for round in 0..rounds {
        if round > 0 {
            restart(&mut disk)?;
        }
        if disk.rings[0].is_packed() && random.below(3) == 0 {
            overcommitted += 1;
            if !overcommit(&mut disk)? {
                late += 1;
                continue;
            }
        } else {
            again(&mut disk, random)?;
        }
        if !disk.rings[0].has_failed(Duration::from_secs(5)) {
            return Err(format!("round {round}: the queue goes on").into());
        }
        completed += used_once(&mut disk)?;
    }
    restart(&mut disk)?;
    disk.read(0, 0, 4096)?;
    let refused = rounds - late;
    Ok(format!(
        "{refused} of {rounds} refused, {late} came late ({overcommitted} for room), {completed} \
         chains used before"
    ))
}

fn restart(disk: &mut Disk) -> Result<(), Box<dyn Error>> {
    disk.stop_queue_at(0)?;
    let _ = disk.rings[0].err.read();
    disk.rings[0].restart(&disk.memory)?;
    Ok(disk.start_queue(0)?)
}

/// Offers some chains and one of them again, at once.
fn again(disk: &mut Disk, random: &mut Random) -> Result<(), Box<dyn Error>> {
    let before = 1 + u16::try_from(random.below(u64::from(SLOTS)))?;
    for slot in 0..before {
        disk.push(0, slot, &read(slot))?;
    }
    let again = u16::try_from(random.below(u64::from(before)))?;
    disk.push(0, again, &read(again))?;
    Ok(disk.publish(0)?)
}

fn read(slot: u16) -> Request {
    Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA + u64::from(slot) * 0x1_0000, 4096)],
    }
}

/// Waits until the device has taken some slow chains, and then offers one as long as the whole
/// ring, over them. False: they were done before.
fn overcommit(disk: &mut Disk) -> Result<bool, Box<dyn Error>> {
    for slot in 0..SLOTS {
        disk.push(0, slot, &read(slot))?;
    }
    disk.publish(0)?;
    // A device that goes to sleep names the place that it wants to be woken for: the next free one.
    let next = disk.rings[0].next_avail;
    let deadline = Instant::now() + PATIENCE;
    while disk.memory.load_u16(disk.rings[0].used)? != next {
        if Instant::now() > deadline {
            return Err("the device does not ask for more".into());
        }
        std::thread::yield_now();
    }
    let ring = &disk.rings[0];
    for i in (0..ring.size).rev() {
        let place = advance(next, i, ring.size);
        let more = if i + 1 < ring.size { NEXT } else { 0 };
        let desc = Desc {
            flags: WRITE | more | available_bits(place),
            next: 120,
            ..Desc::writable(DATA + 0x10_0000, 16)
        };
        ring.write_slot(&disk.memory, place, &desc)?;
    }
    ring.kick.write(1)?;
    let written = |slot| disk.memory.read(Disk::status_addr(slot), 1);
    let open = (0..SLOTS).map(written).collect::<Result<Vec<_>, _>>()?;
    Ok(open.concat().contains(&status::UNTOUCHED))
}

/// What was used before the queue failed: each chain at most once.
fn used_once(disk: &mut Disk) -> Result<u64, Box<dyn Error>> {
    let mut seen = BTreeSet::new();
    // What was written over can't be told apart any more.
    while let Ok(Some(used)) = disk.rings[0].poll_used(&disk.memory) {
        if !seen.insert(used.id) {
            return Err(format!("{used:?} came twice").into());
        }
    }
    Ok(seen.len() as u64)
}
