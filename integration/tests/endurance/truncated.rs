//! T27: files of guest memory are cut off while requests run in them. Each time that one device
//! fails its requests, its queue or its connection; the other serves on, and a new connection
//! finds the disk whole.

use std::error::Error;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::random::Random;
use nix::unistd::ftruncate;

use crate::Outcome;

/// So many files.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options::default();
    let (mut failed, mut answered) = (0, 0);
    for round in 0..rounds {
        options.indirect = random.below(2) == 0;
        let mut disk = arena.attach(&options)?;
        load(&mut disk, random)?;
        // The rings' region is the first, the data's the second.
        let rings = round % 2 == 0;
        let region = &disk.memory.regions()[usize::from(!rings)];
        let entry = region.entry();
        let left = random.below(2) * (entry.mmap_offset + entry.size_bytes / 2);
        ftruncate(region.file(), i64::try_from(left)?)?;
        disk.rings[0].kick.write(1)?;
        arena.check_other()?;
        if rings {
            failed += u64::from(ends(&disk)?);
        } else {
            answered += answers(&mut disk)?;
        }
    }
    Ok(format!(
        "{rounds} files: {failed} with rings ended their queues, {answered} requests were answered"
    ))
}

fn load(disk: &mut Disk, random: &mut Random) -> Result<(), Box<dyn Error>> {
    for slot in 0..8 {
        let request = Request {
            kind: kind::IN,
            sector: random.below(64) * 8,
            segments: vec![(DATA + u64::from(slot) * 0xc_0000, 0x8_0000)],
        };
        disk.push(0, slot, &request)?;
    }
    Ok(disk.publish(0)?)
}

/// Whether a queue whose rings went says so, or its connection ends. A half of them may be left that
/// has all of the rings: then neither need come.
fn ends(disk: &Disk) -> Result<bool, Box<dyn Error>> {
    let entry = disk.memory.regions()[0].entry();
    let file = std::fs::File::from(disk.memory.regions()[0].file().try_clone_to_owned()?);
    let whole = file.metadata()?.len() >= entry.mmap_offset + entry.size_bytes / 2;
    let deadline = Instant::now() + Duration::from_secs(4);
    while Instant::now() < deadline {
        if disk.rings[0].has_failed(Duration::from_millis(5))
            || disk.frontend.closes_within(Duration::from_millis(5))
        {
            return Ok(true);
        }
        if whole {
            return Ok(false);
        }
        disk.rings[0].kick.write(1)?;
    }
    Err("the queue whose rings are gone neither failed nor ended".into())
}

/// Requests whose data went: those that end well had been served before. What comes afterwards fails.
fn answers(disk: &mut Disk) -> Result<u64, Box<dyn Error>> {
    let mut count = 0;
    let deadline = Instant::now() + Duration::from_secs(4);
    loop {
        if disk.rings[0].poll_used(&disk.memory)?.is_some() {
            count += 1;
            if count == 8 {
                break;
            }
        } else if disk.rings[0].has_failed(Duration::from_millis(1))
            || disk.frontend.closes_within(Duration::from_millis(1))
        {
            return Ok(count);
        }
        if Instant::now() > deadline {
            return Err(format!("{count} of 8 requests were answered, and no error").into());
        }
    }
    let late = Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA + 0x50_0000, 4096)],
    };
    disk.push(0, 0, &late)?;
    disk.publish(0)?;
    let deadline = Instant::now() + Duration::from_secs(4);
    while Instant::now() < deadline {
        if disk.rings[0].poll_used(&disk.memory)?.is_some() {
            let byte = disk.memory.read(Disk::status_addr(0), 1)?[0];
            if byte == status::OK {
                return Err("a read into memory that is gone succeeded".into());
            }
            return Ok(count + 1);
        }
        if disk.rings[0].has_failed(Duration::from_millis(1))
            || disk.frontend.closes_within(Duration::from_millis(1))
        {
            return Ok(count);
        }
    }
    Err("a request into memory that is gone has no end".into())
}
