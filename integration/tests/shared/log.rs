//! The dirty log: one bit for each page of 4096 bytes that the device wrote, and no other.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{
    DATA, Disk, DiskError, HIGH, HIGH_BYTES, PATIENCE, Request, feature,
};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::message::{self, request};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::{Outcome, ensure, options};

const PAGE: u64 = 4096;
/// Bytes of a log for all of guest memory.
const LOG_BYTES: u64 = (HIGH + HIGH_BYTES) / PAGE / 8;

type Pages = BTreeSet<u64>;

fn pages(at: u64, bytes: u64) -> impl Iterator<Item = u64> {
    at / PAGE..(at + bytes).div_ceil(PAGE)
}

/// A log's file.
pub struct Log(File);

impl Log {
    pub fn new(bytes: u64) -> Result<Self, Box<dyn Error>> {
        let fd = memfd_create("log", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&fd, i64::try_from(bytes)?)?;
        Ok(Self(fd.into()))
    }

    /// SET_LOG_BASE; with LOG_SHMFD it has a reply.
    pub fn give(&self, disk: &Disk) -> Result<(), DiskError> {
        let bytes = self.0.metadata()?.len();
        let body = message::words(&[bytes, 0]);
        let fds = [self.0.as_fd()];
        disk.frontend.ask(request::SET_LOG_BASE, &body, &fds)?;
        Ok(())
    }

    /// What is marked, and clears it.
    fn take(&self) -> Result<Pages, Box<dyn Error>> {
        let mut bytes = vec![0; usize::try_from(self.0.metadata()?.len())?];
        self.0.read_exact_at(&mut bytes, 0)?;
        self.0.write_all_at(&vec![0; bytes.len()], 0)?;
        let mut pages = Pages::new();
        for (at, byte) in (0u64..).zip(bytes).filter(|(_, byte)| *byte != 0) {
            pages.extend(
                (0..8)
                    .filter(|bit| byte & (1 << bit) != 0)
                    .map(|bit| at * 8 + bit),
            );
        }
        Ok(pages)
    }
}

/// SET_FEATURES with or without LOG_ALL, while queues run.
fn log_all(disk: &Disk, on: bool) -> Result<(), DiskError> {
    let log = if on { feature::LOG_ALL } else { 0 };
    let body = message::words(&[disk.features | log]);
    Ok(disk.frontend.set(request::SET_FEATURES, &body, &[])?)
}

/// SET_VRING_ADDR of a running queue, now with writes to its ring marked.
fn log_ring(disk: &Disk, index: u32) -> Result<(), DiskError> {
    let ring = &disk.rings[usize::try_from(index).unwrap_or(0)];
    let user = |at| disk.memory.user_addr(at);
    let at = [user(ring.desc)?, user(ring.used)?, user(ring.avail)?];
    let body = message::logged_vring_addresses(index, at, ring.used);
    Ok(disk.frontend.set(request::SET_VRING_ADDR, &body, &[])?)
}

/// Where a device may write of a ring.
fn ring_pages(disk: &Disk, index: usize) -> (Pages, Pages) {
    let [descs, _, used] = disk.rings[index].parts();
    let all = |range: &std::ops::Range<u64>| pages(range.start, range.end - range.start);
    if disk.rings[index].is_packed() {
        // The event structure too, when it changes.
        return (
            all(&descs).collect(),
            all(&descs).chain(all(&used)).collect(),
        );
    }
    (all(&used).collect(), all(&used).collect())
}

fn buffer_pages(slot: u16, request: &Request) -> Pages {
    let mut expected: Pages = pages(Disk::status_addr(slot), 1).collect();
    if request.device_writes() {
        for &(addr, len) in &request.segments {
            expected.extend(pages(addr, u64::from(len)));
        }
    }
    expected
}

fn attach(arena: &Arena) -> Result<(Disk, Log), Box<dyn Error>> {
    let disk = arena.attach(&options())?;
    ensure(disk.features & feature::LOG_ALL == 0, || {
        "LOG_ALL before it was asked for".to_owned()
    })?;
    Ok((disk, Log::new(LOG_BYTES)?))
}

fn requests() -> Vec<Request> {
    let request = |kind, segments: &[(u64, u32)]| Request {
        kind,
        sector: 8,
        segments: segments.to_vec(),
    };
    vec![
        request(kind::IN, &[(DATA, 4096)]),
        request(kind::IN, &[(DATA + 0x2fff, 4096)]),
        request(kind::IN, &[(DATA + 0x5_0000 - 100, 200), (HIGH + 1, 3896)]),
        request(kind::IN, &[(HIGH + 0x8000, 0x1_0000)]),
        request(kind::IN, &[(DATA + 0x9_0e00, 512), (DATA + 0xa_0000, 3584)]),
        request(kind::OUT, &[(DATA + 0x10_0000, 8192)]),
        request(kind::FLUSH, &[]),
        request(kind::GET_ID, &[(DATA + 0x20_0ff0, 20)]),
    ]
}

/// Runs each request and compares what was marked by it.
fn each(disk: &mut Disk, log: &Log, queue: u16) -> Outcome {
    let slot = 8 * queue;
    for request in requests() {
        log.take()?;
        disk.push(usize::from(queue), slot, &request)?;
        disk.publish(usize::from(queue))?;
        let used = disk.rings[usize::from(queue)].wait_used(&disk.memory, PATIENCE)?;
        disk.check(slot, &request, used.len)?;
        // The ring's mark may come with the next thing that the worker does, no later than an answer.
        disk.frontend.ask_u64(request::GET_FEATURES)?;
        let marked = log.take()?;
        let (always, sometimes) = ring_pages(disk, usize::from(queue));
        let buffers = buffer_pages(slot, &request);
        let missing: Vec<_> = buffers
            .union(&always)
            .filter(|p| !marked.contains(p))
            .collect();
        let (_, other) = ring_pages(disk, usize::from(1 - queue));
        let more = |p: &&u64| !buffers.contains(p) && !sometimes.contains(p) && !other.contains(p);
        let extra: Vec<_> = marked.iter().filter(more).collect();
        ensure(missing.is_empty() && extra.is_empty(), || {
            format!("{request:x?}: pages {missing:x?} are not marked, {extra:x?} were not written")
        })?;
    }
    Ok(())
}

pub fn exactly(arena: &mut Arena) -> Outcome {
    let (mut disk, log) = attach(arena)?;
    arena.touch(4096..4096 + 8192);
    log.give(&disk)?;
    log_ring(&disk, 0)?;
    log_ring(&disk, 1)?;
    log_all(&disk, true)?;
    each(&mut disk, &log, 0)?;
    each(&mut disk, &log, 1)
}

/// Nothing is marked before LOG_ALL and after it; the ring only if that was asked for.
pub fn while_running(arena: &mut Arena) -> Outcome {
    let (mut disk, log) = attach(arena)?;
    log.give(&disk)?;
    for _ in 0..5 {
        disk.read(0, 0, 8192)?;
        let early = log.take()?;
        ensure(early.is_empty(), || format!("{early:x?} without LOG_ALL"))?;
        log_all(&disk, true)?;
        disk.read(0, 0, 8192)?;
        disk.frontend.ask_u64(request::GET_FEATURES)?;
        let marked = log.take()?;
        let expected = Pages::from([DATA / PAGE, DATA / PAGE + 1, Disk::status_addr(0) / PAGE]);
        ensure(marked == expected, || {
            format!("{marked:x?} are marked, {expected:x?} were written")
        })?;
        log_all(&disk, false)?;
    }
    disk.read(0, 0, 8192)?;
    let late = log.take()?;
    ensure(late.is_empty(), || format!("{late:x?} after LOG_ALL"))
}

/// What a slow disk brings after logging began is marked, whenever it was asked for.
pub fn in_flight(arena: &mut Arena) -> Outcome {
    let (mut disk, log) = attach(arena)?;
    log.give(&disk)?;
    let request = |slot: u16| Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA + u64::from(slot) * 0x1_0000, 4096)],
    };
    for slot in 0..8 {
        disk.push(0, slot, &request(slot))?;
    }
    disk.publish(0)?;
    log_all(&disk, true)?;
    let mut late = Pages::new();
    let mut used_before = BTreeSet::new();
    while let Some(used) = disk.rings[0].poll_used(&disk.memory)? {
        used_before.insert(used.id);
    }
    for _ in used_before.len()..8 {
        let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
        let slot = u16::try_from(used.id)? / 16;
        late.extend(buffer_pages(slot, &request(slot)));
    }
    disk.frontend.ask_u64(request::GET_FEATURES)?;
    let marked = log.take()?;
    let missing: Vec<_> = late.difference(&marked).collect();
    ensure(missing.is_empty() && !late.is_empty(), || {
        format!("pages {missing:x?} of {late:x?} are not marked")
    })
}

/// A log with no room for [`HIGH`]: those pages are left out, and nothing is written behind it.
pub fn too_short(arena: &mut Arena) -> Outcome {
    let (mut disk, _) = attach(arena)?;
    let bytes = (DATA + 8 * PAGE) / PAGE / 8;
    let log = Log::new(bytes + 4096)?;
    let body = message::words(&[bytes, 0]);
    let fds = [log.0.as_fd()];
    disk.frontend.ask(request::SET_LOG_BASE, &body, &fds)?;
    log_all(&disk, true)?;
    let read = Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 4096), (DATA + 0x10_0000, 4096), (HIGH, 4096)],
    };
    disk.run(0, &read)?;
    disk.frontend.ask_u64(request::GET_FEATURES)?;
    let marked = log.take()?;
    let expected = Pages::from([DATA / PAGE, Disk::status_addr(0) / PAGE]);
    ensure(marked == expected, || format!("{marked:x?} are marked"))
}

/// The log's file is cut off while it is used: at most its own device fails.
pub fn cut_off(arena: &mut Arena) -> Outcome {
    for round in 0..5 {
        let (mut disk, log) = attach(arena)?;
        log.give(&disk)?;
        log_ring(&disk, 0)?;
        log_all(&disk, true)?;
        disk.read(0, 0, 4096)?;
        log.0.set_len(round % 2 * 4096)?;
        for slot in 0..8 {
            let request = Request {
                kind: kind::IN,
                sector: 0,
                segments: vec![(DATA + u64::from(slot) * 0x8_0000, 0x8_0000)],
            };
            disk.push(0, slot, &request)?;
        }
        disk.publish(0)?;
        arena.check_other()?;
    }
    Ok(())
}

/// Another log while requests run: marks are in one or the other, and later only in the new.
pub fn replaced(arena: &mut Arena) -> Outcome {
    let (mut disk, mut log) = attach(arena)?;
    log.give(&disk)?;
    log_all(&disk, true)?;
    for round in 0..20u64 {
        let at = DATA + round * 0x1_0000;
        let request = Request {
            kind: kind::IN,
            sector: 0,
            segments: vec![(at, 0x8000)],
        };
        disk.push(0, 0, &request)?;
        disk.publish(0)?;
        let next = Log::new(LOG_BYTES)?;
        next.give(&disk)?;
        let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
        disk.check(0, &request, used.len)?;
        disk.frontend.ask_u64(request::GET_FEATURES)?;
        let both: Pages = log.take()?.union(&next.take()?).copied().collect();
        let expected = buffer_pages(0, &request);
        ensure(both == expected, || {
            format!("round {round}: {both:x?} are marked, {expected:x?} were written")
        })?;
        log = next;
    }
    Ok(())
}
