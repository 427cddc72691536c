//! A host for one test: a folder, a rot in it, and the puppets that rot starts.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::Channel;
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::unistd::Pid;

use crate::puppet::{Order, PUPPETS_SOCKET, Report, Started};

/// How long anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Does it become readable within `wait`?
pub fn readable(fd: impl AsFd, wait: Duration) -> bool {
    happens(fd, PollFlags::POLLIN, wait)
}

/// Does one of `flags`, or a hang-up, happen within `wait`?
pub fn happens(fd: impl AsFd, flags: PollFlags, wait: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), flags)];
    poll(&mut fds, PollTimeout::try_from(wait).expect("short")).expect("poll") > 0
}

/// A folder with binaries, not started yet.
pub struct Host {
    folder: tempfile::TempDir,
    listener: UnixListener,
    unclaimed: Vec<Puppet>,
    rot: Option<Child>,
    /// Arguments after the fixed ones.
    pub more: Vec<String>,
    /// The user that rot runs as; none is the test's.
    pub user: Option<u32>,
}

/// A child of rot that does what it is told.
pub struct Puppet {
    control: Channel,
    /// Which program it was started as.
    pub role: Role,
    /// What it knew at its start.
    pub started: Started,
}

impl Host {
    /// A folder in which the three binaries are this test binary.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("tempdir");
        // Children of other users connect to the test.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("mode");
        fs::create_dir(folder.path().join("bin")).expect("bin");
        fs::write(folder.path().join("trust.toml"), "").expect("trust");
        let own = std::env::current_exe().expect("own path");
        for role in Role::ALL {
            symlink(&own, folder.path().join(format!("bin/bulkhead-{role}"))).expect("link");
        }
        let path = folder.path().join(PUPPETS_SOCKET);
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let listener = socket(AddressFamily::Unix, kind, flags, None).expect("socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("path")).expect("bind");
        listen(&listener, Backlog::new(16).expect("backlog")).expect("listen");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).expect("mode");
        Self {
            folder,
            // The standard library's type for stream sockets accepts from this one as well.
            listener: UnixListener::from(listener),
            unclaimed: Vec::new(),
            rot: None,
            more: Vec::new(),
            user: None,
        }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The socket file of a listener.
    pub fn vhost(&self, name: &str) -> PathBuf {
        self.path(&format!("run/vhost/{name}.sock"))
    }

    /// rot's command, its log going to `log`.
    pub fn command(&self, log: &Path) -> Command {
        let copied = self.path("bin/rot");
        let built = Path::new(env!("CARGO_BIN_EXE_bulkhead-rot"));
        let program = if copied.exists() { &copied } else { built };
        let mut command = Command::new(program);
        let option = |name: &str, value: &str| [name.to_owned(), value.to_owned()];
        let path = |name: &str| self.path(name).to_string_lossy().into_owned();
        command
            .args(option("--host", "h"))
            .args(option("--bin-dir", &path("bin")))
            .args(option("--state-dir", &path("state")))
            .args(option("--run-dir", &path("run")))
            .args(option("--trust", &path("trust.toml")))
            .args(option("--volume-dir", &path("volumes")))
            .args(&self.more)
            .env("BULKHEAD_LOG", "info")
            .stderr(
                File::options()
                    .append(true)
                    .create(true)
                    .open(log)
                    .expect("log"),
            );
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Starts rot.
    pub fn start(&mut self) {
        let command = self.command(&self.path("log"));
        self.spawn(command);
    }

    /// Starts rot by a command that executes it.
    pub fn spawn(&mut self, mut command: Command) {
        self.rot = Some(command.spawn().expect("spawn rot"));
    }

    /// Starts rot, waits for the three puppets and has each say Hello: keyd, data plane, agent.
    /// What each was sent is read up to there.
    pub fn start_up(&mut self) -> [Puppet; 3] {
        self.start();
        let puppets = Role::ALL.map(|role| self.puppet(role));
        let [keyd, dataplane, agent] = &puppets;
        keyd.say(ToRot::Hello);
        dataplane.say(ToRot::Hello);
        keyd.expect_peer(Role::Dataplane, 1);
        dataplane.expect_peer(Role::Keyd, 1);
        agent.say(ToRot::Hello);
        keyd.expect_peer(Role::Agent, 1);
        dataplane.expect_peer(Role::Agent, 1);
        agent.expect_peer(Role::Keyd, 1);
        agent.expect_peer(Role::Dataplane, 1);
        let (admin, fds) = agent.next();
        assert_eq!((admin, fds.len()), (FromRot::AdminListener, 1));
        puppets
    }

    /// The next process of a role.
    #[track_caller]
    pub fn puppet(&mut self, role: Role) -> Puppet {
        loop {
            if let Some(i) = self.unclaimed.iter().position(|p| p.role == role) {
                return self.unclaimed.remove(i);
            }
            let came = readable(&self.listener, PATIENCE);
            assert!(came, "rot started no {role}; its log:\n{}", self.log());
            let puppet = Puppet::accept(&self.listener);
            self.unclaimed.push(puppet);
        }
    }

    /// What rot logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// How many lines of the log have `text`.
    pub fn logged(&self, text: &str) -> usize {
        self.log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }

    /// Waits for a log line with `text`.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while self.logged(text) == 0 {
            assert!(Instant::now() < end, "no {text:?} in:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// rot's process id.
    pub fn pid(&self) -> u32 {
        self.rot.as_ref().expect("started").id()
    }

    /// Sends rot a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("pid"));
        kill(pid, signal).expect("kill");
    }

    /// Waits for rot's end.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        end_of(self.rot.take().expect("started"))
    }
}

/// Waits for the end of a process, or ends it and fails.
#[track_caller]
pub fn end_of(mut process: Child) -> ExitStatus {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.try_wait().expect("wait") {
            return status;
        }
        if Instant::now() > end {
            process.kill().expect("kill");
            panic!("process {} did not end", process.id());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut rot) = self.rot.take() {
            // Its children end with it.
            let _ = rot.kill();
            let _ = rot.wait();
        }
    }
}

impl Puppet {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("accept");
        let control = Channel::from(OwnedFd::from(stream));
        let Report::Started(started) = control.receive().expect("report").message else {
            panic!("the first report is Started");
        };
        let name = started.arguments.first().expect("a name").clone();
        let role = Role::ALL
            .into_iter()
            .find(|role| name == format!("bulkhead-{role}"))
            .expect("a known name");
        Self {
            control,
            role,
            started,
        }
    }

    /// Readable when it has passed something on.
    pub fn control(&self) -> &Channel {
        &self.control
    }

    /// Gives an order.
    pub fn order(&self, order: Order) {
        self.control.send(&order, &[]).expect("the puppet lives");
    }

    /// Has it send rot a message.
    pub fn say(&self, message: ToRot) {
        self.order(Order::Say(message));
    }

    /// The next message it got from rot, with its descriptors.
    #[track_caller]
    pub fn next(&self) -> (FromRot, Vec<OwnedFd>) {
        assert!(
            readable(&self.control, PATIENCE),
            "{} got nothing",
            self.role
        );
        let received = self.control.receive().expect("report");
        match received.message {
            Report::FromRot(message) => (message, received.fds),
            other => panic!("{} reported {other:?}", self.role),
        }
    }

    /// From now on it reads nothing that rot sends, not even that rot is gone.
    #[track_caller]
    pub fn stop_reading(&self) {
        self.order(Order::StopReading);
        assert!(readable(&self.control, PATIENCE), "{} is silent", self.role);
        let report = self.control.receive().expect("report").message;
        assert!(matches!(report, Report::Obeyed), "{report:?}");
    }

    /// The next message is a `Peer` with two descriptors: the channel and the pidfd.
    #[track_caller]
    pub fn expect_peer(&self, role: Role, generation: u64) -> (FromRot, Channel, OwnedFd) {
        let (message, fds) = self.next();
        match &message {
            FromRot::Peer {
                role: r,
                generation: g,
                ..
            } => assert_eq!((*r, *g), (role, generation)),
            other => panic!("{} expected Peer of {role}, got {other:?}", self.role),
        }
        let [socket, pidfd] = <[OwnedFd; 2]>::try_from(fds).expect("two descriptors");
        (message, Channel::from(socket), pidfd)
    }

    /// Has it store descriptors.
    pub fn push(&self, name: &str, fds: &[BorrowedFd<'_>]) {
        let order = Order::Push(name.to_owned());
        self.control.send(&order, fds).expect("the puppet lives");
        let (report, _) = self.report();
        assert!(matches!(report, Report::Obeyed), "{report:?}");
    }

    /// The next report that is not of a message from rot.
    #[track_caller]
    pub fn report(&self) -> (Report, Vec<OwnedFd>) {
        loop {
            assert!(readable(&self.control, PATIENCE), "{} is silent", self.role);
            let received = self.control.receive::<Report>().expect("report");
            if !matches!(received.message, Report::FromRot(_)) {
                return (received.message, received.fds);
            }
        }
    }

    /// Gives an order that it answers.
    #[track_caller]
    pub fn obeys(&self, order: Order) {
        self.order(order);
        let (report, _) = self.report();
        assert!(matches!(report, Report::Obeyed), "{report:?}");
    }

    /// What rot gave it of what was stored.
    #[track_caller]
    pub fn taken(&self) -> Vec<(String, OwnedFd)> {
        self.order(Order::ReportTaken);
        let mut taken = Vec::new();
        loop {
            let (report, fds) = self.report();
            match report {
                Report::Taken(names) if names.is_empty() => return taken,
                Report::Taken(names) => taken.extend(names.into_iter().zip(fds)),
                other => panic!("{} reported {other:?}", self.role),
            }
        }
    }

    /// Kills it and waits for its end.
    pub fn kill(&self) {
        let pid = Pid::from_raw(i32::try_from(self.started.pid).expect("pid"));
        kill(pid, Signal::SIGKILL).expect("kill");
        assert!(self.ends_within(PATIENCE));
    }

    /// Has it ended, or does it within `wait`? Its end closes its socket to the test.
    pub fn ends_within(&self, wait: Duration) -> bool {
        happens(&self.control, PollFlags::empty(), wait)
    }
}
