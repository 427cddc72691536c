//! rot is upgraded in place: the same process goes on with the same children, and a rot that can't
//! take over is never executed.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::release::{Component, Release};
use bulkhead_protocol::rot::{FromRot, Measurement, Role, ToRot};
use nix::sys::signal::Signal;

use crate::host::{Host, PATIENCE, Puppet};
use crate::puppet::{Order, numbered_file};
use crate::storing::{names, numbers};
use crate::systemd::Manager;
use crate::upgrading::{next, runs};
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case(
        "rot_is_replaced_in_place_and_its_children_notice_nothing",
        replaced,
    ),
    case(
        "rot_is_replaced_while_a_child_starts_and_another_waits",
        in_between,
    ),
    case("a_rot_that_can_not_take_over_is_not_executed", refused),
    case("a_replaced_rot_goes_on_with_systemds_store", with_systemd),
];

/// Installs a rot: the built one with something behind its end.
fn install(host: &Host, mark: &[u8]) -> Measurement {
    let built = fs::read(env!("CARGO_BIN_EXE_bulkhead-rot")).expect("rot");
    install_bytes(host, &[&built, mark].concat())
}

fn install_bytes(host: &Host, bytes: &[u8]) -> Measurement {
    use sha2::Digest;
    let mut file = fs::File::create(host.path("bin/bulkhead-rot")).expect("create");
    file.write_all(bytes).expect("write");
    let digest: [u8; 48] = sha2::Sha384::digest(bytes).into();
    digest.into()
}

/// keyd approves it and the agent asks.
fn ask(keyd: &Puppet, agent: &Puppet, version: u64, measurement: Measurement) {
    let release = Release {
        component: Component::Rot,
        version,
        measurement,
    };
    keyd.say(ToRot::Approve { release });
    // It has said it when this is answered.
    keyd.obeys(Order::Barrier);
    agent.say(ToRot::Upgrade {
        request_id: version,
        component: Component::Rot,
    });
    let request_id = version;
    assert_eq!(next(agent), FromRot::Upgrading { request_id });
}

fn bind(agent: &Puppet, request_id: u64, name: &str) {
    agent.say(ToRot::Bind {
        request_id,
        name: name.parse().expect("name"),
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        mode: 0o600,
    });
    assert_eq!(next(agent), FromRot::Bound { request_id });
}

fn replaced() {
    let mut host = Host::new();
    let [keyd, dataplane, agent] = host.start_up();
    bind(&agent, 100, "vm1");
    let (listener, socket) = dataplane.next();
    assert!(matches!(listener, FromRot::Listener { .. }));
    dataplane.push("a", &[numbered_file(1).as_fd(), numbered_file(2).as_fd()]);
    dataplane.push("b", &[numbered_file(3).as_fd()]);
    keyd.push("k", &[numbered_file(4).as_fd()]);
    // What was sent is not stored yet.
    dataplane.obeys(Order::Barrier);
    keyd.obeys(Order::Barrier);
    let pid = host.pid();
    let open = || {
        fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("proc")
            .count()
    };
    let before = open();
    for version in 1..=3 {
        let new = install(&host, format!("rot {version}").as_bytes());
        ask(&keyd, &agent, version, new);
        let request_id = version;
        assert_eq!(next(&agent), FromRot::Upgraded { request_id });
        let told = next(&keyd);
        assert!(
            matches!(told, FromRot::Runs { release } if release.measurement == new),
            "{told:?}"
        );
        assert_eq!(runs(&agent, Component::Rot, version).measurement, new);
        assert_eq!(open(), before, "no descriptor is lost or left over");
    }
    assert_eq!(host.logged("started role="), 3, "nobody was restarted");
    // What was stored and bound is there, and more can be.
    dataplane.push("c", &[numbered_file(5).as_fd()]);
    dataplane.obeys(Order::Remove("b".to_owned()));
    dataplane.kill();
    let dataplane = host.puppet(Role::Dataplane);
    let taken = dataplane.taken();
    assert_eq!(
        (names(&taken), numbers(&taken)),
        (vec!["a", "a", "c"], vec![1, 2, 5])
    );
    dataplane.say(ToRot::Hello);
    keyd.expect_peer(Role::Dataplane, 2);
    dataplane.expect_peer(Role::Keyd, 1);
    dataplane.expect_peer(Role::Agent, 1);
    let (listener, again) = dataplane.next();
    assert!(matches!(listener, FromRot::Listener { .. }));
    let inode = |fds: &[OwnedFd]| nix::sys::stat::fstat(&fds[0]).expect("stat").st_ino;
    assert_eq!(inode(&again), inode(&socket));
    UnixStream::connect(host.vhost("vm1")).expect("it listens");
    bind(&agent, 101, "vm2");
    // It is the only one on its directory, is locked in, and ends in good order.
    let second = host.command(&host.path("second")).status().expect("run");
    assert_eq!(second.code(), Some(1));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("proc");
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"));
    host.signal(Signal::SIGTERM);
    assert!(host.ended().success());
    assert!(!host.path("run/admin.sock").exists());
    assert!(!host.vhost("vm1").exists() && !host.vhost("vm2").exists());
    for puppet in [&keyd, &dataplane, &agent] {
        assert!(puppet.ends_within(PATIENCE));
    }
}

fn in_between() {
    let mut host = Host::new();
    host.start();
    let keyd = host.puppet(Role::Keyd);
    keyd.say(ToRot::Hello);
    let agent = host.puppet(Role::Agent);
    agent.say(ToRot::Hello);
    agent.expect_peer(Role::Keyd, 1);
    assert_eq!(next(&agent), FromRot::AdminListener);
    // It is waited for: five that came to nothing.
    for _ in 0..5 {
        host.puppet(Role::Dataplane).order(Order::Exit(1));
    }
    host.wait_for_log("next start in 800ms");
    let new = install(&host, b"new");
    ask(&keyd, &agent, 1, new);
    assert_eq!(next(&agent), FromRot::Upgraded { request_id: 1 });
    // The new rot starts it, and is replaced before it has said Hello.
    let dataplane = host.puppet(Role::Dataplane);
    let new = install(&host, b"newer");
    ask(&keyd, &agent, 2, new);
    assert_eq!(next(&agent), FromRot::Upgraded { request_id: 2 });
    // What it was told of the first is read already, or not.
    while !matches!(next(&keyd), FromRot::Runs { release } if release.version == 2) {}
    dataplane.say(ToRot::Hello);
    keyd.expect_peer(Role::Dataplane, 6);
}

fn refused() {
    let mut host = Host::new();
    let [keyd, dataplane, agent] = host.start_up();
    dataplane.push("a", &[numbered_file(1).as_fd()]);
    let own = fs::read(std::env::current_exe().expect("own path")).expect("read");
    // Released, measured, and no rot at all; and what is not even a program of ours.
    for (version, bytes, why) in [
        (1, own, "can't take over: exit status"),
        (2, b"#!/bin/true".repeat(20), "not a 64-bit"),
    ] {
        let new = install_bytes(&host, &bytes);
        if version == 1 {
            ask(&keyd, &agent, version, new);
        } else {
            let release = Release {
                component: Component::Rot,
                version,
                measurement: new,
            };
            keyd.say(ToRot::Approve { release });
            keyd.obeys(Order::Barrier);
            agent.say(ToRot::Upgrade {
                request_id: version,
                component: Component::Rot,
            });
        }
        match next(&agent) {
            FromRot::Failed { reason, .. } => assert!(reason.contains(why), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    // Another than what was released.
    keyd.say(ToRot::Approve {
        release: Release {
            component: Component::Rot,
            version: 3,
            measurement: [7; 48].into(),
        },
    });
    keyd.obeys(Order::Barrier);
    install(&host, b"other");
    agent.say(ToRot::Upgrade {
        request_id: 3,
        component: Component::Rot,
    });
    assert!(matches!(next(&agent), FromRot::Failed { .. }));
    // It goes on: children are children, and what they store is kept.
    dataplane.push("b", &[numbered_file(2).as_fd()]);
    dataplane.kill();
    let dataplane = host.puppet(Role::Dataplane);
    assert_eq!(names(&dataplane.taken()), ["a", "b"]);
    assert_eq!(dataplane.started.descriptors, ["0", "1", "2", "3", "4"]);
    assert!(!keyd.ends_within(Duration::ZERO));
}

fn with_systemd() {
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    manager.start(&mut host);
    let [keyd, dataplane, agent] = Role::ALL.map(|role| host.puppet(role));
    for puppet in [&keyd, &dataplane, &agent] {
        puppet.say(ToRot::Hello);
    }
    while next(&agent) != FromRot::AdminListener {}
    let file = numbered_file(1);
    dataplane.push("a", &[file.as_fd(), numbered_file(2).as_fd()]);
    dataplane.push("b", &[file.as_fd()]);
    manager.handle_all_of(&dataplane);
    let stored = manager.names();
    let new = install(&host, b"new");
    ask_with(&mut manager, &keyd, &agent, new);
    assert_eq!(next(&agent), FromRot::Upgraded { request_id: 1 });
    dataplane.push("c", &[numbered_file(3).as_fd()]);
    manager.handle_all_of(&dataplane);
    assert_eq!(manager.names().len(), stored.len() + 1);
    host.signal(Signal::SIGKILL);
    host.ended();
    manager.start(&mut host);
    let taken = host.puppet(Role::Dataplane).taken();
    assert_eq!(
        (names(&taken), numbers(&taken)),
        (vec!["a", "a", "b", "c"], vec![1, 2, 1, 3])
    );
}

/// As [`ask`], while systemd handles what is stored.
fn ask_with(manager: &mut Manager, keyd: &Puppet, agent: &Puppet, measurement: Measurement) {
    let release = Release {
        component: Component::Rot,
        version: 1,
        measurement,
    };
    keyd.say(ToRot::Approve { release });
    manager.handle_all_of(keyd);
    agent.say(ToRot::Upgrade {
        request_id: 1,
        component: Component::Rot,
    });
    assert_eq!(next(agent), FromRot::Upgrading { request_id: 1 });
}
