//! rot under systemd, whose part the test plays: its notify socket and its descriptor store, with
//! its ways (an open file is stored once, the order is not the one of storing).

use std::cmp::Ordering;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_protocol::fd_store::message::Notification;
use bulkhead_protocol::fd_store::{FdName, Keeper};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_rot::same_file;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::host::{Host, PATIENCE, Puppet, happens, readable};
use crate::puppet::{Order, Report, numbered_file};
use crate::storing::{last_stored, names, numbers, stored};
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case("a_killed_rot_loses_nothing_that_systemd_has", killed),
    case(
        "kills_of_rot_at_any_moment_leave_what_fits_together",
        any_moment,
    ),
    case("a_systemd_that_does_not_read_holds_up_nobody_else", slow),
    case(
        "what_systemd_stored_for_another_version_is_dropped",
        foreign,
    ),
    case("descriptors_for_another_process_are_left_alone", not_ours),
];

/// systemd, as far as rot sees it.
pub struct Manager {
    socket: Keeper,
    /// The last that came is the first.
    stored: Vec<(FdName, OwnedFd)>,
}

impl Manager {
    pub fn new(host: &Host) -> Self {
        let socket = UnixDatagram::bind(host.path("notify")).expect("bind");
        Self {
            socket: Keeper::from(OwnedFd::from(socket)),
            stored: Vec::new(),
        }
    }

    /// Handles what has come.
    fn handle(&mut self) {
        while let Ok(received) = self.socket.receive() {
            let received = received.expect("no message is empty");
            match received.notification.expect("rot sends what systemd takes") {
                Notification::Store { name } => {
                    for fd in received.fds {
                        self.store(name, fd);
                    }
                }
                Notification::Remove { name } => self.stored.retain(|(n, _)| *n != name),
                Notification::Barrier => {}
            }
        }
    }

    fn store(&mut self, name: FdName, fd: OwnedFd) {
        let same = |stored: &OwnedFd| same_file::order(stored.as_fd(), fd.as_fd());
        if !self.stored.iter().any(|(_, s)| same(s) == Ordering::Equal) {
            self.stored.insert(0, (name, fd));
        }
    }

    /// Handles what comes until the puppet's barrier was reached.
    #[track_caller]
    pub fn handle_all_of(&mut self, puppet: &Puppet) {
        puppet.order(Order::ReportBarrier);
        let (_, pipe) = puppet.report();
        let [pipe] = <[OwnedFd; 1]>::try_from(pipe).expect("its pipe");
        let end = Instant::now() + PATIENCE;
        while !happens(&pipe, PollFlags::empty(), Duration::from_millis(2)) {
            assert!(Instant::now() < end, "the barrier is not reached");
            self.handle();
        }
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.stored.iter().map(|(n, _)| n.to_string()).collect();
        names.sort();
        names
    }

    /// Starts rot as systemd does.
    pub fn start(&self, host: &mut Host) {
        let mut command = self.command(host, "$$");
        command.env("NOTIFY_SOCKET", host.path("notify"));
        host.spawn(command);
    }

    /// A shell that moves what is stored to 3 and up, and executes rot.
    fn command(&self, host: &Host, pid: &str) -> Command {
        let rot = host.command(&host.path("log"));
        let mut script = String::new();
        for (i, (_, fd)) in self.stored.iter().enumerate() {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("fcntl");
            script += &format!("exec {}<&{}\n", 400 + i, fd.as_raw_fd());
        }
        for i in 0..self.stored.len() {
            script += &format!("exec {}<&{from} {from}<&-\n", 3 + i, from = 400 + i);
        }
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| name.as_str()).collect();
        script += &format!(
            "export LISTEN_PID={pid} LISTEN_FDS={} LISTEN_FDNAMES='{}'\nexec \"$0\" \"$@\"",
            names.len(),
            names.join(":")
        );
        let mut command = Command::new("bash");
        command.args(["-c", &script]).arg(rot.get_program());
        command.args(rot.get_args()).env("BULKHEAD_LOG", "info");
        let log = File::options()
            .append(true)
            .create(true)
            .open(host.path("log"));
        command.stderr(log.expect("log"));
        command
    }
}

fn killed() {
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    manager.start(&mut host);
    let [keyd, dataplane, _agent] = Role::ALL.map(|role| host.puppet(role));
    keyd.say(ToRot::Hello);
    dataplane.say(ToRot::Hello);
    let files = [0, 1, 2].map(numbered_file);
    dataplane.push("a", &[files[0].as_fd(), files[1].as_fd()]);
    // The same open file under another name: systemd has it once.
    dataplane.push("b", &[files[0].as_fd()]);
    manager.handle_all_of(&dataplane);
    keyd.push("k", &[files[2].as_fd()]);
    manager.handle_all_of(&keyd);
    let all = ["dataplane.0", "dataplane.1", "keyd.2", "rot.table"];
    assert_eq!(manager.names(), all);

    host.signal(Signal::SIGKILL);
    host.ended();
    assert!(dataplane.ends_within(PATIENCE) && keyd.ends_within(PATIENCE));
    manager.start(&mut host);
    let dataplane = host.puppet(Role::Dataplane);
    let taken = dataplane.taken();
    assert_eq!(names(&taken), ["a", "a", "b"]);
    assert_eq!(numbers(&taken), [0, 1, 0]);
    let same = same_file::order(taken[2].1.as_fd(), files[0].as_fd());
    assert_eq!(same, Ordering::Equal);
    assert_eq!(names(&host.puppet(Role::Keyd).taken()), ["k"]);
    assert!(host.puppet(Role::Agent).taken().is_empty());
    dataplane.obeys(Order::Remove("a".to_owned()));
    manager.handle_all_of(&dataplane);
    assert_eq!(manager.names(), ["dataplane.0", "keyd.2", "rot.table"]);

    host.signal(Signal::SIGKILL);
    host.ended();
    manager.start(&mut host);
    let dataplane = host.puppet(Role::Dataplane);
    let taken = dataplane.taken();
    assert_eq!((names(&taken), numbers(&taken)), (vec!["b"], vec![0]));
    dataplane.push("c", &[files[1].as_fd()]);
    dataplane.obeys(Order::Remove("b".to_owned()));
    manager.handle_all_of(&dataplane);
    // Numbers are not given again.
    assert_eq!(manager.names(), ["dataplane.3", "keyd.2", "rot.table"]);
}

/// Each round: what a barrier confirmed is there after the kill, and of what was on its way a part
/// without gaps; a rot that is killed before anything changes leaves it as it was.
fn any_moment() {
    const KEPT: u32 = 1_000_000;
    let rounds = if std::env::var_os("BULKHEAD_SOAK").is_some() {
        300
    } else {
        8
    };
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    let mut taken_before = Vec::new();
    for round in 0..rounds {
        manager.start(&mut host);
        let dataplane = host.puppet(Role::Dataplane);
        dataplane.say(ToRot::Hello);
        let taken = numbers(&dataplane.taken());
        assert_eq!(taken, taken_before, "what was there stays there");
        dataplane.obeys(Order::RemoveAll);
        dataplane.push("kept", &[numbered_file(KEPT).as_fd()]);
        manager.handle_all_of(&dataplane);
        assert_eq!(manager.stored.len(), 2, "it and the table");
        dataplane.order(Order::StoreForEver);
        let mut seen = 0;
        while seen < 23 * (round % 40) || manager.stored.len() < 4 {
            // It waits for systemd in between.
            if readable(dataplane.control(), Duration::from_millis(1)) {
                seen = stored(&dataplane);
            }
            manager.handle();
        }
        host.signal(Signal::SIGKILL);
        host.ended();
        assert!(dataplane.ends_within(PATIENCE) || last_stored(&dataplane).is_some());
        while let Some(last) = last_stored(&dataplane) {
            seen = last;
        }
        manager.handle();
        // A rot that only looks: nobody stores anything until it is killed.
        manager.start(&mut host);
        let dataplane = host.puppet(Role::Dataplane);
        taken_before = numbers(&dataplane.taken());
        let [kept, on_their_way @ ..] = &taken_before[..] else {
            panic!("what a barrier confirmed is lost");
        };
        assert_eq!(*kept, KEPT);
        assert!(
            on_their_way.windows(2).all(|two| two[0] + 1 == two[1]),
            "{on_their_way:?}"
        );
        assert!(on_their_way.len() <= 9, "{on_their_way:?}");
        assert!(
            on_their_way.iter().all(|&n| n <= seen + 1),
            "{on_their_way:?} after {seen}"
        );
        manager.handle_all_of(&dataplane);
        assert_eq!(
            manager.stored.len(),
            taken_before.len() + 1,
            "and the table"
        );
        host.signal(Signal::SIGKILL);
        host.ended();
    }
}

fn slow() {
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    manager.start(&mut host);
    let dataplane = host.puppet(Role::Dataplane);
    dataplane.say(ToRot::Hello);
    let agent = host.puppet(Role::Agent);
    agent.say(ToRot::Hello);
    let next = || loop {
        match agent.next().0 {
            FromRot::Peer { .. } => {}
            other => return other,
        }
    };
    assert_eq!(next(), FromRot::AdminListener);
    dataplane.expect_peer(Role::Agent, 1);
    // More than fits systemd's socket (512 where it is long), rot's queue and the data plane's socket.
    let many = 1500;
    dataplane.order(Order::StoreMany(many));
    assert!(!readable(dataplane.control(), Duration::from_millis(300)));
    let name = "vm".parse().expect("name");
    agent.say(ToRot::Unbind {
        request_id: 1,
        name,
    });
    assert_eq!(next(), FromRot::Unbound { request_id: 1 });
    let end = Instant::now() + PATIENCE;
    while !readable(dataplane.control(), Duration::from_millis(1)) {
        assert!(Instant::now() < end, "it is not done");
        manager.handle();
    }
    assert!(matches!(dataplane.report().0, Report::Obeyed));
    manager.handle_all_of(&dataplane);
    assert_eq!(manager.stored.len(), many as usize + 1);
}

fn foreign() {
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    for (i, name) in ["rot.table", "dataplane.0", "dataplane.1"]
        .iter()
        .enumerate()
    {
        let file = numbered_file(u32::try_from(i).expect("small"));
        manager.store(name.parse().expect("a name"), file);
    }
    manager.start(&mut host);
    let dataplane = host.puppet(Role::Dataplane);
    assert!(dataplane.taken().is_empty());
    manager.handle_all_of(&dataplane);
    assert_eq!(manager.names(), ["rot.table"], "a new one");
    host.wait_for_log("its table can't be read");
}

fn not_ours() {
    let mut host = Host::new();
    let mut manager = Manager::new(&host);
    manager.store("dataplane.0".parse().expect("a name"), numbered_file(1));
    let mut command = manager.command(&host, "1");
    command.env("NOTIFY_SOCKET", host.path("notify"));
    host.spawn(command);
    let dataplane = host.puppet(Role::Dataplane);
    assert_eq!(dataplane.started.descriptors, ["0", "1", "2", "3", "4"]);
    assert!(dataplane.taken().is_empty());
    manager.handle_all_of(&dataplane);
    assert_eq!(manager.names(), ["dataplane.0", "rot.table"]);
}
