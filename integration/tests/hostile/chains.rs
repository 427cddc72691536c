//! Requests whose ranges, types or lengths lie: the device answers them with a status.

use bulkhead_integration::arena::{Arena, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, HIGH, HIGH_BYTES, LOW, LOW_BYTES, Options};
use bulkhead_integration::driver::ring::{Desc, WRITE};
use bulkhead_integration::driver::{kind, status};

use crate::End::{Retired, Status, Used};
use crate::guest::{attach, descriptors, expect_data, offer_chain, offer_other};
use crate::{Attack, Case};

const OK: crate::End = Status(status::OK);
const IOERR: crate::End = Status(status::IOERR);
const UNSUPP: crate::End = Status(status::UNSUPP);

const RANGE: &str = "a range past the end fails as a whole: no stale byte, no grown file";
const LENGTH: &str = "a length that is not whole sectors fails the request";
const UNKNOWN: &str = "virtio 5.2.6: an unknown request type is answered with UNSUPP";
const ADDRESS: &str = "a buffer outside guest memory fails the request, or retires the queue \
                       where no status can be written";
const ID: &str = "a device may fill what there is, or fail the request; it never writes past it";

/// The table.
pub const CASES: &[Case] = &[
    Case::new("read_past_end", &[IOERR], RANGE, |a| {
        range(a, kind::IN, FILE_SECTORS, 4096)
    }),
    Case::new("write_past_end", &[IOERR], RANGE, |a| {
        range(a, kind::OUT, FILE_SECTORS, 4096)
    }),
    Case::new("read_far_past_end", &[IOERR], RANGE, |a| {
        range(a, kind::IN, FILE_SECTORS * 1000, 4096)
    }),
    Case::new("read_across_end", &[IOERR], RANGE, |a| {
        range(a, kind::IN, FILE_SECTORS - 8, 8192)
    }),
    Case::new("write_across_end", &[IOERR], RANGE, |a| {
        range(a, kind::OUT, FILE_SECTORS - 8, 8192)
    }),
    Case::new("read_last_block", &[OK], "the end itself is inside", |a| {
        range(a, kind::IN, FILE_SECTORS - 8, 4096)
    }),
    Case::new("read_sector_overflow", &[IOERR], RANGE, |a| {
        range(a, kind::IN, u64::MAX, 512)
    }),
    Case::new("write_sector_overflow", &[IOERR], RANGE, |a| {
        range(a, kind::OUT, u64::MAX - 7, 4096)
    }),
    // 2^55 sectors of 512 bytes are 2^64 bytes: zero, if the product wraps.
    Case::new("write_byte_offset_overflow", &[IOERR], RANGE, |a| {
        range(a, kind::OUT, 1 << 55, 4096)
    }),
    Case::new("read_byte_offset_negative", &[IOERR], RANGE, |a| {
        range(a, kind::IN, 1 << 54, 4096)
    }),
    Case::new(
        "read_lengths_past_u32",
        &[IOERR, Retired],
        "2^32 + 4096 bytes are not 4096 bytes",
        |a| lengths_past_u32(a, kind::IN),
    ),
    Case::new(
        "write_lengths_past_u32",
        &[IOERR, Retired],
        "2^32 + 4096 bytes are not 4096 bytes",
        |a| lengths_past_u32(a, kind::OUT),
    ),
    Case::new("read_not_whole_sectors", &[IOERR], LENGTH, |a| {
        range(a, kind::IN, 0, 100)
    }),
    Case::new("write_not_whole_sectors", &[IOERR], LENGTH, |a| {
        range(a, kind::OUT, 0, 513)
    }),
    Case::new("write_one_byte", &[IOERR], LENGTH, |a| {
        range(a, kind::OUT, 0, 1)
    }),
    Case::new(
        "read_nothing",
        &[OK, IOERR, Retired],
        "the specification does not say what a transfer of no bytes is",
        |a| segments(a, kind::IN, &[]),
    ),
    Case::new(
        "write_nothing",
        &[OK, IOERR, Retired],
        "the specification does not say what a transfer of no bytes is",
        |a| segments(a, kind::OUT, &[]),
    ),
    Case::new("unknown_type", &[UNSUPP], UNKNOWN, |a| range(a, 99, 0, 512)),
    Case::new("unknown_type_high_bit", &[UNSUPP], UNKNOWN, |a| {
        range(a, 0x8000_0000, 0, 512)
    }),
    Case::new("unknown_type_legacy_barrier", &[UNSUPP], UNKNOWN, |a| {
        range(a, 0x8000_0001, 0, 512)
    }),
    Case::new("scsi_command", &[UNSUPP], UNKNOWN, |a| range(a, 2, 0, 512)),
    Case::new(
        "discard_not_negotiated",
        &[UNSUPP, IOERR],
        "a feature that was not negotiated is not served",
        |a| segments(a, kind::DISCARD, &[(DATA, 16)]),
    ),
    Case::new(
        "write_zeroes_not_negotiated",
        &[UNSUPP, IOERR],
        "a feature that was not negotiated is not served",
        |a| segments(a, kind::WRITE_ZEROES, &[(DATA, 16)]),
    ),
    Case::new(
        "flush_with_data",
        &[OK, IOERR, UNSUPP, Retired],
        "a flush has no data; it may be ignored or refused",
        |a| segments(a, kind::FLUSH, &[(DATA, 512)]),
    ),
    Case::new("get_id_without_data", &[IOERR, OK, Retired], ID, |a| {
        segments(a, kind::GET_ID, &[])
    }),
    Case::new("get_id_short", &[IOERR, OK], ID, |a| {
        segments(a, kind::GET_ID, &[(DATA, 4)])
    }),
    Case::new("get_id_split", &[IOERR, OK], ID, |a| {
        segments(a, kind::GET_ID, &[(DATA, 7), (DATA + 64, 13)])
    }),
    Case::new(
        "get_id_readable_data",
        &[IOERR, OK, Retired],
        ID,
        get_id_readable,
    ),
    Case::new("data_in_hole", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::IN, &[(0x1000, 4096)])
    }),
    Case::new("write_data_in_hole", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::OUT, &[(0x1000, 4096)])
    }),
    Case::new("data_wraps", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::IN, &[(u64::MAX - 4095, 8192)])
    }),
    Case::new("data_at_last_address", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::OUT, &[(u64::MAX - 4095, 4096)])
    }),
    Case::new("data_leaves_memory", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::IN, &[(HIGH + HIGH_BYTES - 256, 4096)])
    }),
    Case::new("data_one_byte_outside", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::IN, &[(HIGH + HIGH_BYTES - 4095, 4096)])
    }),
    Case::new("data_length_huge", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::IN, &[(DATA, u32::MAX)])
    }),
    Case::new("second_segment_in_hole", &[IOERR, Retired], ADDRESS, |a| {
        segments(a, kind::OUT, &[(DATA, 4096), (0x1000, 4096)])
    }),
    Case::new(
        "data_straddles_two_regions",
        &[OK, IOERR, Retired],
        "adjacent for the guest, in two files for the backend: it may serve or refuse",
        straddle,
    ),
    Case::new(
        "read_into_its_own_header",
        &[OK, IOERR, Retired, Used],
        "the header was copied once: what the read puts there is data",
        |a| segments(a, kind::IN, &[(Disk::header_addr(0) & !511, 512)]),
    ),
    Case::new(
        "status_overlaps_data",
        &[OK, IOERR, Retired, Used],
        "the guest spoils its own answer",
        status_overlaps_data,
    ),
    Case::new(
        "same_buffer_twice",
        &[OK, IOERR, Retired],
        "two segments over the same bytes: the guest's own data",
        |a| segments(a, kind::IN, &[(DATA, 4096), (DATA, 4096)]),
    ),
    Case::new(
        "segments_shifted_by_one_read",
        &[OK],
        "alignment is the host's problem, not the guest's",
        |a| shifted(a, kind::IN),
    ),
    Case::new(
        "segments_shifted_by_one_write",
        &[OK],
        "alignment is the host's problem, not the guest's",
        |a| shifted(a, kind::OUT),
    ),
];

fn range(arena: &mut Arena, kind: u32, sector: u64, len: u32) -> Attack {
    let mut disk = attach(arena)?;
    disk.memory.fill(DATA, 8192, 0xdd)?;
    let descs = descriptors(&disk, kind, sector, &[(DATA, len)])?;
    let end = offer_chain(&mut disk, &descs)?;
    if end == IOERR && kind == kind::IN && disk.memory.read(DATA, 8192)? != vec![0xdd; 8192] {
        return Err("a read that failed put bytes into guest memory".into());
    }
    Ok(end)
}

fn segments(arena: &mut Arena, kind: u32, list: &[(u64, u32)]) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind, 0, list)?;
    if kind == kind::OUT {
        // A write of several segments may have reached the first when the second failed.
        arena.touch(0..8192);
    }
    offer_chain(&mut disk, &descs)
}

fn get_id_readable(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let mut descs = descriptors(&disk, kind::GET_ID, 0, &[(DATA, 20)])?;
    descs[1].flags &= !WRITE;
    offer_chain(&mut disk, &descs)
}

/// 102 segments of 40 MiB and one more, 2^32 + 4096 bytes in all, in an indirect table.
fn lengths_past_u32(arena: &mut Arena, kind: u32) -> Attack {
    const EXTRA: u64 = 0x2_0000_0000;
    const EXTRA_BYTES: u32 = 40 << 20;
    let options = Options {
        queues: 2,
        extra_region: Some((EXTRA, u64::from(EXTRA_BYTES))),
        ..Options::default()
    };
    let mut disk = arena.attach(&options)?;
    let rest = u32::try_from((1u64 << 32) + 4096 - 102 * u64::from(EXTRA_BYTES))?;
    let mut list = vec![(EXTRA, EXTRA_BYTES); 102];
    list.push((EXTRA, rest));
    let descs = descriptors(&disk, kind, 0, &list)?;
    let len = disk.rings[0].write_table(&disk.memory, HIGH, &descs)?;
    offer_other(&mut disk, &[Desc::indirect(HIGH, len)], &descs)
}

fn straddle(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let list = [(LOW + LOW_BYTES - 2048, 4096)];
    let descs = descriptors(&disk, kind::IN, 16, &list)?;
    let end = offer_chain(&mut disk, &descs)?;
    if end == OK {
        let halves = [(LOW + LOW_BYTES - 2048, 2048), (DATA, 2048)];
        expect_data(arena, &disk, 16, &halves)?;
    }
    Ok(end)
}

fn status_overlaps_data(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let mut descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    descs[2].addr = DATA + 100;
    match offer_chain(&mut disk, &descs)? {
        Status(_) => Ok(Used),
        end => Ok(end),
    }
}

fn shifted(arena: &mut Arena, kind: u32) -> Attack {
    let mut disk = attach(arena)?;
    let list = [(DATA + 1, 4096), (DATA + 0x3001, 8192), (HIGH + 1, 4096)];
    let len = 4096 + 8192 + 4096;
    if kind == kind::OUT {
        for (i, &(addr, len)) in list.iter().enumerate() {
            let byte = u8::try_from(i)? + 0x51;
            disk.memory.fill(addr, len as usize, byte)?;
        }
        arena.touch(0..len);
    }
    let descs = descriptors(&disk, kind, 0, &list)?;
    let end = offer_chain(&mut disk, &descs)?;
    if kind == kind::IN {
        expect_data(arena, &disk, 0, &list)?;
        return Ok(end);
    }
    let back = disk.read(0, 0, u32::try_from(len)?)?;
    let wanted = [vec![0x51; 4096], vec![0x52; 8192], vec![0x53; 4096]].concat();
    if back != wanted {
        return Err("the write put other bytes on the disk".into());
    }
    Ok(end)
}
