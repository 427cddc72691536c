//! T26: the memory table is replaced, and regions come and go, while requests are in flight in
//! them. Every request ends well, with the right bytes.

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bulkhead_integration::arena::{Arena, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, GROUP, HIGH, LOW, Options, PATIENCE, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::memory::GuestMemory;
use bulkhead_integration::frontend::message::{
    RegionEntry, protocol_feature, request, single_region,
};
use bulkhead_integration::random::Random;

use crate::Outcome;

/// The region of [`HIGH`].
const HIGH_REGION: usize = 2;

/// So many changes of memory, each with eight requests in flight.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options::default();
    options.protocol_features |= protocol_feature::CONFIGURE_MEM_SLOTS;
    let mut disk = arena.attach(&options)?;
    let mut changes = [0u64; 4];
    for round in 0..rounds {
        if random.below(8) == 0 {
            changes[3] += 1;
            move_to_other_files(&mut disk).map_err(|e| format!("round {round}: {e}"))?;
        }
        let requests = requests(random);
        for (request, slot) in requests.iter().zip(0..) {
            for &(addr, len) in &request.segments {
                disk.memory.fill(addr, len as usize, 0xdd)?;
            }
            disk.push(0, slot, request)?;
        }
        disk.publish(0)?;
        let which = random.index(3);
        changes[which] += 1;
        match which {
            0 => replace(&disk, random)?,
            1 => out_and_in(&disk, HIGH_REGION)?,
            // The rings' own region too: nothing is taken while it is out.
            _ => out_and_in(&disk, random.index(3))?,
        }
        collect(arena, &mut disk, &requests).map_err(|e| format!("round {round}: {e}"))?;
    }
    let [tables, high, any, moves] = changes;
    Ok(format!(
        "{tables} tables, {moves} of other files, {high} + {any} regions out and in, {} requests",
        rounds * u64::from(GROUP)
    ))
}

/// Eight reads, of one or two segments in the two data regions.
fn requests(random: &mut Random) -> Vec<Request> {
    (0..u64::from(GROUP))
        .map(|i| {
            let both = [
                (DATA + i * 0x4_0000, 0x2_0000),
                (HIGH + i * 0x2_0000, 0x1_0000),
            ];
            let segments = match random.below(3) {
                0 => both[..1].to_vec(),
                1 => both[1..].to_vec(),
                _ => both.to_vec(),
            };
            Request {
                kind: kind::IN,
                sector: random.below(FILE_SECTORS / 8 - 48) * 8,
                segments,
            }
        })
        .collect()
}

/// The same regions in another order.
fn replace(disk: &Disk, random: &mut Random) -> Result<(), Box<dyn Error>> {
    let regions = disk.memory.regions();
    let mut order: Vec<usize> = (0..regions.len()).collect();
    order.rotate_left(random.index(regions.len()));
    let entries: Vec<RegionEntry> = order.iter().map(|&i| regions[i].entry()).collect();
    let fds: Vec<BorrowedFd<'_>> = order.iter().map(|&i| regions[i].file()).collect();
    Ok(disk.frontend.set_memory_table(&entries, &fds)?)
}

/// All of memory in new files, at other addresses of the frontend, with nothing in flight. What the
/// device still did in the old ones would be seen in a pattern there; the next requests must find
/// the new ones.
fn move_to_other_files(disk: &mut Disk) -> Result<(), Box<dyn Error>> {
    let old = Arc::clone(&disk.memory);
    let entries: Vec<RegionEntry> = old
        .regions()
        .iter()
        .map(|region| RegionEntry {
            user_addr: region.entry().user_addr ^ (1 << 44),
            ..region.entry()
        })
        .collect();
    let new = GuestMemory::with_regions(&entries)?;
    let bytes = usize::try_from(entries[0].size_bytes)?;
    new.write(LOW, &old.read(LOW, bytes)?)?;
    disk.memory = Arc::new(new);
    disk.share_memory()?;
    for entry in &entries {
        old.fill(entry.guest_addr, usize::try_from(entry.size_bytes)?, 0x5a)?;
    }
    // Whether kicks are wanted may have been said in the old memory.
    let flush = Request {
        kind: kind::FLUSH,
        sector: 0,
        segments: Vec::new(),
    };
    disk.push(0, 0, &flush)?;
    disk.publish(0)?;
    disk.rings[0].kick.write(1)?;
    let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
    disk.check(0, &flush, used.len)?;
    for entry in &entries {
        let bytes = old.read(entry.guest_addr, usize::try_from(entry.size_bytes)?)?;
        if let Some(at) = bytes.iter().position(|byte| *byte != 0x5a) {
            let at = entry.guest_addr + at as u64;
            return Err(format!("the old memory was written at {at:#x}").into());
        }
    }
    Ok(())
}

/// Takes a region away and gives it again. Without the rings' region nothing is taken meanwhile;
/// without another one the queue is disabled for as long, since what it would take could lie there.
/// What the device has taken before keeps the memory that it lies in.
fn out_and_in(disk: &Disk, which: usize) -> Result<(), Box<dyn Error>> {
    let frontend = &disk.frontend;
    if which == 0 {
        return remove_and_add(disk, which);
    }
    frontend.set_vring_state(request::SET_VRING_ENABLE, 0, 0)?;
    remove_and_add(disk, which)?;
    Ok(frontend.set_vring_state(request::SET_VRING_ENABLE, 0, 1)?)
}

fn remove_and_add(disk: &Disk, which: usize) -> Result<(), Box<dyn Error>> {
    let region = &disk.memory.regions()[which];
    let body = single_region(&region.entry());
    disk.frontend.set(request::REM_MEM_REG, &body, &[])?;
    disk.frontend
        .set(request::ADD_MEM_REG, &body, &[region.file()])?;
    Ok(())
}

fn collect(arena: &Arena, disk: &mut Disk, requests: &[Request]) -> Result<(), Box<dyn Error>> {
    let mut open: Vec<u16> = (0..GROUP).collect();
    while !open.is_empty() {
        let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
        let known = open
            .iter()
            .position(|&s| u32::from(Disk::head(s)) == used.id);
        let slot = open.swap_remove(known.ok_or("a head that is not in flight was used")?);
        let request = &requests[usize::from(slot)];
        disk.check(slot, request, used.len)?;
        let mut at = usize::try_from(request.sector * 512)?;
        for &(addr, len) in &request.segments {
            let len = len as usize;
            if disk.memory.read(addr, len)? != arena.contents[at..at + len] {
                return Err(format!("slot {slot} read other bytes to {addr:#x}").into());
            }
            at += len;
        }
    }
    Ok(())
}
