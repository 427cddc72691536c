//! What attacks from inside a guest share: offering a chain and seeing how it ends, with every
//! byte of guest memory that the device had no right to compared before and after.

use std::error::Error;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, GROUP, Options, Request};
use bulkhead_integration::driver::packed::{advance, available_bits};
use bulkhead_integration::driver::ring::{Desc, INDIRECT, NEXT, WRITE};
use bulkhead_integration::driver::{SECTOR_BYTES, kind, status};
use bulkhead_integration::frontend::{FrontendError, wait_readable};

use crate::{Attack, End};

/// How long an attack may take to end.
pub const END_WITHIN: Duration = Duration::from_secs(4);
/// The sector that verification reads use.
const PROBE_SECTOR: u64 = 8;

/// A disk with both queues, as attacks start from.
pub fn attach(arena: &Arena) -> Result<Disk, Box<dyn Error>> {
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    Ok(arena.attach(&options)?)
}

/// A well-formed request's descriptors on slot 0, to be spoilt.
pub fn descriptors(
    disk: &Disk,
    kind: u32,
    sector: u64,
    segments: &[(u64, u32)],
) -> Result<Vec<Desc>, Box<dyn Error>> {
    let request = Request {
        kind,
        sector,
        segments: segments.to_vec(),
    };
    Ok(disk.descriptors(0, &request)?)
}

/// What the device may write to for a chain: its writable buffers.
fn writable(descs: &[Desc]) -> Vec<Range<u64>> {
    descs
        .iter()
        .filter(|d| d.flags & WRITE != 0 && d.flags & INDIRECT == 0)
        .map(|d| d.addr..d.addr.saturating_add(u64::from(d.len)))
        .collect()
}

/// Offers a chain as it is and sees how it ends.
pub fn offer_chain(disk: &mut Disk, descs: &[Desc]) -> Attack {
    offer_other(disk, descs, descs)
}

/// Offers the chain `ring_descs`, which leads the device to the buffers `descs`, and sees how it
/// ends.
pub fn offer_other(disk: &mut Disk, ring_descs: &[Desc], descs: &[Desc]) -> Attack {
    disk.rings[0].offer(&disk.memory, 0, ring_descs)?;
    judge(disk, 0, descs)
}

/// Offers head 0 of a split ring, whose chain is in place, and sees how it ends. `descs` are the
/// buffers that the device may be led to.
pub fn offer(disk: &mut Disk, descs: &[Desc]) -> Attack {
    offer_head(disk, 0, descs)
}

/// As [`offer`], with any head.
pub fn offer_head(disk: &mut Disk, head: u16, descs: &[Desc]) -> Attack {
    disk.rings[0].push(&disk.memory, head)?;
    judge(disk, head, descs)
}

/// Publishes what was offered under `id`, and sees how it ends, what was written where, and
/// whether the queues go on as they should.
pub fn judge(disk: &mut Disk, id: u16, descs: &[Desc]) -> Attack {
    let before = Watch::of(disk, &writable(descs))?;
    disk.rings[0].publish(&disk.memory)?;
    let end = wait_for_end(disk, Some((id, descs)))?;
    before.compare(disk)?;
    after_end(disk, end)?;
    Ok(end)
}

/// Breaks queue 0: an index that jumps, or a packed chain without an end.
pub fn break_queue(disk: &mut Disk) -> Result<(), Box<dyn Error>> {
    let ring = &disk.rings[0];
    if ring.is_packed() {
        let mut place = ring.next_avail;
        for _ in 0..ring.size {
            let desc = Desc {
                flags: NEXT | available_bits(place),
                ..Desc::readable(DATA, 16)
            };
            ring.write_slot(&disk.memory, place, &desc)?;
            place = advance(place, 1, ring.size);
        }
    } else {
        ring.publish_index(&disk.memory, ring.next_avail.wrapping_add(0x4000))?;
    }
    Ok(ring.kick.write(1).map(drop)?)
}

/// Waits for a used entry, the error descriptor or the end of the connection.
pub fn wait_for_end(disk: &mut Disk, expected: Option<(u16, &[Desc])>) -> Attack {
    let deadline = Instant::now() + END_WITHIN;
    loop {
        if let Some(used) = disk.rings[0].poll_used(&disk.memory)? {
            let Some((head, descs)) = expected else {
                return Ok(End::Used);
            };
            if used.id != u32::from(head) {
                return Err(format!("head {} was used, offered was {head}", used.id).into());
            }
            return judge_used(disk, used.len, descs);
        }
        if disk.rings[0].has_failed(Duration::ZERO) {
            std::thread::sleep(Duration::from_millis(20));
            return match disk.rings[0].poll_used(&disk.memory)? {
                None => Ok(End::Retired),
                Some(used) => Err(format!("the queue failed and then used {used:?}").into()),
            };
        }
        if wait_readable(disk.frontend.stream().as_fd(), Duration::from_millis(1)) {
            return Ok(End::Closed);
        }
        if Instant::now() > deadline {
            return Ok(End::Silent);
        }
    }
}

/// Status byte and used length of a completed chain.
fn judge_used(disk: &Disk, used_len: u32, descs: &[Desc]) -> Attack {
    let room: u64 = writable(descs).iter().map(|r| r.end - r.start).sum();
    if u64::from(used_len) > room {
        return Err(format!("used.len is {used_len}, the device could write {room}").into());
    }
    let Some(last) = descs.last().filter(|d| d.flags & WRITE != 0 && d.len > 0) else {
        return Ok(End::Used);
    };
    let byte = disk
        .memory
        .read(last.addr + u64::from(last.len) - 1, 1)
        .map_or(status::UNTOUCHED, |bytes| bytes[0]);
    if byte == status::UNTOUCHED {
        return Ok(End::Used);
    }
    if used_len == 0 {
        return Err("used.len is 0 and a status byte was written".into());
    }
    if byte == status::OK && !matches!(u64::from(used_len), n if n == room || n == 1) {
        return Err(
            format!("used.len is {used_len} of {room} for a request that succeeded").into(),
        );
    }
    Ok(End::Status(byte))
}

/// Guest address and bytes of each region.
type Snapshot = Vec<(u64, Vec<u8>)>;

/// Guest memory as it was, and where the device may write.
#[derive(Debug)]
pub struct Watch {
    regions: Snapshot,
    rights: Vec<Range<u64>>,
}

impl Watch {
    /// From now on the device may write to the used part of each ring, and to `buffers`.
    pub fn of(disk: &Disk, buffers: &[Range<u64>]) -> Result<Self, Box<dyn Error>> {
        let mut rights = buffers.to_vec();
        for ring in &disk.rings {
            let [descs, driver, device] = ring.parts();
            rights.push(device);
            if ring.is_packed() {
                rights.push(descs);
            } else {
                // What the driver writes after this.
                rights.push(driver.start + 2..driver.start + 4);
            }
        }
        Ok(Self {
            regions: snapshot(disk)?,
            rights,
        })
    }

    /// Memory has what it had, but for what the device may write.
    pub fn compare(&self, disk: &Disk) -> Result<(), Box<dyn Error>> {
        self.compare_but(disk, &[])
    }

    /// As [`Watch::compare`], and ranges that other requests wrote meanwhile, or their driver: the
    /// slots of probes among them.
    pub fn compare_but(&self, disk: &Disk, others: &[Range<u64>]) -> Result<(), Box<dyn Error>> {
        let probes = (0..2).map(|queue| {
            let slot = Disk::header_addr(GROUP * queue + 2);
            slot..slot + 4096
        });
        let others: Vec<_> = others.iter().cloned().chain(probes).collect();
        for ((base, old), (_, new)) in self.regions.iter().zip(snapshot(disk)?) {
            if *old == new {
                continue;
            }
            for ((at, a), b) in (*base..).zip(old).zip(&new) {
                if a != b
                    && !self
                        .rights
                        .iter()
                        .chain(&others)
                        .any(|range| range.contains(&at))
                {
                    return Err(format!("guest memory at {at:#x} was written").into());
                }
            }
        }
        Ok(())
    }
}

fn snapshot(disk: &Disk) -> Result<Snapshot, Box<dyn Error>> {
    disk.memory
        .regions()
        .iter()
        .map(|region| {
            let entry = region.entry();
            let len = usize::try_from(entry.size_bytes)?.min(8 << 20);
            Ok((entry.guest_addr, disk.memory.read(entry.guest_addr, len)?))
        })
        .collect()
}

/// After a failed request the queue goes on; after a retired queue the other one does.
fn after_end(disk: &mut Disk, end: End) -> Result<(), Box<dyn Error>> {
    match end {
        End::Status(_) => probe(disk, 0)?,
        End::Retired => {
            let request = read_probe();
            disk.push(0, 1, &request)?;
            disk.publish(0)?;
            std::thread::sleep(Duration::from_millis(30));
            if let Some(used) = disk.rings[0].poll_used(&disk.memory)? {
                return Err(format!("a retired queue used {used:?}").into());
            }
        }
        _ => {}
    }
    if disk.rings.len() > 1 && end != End::Closed {
        probe(disk, 1)?;
    }
    Ok(())
}

fn read_probe() -> Request {
    Request {
        kind: kind::IN,
        sector: PROBE_SECTOR,
        segments: vec![(DATA + 0x40_0000, 4096)],
    }
}

/// A good read on a queue.
pub fn probe(disk: &mut Disk, queue: usize) -> Result<(), Box<dyn Error>> {
    let request = read_probe();
    let slot = GROUP * u16::try_from(queue)? + 2;
    disk.push(queue, slot, &request)?;
    disk.publish(queue)?;
    let used = disk.rings[queue]
        .wait_used(&disk.memory, END_WITHIN)
        .map_err(|e| format!("queue {queue} no longer serves: {e}"))?;
    if used.id != u32::from(Disk::head(slot)) {
        return Err(format!("queue {queue} used head {}", used.id).into());
    }
    Ok(disk.check(slot, &request, used.len)?)
}

/// Compares what a read put into memory with what the disk holds.
pub fn expect_data(
    arena: &Arena,
    disk: &Disk,
    sector: u64,
    segments: &[(u64, u32)],
) -> Result<(), Box<dyn Error>> {
    let mut at = usize::try_from(sector * SECTOR_BYTES)?;
    for &(addr, len) in segments {
        let bytes = disk.memory.read(addr, len as usize)?;
        if bytes != arena.contents[at..at + len as usize] {
            return Err(format!("the read put other bytes at {addr:#x}").into());
        }
        at += len as usize;
    }
    Ok(())
}

/// What became of a message.
pub fn fate(result: Result<(), FrontendError>) -> Attack {
    match result {
        Ok(()) => Ok(End::Accepted),
        Err(FrontendError::Refused { .. }) => Ok(End::Refused),
        Err(FrontendError::Closed) => Ok(End::Closed),
        Err(FrontendError::Timeout(_)) => Ok(End::Silent),
        Err(other) => Err(other.into()),
    }
}
