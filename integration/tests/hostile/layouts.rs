//! Chains whose shape is wrong: loops, tables in tables, headers and status bytes that are not
//! where they belong.

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, HIGH, Options, feature};
use bulkhead_integration::driver::ring::{Desc, NEXT, WRITE, linked};
use bulkhead_integration::driver::{kind, status};

use crate::End::{Retired, Status, Used};
use crate::guest::{attach, descriptors, offer, offer_chain, offer_other};
use crate::{Attack, Case};

const OK: crate::End = Status(status::OK);
const IOERR: crate::End = Status(status::IOERR);
const UNSUPP: crate::End = Status(status::UNSUPP);

const BROKEN: &str = "a chain that can't be walked retires the queue; a device that found the \
                      status byte may fail the request instead";
const FRAMING: &str = "virtio 2.7.4 lets the driver frame as it likes: serve it, fail it or retire";
const NO_ANSWER: &str =
    "there is no byte to answer in: the queue retires, or the chain is used empty";

/// The table.
pub const CASES: &[Case] = &[
    Case::split("loop_to_itself", &[Retired, IOERR], BROKEN, |a| {
        loops(a, 1, 1)
    }),
    Case::split("loop_to_head", &[Retired, IOERR], BROKEN, |a| {
        loops(a, 2, 0)
    }),
    Case::split("loop_of_two", &[Retired, IOERR], BROKEN, |a| loops(a, 2, 1)),
    Case::split(
        "loop_in_indirect_table",
        &[Retired, IOERR],
        BROKEN,
        indirect_loop,
    ),
    Case::split("next_out_of_range", &[Retired, IOERR], BROKEN, |a| {
        loops(a, 1, 128)
    }),
    Case::split("next_far_out_of_range", &[Retired, IOERR], BROKEN, |a| {
        loops(a, 1, 0xffff)
    }),
    Case::split(
        "indirect_next_out_of_range",
        &[Retired, IOERR],
        BROKEN,
        |a| {
            table(a, |descs| {
                descs[1].next = 3;
            })
        },
    ),
    Case::new(
        "indirect_inside_indirect",
        &[Retired, IOERR],
        BROKEN,
        nested,
    ),
    Case::new("indirect_zero_length", &[Retired, IOERR], BROKEN, |a| {
        indirect_len(a, 0)
    }),
    Case::new("indirect_odd_length", &[Retired, IOERR], BROKEN, |a| {
        indirect_len(a, 47)
    }),
    Case::split("indirect_short_table", &[Retired, IOERR], BROKEN, |a| {
        indirect_len(a, 32)
    }),
    Case::packed(
        "indirect_table_without_its_status",
        &[Retired, IOERR, Used],
        "a packed table ends where its length says: the last writable byte is the status",
        |a| indirect_len(a, 32),
    ),
    Case::new("indirect_less_than_one", &[Retired, IOERR], BROKEN, |a| {
        indirect_len(a, 15)
    }),
    Case::new("indirect_huge_length", &[Retired, IOERR], BROKEN, |a| {
        indirect_len(a, 0xffff_fff0)
    }),
    Case::new("indirect_out_of_memory", &[Retired, IOERR], BROKEN, |a| {
        indirect_desc(a, Desc::indirect(0x1000, 48))
    }),
    Case::new("indirect_wraps", &[Retired, IOERR], BROKEN, |a| {
        indirect_desc(a, Desc::indirect(u64::MAX - 15, 48))
    }),
    Case::new(
        "indirect_unaligned",
        &[OK, Retired, IOERR],
        "the specification asks for no alignment of an indirect table",
        indirect_unaligned,
    ),
    Case::new(
        "indirect_with_next",
        &[Retired, IOERR, OK],
        "virtio 2.7.5.3.1 forbids the driver INDIRECT with NEXT; a device may ignore NEXT",
        indirect_with_next,
    ),
    Case::new(
        "indirect_with_write_flag",
        &[OK, Retired, IOERR],
        "virtio 2.7.5.3.2: the device ignores the write-only flag of a table",
        |a| {
            let mut desc = Desc::indirect(Disk::table_addr(0), 48);
            desc.flags |= WRITE;
            indirect_desc(a, desc)
        },
    ),
    Case::new(
        "indirect_after_header",
        &[OK, Retired, IOERR],
        "virtio 2.7.5.3.2: a device must take a chain that ends in a table; ours may refuse",
        indirect_after_header,
    ),
    Case::new(
        "indirect_not_negotiated",
        &[OK, Retired, IOERR],
        "served or refused, never misread",
        indirect_not_negotiated,
    ),
    Case::new(
        "indirect_longer_than_queue",
        &[OK, Retired, IOERR],
        "virtio 2.7.5.3.1 forbids it to the driver; the device may serve it",
        longer_than_queue,
    ),
    Case::new("zero_length_data", &[OK, Retired, IOERR], FRAMING, |a| {
        spoilt(a, kind::IN, |descs| {
            descs.insert(1, Desc::writable(DATA + 0x1000, 0));
        })
    }),
    Case::new("zero_length_header", &[Retired, IOERR], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[0].len = 0)
    }),
    Case::new(
        "zero_length_status",
        &[Retired, IOERR, Used],
        NO_ANSWER,
        |a| spoilt(a, kind::OUT, |descs| descs[2].len = 0),
    ),
    Case::new("header_split_in_two", &[OK, IOERR, Retired], FRAMING, |a| {
        header_split(a, 8)
    }),
    Case::new(
        "header_split_in_bytes",
        &[OK, IOERR, Retired],
        FRAMING,
        |a| header_split(a, 1),
    ),
    Case::new("header_short", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[0].len = 15)
    }),
    Case::new("header_long", &[OK, IOERR, Retired], FRAMING, |a| {
        spoilt(a, kind::IN, |descs| descs[0].len = 17)
    }),
    Case::new("header_write_only", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[0].flags |= WRITE)
    }),
    Case::new("header_out_of_memory", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[0].addr = 0x1000)
    }),
    Case::new("header_wraps", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[0].addr = u64::MAX - 7)
    }),
    Case::new("header_only", &[Retired, Used], NO_ANSWER, |a| {
        spoilt(a, kind::IN, |descs| descs.truncate(1))
    }),
    Case::new("status_missing", &[Retired, Used], NO_ANSWER, |a| {
        spoilt(a, kind::OUT, |descs| descs.truncate(2))
    }),
    Case::new(
        "status_missing_on_read",
        &[IOERR, Retired, Used],
        "the last writable byte is the status: 4095 bytes of data are left",
        |a| spoilt(a, kind::IN, |descs| descs.truncate(2)),
    ),
    Case::new("status_read_only", &[Retired, Used], NO_ANSWER, |a| {
        spoilt(a, kind::OUT, |descs| descs[2].flags &= !WRITE)
    }),
    Case::new("status_out_of_memory", &[Retired], NO_ANSWER, |a| {
        spoilt(a, kind::OUT, |descs| descs[2].addr = 0x1000)
    }),
    Case::new("status_wraps", &[Retired], NO_ANSWER, |a| {
        spoilt(a, kind::IN, |descs| {
            descs[2].addr = u64::MAX;
            descs[2].len = 2;
        })
    }),
    Case::new(
        "status_longer_than_a_byte",
        &[OK, IOERR, Retired, Used],
        FRAMING,
        |a| spoilt(a, kind::OUT, |descs| descs[2].len = 8),
    ),
    Case::new(
        "status_in_data_segment",
        &[OK, IOERR, Retired],
        FRAMING,
        |a| {
            spoilt(a, kind::IN, |descs| {
                descs.truncate(2);
                descs[1].len = 4097;
            })
        },
    ),
    Case::new(
        "header_in_data_segment",
        &[OK, IOERR, Retired],
        FRAMING,
        |a| {
            spoilt(a, kind::OUT, |descs| {
                descs[0].len += 4096;
                descs.remove(1);
            })
        },
    ),
    Case::new("read_into_read_only", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::IN, |descs| descs[1].flags &= !WRITE)
    }),
    Case::new("write_from_write_only", &[IOERR, Retired], BROKEN, |a| {
        spoilt(a, kind::OUT, |descs| descs[1].flags |= WRITE)
    }),
    Case::new(
        "readable_after_writable",
        &[IOERR, Retired, Used],
        BROKEN,
        |a| spoilt(a, kind::OUT, |descs| descs.swap(1, 2)),
    ),
    Case::new(
        "unknown_flags",
        &[OK, IOERR, UNSUPP, Retired],
        FRAMING,
        |a| spoilt(a, kind::IN, |descs| descs[1].flags |= 0xfff8),
    ),
    Case::new(
        "all_zero_descriptor",
        &[Retired, IOERR, Used],
        NO_ANSWER,
        |a| spoilt(a, kind::IN, |descs| *descs = vec![Desc::readable(0, 0)]),
    ),
];

/// A good request of one logical block, spoilt, offered directly.
fn spoilt(arena: &mut Arena, kind: u32, spoil: fn(&mut Vec<Desc>)) -> Attack {
    let mut disk = attach(arena)?;
    if kind == kind::OUT {
        arena.touch(0..4096);
    }
    let mut descs = descriptors(&disk, kind, 0, &[(DATA, 4096)])?;
    spoil(&mut descs);
    offer_chain(&mut disk, &descs)
}

/// A good request whose descriptor `from` goes on at `next`.
fn loops(arena: &mut Arena, from: usize, next: u16) -> Attack {
    let mut disk = attach(arena)?;
    let mut descs = linked(&descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?, 0);
    descs[from].flags |= NEXT;
    descs[from].next = next;
    for (desc, index) in descs.iter().zip(0..) {
        disk.rings[0].write_desc(&disk.memory, index, desc)?;
    }
    offer(&mut disk, &descs)
}

/// A good request in the indirect table of a split ring, its links spoilt.
fn table(arena: &mut Arena, spoil: fn(&mut Vec<Desc>)) -> Attack {
    let mut disk = attach(arena)?;
    let mut descs = linked(&descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?, 0);
    spoil(&mut descs);
    let bytes: Vec<u8> = descs.iter().flat_map(Desc::bytes).collect();
    disk.memory.write(Disk::table_addr(0), &bytes)?;
    let len = u32::try_from(bytes.len())?;
    offer_other(
        &mut disk,
        &[Desc::indirect(Disk::table_addr(0), len)],
        &descs,
    )
}

fn offer_table(disk: &mut Disk, at: u64, descs: &[Desc]) -> Attack {
    let len = disk.rings[0].write_table(&disk.memory, at, descs)?;
    offer_other(disk, &[Desc::indirect(at, len)], descs)
}

fn indirect_loop(arena: &mut Arena) -> Attack {
    table(arena, |descs| {
        descs[2].flags |= NEXT;
        descs[2].next = 1;
    })
}

fn good(disk: &Disk) -> Result<Vec<Desc>, Box<dyn std::error::Error>> {
    descriptors(disk, kind::IN, 0, &[(DATA, 4096)])
}

fn nested(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = good(&disk)?;
    let (inner, outer) = (Disk::table_addr(1), Disk::table_addr(0));
    let ring = &disk.rings[0];
    let len = ring.write_table(&disk.memory, inner, &descs)?;
    let len = ring.write_table(&disk.memory, outer, &[Desc::indirect(inner, len)])?;
    offer_other(&mut disk, &[Desc::indirect(outer, len)], &descs)
}

/// A good table of three entries that the outer descriptor gives another length.
fn indirect_len(arena: &mut Arena, len: u32) -> Attack {
    indirect_desc(arena, Desc::indirect(Disk::table_addr(0), len))
}

fn indirect_desc(arena: &mut Arena, outer: Desc) -> Attack {
    let mut disk = attach(arena)?;
    let descs = good(&disk)?;
    disk.rings[0].write_table(&disk.memory, Disk::table_addr(0), &descs)?;
    offer_other(&mut disk, &[outer], &descs)
}

fn indirect_unaligned(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = good(&disk)?;
    offer_table(&mut disk, Disk::table_addr(0) + 1, &descs)
}

fn indirect_with_next(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = good(&disk)?;
    disk.rings[0].write_table(&disk.memory, Disk::table_addr(0), &descs)?;
    let outer = Desc::indirect(Disk::table_addr(0), 48);
    let tail = Desc::writable(Disk::status_addr(1), 1);
    let mut all = vec![tail];
    all.extend(descs);
    offer_other(&mut disk, &[outer, tail], &all)
}

/// Header in the ring, data and status in a table behind it.
fn indirect_after_header(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let descs = good(&disk)?;
    let at = Disk::table_addr(0);
    let len = disk.rings[0].write_table(&disk.memory, at, &descs[1..])?;
    offer_other(&mut disk, &[descs[0], Desc::indirect(at, len)], &descs)
}

fn indirect_not_negotiated(arena: &mut Arena) -> Attack {
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.features &= !feature::INDIRECT_DESC;
    let mut disk = arena.attach(&options)?;
    let descs = good(&disk)?;
    offer_table(&mut disk, Disk::table_addr(0), &descs)
}

fn longer_than_queue(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let list: Vec<_> = (0..400).map(|i| (DATA + i * 512, 512)).collect();
    let descs = descriptors(&disk, kind::IN, 0, &list)?;
    offer_table(&mut disk, HIGH, &descs)
}

fn header_split(arena: &mut Arena, piece: u32) -> Attack {
    let mut disk = attach(arena)?;
    let descs = descriptors(&disk, kind::IN, 0, &[(DATA, 4096)])?;
    let mut split: Vec<Desc> = (0..16 / piece)
        .map(|i| Desc::readable(descs[0].addr + u64::from(i * piece), piece))
        .collect();
    split.extend_from_slice(&descs[1..]);
    offer_chain(&mut disk, &split)
}
