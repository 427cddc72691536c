//! Memory tables that lie, and memory that is taken away while it is used.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_integration::arena::{Arena, FILE_BYTES};
use bulkhead_integration::disk::{DATA, Disk, DiskError, Options, Request};
use bulkhead_integration::driver::memory::GuestMemory;
use bulkhead_integration::driver::{kind, status};
use bulkhead_integration::frontend::message::{self, RegionEntry, protocol_feature, request};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::End::{Accepted, Closed, Refused, Retired, Silent, Status, Used};
use crate::guest::{attach, fate, probe, wait_for_end};
use crate::{Attack, Case, End};

const TABLE: &str = "a table that can't be true is refused, and nothing of it is kept";
const OPEN: &str = "the specification does not forbid it: taken or refused";
const FDS: &str = "each region has one descriptor: fewer or more is refused, and all are closed";
const TAKEN: &str = "memory that goes away fails the requests, the queue or the connection of that \
                     device alone";

const MIB: u64 = 1 << 20;

/// The table.
pub const CASES: &[Case] = &[
    Case::once(
        "regions_overlap_for_the_guest",
        &[Refused, Closed],
        TABLE,
        |a| table(a, &[entry(0, MIB, 0, 0), entry(MIB / 2, MIB, 2 * MIB, 0)]),
    ),
    Case::once(
        "regions_overlap_for_the_frontend",
        &[Refused, Closed, Accepted],
        OPEN,
        |a| table(a, &[entry(0, MIB, 0, 0), entry(2 * MIB, MIB, MIB / 2, 0)]),
    ),
    Case::once("regions_the_same_twice", &[Refused, Closed], TABLE, |a| {
        table(a, &[entry(0, MIB, 0, 0), entry(0, MIB, 0, 0)])
    }),
    Case::once(
        "region_wraps_for_the_guest",
        &[Refused, Closed],
        TABLE,
        |a| table(a, &[entry(u64::MAX - 4095, MIB, 0, 0)]),
    ),
    Case::once(
        "region_wraps_for_the_frontend",
        &[Refused, Closed],
        TABLE,
        |a| table(a, &[entry(0, MIB, u64::MAX - 4095, 0)]),
    ),
    Case::once("region_offset_wraps", &[Refused, Closed], TABLE, |a| {
        table(a, &[entry(0, MIB, 0, u64::MAX - 4095)])
    }),
    Case::once("region_size_all_ones", &[Refused, Closed], TABLE, |a| {
        table(a, &[entry(0, u64::MAX, 0, 0)])
    }),
    Case::once(
        "region_size_zero",
        &[Refused, Closed, Accepted],
        OPEN,
        |a| table(a, &[entry(0, 0, 0, 0)]),
    ),
    Case::once(
        "region_longer_than_its_file",
        &[Refused, Closed],
        TABLE,
        |a| table(a, &[entry(0, 64 * MIB, 0, 0)]),
    ),
    Case::once("region_behind_its_file", &[Refused, Closed], TABLE, |a| {
        table(a, &[entry(0, MIB, 0, 64 * MIB)])
    }),
    Case::once(
        "region_at_unaligned_offset",
        &[Refused, Closed, Accepted],
        OPEN,
        |a| table(a, &[entry(0, MIB, 0, 100)]),
    ),
    Case::once(
        "region_at_unaligned_address",
        &[Refused, Closed, Accepted],
        OPEN,
        |a| table(a, &[entry(13, MIB, 7, 0)]),
    ),
    Case::once("regions_none", &[Refused, Closed, Accepted], OPEN, |a| {
        table(a, &[])
    }),
    Case::once("regions_nine", &[Refused, Closed], TABLE, |a| {
        let entries: Vec<_> = (0..9).map(|i| entry(i * MIB, MIB, i * MIB, 0)).collect();
        table(a, &entries)
    }),
    Case::once("regions_count_all_ones", &[Refused, Closed], TABLE, |a| {
        let body = message::memory_table(u32::MAX, &[entry(0, MIB, 0, 0)]);
        send_table(a, &body, 1)
    }),
    Case::once(
        "regions_count_more_than_sent",
        &[Refused, Closed],
        TABLE,
        |a| {
            let body = message::memory_table(2, &[entry(0, MIB, 0, 0)]);
            send_table(a, &body, 2)
        },
    ),
    Case::once(
        "regions_count_less_than_sent",
        &[Refused, Closed],
        TABLE,
        |a| {
            let body = message::memory_table(1, &[entry(0, MIB, 0, 0), entry(MIB, MIB, MIB, 0)]);
            send_table(a, &body, 1)
        },
    ),
    Case::once("memory_fds_missing", &[Refused, Closed], FDS, |a| {
        send_table(a, &message::memory_table(1, &[entry(0, MIB, 0, 0)]), 0)
    }),
    Case::once("memory_fds_too_few", &[Refused, Closed], FDS, |a| {
        let body = message::memory_table(2, &[entry(0, MIB, 0, 0), entry(MIB, MIB, MIB, 0)]);
        send_table(a, &body, 1)
    }),
    Case::once("memory_fds_too_many", &[Refused, Closed], FDS, |a| {
        send_table(a, &message::memory_table(1, &[entry(0, MIB, 0, 0)]), 8)
    }),
    Case::once("memory_fds_nine", &[Refused, Closed], FDS, |a| {
        send_table(a, &message::memory_table(1, &[entry(0, MIB, 0, 0)]), 9)
    }),
    Case::once("memory_fds_two_hundred", &[Refused, Closed], FDS, |a| {
        send_table(a, &message::memory_table(1, &[entry(0, MIB, 0, 0)]), 200)
    }),
    Case::once("memory_is_an_eventfd", &[Refused, Closed], TABLE, |a| {
        let event = EventFd::new()?;
        one_fd(a, event.as_fd())
    }),
    Case::once("memory_is_a_pipe", &[Refused, Closed], TABLE, |a| {
        let (read, _write) = nix::unistd::pipe()?;
        one_fd(a, read.as_fd())
    }),
    Case::once("memory_is_a_folder", &[Refused, Closed], TABLE, |a| {
        one_fd(a, File::open("/proc")?.as_fd())
    }),
    Case::once("memory_is_read_only", &[Refused, Closed], TABLE, |a| {
        let file = memfd(MIB)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        one_fd(a, File::open(path)?.as_fd())
    }),
    Case::once("memory_is_empty", &[Refused, Closed], TABLE, |a| {
        one_fd(a, memfd(0)?.as_fd())
    }),
    Case::once(
        "memory_is_on_a_disk",
        &[Refused, Closed],
        "a page that comes from elsewhere makes everybody wait for it",
        |a| {
            let dir = std::env::current_exe()?;
            let file = tempfile::tempfile_in(dir.parent().ok_or("no folder")?)?;
            file.set_len(MIB)?;
            one_fd(a, file.as_fd())
        },
    ),
    Case::new(
        "memory_with_rings_out_and_in",
        &[Accepted],
        "a frontend changes a region by removing and adding it: the queues go on",
        out_and_in,
    ),
    Case::new(
        "memory_replaced_under_load",
        &[Accepted, Refused, Closed],
        "the queues go on in the new table, or stop",
        replaced,
    ),
    Case::new(
        "memory_without_the_rings",
        &[Accepted, Refused, Closed, Retired],
        "a table that no longer has the rings stops their queues",
        without_rings,
    ),
    Case::new(
        "memory_shrunk_under_reads",
        &[Status(status::IOERR), Retired, Closed, Used],
        TAKEN,
        |a| shrunk(a, kind::IN),
    ),
    Case::new(
        "memory_shrunk_under_writes",
        &[Status(status::IOERR), Retired, Closed, Used],
        TAKEN,
        |a| shrunk(a, kind::OUT),
    ),
    Case::new(
        "memory_with_rings_shrunk",
        &[Retired, Closed],
        TAKEN,
        rings_shrunk,
    ),
];

fn entry(guest_addr: u64, size_bytes: u64, user: u64, mmap_offset: u64) -> RegionEntry {
    RegionEntry {
        guest_addr,
        size_bytes,
        user_addr: user,
        mmap_offset,
    }
}

fn memfd(bytes: u64) -> Result<OwnedFd, Box<dyn Error>> {
    let fd = memfd_create("memory", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&fd, i64::try_from(bytes)?)?;
    Ok(fd)
}

fn table(arena: &mut Arena, entries: &[RegionEntry]) -> Attack {
    let count = u32::try_from(entries.len())?;
    send_table(arena, &message::memory_table(count, entries), entries.len())
}

/// SET_MEM_TABLE with memfds of 4 MiB.
fn send_table(arena: &mut Arena, body: &[u8], fds: usize) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let files: Vec<_> = (0..fds).map(|_| memfd(4 * MIB)).collect::<Result<_, _>>()?;
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    fate(disk.frontend.set(request::SET_MEM_TABLE, body, &fds))
}

fn one_fd(arena: &mut Arena, fd: BorrowedFd<'_>) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    fate(
        disk.frontend
            .set_memory_table(&[entry(0, MIB, 0, 0)], &[fd]),
    )
}

fn reads(disk: &mut Disk, kind: u32, len: u32) -> Result<(), DiskError> {
    for slot in 0..4 {
        let request = Request {
            kind,
            sector: u64::from(slot) * 1024,
            segments: vec![(DATA + u64::from(slot) * 0x10_0000, len)],
        };
        disk.push(0, slot, &request)?;
    }
    disk.publish(0)
}

/// The same table again, many times, while requests run.
fn replaced(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    for _ in 0..20 {
        reads(&mut disk, kind::IN, 0x8_0000)?;
        match disk.share_memory() {
            Ok(()) => {}
            Err(DiskError::Frontend(e)) => return fate(Err(e)),
            Err(other) => return Err(other.into()),
        }
        for _ in 0..4 {
            let used = disk.rings[0].wait_used(&disk.memory, Duration::from_secs(5))?;
            if used.len != 0x8_0001 {
                return Err(format!("{used:?} after the table was replaced").into());
            }
        }
    }
    probe(&mut disk, 1)?;
    Ok(Accepted)
}

/// The region with the rings is removed and added again, many times, while requests run.
fn out_and_in(arena: &mut Arena) -> Attack {
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.protocol_features |= protocol_feature::CONFIGURE_MEM_SLOTS;
    let mut disk = arena.attach(&options)?;
    for _ in 0..20 {
        reads(&mut disk, kind::IN, 0x8_0000)?;
        let region = &disk.memory.regions()[0];
        let body = message::single_region(&region.entry());
        let frontend = &disk.frontend;
        frontend.set(request::REM_MEM_REG, &body, &[])?;
        // Nothing is taken now, and nothing is lost.
        disk.rings[0].kick.write(1)?;
        frontend.set(request::ADD_MEM_REG, &body, &[region.file()])?;
        for _ in 0..4 {
            let used = disk.rings[0].wait_used(&disk.memory, Duration::from_secs(5))?;
            if used.len != 0x8_0001 {
                return Err(format!("{used:?} after the region was there again").into());
            }
        }
    }
    probe(&mut disk, 1)?;
    Ok(Accepted)
}

fn without_rings(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    reads(&mut disk, kind::IN, 0x8_0000)?;
    let other = GuestMemory::new(&[(0x10_0000_0000, MIB, 0)])?;
    let region = &other.regions()[0];
    let set = disk
        .frontend
        .set_memory_table(&[region.entry()], &[region.file()]);
    let end = fate(set)?;
    std::thread::sleep(Duration::from_millis(20));
    Ok(end)
}

/// Takes the data away and goes on with requests until they fail.
fn shrunk(arena: &mut Arena, kind: u32) -> Attack {
    if kind == kind::OUT {
        arena.touch(0..FILE_BYTES);
    }
    let mut disk = attach(arena)?;
    reads(&mut disk, kind, 0x8_0000)?;
    ftruncate(disk.memory.regions()[1].file(), 0)?;
    let mut end = Silent;
    for round in 0..5 {
        for _ in 0..4 {
            end = wait_for_end(&mut disk, None)?;
            if end != Used {
                return Ok(end);
            }
        }
        if round < 4 {
            reads(&mut disk, kind, 0x1000)?;
        }
    }
    // Requests that came after the memory went can't have succeeded.
    let bytes = (0..4).map(|slot| disk.memory.read(Disk::status_addr(slot), 1));
    let all: Vec<u8> = bytes.collect::<Result<Vec<_>, _>>()?.concat();
    if all.contains(&status::OK) {
        return Err(format!("a request without memory succeeded: {all:?}").into());
    }
    Ok(end)
}

fn rings_shrunk(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    reads(&mut disk, kind::IN, 0x8_0000)?;
    ftruncate(disk.memory.regions()[0].file(), 0)?;
    // From here on the rings can't be touched from this side either.
    disk.rings[0].kick.write(1)?;
    arena.check_other()?;
    for _ in 0..100 {
        if disk.rings[0].has_failed(Duration::from_millis(10)) {
            return Ok(Retired);
        }
        disk.rings[0].kick.write(1)?;
        if disk.frontend.closes_within(Duration::from_millis(10)) {
            return Ok(End::Closed);
        }
    }
    Ok(Silent)
}
