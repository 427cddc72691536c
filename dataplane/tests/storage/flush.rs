//! A flush that failed (T53): an error now, and for good, whichever queue or worker asks.

use std::collections::HashSet;
use std::sync::Arc;

use bulkhead_dataplane::storage::error::{Fault, Kind, What};
use bulkhead_dataplane::storage::{DelaySpec, ErrorSpec, RamSpec, StorageSpec, VolatileCache};

use super::rig::{FLUSH, IOERR, OK, Op, Rig, SECTOR, SECTORS, Shape, WRITE_ZEROES};
use super::rounds;

const ERRNOS: [i32; 5] = [
    libc::EIO,
    libc::ENOSPC,
    libc::EINTR,
    libc::EAGAIN,
    libc::ENOMEM,
];

fn memory() -> RamSpec {
    RamSpec::new(SECTORS * SECTOR as u64).expect("memory")
}

/// A storage with faults to be injected.
fn failing() -> (Arc<ErrorSpec>, StorageSpec) {
    let spec = ErrorSpec::new(StorageSpec::Ram(Arc::new(memory())));
    (Arc::clone(&spec), StorageSpec::Error(spec))
}

fn write(byte: u8) -> Op {
    Op::Write(0, vec![byte; SECTOR])
}

/// Whatever the errno, even one after which a transfer would be tried again: the kernel tells of a lost
/// write only once.
#[test]
fn a_failed_flush_stays_failed() {
    let mut rig = Rig::new(failing().1, Shape::PLAIN);
    for round in 0..rounds(200) {
        let (spec, storage) = failing();
        rig = rig.again(storage, Shape::PLAIN);
        assert_eq!(rig.run(0, &write(1)).0, OK);
        assert_eq!(rig.run(0, &Op::Flush).0, OK);
        let errno = ERRNOS[round % ERRNOS.len()];
        spec.inject(Fault::next(1, Kind::Flush, What::Errno(errno)));
        assert_eq!(rig.run(0, &write(2)).0, OK);
        assert_eq!(rig.run(0, &Op::Flush).0, IOERR, "errno {errno}");
        assert_eq!(spec.injected(), 1, "it was tried once");
        for _ in 0..3 {
            assert_eq!(rig.run(0, &write(3)).0, OK, "writes go on");
            assert_eq!(rig.run(0, &Op::Flush).0, IOERR, "errno {errno}");
        }
        assert!(rig.device.flush_failed());
        rig.device.reset();
        assert_eq!(
            rig.run(0, &Op::Flush).0,
            IOERR,
            "a reset finds nothing again"
        );
    }
    rig.end();
}

/// A write that was to be stable and failed: no flush may say that it is.
#[test]
fn a_failed_write_through_fails_later_flushes() {
    for errno in [libc::EIO, libc::ENOSPC, libc::ENOMEM] {
        let (spec, storage) = failing();
        let mut rig = Rig::new(storage, Shape::PLAIN);
        rig.device.set_writeback(false);
        assert_eq!(rig.run(0, &write(1)).0, OK);
        spec.inject(Fault::next(1, Kind::Write, What::Errno(errno)));
        assert_eq!(rig.run(0, &write(2)).0, IOERR, "errno {errno}");
        assert_eq!(rig.run(0, &write(3)).0, OK, "it tells the truth of itself");
        assert_eq!(rig.run(0, &Op::Flush).0, IOERR, "errno {errno}");
        rig.end();
    }
}

/// Discards and zeroes in write-through mode end with a flush, and fail with it.
#[test]
fn what_is_discarded_or_zeroed_write_through_is_flushed() {
    for op in [
        Op::Zero(0, 8, false),
        Op::Zero(0, 8, true),
        Op::Discard(0, 8),
    ] {
        let (spec, storage) = failing();
        let mut rig = Rig::new(storage, Shape::PLAIN);
        spec.inject(Fault::each(Kind::Flush, What::Errno(libc::EIO)));
        assert_eq!(rig.run(0, &op).0, OK, "write-back: no flush");
        rig.device.set_writeback(false);
        assert_eq!(rig.run(0, &op).0, IOERR, "{op:?}");
        assert_eq!(rig.run(0, &Op::Flush).0, IOERR);
        rig.end();
    }
}

/// Several queues on two workers flush at once, and what one of them was to make stable is lost. Only that one
/// is told by the storage; none of the others may succeed with a write that it should cover and that is gone.
#[test]
fn no_flush_beside_a_failed_one_succeeds() {
    let shape = Shape {
        queues: 4,
        workers: 2,
        ..Shape::PLAIN
    };
    let mut rig = Rig::new(failing().1, shape);
    for round in 0..rounds(100) {
        let cache = VolatileCache::new(memory());
        let inner = StorageSpec::Volatile(Arc::clone(&cache));
        let most = std::time::Duration::from_micros(100);
        let storage = StorageSpec::Delay(DelaySpec::new(inner, most));
        rig = rig.again(storage, shape);
        for queue in 0..4 {
            assert_eq!(rig.run(queue, &write(1)).0, OK);
        }
        cache.lose_at_next_flush(libc::EIO);
        // All of them cover the writes above.
        let mut open = HashSet::new();
        for queue in 0..4 {
            for _ in 0..=round % 3 {
                open.insert((queue, rig.submit(queue, &Op::Flush)));
            }
        }
        while !open.is_empty() {
            for queue in 0..4 {
                if let Some((slot, status, _)) = rig.poll(queue, 0) {
                    assert_eq!(
                        status, IOERR,
                        "the write is lost, and queue {queue} says it is not"
                    );
                    assert!(open.remove(&(queue, slot)));
                }
            }
        }
    }
    rig.end();
}

/// Without FLUSH negotiated there is none to be asked for.
#[test]
fn a_flush_that_was_not_negotiated_is_not_supported() {
    let (_, storage) = failing();
    let shape = Shape {
        features: WRITE_ZEROES,
        ..Shape::PLAIN
    };
    const { assert!(WRITE_ZEROES & FLUSH == 0) };
    let mut rig = Rig::new(storage, shape);
    assert_eq!(rig.run(0, &Op::Flush).0, 2);
    rig.end();
}
