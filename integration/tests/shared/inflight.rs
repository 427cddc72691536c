//! The in-flight region, byte by byte (QEMU `docs/interop/vhost-user.rst`, "Inflight I/O
//! tracking"): what is in flight is marked in it, in the order in which it was taken, and nothing
//! else is.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, GROUP, PATIENCE, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::packed::WRAP;
use bulkhead_integration::frontend::message::{Inflight, request};
use bulkhead_integration::random::Random;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{Outcome, QUEUES, ensure, options};

const QUEUE_SIZE: u16 = 128;

/// A region's file, and how the backend laid it out.
struct Region {
    file: File,
    what: Inflight,
    packed: bool,
}

impl Region {
    fn stride(&self) -> u64 {
        self.what.mmap_size / u64::from(self.what.queues)
    }

    fn bytes<const N: usize>(&self, queue: u16, at: u64) -> Result<[u8; N], Box<dyn Error>> {
        let mut bytes = [0; N];
        let offset = self.what.mmap_offset + self.stride() * u64::from(queue) + at;
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn u8(&self, queue: u16, at: u64) -> Result<u8, Box<dyn Error>> {
        Ok(self.bytes::<1>(queue, at)?[0])
    }

    fn u16(&self, queue: u16, at: u64) -> Result<u16, Box<dyn Error>> {
        Ok(u16::from_le_bytes(self.bytes(queue, at)?))
    }

    fn u64(&self, queue: u16, at: u64) -> Result<u64, Box<dyn Error>> {
        Ok(u64::from_le_bytes(self.bytes(queue, at)?))
    }

    /// Offset of an entry.
    fn entry(&self, index: u16) -> u64 {
        let bytes = if self.packed { 32 } else { 16 };
        bytes * (1 + u64::from(index))
    }

    fn in_flight(&self, queue: u16) -> Result<Vec<u16>, Box<dyn Error>> {
        let mut list = Vec::new();
        for index in 0..QUEUE_SIZE {
            match self.u8(queue, self.entry(index))? {
                0 => {}
                1 => list.push(index),
                other => return Err(format!("inflight is {other}").into()),
            }
        }
        Ok(list)
    }

    /// When the chain of this entry was taken, counted in chains.
    fn counter(&self, queue: u16, index: u16) -> Result<u64, Box<dyn Error>> {
        self.u64(queue, self.entry(index) + 8)
    }

    /// Version, sizes and where the ring is: as they must be with nothing in flight.
    fn check_idle(&self, disk: &Disk, queue: u16) -> Outcome {
        let ring = &disk.rings[usize::from(queue)];
        ensure(self.u64(queue, 0)? == 0, || "features are not 0".to_owned())?;
        ensure(self.u16(queue, 8)? == 1, || {
            "the version is not 1".to_owned()
        })?;
        let entries = self.u16(queue, 10)?;
        ensure(entries == QUEUE_SIZE, || format!("desc_num is {entries}"))?;
        let open = self.in_flight(queue)?;
        ensure(open.is_empty(), || format!("{open:?} are in flight"))?;
        if !self.packed {
            let used = self.u16(queue, 14)?;
            return ensure(used == ring.last_used, || {
                format!("used_idx is {used}, the ring's {}", ring.last_used)
            });
        }
        for (index, wrap) in [(16, 20), (18, 21)] {
            let at = self.u16(queue, index)?;
            let counter = u16::from(self.u8(queue, wrap)? & 1) * WRAP;
            ensure(at | counter == ring.last_used, || {
                format!(
                    "used is {at} with {counter:#x}, the ring's {:#x}",
                    ring.last_used
                )
            })?;
        }
        let (free, old) = (self.u16(queue, 12)?, self.u16(queue, 14)?);
        ensure(free == old && free < QUEUE_SIZE, || {
            format!("free_head is {free}, old_free_head {old}")
        })
    }
}

/// Asks for a region, gives it back, and only then starts the queues.
fn attach(arena: &Arena) -> Result<(Disk, Region), Box<dyn Error>> {
    let disk = arena.negotiate(&options())?;
    let (what, fd) = disk
        .frontend
        .get_inflight(&Inflight::question(QUEUES, QUEUE_SIZE))?;
    ensure(
        what.queues == QUEUES && what.queue_size == QUEUE_SIZE,
        || format!("asked for {QUEUES} queues of {QUEUE_SIZE}, got {what:?}"),
    )?;
    let region = Region {
        file: fd.into(),
        what,
        packed: disk.rings[0].is_packed(),
    };
    let least = u64::from(QUEUES) * region.entry(QUEUE_SIZE);
    ensure(what.mmap_size >= least, || {
        format!("{what:?}: {least} bytes are needed")
    })?;
    let length = region.file.metadata()?.len();
    ensure(length >= what.mmap_offset + what.mmap_size, || {
        format!("{what:?} in a file of {length} bytes")
    })?;
    start(&disk, &region)?;
    Ok((disk, region))
}

fn start(disk: &Disk, region: &Region) -> Outcome {
    let fds = [region.file.as_fd()];
    let body = region.what.body();
    disk.frontend.set(request::SET_INFLIGHT_FD, &body, &fds)?;
    disk.share_memory()?;
    for index in 0..usize::from(QUEUES) {
        disk.start_queue(index)?;
    }
    Ok(())
}

fn read(slot: u16) -> Request {
    let at = DATA + u64::from(slot) * 0x1_0000;
    Request {
        kind: kind::IN,
        sector: u64::from(slot) * 8,
        segments: vec![(at, 4096), (at + 8192, 4096)],
    }
}

fn collect(disk: &mut Disk, queue: u16, count: usize) -> Outcome {
    for _ in 0..count {
        let used = disk.rings[usize::from(queue)].wait_used(&disk.memory, PATIENCE)?;
        let slot = u16::try_from(used.id)? / 16 + GROUP * queue;
        disk.check(slot, &read(slot), used.len)?;
    }
    // The region follows the ring within the same turn of the worker.
    disk.frontend.ask_u64(request::GET_FEATURES)?;
    Ok(())
}

/// A region is true after each batch; waits a moment for the worker's turn to end.
fn idle(disk: &Disk, region: &Region, queue: u16) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match region.check_idle(disk, queue) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            outcome => return outcome,
        }
    }
}

/// Batches of all sizes on both queues, past the end of the ring; the counters say in what order.
pub fn after_requests(arena: &mut Arena) -> Outcome {
    let (mut disk, region) = attach(arena)?;
    for queue in 0..QUEUES {
        idle(&disk, &region, queue)?;
    }
    let mut taken = 0u64;
    for round in 0..60u16 {
        let count = 1 + round % GROUP;
        for queue in 0..QUEUES {
            for slot in GROUP * queue..GROUP * queue + count {
                disk.push(usize::from(queue), slot, &read(slot))?;
            }
            disk.publish(usize::from(queue))?;
        }
        for queue in 0..QUEUES {
            collect(&mut disk, queue, usize::from(count))?;
            idle(&disk, &region, queue)?;
        }
        if !region.packed {
            for slot in 0..count {
                let counter = region.counter(0, Disk::head(slot))?;
                ensure(counter == taken + u64::from(slot), || {
                    format!("round {round}: counter {counter} for chain {slot} after {taken}")
                })?;
            }
        }
        taken += u64::from(count);
    }
    Ok(())
}

/// A slow disk: what is in flight is marked, never what was used; entries say what was taken.
pub fn during_requests(arena: &mut Arena) -> Outcome {
    let (mut disk, region) = attach(arena)?;
    let mut seen = 0;
    for round in 0..4u64 {
        for slot in 0..GROUP {
            disk.push(0, slot, &read(slot))?;
        }
        disk.publish(0)?;
        let mut left = usize::from(GROUP);
        while left > 0 {
            let open = region.in_flight(0)?;
            seen = seen.max(open.len());
            ensure(open.len() <= usize::from(GROUP), || {
                format!("{open:?} are in flight")
            })?;
            if region.packed {
                check_copies(&region, &open, round * u64::from(GROUP))?;
            } else {
                let heads: Vec<u16> = (0..GROUP).map(Disk::head).collect();
                ensure(open.iter().all(|head| heads.contains(head)), || {
                    format!("{open:?} are in flight, offered were {heads:?}")
                })?;
            }
            if disk.rings[0].poll_used(&disk.memory)?.is_some() {
                left -= 1;
            }
        }
        idle(&disk, &region, 0)?;
        if !region.packed {
            for slot in 0..GROUP {
                let counter = region.counter(0, Disk::head(slot))?;
                let expected = round * u64::from(GROUP) + u64::from(slot);
                ensure(counter == expected, || format!("{counter}, not {expected}"))?;
            }
        }
    }
    ensure(seen > 1, || "nothing was seen in flight".to_owned())
}

/// Entries of chains in flight: their descriptors as the ring had them, and when they were taken.
fn check_copies(region: &Region, open: &[u16], taken: u64) -> Outcome {
    for &index in open {
        let at = region.entry(index);
        let (next, num) = (region.u16(0, at + 2)?, region.u16(0, at + 6)?);
        let id = region.u16(0, at + 16)?;
        let (addr, counter) = (region.u64(0, at + 24)?, region.counter(0, index)?);
        // It may have ended since it was seen.
        if region.u8(0, at)? == 0 {
            continue;
        }
        let slot = (0..GROUP).find(|&slot| Disk::head(slot) == id);
        let slot = slot.ok_or_else(|| format!("entry {index} has id {id}"))?;
        let right = num == 4
            && next < QUEUE_SIZE
            && addr == Disk::header_addr(slot)
            && counter == taken + u64::from(slot);
        ensure(right, || {
            format!("entry {index}: num {num}, next {next}, id {id}, addr {addr:#x}, {counter}")
        })?;
    }
    Ok(())
}

/// A region that a hostile frontend filled: the queue serves, or it is refused.
pub fn noise(arena: &mut Arena) -> Outcome {
    let mut random = Random::named("in-flight noise");
    for _ in 0..10 {
        let mut disk = arena.negotiate(&options())?;
        let (what, _) = disk
            .frontend
            .get_inflight(&Inflight::question(QUEUES, QUEUE_SIZE))?;
        let file: File = memfd_create("inflight", MFdFlags::MFD_CLOEXEC)?.into();
        let bytes = random.bytes(usize::try_from(what.mmap_size)?);
        file.write_all_at(&bytes, 0)?;
        let packed = disk.rings[0].is_packed();
        let region = Region { file, what, packed };
        if start(&disk, &region).is_err() {
            continue;
        }
        for slot in 0..GROUP {
            disk.push(0, slot, &read(slot))?;
        }
        disk.publish(0)?;
        // Noise in it while requests run.
        for _ in 0..100 {
            let at = random.below(what.mmap_size - 8);
            region.file.write_all_at(&random.bytes(8), at)?;
        }
        collect(&mut disk, 0, usize::from(GROUP))?;
    }
    Ok(())
}

/// The region's file is cut off under load: that queue fails, or its connection ends, with the next
/// chain that it would have to note; where its own part is left, it goes on. The other device serves.
pub fn cut_off(arena: &mut Arena) -> Outcome {
    for round in 0..20u64 {
        let mut disk = arena.negotiate(&options())?;
        let (what, _) = disk
            .frontend
            .get_inflight(&Inflight::question(QUEUES, QUEUE_SIZE))?;
        let file: File = memfd_create("inflight", MFdFlags::MFD_CLOEXEC)?.into();
        file.set_len(what.mmap_size)?;
        let packed = disk.rings[0].is_packed();
        let region = Region { file, what, packed };
        start(&disk, &region)?;
        for slot in 0..GROUP - 1 {
            disk.push(0, slot, &read(slot))?;
        }
        disk.publish(0)?;
        let left = if round % 2 == 0 { 0 } else { 8192 };
        region.file.set_len(left)?;
        arena.check_other()?;
        disk.push(0, GROUP - 1, &read(GROUP - 1))?;
        disk.publish(0)?;
        disk.rings[0].kick.write(1)?;
        if left == 0 {
            let fails = || disk.rings[0].has_failed(Duration::from_millis(10));
            let ends = || disk.frontend.closes_within(Duration::from_millis(10));
            let seen = (0..500).any(|_| fails() || ends());
            ensure(seen, || {
                format!("round {round}: nothing failed without its region")
            })?;
        } else {
            collect(&mut disk, 0, usize::from(GROUP))?;
        }
    }
    Ok(())
}
