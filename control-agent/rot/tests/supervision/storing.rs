//! What the children store: it comes back as it was, to its own role alone, whatever a child does.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_protocol::fd_store::message::Notification;
use bulkhead_protocol::rot::{Role, ToRot};
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek, pipe2};

use crate::host::{Host, Puppet, happens, wait_until};
use crate::puppet::{Order, Report, number_of, numbered_file};
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case("stored_files_come_back_in_order_to_their_role", order),
    case(
        "a_start_from_nothing_removes_what_it_does_not_take",
        nothing,
    ),
    case("what_hangs_up_or_blocks_is_kept", odd_files),
    case("kills_at_any_moment_lose_nothing_that_was_sent", kills),
    case("as_many_as_256_devices_have_come_back", many),
    case("what_is_over_the_limit_is_refused_and_the_rest_kept", full),
    case("a_hostile_child_harms_only_its_own_store", hostile),
    case("an_empty_message_ends_the_store_and_nothing_else", empty),
    case("a_barrier_waits_for_what_was_sent_before", barrier),
    case("starts_that_come_to_nothing_lose_the_store", vain),
];

pub fn names(taken: &[(String, OwnedFd)]) -> Vec<&str> {
    taken.iter().map(|(name, _)| name.as_str()).collect()
}

pub fn numbers(taken: &[(String, OwnedFd)]) -> Vec<u32> {
    taken.iter().map(|(_, fd)| number_of(fd)).collect()
}

/// Kills it and gives the next of its role, which has said Hello.
fn reborn(host: &mut Host, puppet: &Puppet) -> Puppet {
    puppet.kill();
    let next = host.puppet(puppet.role);
    next.say(ToRot::Hello);
    next
}

/// Started alone, without its peers.
fn one(host: &mut Host, role: Role) -> Puppet {
    host.start();
    let puppet = host.puppet(role);
    puppet.say(ToRot::Hello);
    // The last of the three: rot has as many descriptors now as it keeps.
    host.wait_for_log("started role=agent");
    puppet
}

fn descriptors_of(host: &Host) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", host.pid()));
    entries.expect("proc").count()
}

fn resident_kib(host: &Host) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.pid())).expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("VmRSS").parse().expect("a number")
}

fn order() {
    let mut host = Host::new();
    let dataplane = one(&mut host, Role::Dataplane);
    let agent = host.puppet(Role::Agent);
    let files = [0, 1, 2, 3].map(numbered_file);
    dataplane.push("a", &[files[0].as_fd(), files[1].as_fd()]);
    dataplane.push("b", &[files[2].as_fd()]);
    dataplane.push("a", &[files[3].as_fd()]);
    let dataplane = reborn(&mut host, &dataplane);
    let taken = dataplane.taken();
    assert_eq!(names(&taken), ["a", "a", "b", "a"]);
    assert_eq!(numbers(&taken), [0, 1, 2, 3]);
    // The same open file, not another of the same content: they share their position.
    lseek(&files[2], 77, Whence::SeekSet).expect("seek");
    assert_eq!(lseek(&taken[2].1, 0, Whence::SeekCur).expect("seek"), 77);
    agent.kill();
    assert!(host.puppet(Role::Agent).taken().is_empty());
    dataplane.obeys(Order::Remove("a".to_owned()));
    dataplane.push("c", &[files[0].as_fd()]);
    let dataplane = reborn(&mut host, &dataplane);
    let taken = dataplane.taken();
    assert_eq!(names(&taken), ["b", "c"]);
    assert_eq!(numbers(&taken), [2, 0]);
}

fn nothing() {
    let mut host = Host::new();
    let keyd = one(&mut host, Role::Keyd);
    let file = numbered_file(1);
    let before = descriptors_of(&host);
    for name in ["a", "b", "a"] {
        keyd.push(name, &[file.as_fd()]);
    }
    let keyd = reborn(&mut host, &keyd);
    keyd.obeys(Order::RemoveAll);
    keyd.obeys(Order::Barrier);
    assert_eq!(descriptors_of(&host), before);
    let keyd = reborn(&mut host, &keyd);
    assert!(keyd.taken().is_empty());
}

fn odd_files() {
    let mut host = Host::new();
    let dataplane = one(&mut host, Role::Dataplane);
    let (hung_up, writer) = pipe2(OFlag::O_CLOEXEC).expect("pipe");
    drop(writer);
    assert!(happens(&hung_up, PollFlags::POLLIN, Duration::ZERO));
    let (reader, full) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("pipe");
    while nix::unistd::write(&full, &[0; 4096]).is_ok() {}
    nix::fcntl::fcntl(&full, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).expect("fcntl");
    let (silent, _peer) = std::os::unix::net::UnixStream::pair().expect("pair");
    dataplane.push("odd", &[hung_up.as_fd(), full.as_fd(), silent.as_fd()]);
    dataplane.obeys(Order::Barrier);
    drop(full);
    let dataplane = reborn(&mut host, &dataplane);
    let taken = dataplane.taken();
    assert_eq!(names(&taken), ["odd"; 3]);
    assert!(happens(&taken[0].1, PollFlags::POLLIN, Duration::ZERO));
    drop(taken);
    // rot's copy and the process's keep the pipe open, until both are gone.
    dataplane.obeys(Order::Remove("odd".to_owned()));
    let mut everything = [0; 4096];
    loop {
        match nix::unistd::read(&reader, &mut everything) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, nix::errno::Errno::EAGAIN);
                assert!(happens(&reader, PollFlags::POLLIN, crate::host::PATIENCE));
            }
        }
    }
}

/// Each round: a host whose data plane stores and removes without end is killed twice.
fn kills() {
    let rounds = if std::env::var_os("BULKHEAD_SOAK").is_some() {
        500
    } else {
        12
    };
    for round in 0..rounds {
        let mut host = Host::new();
        let mut dataplane = one(&mut host, Role::Dataplane);
        for _ in 0..2 {
            dataplane.order(Order::StoreForEver);
            // Any moment will do: what is checked holds at each.
            let mut seen = 0;
            while seen < 3 + 17 * (round % 40) {
                seen = stored(&dataplane);
            }
            let pid = nix::unistd::Pid::from_raw(dataplane.started.pid.try_into().expect("pid"));
            nix::sys::signal::kill(pid, Signal::SIGKILL).expect("kill");
            while let Some(last) = last_stored(&dataplane) {
                seen = last;
            }
            dataplane = host.puppet(Role::Dataplane);
            dataplane.say(ToRot::Hello);
            let taken = numbers(&dataplane.taken());
            let last = *taken.last().expect("something is stored");
            assert!(last == seen || last == seen + 1, "{last} after {seen}");
            let expected: Vec<u32> = (last.saturating_sub(8)..=last).collect();
            // The last removal was sent or not.
            assert!(taken == expected || taken == expected[1..], "{taken:?}");
            dataplane.obeys(Order::RemoveAll);
        }
    }
}

/// The number of the file that it stored next.
#[track_caller]
pub fn stored(puppet: &Puppet) -> u32 {
    match puppet.report().0 {
        Report::Stored(number) => number,
        other => panic!("reported {other:?}"),
    }
}

/// What it reported before its end; none at its end.
pub fn last_stored(puppet: &Puppet) -> Option<u32> {
    match puppet.control().receive::<Report>() {
        Ok(received) => match received.message {
            Report::Stored(number) => Some(number),
            other => panic!("reported {other:?}"),
        },
        Err(_) => None,
    }
}

fn many() {
    let mut host = Host::new();
    let dataplane = one(&mut host, Role::Dataplane);
    let devices = 256 * 6;
    dataplane.obeys(Order::StoreMany(devices));
    let dataplane = reborn(&mut host, &dataplane);
    dataplane.obeys(Order::CheckMany(devices));
    // And as many as it may store at all, with names of full length.
    dataplane.obeys(Order::RemoveAll);
    dataplane.obeys(Order::StoreMany(limit(&dataplane)));
    let dataplane = reborn(&mut host, &dataplane);
    dataplane.obeys(Order::CheckMany(limit(&dataplane)));
    assert_eq!(host.logged("the store is full"), 0);
}

/// How much rot told it that it stores.
fn limit(puppet: &Puppet) -> u32 {
    let environment = &puppet.started.environment;
    let limit = environment.iter().find_map(|e| e.strip_prefix("FDSTORE="));
    limit.expect("FDSTORE").parse().expect("a number")
}

fn store_message(name: &str) -> Vec<u8> {
    let name = name.parse().expect("a name");
    Notification::Store { name }.text().into_bytes()
}

fn full() {
    let mut host = Host::new();
    let agent = one(&mut host, Role::Agent);
    let limit = limit(&agent);
    agent.obeys(Order::StoreMany(limit - 1));
    agent.obeys(Order::Barrier);
    let before = descriptors_of(&host);
    agent.obeys(Order::StoreBytes(store_message("two"), 2));
    agent.obeys(Order::Barrier);
    assert_eq!(descriptors_of(&host), before);
    assert_eq!(host.logged("the store is full"), 1);
    agent.obeys(Order::StoreBytes(store_message("one"), 1));
    agent.obeys(Order::Barrier);
    assert_eq!(descriptors_of(&host), before + 1);
    let agent = reborn(&mut host, &agent);
    let taken = agent.taken();
    assert_eq!(taken.len(), limit as usize);
    assert_eq!(taken.last().expect("the last").0, "one");
}

fn hostile() {
    let mut host = Host::new();
    let [keyd, dataplane, _agent] = host.start_up();
    let file = numbered_file(9);
    keyd.push("kept", &[file.as_fd()]);
    dataplane.push("kept", &[file.as_fd()]);
    dataplane.obeys(Order::Barrier);
    let attack = |rounds: u32| {
        for _ in 0..rounds {
            for (bytes, fds) in [
                (&b"FDSTORE=1\nFDNAME=a:b\nFDPOLL=0"[..], 3),
                (b"FDSTORE=1\nFDNAME=seventeen-letters\nFDPOLL=0", 1),
                (b"FDSTORE=1\nFDNAME=no-poll", 128),
                (b"FDSTORE=1\nFDNA", 1),
                (b"FDSTOREREMOVE=1\nFDNAME=kept", 1),
                (b"FDSTOREREMOVE=1\nFDNAME=", 0),
                (b"BARRIER=1", 0),
                (b"BARRIER=1", 128),
                (b"MAINPID=1\nREADY=1", 1),
                (b"\0\0\0\0", 200),
                (b"", 5),
                (&[b'x'; 4000], 7),
            ] {
                keyd.obeys(Order::StoreBytes(bytes.to_vec(), fds));
            }
            // Over its limit of 256.
            keyd.obeys(Order::StoreBytes(store_message("much"), 128));
            keyd.obeys(Order::StoreBytes(store_message("much"), 128));
        }
        keyd.obeys(Order::Barrier);
    };
    attack(5);
    let (descriptors, memory) = (descriptors_of(&host), resident_kib(&host));
    attack(100);
    assert_eq!(descriptors_of(&host), descriptors);
    let grown = resident_kib(&host).saturating_sub(memory);
    assert!(grown < 2048, "rot's memory grew by {grown} KiB");
    assert_eq!(host.logged("further complaints about it are not logged"), 1);
    let taken = reborn(&mut host, &keyd).taken();
    assert_eq!(names(&taken[..1]), ["kept"]);
    assert!(
        taken[1..].iter().all(|(name, _)| name == "much"),
        "{taken:?}"
    );
    dataplane.kill();
    assert_eq!(names(&host.puppet(Role::Dataplane).taken()), ["kept"]);
}

fn empty() {
    let mut host = Host::new();
    let keyd = one(&mut host, Role::Keyd);
    let file = numbered_file(4);
    keyd.push("kept", &[file.as_fd()]);
    keyd.obeys(Order::Barrier);
    keyd.obeys(Order::StoreBytes(Vec::new(), 0));
    keyd.obeys(Order::StoreBytes(store_message("late"), 1));
    let keyd = reborn(&mut host, &keyd);
    assert_eq!(names(&keyd.taken()), ["kept"]);
}

fn barrier() {
    let mut host = Host::new();
    let dataplane = one(&mut host, Role::Dataplane);
    let before = descriptors_of(&host);
    host.signal(Signal::SIGSTOP);
    wait_until("rot is stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.pid())).expect("proc");
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('T'))
    });
    let file = numbered_file(1);
    dataplane.push("a", &[file.as_fd()]);
    dataplane.order(Order::ReportBarrier);
    let (_, pipe) = dataplane.report();
    let [pipe] = <[OwnedFd; 1]>::try_from(pipe).expect("its pipe");
    let reached = |wait| happens(&pipe, PollFlags::empty(), wait);
    assert!(!reached(Duration::from_millis(50)), "rot is stopped");
    host.signal(Signal::SIGCONT);
    assert!(reached(crate::host::PATIENCE));
    assert_eq!(descriptors_of(&host), before + 1);
}

fn vain() {
    let mut host = Host::new();
    let dataplane = one(&mut host, Role::Dataplane);
    let file = numbered_file(1);
    dataplane.push("a", &[file.as_fd()]);
    let mut dataplane = reborn(&mut host, &dataplane);
    // rot has its Hello before this.
    dataplane.obeys(Order::Barrier);
    for _ in 0..6 {
        dataplane.kill();
        dataplane = host.puppet(Role::Dataplane);
        assert_eq!(names(&dataplane.taken()), ["a"]);
    }
    dataplane.kill();
    let dataplane = host.puppet(Role::Dataplane);
    assert!(dataplane.taken().is_empty());
    host.wait_for_log("6 starts came to nothing: 1 stored descriptors are dropped");
}
