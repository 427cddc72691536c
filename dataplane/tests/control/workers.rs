//! The workers: from the host's arguments, or else from keyd before they are made; others later lead to
//! another start, at once where nothing is served.

use std::fs;

use bulkhead_protocol::control::WorkerLoad;
use bulkhead_protocol::rot::FromRot;
use bulkhead_protocol::workers::Workers;

use crate::harness::Host;

fn workers(count: u16) -> Option<Workers> {
    Workers::new(Some(count), Vec::new()).ok()
}

/// The CPUs that the worker threads of a process are bound to, as the kernel says.
fn cpus_of_workers(host: &Host) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", host.pid())).expect("tasks");
    let mut cpus: Vec<(String, String)> = tasks
        .filter_map(|task| {
            let task = task.expect("entry").path();
            let name = fs::read_to_string(task.join("comm")).expect("name");
            let status = fs::read_to_string(task.join("status")).expect("status");
            let allowed = status
                .lines()
                .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
            let allowed = allowed.expect("a field").trim().to_owned();
            name.starts_with("worker-").then_some((name, allowed))
        })
        .collect();
    cpus.sort();
    cpus.into_iter().map(|(_, cpus)| cpus).collect()
}

/// A CPU that this process, and so what it starts, may use.
fn usable_cpu() -> u16 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let list = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    let first = list.expect("a field").trim().split(['-', ',']).next();
    first.and_then(|cpu| cpu.parse().ok()).expect("a CPU")
}

#[test]
fn keyd_says_how_many_there_are_and_where() {
    let mut host = Host::start_with(&[]);
    let cpu = usable_cpu();
    let one = Workers::new(None, vec![cpu]).ok();
    assert!(!host.workers(one.clone()), "they are made as it was said");
    let status = host.workers_status();
    assert_eq!(Some(status.workers), one);
    assert!(!status.by_host && status.pending.is_none() && status.problem.is_none());
    assert_eq!(cpus_of_workers(&host), [cpu.to_string()]);
    host.served(1);
    assert!(host.stop().success());
}

#[test]
fn a_cpu_that_is_not_there_costs_nothing_that_is_served() {
    let mut host = Host::start_with(&[]);
    let cpu = usable_cpu();
    host.workers(Workers::new(None, vec![1023, cpu]).ok());
    let problem = host.workers_status().problem.expect("a problem");
    assert!(problem.starts_with("CPU 1023 is not there"), "{problem}");
    let cpus = cpus_of_workers(&host);
    assert_eq!((cpus.len(), &cpus[1]), (2, &cpu.to_string()));
    host.served(1);
}

#[test]
fn others_come_with_the_next_start_which_is_now_if_nothing_is_served() {
    let mut host = Host::start_with(&[]);
    host.workers(workers(2));
    host.served(1);
    assert!(!host.workers(workers(3)), "volume 1 is served");
    let status = host.workers_status();
    assert_eq!(
        (Some(status.workers), status.pending),
        (workers(2), workers(3))
    );
    assert!(!host.workers(workers(2)), "taken back");
    assert_eq!(host.workers_status().pending, None);
    assert_eq!(host.detach(1), Ok(()));
    assert!(host.workers(workers(3)));
    assert!(host.ended().success(), "rot starts it again, at once");
}

#[test]
fn the_hosts_own_arguments_go_before_the_bundle() {
    let mut host = Host::start();
    assert!(
        !host.workers(workers(5)),
        "it has two, whatever the bundle says"
    );
    let status = host.workers_status();
    let has_nothing = |load: &WorkerLoad| load.cpu.is_none() && load.queues == 0;
    assert!(status.loads.len() == 2 && status.loads.iter().all(has_nothing));
    assert_eq!((status.queue_moves, status.queue_moves_given_up), (0, 0));
    assert_eq!((Some(status.workers), status.by_host), (workers(2), true));
    assert_eq!((status.pending, cpus_of_workers(&host).len()), (None, 2));
}

#[test]
fn it_can_be_stopped_while_it_waits_for_its_workers() {
    let host = Host::start_with(&[]);
    host.tell(&FromRot::Stop, &[]);
    assert!(host.ended().success());
}
