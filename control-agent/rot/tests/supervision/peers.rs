//! Who is connected to whom, and what each is told: at a start and after each restart.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::Channel;
use bulkhead_protocol::rot::{FromRot, Measurement, Role, ToRot};

use crate::host::{Host, PATIENCE, Puppet, readable, wait_until};
use crate::puppet::Order;
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case("a_start_connects_each_pair_and_says_who_is_who", start),
    case("a_child_is_introduced_only_after_its_hello", before_hello),
    case("restart_of_keyd_reaches_the_survivors", || {
        restart(Role::Keyd)
    }),
    case("restart_of_dataplane_reaches_the_survivors", || {
        restart(Role::Dataplane);
    }),
    case("restart_of_agent_reaches_the_survivors", || {
        restart(Role::Agent);
    }),
    case("restarts_back_off", back_off),
    case(
        "who_said_hello_is_followed_at_once_however_often",
        no_back_off,
    ),
    case("a_swapped_binary_is_not_what_is_restarted", swapped),
    case("children_have_descriptors_0_to_4_alone", descriptors),
    case("what_does_not_decode_is_refused_and_rot_goes_on", garbage),
    case("a_child_that_closes_its_channel_is_restarted", closes),
    case("a_child_that_does_not_read_is_restarted", unread),
];

/// The two ends belong together, and each names its sender without having been asked to.
fn assert_connected(a: &Channel, b: &Channel) {
    a.send(&7u8, &[]).expect("send");
    let got = b.receive::<u8>().expect("receive");
    assert_eq!(got.message, 7);
    assert!(got.sender.is_some(), "messages name their sender");
}

/// The process id that a pidfd stands for.
fn pid_of(pidfd: impl AsFd) -> u32 {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path).expect("fdinfo");
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    line.expect("a pidfd").trim().parse().expect("a number")
}

fn sha384(path: impl AsRef<std::path::Path>) -> Measurement {
    use sha2::Digest;
    let digest: [u8; 48] = sha2::Sha384::digest(std::fs::read(path).expect("read")).into();
    Measurement::from(digest)
}

fn start() {
    let mut host = Host::new();
    host.start();
    let [keyd, dataplane, agent] = Role::ALL.map(|role| host.puppet(role));
    keyd.say(ToRot::Hello);
    dataplane.say(ToRot::Hello);
    let (told, keyd_end, pidfd) = keyd.expect_peer(Role::Dataplane, 1);
    let expected = FromRot::Peer {
        role: Role::Dataplane,
        generation: 1,
        measurement: sha384(host.path("bin/bulkhead-dataplane")),
        pid: dataplane.started.pid,
    };
    assert_eq!(told, expected);
    assert_eq!(pid_of(pidfd), dataplane.started.pid);
    let (_, dataplane_end, pidfd) = dataplane.expect_peer(Role::Keyd, 1);
    assert_eq!(pid_of(pidfd), keyd.started.pid);
    assert_connected(&keyd_end, &dataplane_end);
    assert_eq!(host.logged("ready"), 0, "the agent has not said Hello");
    agent.say(ToRot::Hello);
    let (_, agent_end, _) = agent.expect_peer(Role::Keyd, 1);
    let (_, keyd_end, _) = keyd.expect_peer(Role::Agent, 1);
    assert_connected(&agent_end, &keyd_end);
    let (_, agent_end, _) = agent.expect_peer(Role::Dataplane, 1);
    let (_, dataplane_end, _) = dataplane.expect_peer(Role::Agent, 1);
    assert_connected(&dataplane_end, &agent_end);
    assert_eq!(agent.next().0, FromRot::AdminListener);
    host.wait_for_log("ready");
    let log = host.log();
    let started = |role: &str| log.find(&format!("started role={role}")).expect("logged");
    assert!(started("keyd") < started("dataplane"));
    assert!(started("dataplane") < started("agent"));
}

fn before_hello() {
    let mut host = Host::new();
    host.start();
    let [keyd, dataplane, agent] = Role::ALL.map(|role| host.puppet(role));
    agent.say(ToRot::Hello);
    assert_eq!(agent.next().0, FromRot::AdminListener, "no peer is up yet");
    keyd.say(ToRot::Hello);
    agent.expect_peer(Role::Keyd, 1);
    keyd.expect_peer(Role::Agent, 1);
    dataplane.say(ToRot::Hello);
    agent.expect_peer(Role::Dataplane, 1);
    // Once is enough; the second is complained of.
    dataplane.say(ToRot::Hello);
    host.wait_for_log("Hello again");
}

fn restart(role: Role) {
    let mut host = Host::new();
    let first = host.start_up();
    first.iter().find(|p| p.role == role).expect("it").kill();
    for generation in 2..4 {
        let new = host.puppet(role);
        new.say(ToRot::Hello);
        for survivor in first.iter().filter(|p| p.role != role) {
            let (_, theirs, _) = survivor.expect_peer(role, generation);
            let (_, its, pidfd) = new.expect_peer(survivor.role, 1);
            assert_connected(&its, &theirs);
            assert_eq!(pid_of(pidfd), survivor.started.pid);
        }
        if role == Role::Agent {
            let (message, fds) = new.next();
            assert_eq!((message, fds.len()), (FromRot::AdminListener, 1));
        }
        new.order(Order::Exit(3));
    }
    host.wait_for_log("ended: killed by SIGKILL");
    host.wait_for_log("ended: exit status 3");
    assert!(host.logged("ready") >= 2);
}

fn back_off() {
    let mut host = Host::new();
    host.start();
    let mut before = Instant::now();
    for least_ms in [0u64, 0, 100, 200, 400] {
        let puppet = host.puppet(Role::Keyd);
        assert!(before.elapsed() >= Duration::from_millis(least_ms));
        before = Instant::now();
        puppet.order(Order::Exit(1));
    }
    host.wait_for_log("next start in 800ms");
    assert_eq!(
        host.logged("role=dataplane"),
        2,
        "measured, started, left alone"
    );
}

fn no_back_off() {
    let mut host = Host::new();
    host.start();
    for _ in 0..12 {
        let puppet = host.puppet(Role::Keyd);
        puppet.say(ToRot::Hello);
        // It has said it when this is answered; whether rot has read it or not.
        puppet.obeys(Order::Barrier);
        puppet.kill();
    }
    host.puppet(Role::Keyd);
    let longest = |line: &str| {
        let wait = line.split("next start in ").nth(1)?;
        let wait = wait.split_whitespace().next()?;
        // Less than a millisecond is written with another unit.
        wait.strip_suffix("ms")?.parse::<f64>().ok()
    };
    let log = host.log();
    let waits: Vec<f64> = log.lines().filter_map(longest).collect();
    assert!(waits.iter().all(|ms| *ms <= 50.0), "{waits:?}");
    assert_eq!(host.logged("next start in "), 12);
}

fn swapped() {
    let mut host = Host::new();
    let own = std::env::current_exe().expect("own path");
    let file = host.path("bin/bulkhead-keyd");
    std::fs::remove_file(&file).expect("remove");
    std::fs::copy(&own, &file).expect("copy");
    let measured = sha384(&file);
    let [keyd, _dataplane, agent] = host.start_up();
    std::fs::write(host.path("other"), b"#!/bin/false").expect("write");
    std::fs::rename(host.path("other"), &file).expect("swap");
    keyd.kill();
    let keyd = host.puppet(Role::Keyd);
    keyd.say(ToRot::Hello);
    let (told, _, _) = agent.expect_peer(Role::Keyd, 2);
    assert!(matches!(told, FromRot::Peer { measurement, .. } if measurement == measured));
}

fn descriptors() {
    let mut host = Host::new();
    host.start();
    for role in Role::ALL {
        let first = host.puppet(role);
        assert_eq!(
            first.started.descriptors,
            ["0", "1", "2", "3", "4"],
            "{role}"
        );
        assert_eq!(first.started.environment.len(), 3, "{:?}", first.started);
        // The one that is restarted as well.
        first.order(Order::Exit(0));
        let second = host.puppet(role);
        assert_eq!(
            second.started.descriptors,
            ["0", "1", "2", "3", "4"],
            "{role}"
        );
    }
}

fn garbage() {
    let mut host = Host::new();
    let [keyd, _dataplane, agent] = host.start_up();
    for _ in 0..30 {
        keyd.order(Order::SayBytes(vec![0xff; 40]));
    }
    host.wait_for_log("further complaints about it are not logged");
    let rot_descriptors = || {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", host.pid())).expect("proc");
        entries.count()
    };
    // Before the first is sent: rot has each for a moment.
    let before = rot_descriptors();
    keyd.order(Order::SayWithDescriptor(ToRot::Hello));
    for _ in 0..5 {
        agent.order(Order::SayWithDescriptor(ToRot::Hello));
    }
    host.wait_for_log("it sent descriptors");
    wait_until("rot closes them", || rot_descriptors() == before);
    assert_eq!(host.logged("refused what it sent"), 20);
    assert!(!keyd.ends_within(Duration::ZERO));
    let name = "vm".parse().expect("name");
    let request_id = 1;
    agent.say(ToRot::Unbind { request_id, name });
    assert_eq!(agent.next().0, FromRot::Unbound { request_id });
}

fn closes() {
    let mut host = Host::new();
    let [keyd, _dataplane, agent] = host.start_up();
    keyd.order(Order::CloseChannel);
    assert!(keyd.ends_within(PATIENCE));
    host.wait_for_log("killing it: it closed its channel");
    let again = host.puppet(Role::Keyd);
    again.say(ToRot::Hello);
    agent.expect_peer(Role::Keyd, 2);
}

/// The data plane does not read while the agent keeps binding and unbinding: the agent waits for
/// the data plane's end, gets every answer, and the others notice nothing.
fn unread() {
    let mut host = Host::new();
    let [keyd, dataplane, agent] = host.start_up();
    dataplane.stop_reading();
    let name = || "vm".parse().expect("name");
    let bind = |request_id| ToRot::Bind {
        request_id,
        name: name(),
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        mode: 0o600,
    };
    let mut round = 0;
    let answered = |puppet: &Puppet| readable(puppet.control(), Duration::from_secs(2));
    loop {
        agent.say(bind(round));
        agent.say(ToRot::Unbind {
            request_id: round,
            name: name(),
        });
        if !answered(&agent) {
            break;
        }
        assert_eq!(agent.next().0, FromRot::Bound { request_id: round });
        if !answered(&agent) {
            break;
        }
        assert_eq!(agent.next().0, FromRot::Unbound { request_id: round });
        round += 1;
        assert!(round < 10_000, "rot queues without bound");
    }
    // keyd is served meanwhile.
    keyd.order(Order::SayBytes(vec![0xff]));
    host.wait_for_log("refused what it sent");
    assert!(dataplane.ends_within(PATIENCE));
    host.wait_for_log("killing it: it does not read what rot sends");
    let (message, _) = agent.next();
    assert!(
        matches!(message, FromRot::Bound { .. } | FromRot::Unbound { .. }),
        "the agent is answered again: {message:?}"
    );
    let again = host.puppet(Role::Dataplane);
    again.say(ToRot::Hello);
    keyd.expect_peer(Role::Dataplane, 2);
}
