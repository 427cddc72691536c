//! Storage that does not answer: it is seen, by a worker that sleeps too, and said once each way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::blk::{Level, Patience, Summary};
use bulkhead_dataplane::storage::{DelaySpec, RamSpec, StorageSpec};
use bulkhead_dataplane::worker::message::FromWorker;

use crate::rig::{OK, Op, PATIENCE, Rig, SECTORS, Shape};

/// A worker that is soon heard of.
pub const SHORT: Patience = Patience {
    slow: Duration::from_millis(50),
    hung: Duration::from_millis(400),
    give_up: Duration::from_millis(300),
};

/// A storage that hangs as long as it is told to.
pub fn hanging() -> (Arc<DelaySpec>, StorageSpec) {
    let ram = RamSpec::new(SECTORS * 512).expect("memory");
    let spec = DelaySpec::new(StorageSpec::Ram(ram.into()), Duration::ZERO);
    (Arc::clone(&spec), StorageSpec::Delay(spec))
}

/// Waits until the workers see something of the storage.
pub fn wait_for(rig: &Rig, what: &str, is_so: impl Fn(Summary) -> bool) -> Summary {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let summary = rig.device.health.summary();
        if is_so(summary) {
            return summary;
        }
        assert!(Instant::now() < deadline, "{what}: {summary:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn requests_that_hang_are_found_while_the_worker_sleeps() {
    let (hang, storage) = hanging();
    let mut rig = Rig::new(storage, Shape::PLAIN);
    rig.device.health.set_patience(SHORT);
    assert_eq!(rig.run(0, &Op::Write(0, vec![7; 512])).0, OK);
    assert_eq!(rig.device.health.ended_slow.get(), 0);

    hang.stop(true);
    let begun = Instant::now();
    for sector in 0..5 {
        rig.submit(0, &Op::Read(sector, 1));
    }
    let slow = wait_for(&rig, "slow", |s| s.old == 5 && s.level >= Level::Slow);
    assert!(slow.oldest >= SHORT.slow);
    let hung = wait_for(&rig, "hung", |s| s.level == Level::Hung);
    assert!(hung.oldest >= SHORT.hung && hung.oldest <= 2 * begun.elapsed());
    // Nothing happens from here on but that they grow older.
    let older = wait_for(&rig, "older", |s| s.oldest > 2 * SHORT.hung);
    assert_eq!(older.old, 5);

    hang.stop(false);
    for _ in 0..5 {
        assert_eq!(rig.wait(0, 512).1, OK);
    }
    let fine = wait_for(&rig, "fine", |s| s.level == Level::Fine);
    assert_eq!(fine, Summary::default());
    let health = &rig.device.health;
    assert_eq!(health.ended_slow.get(), 5);
    let slowest = health.latency.per_mille_us(1000).expect("some ended");
    assert!(u128::from(slowest) >= SHORT.hung.as_micros());
    // Slow, hung, fine; a worker that was late may have seen some of it at once.
    let said = rig.end();
    assert!((2..=3).contains(&said), "{said} times");
}

#[test]
fn how_long_requests_took_is_counted_once_each() {
    let (_, storage) = hanging();
    let mut rig = Rig::new(storage, Shape::PLAIN);
    for _ in 0..100 {
        assert_eq!(rig.run(0, &Op::Read(0, 1)).0, OK);
    }
    let latency = &rig.device.health.latency;
    let deadline = Instant::now() + PATIENCE;
    // The worker tells of them before it sleeps at the latest.
    while latency.count() < 100 {
        assert!(Instant::now() < deadline, "requests are not counted");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(latency.count(), 100);
    rig.end();
}

#[test]
fn what_is_given_up_ends_without_a_word_to_the_guest() {
    for (unit, wipe) in [(None, false), (None, true), (Some(512), true)] {
        let (hang, storage) = hanging();
        let shape = Shape {
            unit,
            ..Shape::PLAIN
        };
        let mut rig = Rig::new(storage, shape);
        rig.device.health.set_patience(SHORT);
        assert_eq!(rig.run(0, &Op::Write(0, vec![7; 512])).0, OK);
        hang.stop(true);
        rig.submit(0, &Op::Read(0, 1));
        rig.submit(0, &Op::Write(1, vec![8; 512]));
        rig.submit(0, &Op::Flush);
        wait_for(&rig, "they are under way", |s| s.old == 3);
        rig.stop(0);
        rig.give_up(0, wipe);
        // Long after.
        std::thread::sleep(2 * SHORT.slow);
        assert_eq!(rig.device.health.summary().old, 3);
        assert!(rig.said().is_none(), "stopped, with requests under way");
        hang.stop(false);
        assert!(matches!(rig.reply(), FromWorker::Stopped { .. }));
        assert!(rig.poll(0, 0).is_none(), "the guest was told of a request");
        wait_for(&rig, "nothing is left", |s| s.old == 0);
        assert!(!rig.device.flush_failed());
        rig.end();
    }
}
