//! Devices that nobody uses.

use std::time::Duration;

use super::limits::processor_time;
use super::rig::{Disk, Plan, Rig};

/// How often the threads of the workers went to sleep by themselves.
fn sleeps() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("threads");
    let of = |path: &std::path::Path| -> Option<u64> {
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        name.starts_with("worker-").then_some(())?;
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))?;
        line.split_whitespace().last()?.parse().ok()
    };
    tasks.flatten().filter_map(|task| of(&task.path())).sum()
}

fn hundred(rig: &mut Rig) -> Vec<Disk> {
    let disks: Vec<Disk> = (0..100).map(|_| rig.disk(0, Plan::null())).collect();
    for disk in &disks {
        disk.offer_one(1);
        disk.wait_for(1);
    }
    disks.iter().for_each(Disk::wait_until_parked);
    std::thread::sleep(Duration::from_millis(50));
    disks
}

#[test]
fn a_hundred_idle_devices_cost_less_than_one_percent_of_a_core() {
    let mut rig = Rig::new(1);
    let _disks = hundred(&mut rig);
    let (before, slept) = (processor_time(), sleeps());
    std::thread::sleep(Duration::from_secs(2));
    let (used, slept) = (processor_time() - before, sleeps() - slept);
    assert!(used < Duration::from_millis(20), "{used:?} of two seconds");
    assert!(slept <= 2, "{slept} wake-ups");
}

/// One of a hundred gets a request now and then.
#[test]
fn the_first_request_after_idleness_costs_one_wake_up() {
    let mut rig = Rig::new(1);
    let disks = hundred(&mut rig);
    let before = sleeps();
    for request in 2..=51 {
        assert!(disks[17].offer_one(request), "it asks for a kick");
        disks[17].wait_for(u64::from(request));
        disks[17].wait_until_parked();
        std::thread::sleep(Duration::from_millis(5));
    }
    let slept = sleeps() - before;
    // A worker that the machine kept waiting may have found the next request before it slept.
    assert!(slept <= 55, "{slept} sleeps for 50 requests");
}

/// The queues of a worker that is busy with one of them: who does nothing has its kick armed, and is served
/// when it kicks.
#[test]
fn idle_queues_of_a_busy_worker_are_parked() {
    let mut rig = Rig::new(1);
    let disks = hundred(&mut rig);
    let busy = &disks[3];
    let mut offered = 1u16;
    let mut asked = 0;
    for _ in 0..20 {
        for _ in 0..50 {
            offered += 16;
            busy.offer_one(offered);
            busy.wait_for(u64::from(offered));
        }
        let request = u16::try_from(disks[70].completed() + 1).expect("few");
        asked += u32::from(disks[70].offer_one(request));
        disks[70].wait_for(u64::from(request));
    }
    assert!(asked >= 15, "{asked} of 20 times");
}
