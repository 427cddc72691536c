//! WRITE_ZEROES and DISCARD (T64): zeroes read back as zeroes, encrypted or not, on every storage and by every
//! way there is to zero; what lies beside a range stays as it is.

use std::sync::Arc;

use bulkhead_dataplane::storage::error::{Fault, Kind, What};
use bulkhead_dataplane::storage::{ErrorSpec, FileSpec, RamSpec, StorageSpec, VolatileCache};

use super::rig::{IOERR, OK, Op, Rig, SECTOR, SECTORS, Shape};
use super::{Random, rounds};

const BYTES: u64 = SECTORS * SECTOR as u64;

fn ram() -> StorageSpec {
    StorageSpec::Ram(Arc::new(RamSpec::new(BYTES).expect("memory")))
}

/// A file, in the folder of the sources or in memory: file systems differ in what they can give up.
fn file(in_memory: bool) -> StorageSpec {
    let file: std::fs::File = if in_memory {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        nix::sys::memfd::memfd_create("volume", flags)
            .expect("memory")
            .into()
    } else {
        tempfile::tempfile_in(".").expect("file")
    };
    file.set_len(BYTES).expect("length");
    StorageSpec::File(FileSpec::from_fd(file.into(), false, 512).expect("usable"))
}

/// A storage without one or both of the ways to zero.
fn without(inner: StorageSpec, kinds: &[Kind]) -> StorageSpec {
    let spec = ErrorSpec::new(inner);
    for kind in kinds {
        spec.inject(Fault::each(*kind, What::Errno(libc::EOPNOTSUPP)));
    }
    StorageSpec::Error(spec)
}

fn storages() -> Vec<(&'static str, StorageSpec)> {
    let volatile = VolatileCache::new(RamSpec::new(BYTES).expect("memory"));
    vec![
        ("ram", ram()),
        ("volatile cache", StorageSpec::Volatile(volatile)),
        ("file", file(false)),
        ("memory file", file(true)),
        ("without zeroes", without(ram(), &[Kind::Zero])),
        ("without discard", without(ram(), &[Kind::Discard])),
        (
            "file without either",
            without(file(false), &[Kind::Zero, Kind::Discard]),
        ),
    ]
}

/// 10,000 ranges in all, with writes between them, against a shadow.
fn against_shadow(name: &str, storage: StorageSpec, unit: Option<u32>, count: usize) {
    let shape = Shape {
        unit,
        ..Shape::PLAIN
    };
    let mut rig = Rig::new(storage, shape);
    let mut random = Random(unit.map_or(1, u64::from));
    let bytes = usize::try_from(BYTES).expect("few");
    let mut shadow: Vec<u8> = (0..bytes).map(|_| random.next().to_le_bytes()[0]).collect();
    let all = u32::try_from(SECTORS).expect("few");
    assert_eq!(rig.run(0, &Op::Write(0, shadow.clone())).0, OK);
    for round in 0..count {
        let block = shape.block();
        let sectors = (1 + random.below(8)) * block;
        let first = random.below((SECTORS - sectors) / block + 1) * block;
        let length = u32::try_from(sectors).expect("few");
        let at = usize::try_from(first).expect("few") * SECTOR;
        let part = &mut shadow[at..at + length as usize * SECTOR];
        let op = match random.below(8) {
            0 => Op::Discard(first, length),
            1..4 => {
                part.fill(random.next().to_le_bytes()[0] | 1);
                Op::Write(first, part.to_vec())
            }
            way => {
                part.fill(0);
                Op::Zero(first, length, way % 2 == 0)
            }
        };
        assert_eq!(rig.run(0, &op).0, OK, "{name} {unit:?} {round}: {op:?}");
        let (status, back) = rig.run(0, &Op::Read(first, length));
        assert_eq!(status, OK);
        let part = &mut shadow[at..at + length as usize * SECTOR];
        if matches!(op, Op::Discard(..)) {
            part.copy_from_slice(&back);
        }
        assert!(back == part, "{name} {unit:?} {round}: after {op:?}");
    }
    let (status, back) = rig.run(0, &Op::Read(0, all));
    assert!(status == OK && back == shadow, "{name} {unit:?}: the whole");
    rig.end();
}

#[test]
fn zeroes_read_back_as_zeroes_on_every_storage() {
    for unit in [None, Some(512), Some(4096)] {
        for (name, storage) in storages() {
            // A disk's file system takes its time.
            let count = if name.starts_with("file") { 40 } else { 655 };
            against_shadow(name, storage, unit, rounds(count));
        }
    }
}

/// What a storage does not have is asked for once.
#[test]
fn a_way_that_there_is_not_is_remembered() {
    let spec = ErrorSpec::new(ram());
    for kind in [Kind::Zero, Kind::Discard] {
        spec.inject(Fault::each(kind, What::Errno(libc::EOPNOTSUPP)));
    }
    let mut rig = Rig::new(StorageSpec::Error(Arc::clone(&spec)), Shape::PLAIN);
    for _ in 0..10 {
        assert_eq!(rig.run(0, &Op::Zero(0, 8, true)).0, OK);
        assert_eq!(rig.run(0, &Op::Zero(0, 8, false)).0, OK);
        assert_eq!(rig.run(0, &Op::Discard(0, 8)).0, OK);
    }
    assert_eq!(spec.injected(), 2, "giving up, and zeroing");
    rig.end();
}

/// Other errors are errors.
#[test]
fn a_range_that_fails_is_an_error() {
    let spec = ErrorSpec::new(ram());
    let mut rig = Rig::new(StorageSpec::Error(Arc::clone(&spec)), Shape::PLAIN);
    for (kind, op) in [
        (Kind::Zero, Op::Zero(0, 8, true)),
        (Kind::Zero, Op::Zero(0, 8, false)),
        (Kind::Discard, Op::Discard(0, 8)),
    ] {
        for errno in [libc::EIO, libc::ENOSPC, libc::EINVAL] {
            spec.heal();
            spec.inject(Fault::next(1, kind, What::Errno(errno)));
            assert_eq!(rig.run(0, &op).0, IOERR, "{op:?} {errno}");
            assert_eq!(rig.run(0, &op).0, OK, "{op:?} {errno}");
        }
    }
    rig.end();
}
