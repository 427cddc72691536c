//! Faults of a storage (T54): what can be tried again is, from what was asked and not from what is left of it;
//! everything else is an error for the guest at once. Nothing is said to be done that is not, no buffer is left
//! behind, nothing hangs.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_dataplane::storage::error::{Fault, Kind, What};
use bulkhead_dataplane::storage::{DelaySpec, ErrorSpec, FileSpec, RamSpec, StorageSpec};

use super::rig::{IOERR, OK, Op, Rig, SECTOR, SECTORS, SLOTS, Shape};
use super::{Random, rounds};

const BYTES: u64 = SECTORS * SECTOR as u64;

fn ram() -> StorageSpec {
    StorageSpec::Ram(Arc::new(RamSpec::new(BYTES).expect("memory")))
}

fn file() -> StorageSpec {
    let file = tempfile::tempfile_in(".").expect("file");
    file.set_len(BYTES).expect("length");
    StorageSpec::File(FileSpec::from_fd(file.into(), false, 512).expect("usable"))
}

fn slow(inner: StorageSpec) -> StorageSpec {
    StorageSpec::Delay(DelaySpec::new(inner, Duration::from_micros(50)))
}

const SHAPES: [Shape; 2] = [
    Shape::PLAIN,
    Shape {
        unit: Some(512),
        ..Shape::PLAIN
    },
];

fn kind(op: &Op) -> Kind {
    match op {
        Op::Read(..) => Kind::Read,
        Op::Write(..) => Kind::Write,
        Op::Flush => Kind::Flush,
        Op::Discard(..) => Kind::Discard,
        Op::Zero(..) => Kind::Zero,
    }
}

/// A few that go away are not seen by the guest; many are, as an error.
#[test]
fn what_is_temporary_is_tried_again() {
    for (inner, shape) in [(ram as fn() -> StorageSpec, SHAPES[0]), (file, SHAPES[1])] {
        let spec = ErrorSpec::new(inner());
        let mut rig = Rig::new(StorageSpec::Error(Arc::clone(&spec)), shape);
        let data = vec![0x5a; 8 * SECTOR];
        for errno in [libc::EAGAIN, libc::EINTR, libc::ENOMEM] {
            for op in [
                Op::Write(8, data.clone()),
                Op::Read(8, 8),
                Op::Discard(64, 8),
            ] {
                let before = spec.injected();
                spec.inject(Fault::next(16, kind(&op), What::Errno(errno)));
                let (status, bytes) = rig.run(0, &op);
                assert_eq!(status, OK, "{op:?} {errno}");
                if matches!(op, Op::Read(..)) {
                    assert_eq!(bytes, data);
                }
                assert_eq!(spec.injected() - before, 16);
                spec.heal();
                spec.inject(Fault::next(17, kind(&op), What::Errno(errno)));
                assert_eq!(rig.run(0, &op).0, IOERR, "{op:?} {errno}");
                spec.heal();
            }
        }
        rig.end();
    }
}

/// A transfer that ends short is an error, and is not gone on with.
#[test]
fn what_is_short_is_an_error() {
    for shape in SHAPES {
        let spec = ErrorSpec::new(ram());
        let mut rig = Rig::new(StorageSpec::Error(Arc::clone(&spec)), shape);
        for op in [Op::Write(0, vec![1; 8 * SECTOR]), Op::Read(0, 8)] {
            spec.inject(Fault::next(1, kind(&op), What::Short));
            assert_eq!(rig.run(0, &op).0, IOERR, "{op:?}");
            assert_eq!(rig.run(0, &op).0, OK, "{op:?}");
        }
        rig.end();
    }
}

/// The end of a file that somebody cut: an error, never stale bytes, and the file does not grow.
#[test]
fn a_file_that_became_shorter_is_an_error() {
    let file = tempfile::NamedTempFile::new_in(".").expect("file");
    file.as_file().set_len(BYTES).expect("length");
    let fd = file.reopen().expect("open").into();
    let spec = FileSpec::from_fd(fd, false, 512).expect("usable");
    let mut rig = Rig::new(StorageSpec::File(spec), Shape::PLAIN);
    let all = u32::try_from(SECTORS).expect("few");
    assert_eq!(rig.run(0, &Op::Read(0, all)).0, OK);
    file.as_file().set_len(BYTES / 2).expect("length");
    assert_eq!(rig.run(0, &Op::Read(0, all)).0, IOERR);
    assert_eq!(rig.run(0, &Op::Read(SECTORS - 8, 8)).0, IOERR);
    assert_eq!(rig.run(0, &Op::Zero(SECTORS - 8, 8, false)).0, OK);
    let length = file.as_file().metadata().expect("stat").len();
    assert_eq!(length, BYTES / 2, "zeroes do not grow it");
    rig.end();
}

/// 5,000 faults of every kind among requests in flight, encrypted or not, slow or not. Each sector has one
/// writer, so that what it holds is known unless its last write failed.
#[test]
fn faults_among_many_requests_are_all_told() {
    let whats = [
        What::Short,
        What::Errno(libc::EIO),
        What::Errno(libc::ENOSPC),
        What::Errno(libc::EAGAIN),
        What::Errno(libc::EINTR),
        What::Errno(libc::ENOMEM),
        What::Errno(libc::EOPNOTSUPP),
    ];
    let mut faults = 0;
    let mut random = Random(7);
    for shape in SHAPES {
        for (inner, count) in [
            (ram as fn() -> StorageSpec, 480),
            (file, 20),
            (|| slow(ram()), 260),
        ] {
            let spec = ErrorSpec::new(inner());
            let mut rig = Rig::new(StorageSpec::Error(Arc::clone(&spec)), shape);
            let mut known: Vec<Option<u8>> = vec![None; usize::from(SLOTS)];
            for round in 0..rounds(count) {
                let what = whats[round % whats.len()];
                for kind in [Kind::Read, Kind::Write, Kind::Zero, Kind::Discard] {
                    let times = 1 + u32::try_from(random.below(3)).expect("few");
                    spec.inject(Fault {
                        every: 1 + u32::try_from(random.below(2)).expect("few"),
                        ..Fault::next(times, kind, what)
                    });
                }
                burst(&mut rig, &mut random, &mut known);
                spec.heal();
                check(&mut rig, &known);
            }
            faults += spec.injected();
            rig.end();
        }
    }
    assert!(faults >= 5000, "{faults} faults");
}

/// Eight sectors for each slot.
fn sector(place: usize) -> u64 {
    place as u64 * 8
}

/// A request of each place at once.
fn burst(rig: &mut Rig, random: &mut Random, known: &mut [Option<u8>]) {
    let mut open = Vec::new();
    for (place, before) in known.iter().enumerate() {
        let byte = random.next().to_le_bytes()[0];
        let (op, then) = match random.below(6) {
            0 => (Op::Read(sector(place), 8), *before),
            1 => (Op::Zero(sector(place), 8, byte.is_multiple_of(2)), Some(0)),
            2 => (Op::Discard(sector(place), 8), None),
            _ => (Op::Write(sector(place), vec![byte; 8 * SECTOR]), Some(byte)),
        };
        let slot = rig.submit(0, &op);
        open.push((slot, place, op, then));
    }
    while !open.is_empty() {
        let (slot, status, bytes) = rig.wait(0, 8 * SECTOR);
        let at = open.iter().position(|(of, ..)| *of == slot).expect("open");
        let (_, place, op, then) = open.swap_remove(at);
        if let (Op::Read(..), OK, Some(byte)) = (&op, status, known[place]) {
            assert!(
                bytes.iter().all(|b| *b == byte),
                "place {place} read wrongly"
            );
        }
        let failed = !matches!(op, Op::Read(..)) && status != OK;
        known[place] = if failed { None } else { then };
    }
}

/// Everything that was said to be done is there.
fn check(rig: &mut Rig, known: &[Option<u8>]) {
    for (place, known) in known.iter().enumerate() {
        if let Some(byte) = known {
            let (status, bytes) = rig.run(0, &Op::Read(sector(place), 8));
            assert_eq!(status, OK);
            assert!(
                bytes.iter().all(|b| b == byte),
                "place {place} has something else"
            );
        }
    }
}

/// Requests that a storage keeps do not keep the worker from others, and come back when it lets them.
#[test]
fn a_storage_that_stands_still_holds_up_nothing_but_its_requests() {
    let spec = DelaySpec::new(ram(), Duration::from_micros(100));
    let mut rig = Rig::new(StorageSpec::Delay(Arc::clone(&spec)), Shape::PLAIN);
    spec.stop(true);
    let mut open: Vec<u16> = (0..8).map(|_| rig.submit(0, &Op::Read(0, 8))).collect();
    // Long enough for the worker to sleep.
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.poll(0, 0).is_none(), "it stands still");
    spec.stop(false);
    while !open.is_empty() {
        let (slot, status, _) = rig.wait(0, 0);
        assert_eq!(status, OK);
        open.retain(|of| *of != slot);
    }
    rig.end();
}

/// A slow storage ends requests in another order than they came in.
#[test]
fn a_slow_storage_mixes_the_order() {
    let mut rig = Rig::new(slow(ram()), Shape::PLAIN);
    let mut mixed = false;
    for _ in 0..20 {
        let slots: Vec<u16> = (0..16).map(|_| rig.submit(0, &Op::Read(0, 8))).collect();
        let ended: Vec<u16> = (0..16).map(|_| rig.wait(0, 0).0).collect();
        mixed |= slots != ended;
    }
    assert!(mixed);
    rig.end();
}
