//! A victim beside a hostile neighbour on one worker: what each gets of the worker, and of its room.

use std::time::Duration;

use bulkhead_dataplane::storage::{DelaySpec, StorageSpec};

use super::rig::{Plan, RING, Requests, Rig};

/// Both have requests all the time, and the victim has done all of its: its part of the worker's time, in percent.
fn victims_share(hostile: Plan) -> u64 {
    let mut rig = Rig::new(1);
    // Much to do, a little at a time.
    let victim = rig.disk(
        0,
        Plan {
            encrypted: true,
            ..Plan::null()
        },
    );
    let queues = u64::from(hostile.queues);
    let hostile = rig.disk(0, hostile);
    hostile.offer(RING);
    hostile.wait_for(16);
    let times = || [&victim, &hostile].map(|disk| disk.device.metrics.worker_ticks());
    victim.offer(2000);
    victim.wait_for(1000);
    let before = times();
    victim.offer(RING);
    victim.wait_for(u64::from(RING) * 3 / 4);
    let after = times();
    let left = queues * u64::from(RING) - hostile.completed();
    assert!(left > 0, "the hostile one had requests until the end");
    let [victims, others] = [after[0] - before[0], after[1] - before[1]];
    victims * 100 / (victims + others)
}

#[test]
fn a_neighbour_with_64_full_queues_gets_half() {
    let share = victims_share(Plan {
        queues: 64,
        ..Plan::null()
    });
    assert!((45..=60).contains(&share), "{share} %");
}

#[test]
fn a_neighbour_with_large_encrypted_requests_gets_half() {
    let share = victims_share(Plan {
        encrypted: true,
        queues: 4,
        requests: Requests::Reads(128 << 10),
        ..Plan::null()
    });
    assert!((45..=60).contains(&share), "{share} %");
}

#[test]
fn a_neighbour_with_chains_of_junk_gets_half() {
    let share = victims_share(Plan {
        queues: 8,
        requests: Requests::Junk(1024),
        ..Plan::null()
    });
    assert!((45..=60).contains(&share), "{share} %");
}

/// A storage that never answers, and more requests for it than a worker has room for.
#[test]
fn a_neighbour_whose_storage_hangs_leaves_room() {
    for encrypted in [false, true] {
        let mut rig = Rig::new(1);
        let hangs = DelaySpec::new(StorageSpec::Null, Duration::from_micros(1));
        hangs.stop(true);
        let hostile = rig.disk(
            0,
            Plan {
                storage: StorageSpec::Delay(hangs.clone()),
                queues: 64,
                encrypted,
                ..Plan::null()
            },
        );
        let victim = rig.disk(
            0,
            Plan {
                storage: StorageSpec::Delay(DelaySpec::new(
                    StorageSpec::Null,
                    Duration::from_micros(1),
                )),
                encrypted,
                ..Plan::null()
            },
        );
        hostile.offer(RING);
        std::thread::sleep(Duration::from_millis(100));
        victim.offer(1000);
        victim.wait_for(1000);
        assert_eq!(hostile.completed(), 0);
        rig.stop(&hostile);
        hangs.stop(false);
    }
}
