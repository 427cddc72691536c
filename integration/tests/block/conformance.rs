//! `block_conforms_*`: one suite for every storage, plain and encrypted, with blocks of 512 and 4096 bytes: what
//! is written reads back however it lies in memory, zeroes are zeroes, nothing beside a range changes, and what
//! does not lie inside is an error.

use std::path::Path;

use bulkhead_integration::disk::{DATA, Disk, DiskError, Options, Request, feature};
use bulkhead_integration::driver::{DriverError, SECTOR_BYTES, kind, status};
use bulkhead_integration::processes::{Process, binary};
use bulkhead_integration::random::Random;
use libtest_mimic::{Failed, Trial};

use crate::requests::unaligned;
use crate::support::{Outcome, against_shadow, ensure};

/// Bytes of the disk: as many as of those that `support` has requests for.
const BYTES: u64 = 2 << 20;
const SECTORS: u64 = BYTES / SECTOR_BYTES;

/// virtio-blk features that only these tests use.
const SIZE_MAX: u64 = 1 << 1;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Storages: name, `--blk` with the path of a file, and whether they keep what is written.
const STORAGES: [(&str, &str, bool); 9] = [
    ("file", "file:@", true),
    ("ram", "ram:2MiB", true),
    ("null", "null:2MiB", false),
    ("volatile_cache", "volatile-cache:@", true),
    ("delay", "delay=200:ram:2MiB", true),
    ("delayed_file", "delay=200:file:@", true),
    // Each third read and write is to be tried again: nothing that a guest sees.
    (
        "error",
        "error=read/EAGAIN/3:error=write/EINTR/3:ram:2MiB",
        true,
    ),
    ("no_zeroes", "error=zero/EOPNOTSUPP/1:file:@", true),
    ("no_discard", "error=discard/EOPNOTSUPP/1:file:@", true),
];

/// Name, data unit and logical block in bytes.
const SHAPES: [(&str, Option<u32>, u32); 5] = [
    ("512", None, 512),
    ("4096", None, 4096),
    ("xts512", Some(512), 512),
    ("xts512_4096", Some(512), 4096),
    ("xts4096", Some(4096), 4096),
];

/// A disk of the table.
#[derive(Debug, Clone, Copy)]
struct Case {
    spec: &'static str,
    keeps: bool,
    unit: Option<u32>,
    block_bytes: u32,
}

/// First sector, sectors and flags of a range.
type Range = (u64, u64, u32);

type Check = fn(&Case, &mut Disk, &mut Random) -> Outcome;

const CHECKS: [(&str, Check); 7] = [
    ("configuration", configuration),
    ("reads and writes", reads_and_writes),
    ("unaligned segments", unaligned_segments),
    ("zeroes", zeroes),
    ("discards", discards),
    ("the end of the device", the_end),
    ("ranges that are none", bad_ranges),
];

/// A trial for each storage and shape, and one for each storage that is read-only.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (storage, spec, keeps) in STORAGES {
        for (shape, unit, block_bytes) in SHAPES {
            let case = Case {
                spec,
                keeps,
                unit,
                block_bytes,
            };
            let name = format!("block_conforms_{storage}_{shape}");
            let seed = name.clone();
            trials.push(Trial::test(name, move || conforms(case, &seed)));
        }
        let (_, unit, block_bytes) = SHAPES[4];
        let case = Case {
            spec,
            keeps,
            unit,
            block_bytes,
        };
        let name = format!("block_conforms_{storage}_read_only");
        trials.push(Trial::test(name, move || read_only(case)));
    }
    trials
}

impl Case {
    fn block(&self) -> u64 {
        u64::from(self.block_bytes) / SECTOR_BYTES
    }

    fn attach(&self, dir: &Path, read_only: bool) -> Result<(Process, Disk), Failed> {
        let (socket, file) = (dir.join("a.sock"), dir.join("volume"));
        std::fs::File::create(&file)?.set_len(BYTES)?;
        let mut args = vec!["--socket".to_owned(), socket.display().to_string()];
        args.extend(["--blk".to_owned()]);
        args.push(self.spec.replace('@', &file.display().to_string()));
        args.extend(["--discard".to_owned(), "--logical-block".to_owned()]);
        args.push(self.block_bytes.to_string());
        if let Some(unit) = self.unit {
            args.extend(["--xts", "--data-unit"].map(str::to_owned));
            args.push(unit.to_string());
        }
        if read_only {
            args.push("--read-only".to_owned());
        }
        let process = Process::start(&binary("serve", "bulkhead-benches")?, &args)?;
        let mut options = Options::default();
        options.features |=
            SIZE_MAX | TOPOLOGY | CONFIG_WCE | DISCARD | WRITE_ZEROES | feature::BLK_RO;
        let disk = Disk::attach(&socket, &options)?;
        Ok((process, disk))
    }
}

fn conforms(case: Case, name: &str) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let (process, mut disk) = case.attach(dir.path(), false)?;
    let mut random = Random::named(name);
    for (what, check) in CHECKS {
        check(&case, &mut disk, &mut random)
            .map_err(|e| format!("{what}: {e}\n--- log:\n{}", process.log()))?;
    }
    Ok(())
}

fn read_only(case: Case) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let (_process, mut disk) = case.attach(dir.path(), true)?;
    let offered = disk.features;
    ensure(
        offered & feature::BLK_RO != 0 && offered & (DISCARD | WRITE_ZEROES) == 0,
        || format!("features {offered:#x} of a read-only disk"),
    )?;
    let len = case.block_bytes;
    disk.read(0, 0, len)?;
    disk.flush(0)?;
    refused(&mut disk, kind::OUT, 0, len, status::IOERR)?;
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        write_ranges(&disk, &[(0, case.block(), 0)])?;
        refused(&mut disk, kind, 0, 16, status::UNSUPP)?;
    }
    Ok(())
}

/// Runs a request that must end with this status.
fn refused(disk: &mut Disk, kind: u32, sector: u64, len: u32, expected: u8) -> Outcome {
    let request = Request {
        kind,
        sector,
        segments: vec![(DATA, len)],
    };
    match disk.run(0, &request) {
        Err(DiskError::Driver(DriverError::Status(status))) if status == expected => Ok(()),
        other => Err(format!("{request:?} ended with {other:?}, not with {expected}").into()),
    }
}

/// Writes ranges down for the next request: sector, sectors, flags.
fn write_ranges(disk: &Disk, ranges: &[Range]) -> Outcome {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(u32::try_from(*sectors)?.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    Ok(disk.memory.write(DATA, &bytes)?)
}

/// Discards or zeroes ranges.
fn run_ranges(disk: &mut Disk, kind: u32, ranges: &[Range]) -> Outcome {
    write_ranges(disk, ranges)?;
    let len = u32::try_from(ranges.len() * 16)?;
    let request = Request {
        kind,
        sector: 0,
        segments: vec![(DATA, len)],
    };
    Ok(disk.run(0, &request)?)
}

fn configuration(case: &Case, disk: &mut Disk, _: &mut Random) -> Outcome {
    let always = SIZE_MAX | TOPOLOGY | CONFIG_WCE | DISCARD | WRITE_ZEROES;
    ensure(disk.features & always == always, || {
        format!("features {:#x}", disk.features)
    })?;
    let space = disk.frontend.get_config(0, 60)?;
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap_or_default());
    ensure(disk.capacity_sectors()? == SECTORS, || {
        "capacity".to_owned()
    })?;
    ensure(word(20) == case.block_bytes, || "blk_size".to_owned())?;
    let physical = case.block_bytes << space[24];
    ensure(physical >= 4096 && space[25] == 0, || {
        format!("a physical block of {physical} bytes")
    })?;
    ensure(space[32] == 1, || "it begins in write-back mode".to_owned())?;
    let limits = [36, 40, 44, 48, 52].map(word);
    ensure(limits.iter().all(|limit| *limit > 0), || {
        format!("limits {limits:?}")
    })?;
    ensure(space[56] == u8::from(case.unit.is_none()), || {
        "write_zeroes_may_unmap".to_owned()
    })
}

fn reads_and_writes(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    if !case.keeps {
        disk.write(0, 0, &random.bytes(65_536))?;
        disk.read(0, 0, 65_536)?;
        return Ok(disk.flush(0)?);
    }
    let mut shadow = random.bytes(usize::try_from(BYTES)?);
    disk.write(0, 0, &shadow)?;
    against_shadow(disk, random, case.block(), &mut shadow, 60)?;
    disk.flush(0)?;
    ensure(disk.read_all(SECTORS)? == shadow, || {
        "the whole disk reads back differently".to_owned()
    })
}

fn unaligned_segments(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    if case.keeps {
        unaligned(disk, random, case.block(), 40)?;
    }
    Ok(())
}

/// Up to 16 ranges, apart from each other, and the bytes of each.
fn ranges(case: &Case, random: &mut Random, unmap: u32) -> Vec<Range> {
    let count = 1 + random.below(16);
    (0..count)
        .map(|i| {
            let sectors = (1 + random.below(6)) * case.block();
            (
                i * SECTORS / 16 + random.below(4) * case.block(),
                sectors,
                unmap,
            )
        })
        .collect()
}

fn zeroes(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    for unmap in [0, 1, 0, 1] {
        let mut shadow = random.bytes(usize::try_from(BYTES)?);
        disk.write(0, 0, &shadow)?;
        let ranges = ranges(case, random, unmap);
        run_ranges(disk, kind::WRITE_ZEROES, &ranges)?;
        for (sector, sectors, _) in &ranges {
            let at = usize::try_from(sector * SECTOR_BYTES)?;
            shadow[at..at + usize::try_from(sectors * SECTOR_BYTES)?].fill(0);
        }
        ensure(!case.keeps || disk.read_all(SECTORS)? == shadow, || {
            format!("after zeroes of {ranges:?}")
        })?;
    }
    // All of it, at once.
    run_ranges(disk, kind::WRITE_ZEROES, &[(0, SECTORS, 0)])?;
    let all = disk.read_all(SECTORS)?;
    ensure(!case.keeps || all.iter().all(|b| *b == 0), || {
        "after zeroes everywhere".to_owned()
    })
}

/// What is discarded can be anything; what is not stays, and what is written afterwards is there.
fn discards(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    for _ in 0..4 {
        let mut shadow = random.bytes(usize::try_from(BYTES)?);
        disk.write(0, 0, &shadow)?;
        let ranges = ranges(case, random, 0);
        run_ranges(disk, kind::DISCARD, &ranges)?;
        let now = disk.read_all(SECTORS)?;
        for (sector, sectors, _) in &ranges {
            let at = usize::try_from(sector * SECTOR_BYTES)?;
            let range = at..at + usize::try_from(sectors * SECTOR_BYTES)?;
            shadow[range.clone()].copy_from_slice(&now[range]);
        }
        ensure(!case.keeps || now == shadow, || {
            format!("discards of {ranges:?} changed something else")
        })?;
        let (sector, sectors, _) = ranges[0];
        let bytes = random.bytes(usize::try_from(sectors * SECTOR_BYTES)?);
        disk.write(0, sector, &bytes)?;
        let back = disk.read(0, sector, u32::try_from(bytes.len())?)?;
        ensure(!case.keeps || back == bytes, || {
            "a write after a discard is not there".to_owned()
        })?;
    }
    Ok(())
}

fn the_end(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    let (block, len) = (case.block(), case.block_bytes);
    let bytes = random.bytes(len as usize);
    disk.write(0, SECTORS - block, &bytes)?;
    let back = disk.read(0, SECTORS - block, len)?;
    ensure(!case.keeps || back == bytes, || "the last block".to_owned())?;
    for kind in [kind::IN, kind::OUT] {
        for sector in [
            SECTORS,
            SECTORS + 8,
            1 << 54,
            1 << 55,
            u64::MAX - 7,
            u64::MAX,
        ] {
            refused(disk, kind, sector, len, status::IOERR)?;
        }
        refused(disk, kind, SECTORS - block, 2 * len, status::IOERR)?;
        for odd in [1, len - 1, len + 1, len / 2] {
            refused(disk, kind, 0, odd, status::IOERR)?;
        }
    }
    if block > 1 {
        refused(disk, kind::IN, 1, len, status::IOERR)?;
        refused(disk, kind::OUT, 1, len, status::IOERR)?;
    }
    let back = disk.read(0, SECTORS - block, len)?;
    ensure(!case.keeps || back == bytes, || {
        "the last block changed".to_owned()
    })
}

fn bad_ranges(case: &Case, disk: &mut Disk, random: &mut Random) -> Outcome {
    let block = case.block();
    let before = random.bytes(usize::try_from(BYTES)?);
    disk.write(0, 0, &before)?;
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        let bad: [(&[Range], u8); 6] = [
            (&[(SECTORS, block, 0)], status::IOERR),
            // The first is good: nothing is done all the same.
            (
                &[(0, block, 0), (SECTORS - block, 2 * block, 0)],
                status::IOERR,
            ),
            (&[(u64::MAX, block, 0)], status::IOERR),
            (&[(0, 0, 0)], status::IOERR),
            (&[(0, block, 2)], status::UNSUPP),
            (&[(0, block, 0); 17], status::IOERR),
        ];
        for (ranges, expected) in bad {
            write_ranges(disk, ranges)?;
            let len = u32::try_from(ranges.len() * 16)?;
            refused(disk, kind, 0, len, expected)?;
        }
        write_ranges(disk, &[(0, block, 0)])?;
        for odd in [1, 15, 17, 65_536] {
            refused(disk, kind, 0, odd, status::IOERR)?;
        }
    }
    write_ranges(disk, &[(0, block, 1)])?;
    refused(disk, kind::DISCARD, 0, 16, status::UNSUPP)?;
    ensure(!case.keeps || disk.read_all(SECTORS)? == before, || {
        "a refused range changed something".to_owned()
    })
}
