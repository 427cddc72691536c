//! The listeners: who may ask for them, how their files look, and what they outlive.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use nix::sys::signal::Signal;

use crate::host::{Host, Puppet};
use crate::puppet::Order;
use crate::{Case, case, root_case};

pub const CASES: &[Case] = &[
    case("a_listener_outlives_the_data_plane", outlives),
    case("an_agent_restart_keeps_the_listeners", agent_restart),
    case("unbind_removes_the_file_and_tells_the_data_plane", unbind),
    case("refused_listeners_of_any_but_the_agent", only_the_agent),
    case("refused_requests_before_hello", before_hello),
    case("refused_names_that_climb", climbing),
    root_case("a_listener_has_the_owner_and_mode_asked_for", owner),
    case("what_a_killed_rot_left_is_replaced", stale),
];

fn bind(name: &str, request_id: u64) -> ToRot {
    ToRot::Bind {
        request_id,
        name: name.parse().expect("name"),
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        mode: 0o660,
    }
}

/// The data plane's next message is this listener.
#[track_caller]
fn take_listener(dataplane: &Puppet, name: &str) -> UnixListener {
    let (message, fds) = dataplane.next();
    let expected = FromRot::Listener {
        name: name.parse().expect("name"),
    };
    assert_eq!(message, expected);
    let [socket] = <[OwnedFd; 1]>::try_from(fds).expect("one descriptor");
    UnixListener::from(socket)
}

/// Binds at an agent whose data plane is `dataplane`.
#[track_caller]
fn bound(agent: &Puppet, dataplane: &Puppet, name: &str) -> UnixListener {
    agent.say(bind(name, 77));
    assert_eq!(agent.next().0, FromRot::Bound { request_id: 77 });
    take_listener(dataplane, name)
}

/// A byte from the frontend arrives at whoever accepts.
fn assert_serves(listener: &UnixListener, mut frontend: UnixStream) {
    let (mut backend, _) = listener.accept().expect("a frontend waits");
    frontend.write_all(b"!").expect("write");
    let mut byte = [0];
    backend.set_nonblocking(false).expect("fcntl");
    backend.read_exact(&mut byte).expect("read");
    assert_eq!(&byte, b"!");
}

fn outlives() {
    let mut host = Host::new();
    let [keyd, dataplane, agent] = host.start_up();
    let first = bound(&agent, &dataplane, "vm");
    assert_serves(
        &first,
        UnixStream::connect(host.vhost("vm")).expect("connect"),
    );
    drop(first);
    dataplane.kill();
    // Nobody accepts now, and yet the frontend is connected.
    let frontend = UnixStream::connect(host.vhost("vm")).expect("connect");
    let dataplane = host.puppet(Role::Dataplane);
    // Bound before its Hello: it hears of it once.
    agent.say(bind("other", 5));
    assert_eq!(agent.next().0, FromRot::Bound { request_id: 5 });
    dataplane.say(ToRot::Hello);
    dataplane.expect_peer(Role::Keyd, 1);
    dataplane.expect_peer(Role::Agent, 1);
    let other = take_listener(&dataplane, "other");
    let second = take_listener(&dataplane, "vm");
    assert_serves(&second, frontend);
    assert_serves(
        &other,
        UnixStream::connect(host.vhost("other")).expect("connect"),
    );
    keyd.expect_peer(Role::Dataplane, 2);
    assert!(!crate::host::readable(
        dataplane.control(),
        std::time::Duration::from_millis(50)
    ));
}

fn agent_restart() {
    let mut host = Host::new();
    let [_keyd, dataplane, agent] = host.start_up();
    let listener = bound(&agent, &dataplane, "vm");
    let inode = std::fs::metadata(host.vhost("vm")).expect("file").ino();
    agent.kill();
    let agent = host.puppet(Role::Agent);
    agent.say(ToRot::Hello);
    agent.expect_peer(Role::Keyd, 1);
    agent.expect_peer(Role::Dataplane, 1);
    assert_eq!(agent.next().0, FromRot::AdminListener);
    dataplane.expect_peer(Role::Agent, 2);
    // The new agent asks for what the old one had: the same socket, no news for the data plane.
    agent.say(bind("vm", 9));
    assert_eq!(agent.next().0, FromRot::Bound { request_id: 9 });
    assert_eq!(
        std::fs::metadata(host.vhost("vm")).expect("file").ino(),
        inode
    );
    assert_serves(
        &listener,
        UnixStream::connect(host.vhost("vm")).expect("connect"),
    );
    assert!(!crate::host::readable(
        dataplane.control(),
        std::time::Duration::from_millis(50)
    ));
}

fn unbind() {
    let mut host = Host::new();
    let [_keyd, dataplane, agent] = host.start_up();
    bound(&agent, &dataplane, "vm");
    let name = || "vm".parse().expect("name");
    for request_id in [1, 2] {
        agent.say(ToRot::Unbind {
            request_id,
            name: name(),
        });
        assert_eq!(agent.next().0, FromRot::Unbound { request_id });
        assert!(!host.vhost("vm").exists());
    }
    let gone = FromRot::ListenerGone { name: name() };
    assert_eq!(dataplane.next().0, gone);
    // Told once, and the name is free again.
    bound(&agent, &dataplane, "vm");
    assert!(host.vhost("vm").exists());
}

fn only_the_agent() {
    let mut host = Host::new();
    let [keyd, dataplane, agent] = host.start_up();
    bound(&agent, &dataplane, "vm");
    let unbind = ToRot::Unbind {
        request_id: 3,
        name: "vm".parse().expect("name"),
    };
    for other in [&keyd, &dataplane] {
        for request in [bind("mine", 3), unbind.clone()] {
            other.say(request);
            let (FromRot::Failed { request_id, reason }, _) = other.next() else {
                panic!("{} was not refused", other.role);
            };
            assert_eq!(request_id, 3);
            assert!(reason.contains("only the agent"), "{reason}");
        }
    }
    assert!(!host.vhost("mine").exists());
    assert!(host.vhost("vm").exists());
}

fn before_hello() {
    let mut host = Host::new();
    host.start();
    let agent = host.puppet(Role::Agent);
    agent.say(bind("vm", 4));
    let reason = "say Hello first".to_owned();
    let request_id = 4;
    assert_eq!(agent.next().0, FromRot::Failed { request_id, reason });
    assert!(!host.vhost("vm").exists());
}

fn files_in(folder: &Path) -> usize {
    std::fs::read_dir(folder).expect("folder").count()
}

/// A `Bind` as bytes, with whatever is wished for in place of the name: no value of the type
/// `SocketName` can climb, so a hostile agent would have to write the bytes itself.
fn climbing() {
    let mut host = Host::new();
    let [_keyd, dataplane, agent] = host.start_up();
    let before = files_in(&host.path("run"));
    let honest = minicbor::to_vec(bind("0123456789", 6)).expect("encode");
    let at = honest
        .windows(10)
        .position(|w| w == b"0123456789")
        .expect("there");
    for name in [
        b"../../evil",
        b"/tmp/evil0",
        b"a/../../bc",
        b".hidden-no",
        b"nul\0nul\0nu",
    ] {
        let mut bytes = honest.clone();
        bytes.splice(at..at + 10, name.iter().copied());
        agent.order(Order::SayBytes(bytes));
    }
    // The next proper request is the first that is answered.
    let listener = bound(&agent, &dataplane, "vm");
    assert_serves(
        &listener,
        UnixStream::connect(host.vhost("vm")).expect("connect"),
    );
    assert_eq!(host.logged("socket name"), 5, "{}", host.log());
    assert_eq!(files_in(&host.path("run")), before);
    assert_eq!(files_in(&host.path("run/vhost")), 1);
}

fn owner() {
    let mut host = Host::new();
    let [_keyd, dataplane, agent] = host.start_up();
    agent.say(ToRot::Bind {
        request_id: 1,
        name: "vm".parse().expect("name"),
        uid: 64010,
        gid: 64011,
        mode: 0o620,
    });
    assert_eq!(agent.next().0, FromRot::Bound { request_id: 1 });
    take_listener(&dataplane, "vm");
    let file = std::fs::symlink_metadata(host.vhost("vm")).expect("file");
    assert!(file.file_type().is_socket());
    assert_eq!((file.uid(), file.gid()), (64010, 64011));
    assert_eq!(file.mode() & 0o7777, 0o620);
}

fn stale() {
    let mut host = Host::new();
    let [_keyd, dataplane, agent] = host.start_up();
    bound(&agent, &dataplane, "vm");
    bound(&agent, &dataplane, "old");
    host.signal(Signal::SIGKILL);
    host.ended();
    for left in [
        host.vhost("vm"),
        host.vhost("old"),
        host.path("run/admin.sock"),
    ] {
        assert!(left.exists(), "a killed rot leaves {}", left.display());
    }
    let [_keyd, dataplane, agent] = host.start_up();
    assert!(!host.vhost("old").exists(), "nobody asked for it");
    let listener = bound(&agent, &dataplane, "vm");
    assert_serves(
        &listener,
        UnixStream::connect(host.vhost("vm")).expect("connect"),
    );
}
