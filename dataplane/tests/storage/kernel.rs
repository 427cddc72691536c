//! Faults that the kernel tells of (T53, T54): a file system that fails, goes away, or is full. As those of a storage
//! for tests, but through the ring, a real file, and what the kernel makes of it.

use std::time::{Duration, Instant};

use bulkhead_dataplane::storage::{FileSpec, StorageSpec};

use super::rig::{IOERR, OK, Op, PATIENCE, Rig, SECTOR, SECTORS, SLOTS, Shape};
use crate::stuck::{Asked, Sticks, Stuck, Wrong};

const BYTES: u64 = SECTORS * SECTOR as u64;

const SHAPES: [Shape; 2] = [
    Shape::PLAIN,
    Shape {
        unit: Some(4096),
        ..Shape::PLAIN
    },
];

/// A file system; none, and said so, where there can't be one.
fn mounted(test: &str) -> Option<Stuck> {
    let stuck = Stuck::mount(BYTES);
    if stuck.is_none() {
        println!("skipped: {test}: no mount");
    }
    stuck
}

fn on(stuck: &Stuck, shape: Shape) -> Rig {
    let block = shape.unit.unwrap_or(512);
    let spec = FileSpec::from_fd(stuck.file().into(), false, block).expect("usable");
    Rig::new(StorageSpec::File(spec), shape)
}

/// Eight sectors with this byte, at one of 32 places.
fn write(place: u64, byte: u8) -> Op {
    Op::Write(place * 8, vec![byte; 8 * SECTOR])
}

fn read(place: u64) -> Op {
    Op::Read(place * 8, 8)
}

/// Whatever the errno, it is the guest's to know, and over when the cause is.
#[test]
fn what_the_kernel_can_not_do_is_an_error_until_it_can() {
    let name = "what_the_kernel_can_not_do_is_an_error_until_it_can";
    let Some(stuck) = mounted(name) else { return };
    let errnos = [
        libc::EIO,
        libc::ENOSPC,
        libc::EDQUOT,
        libc::EROFS,
        libc::ENODEV,
        libc::ENOMEM,
        libc::ENXIO,
        libc::EPERM,
    ];
    let wrongs = errnos.map(Wrong::Errno).into_iter().chain([Wrong::Half]);
    for shape in SHAPES {
        let mut rig = on(&stuck, shape);
        for (round, wrong) in (1..).zip(wrongs.clone()) {
            assert_eq!(rig.run(0, &write(0, round)).0, OK);
            stuck.go_wrong(Some((Asked::Write, wrong)));
            assert_eq!(rig.run(0, &write(1, round)).0, IOERR, "write: {wrong:?}");
            assert_eq!(rig.run(0, &read(0)), (OK, vec![round; 8 * SECTOR]));
            stuck.go_wrong(Some((Asked::Read, wrong)));
            assert_eq!(rig.run(0, &read(0)).0, IOERR, "read: {wrong:?}");
            assert_eq!(rig.run(0, &write(1, round)).0, OK, "writes go on");
            stuck.go_wrong(None);
            for place in [0, 1] {
                assert_eq!(rig.run(0, &read(place)), (OK, vec![round; 8 * SECTOR]));
            }
            assert_eq!(
                rig.run(0, &Op::Flush).0,
                OK,
                "nothing that was said is lost"
            );
        }
        rig.end();
    }
}

/// `fsync` fails, once: the flush does, and every one after it; in write-through mode the write does.
#[test]
fn a_flush_that_the_kernel_fails_stays_failed() {
    let Some(stuck) = mounted("a_flush_that_the_kernel_fails_stays_failed") else {
        return;
    };
    for through in [false, true] {
        for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ENOMEM] {
            let mut rig = on(&stuck, Shape::PLAIN);
            rig.device.set_writeback(!through);
            assert_eq!(rig.run(0, &write(0, 1)).0, OK);
            stuck.go_wrong(Some((Asked::Flush, Wrong::Errno(errno))));
            let op = if through { write(0, 2) } else { Op::Flush };
            assert_eq!(rig.run(0, &op).0, IOERR, "{op:?}, errno {errno}");
            stuck.go_wrong(None);
            assert_eq!(rig.run(0, &Op::Flush).0, IOERR, "errno {errno}");
            assert_eq!(
                rig.run(0, &write(0, 3)).0,
                OK,
                "it tells the truth of itself"
            );
            assert_eq!(rig.run(0, &read(0)).0, OK);
            assert_eq!(rig.run(0, &Op::Flush).0, IOERR, "errno {errno}");
            rig.end();
        }
    }
}

/// The disk goes while it has requests: each of them ends, as does everything after them, with an error; and the
/// device can be taken away. No buffer is left with the kernel.
#[test]
fn a_disk_that_is_gone_fails_what_it_had() {
    let name = "a_disk_that_is_gone_fails_what_it_had";
    for shape in SHAPES {
        let Some(stuck) = mounted(name) else { return };
        let mut rig = on(&stuck, shape);
        assert_eq!(rig.run(0, &write(0, 1)).0, OK);
        stuck.stick(Sticks::All);
        let mut open: Vec<u16> = (0..u64::from(SLOTS))
            .map(|place| match place % 3 {
                0 => rig.submit(0, &read(place)),
                1 => rig.submit(0, &write(place, 2)),
                _ => rig.submit(0, &Op::Flush),
            })
            .collect();
        let since = Instant::now();
        while stuck.waiting() == 0 {
            assert!(since.elapsed() < PATIENCE, "nothing was asked of the disk");
            std::thread::sleep(Duration::from_millis(1));
        }
        stuck.go_away();
        while !open.is_empty() {
            let (slot, status, _) = rig.wait(0, 0);
            assert_eq!(status, IOERR);
            open.retain(|of| *of != slot);
        }
        for op in [read(0), write(0, 3), Op::Flush, Op::Zero(0, 8, true)] {
            assert_eq!(rig.run(0, &op).0, IOERR, "{op:?}");
        }
        rig.end();
    }
}
