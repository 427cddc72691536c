//! Queues spread over the workers by what they have to do, and nobody looks at that on an idle host.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::server::{Event, Server};
use bulkhead_dataplane::storage::{RamSpec, StorageSpec};
use bulkhead_dataplane::worker::message::QueueId;
use bulkhead_integration::disk::{DATA, Disk, GROUP, Options, PATIENCE, Request};
use bulkhead_integration::driver::kind;

use crate::rig::Rig;

/// However busy the machine is.
const LONG: Duration = Duration::from_secs(60);
const BYTES: u64 = 8 << 20;
/// Bytes of a request: long enough that the workers are the limit, and not who loads them.
const REQUEST_BYTES: u32 = 256 << 10;

/// Memory, encrypted: what costs a worker time.
fn device() -> Arc<BlkDevice> {
    let geometry = Geometry {
        logical_block_bytes: 4096,
        read_only: false,
        serial: [0; 20],
        queues: 2,
        discard: false,
    };
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [0x11; 64];
    key[32..].fill(0x22);
    let cipher = Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::B4096,
    };
    let ram = RamSpec::new(BYTES).expect("memory");
    BlkDevice::new(
        geometry,
        BYTES / 512,
        StorageSpec::Ram(ram.into()),
        Some(cipher),
    )
}

/// Eight reads on each queue, and their ends.
fn load(disk: &mut Disk) {
    for queue in 0..2 {
        for slot in queue * GROUP..(queue + 1) * GROUP {
            let request = Request {
                kind: kind::IN,
                sector: u64::from(slot) * 8,
                segments: vec![(DATA + u64::from(slot) * 0x4_0000, REQUEST_BYTES)],
            };
            disk.push(usize::from(queue), slot, &request).expect("room");
        }
        disk.publish(usize::from(queue)).expect("published");
    }
    for queue in 0..2 {
        for _ in 0..GROUP {
            let ring = &mut disk.rings[queue];
            ring.wait_used(&disk.memory, PATIENCE).expect("an end");
        }
    }
}

/// How often the control thread has slept.
fn sleeps(rig: &Rig) -> u64 {
    let status = fs::read_to_string(format!("/proc/self/task/{}/status", rig.tid));
    let status = status.expect("the thread's status");
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|n| n.trim().parse().ok()).expect("a number")
}

#[test]
fn two_busy_queues_do_not_share_a_worker_for_long_and_an_idle_host_is_left_alone() {
    let mut rig = Rig::new();
    let (id, path) = rig.offer(device(), None);
    let mut disk = Disk::attach(
        &path,
        &Options {
            queues: 2,
            ..Options::default()
        },
    )
    .expect("attaches");
    assert!(matches!(rig.event(), Event::Connected { .. }));
    let queue = move |index| QueueId { device: id, index };
    let places = move |rig: &Rig| {
        rig.ask(move |server: &mut Server| {
            let status = server.worker_status();
            let counts: Vec<u32> = status.iter().map(|worker| worker.queues).collect();
            let at = [0, 1].map(|index| server.worker_of(queue(index)));
            (at, counts)
        })
    };
    let (at, counts) = places(&rig);
    assert_eq!(counts, [1, 1], "they start on different workers");
    let to = at[0].expect("it runs");
    rig.ask(move |server| server.move_queue(queue(1), to))
        .expect("it can move");
    let deadline = Instant::now() + LONG;
    while places(&rig).0 != [Some(to); 2] || rig.ask(|server| server.moves().done) == 0 {
        assert!(Instant::now() < deadline, "it does not move");
        std::thread::sleep(Duration::from_millis(1));
    }
    // The load has the balancer part them again.
    while rig.ask(|server| server.moves().done) < 2 {
        assert!(Instant::now() < deadline, "they stay together");
        (0..20).for_each(|_| load(&mut disk));
    }
    assert_eq!(places(&rig).1, [1, 1]);
    let busy = rig.ask(|server| server.worker_status());
    assert!(
        busy.iter().any(|worker| worker.busy_permille > 0),
        "{busy:?}"
    );

    // The next look would be within 100 ms.
    let mut before = sleeps(&rig);
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = sleeps(&rig);
        if now == before {
            break;
        }
        before = now;
        assert!(Instant::now() < deadline, "the control thread is woken");
    }
}
