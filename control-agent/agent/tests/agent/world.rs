//! A host for the real agent binary: its directories and files, the ends of its channels, and an
//! operator. The peers on the other ends are in `peers.rs`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_bundle::digest_of;
use bulkhead_bundle::text::to_hex;
use bulkhead_protocol::admin::{AdminReply, AdminRequest, HostStatus};
use bulkhead_protocol::control::AgentToDataplane;
use bulkhead_protocol::envelope::to_memfd;
use bulkhead_protocol::keys::AgentToKeyd;
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_protocol::{Channel, ChannelError, VolumeId};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use tempfile::TempDir;

use crate::bundles::{SIZE_BYTES, trust};
use crate::peers::Peers;

/// Longer than any wait of the agent.
const PATIENCE: Duration = Duration::from_secs(40);

pub struct World {
    pub dir: TempDir,
    pub peers: Peers,
    child: Option<Child>,
    pub rot: Channel,
    pub keyd: Option<Channel>,
    pub dataplane: Option<Channel>,
    listener: OwnedFd,
    generation: u64,
}

/// Everything that a refusal must leave as it was.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Digest of each file of the state.
    kept: BTreeMap<String, String>,
    pub descriptors: usize,
    floor: u64,
    bound: BTreeMap<String, (u32, u32, u32)>,
    inodes: BTreeMap<VolumeId, u64>,
    prepared: usize,
    connected: usize,
    status: HostStatus,
}

fn seqpacket() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("socket")
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

impl World {
    /// A host with files for volumes 1 to 4, and an agent with both peers.
    pub fn new() -> Self {
        let mut world = Self::prepared();
        world.start();
        world
    }

    fn prepared() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        for name in ["state", "volumes", "other", "run", "mirrors"] {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
        }
        fs::write(dir.path().join("trust.toml"), trust().to_text()).expect("trust");
        let listener = seqpacket();
        let address = UnixAddr::new(&dir.path().join("admin.sock")).expect("address");
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &address).expect("bind");
        listen(&listener, Backlog::new(32).expect("backlog")).expect("listen");
        let (rot, _) = Channel::pair().expect("pair");
        let world = Self {
            dir,
            peers: Peers::default(),
            child: None,
            rot,
            keyd: None,
            dataplane: None,
            listener,
            generation: 0,
        };
        for number in 1..=4 {
            world.make_file(&format!("disk{number}.img"), SIZE_BYTES);
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file among the volumes; returns its inode.
    pub fn make_file(&self, name: &str, size_bytes: u64) -> u64 {
        let file = File::create(self.path("volumes").join(name)).expect("create");
        file.set_len(size_bytes).expect("size");
        file.metadata().expect("stat").ino()
    }

    pub fn inode(&self, name: &str) -> u64 {
        let path = self.path("volumes").join(name);
        fs::metadata(path).expect("stat").ino()
    }

    /// Starts the agent (again) with new channels to everybody.
    pub fn start(&mut self) {
        self.kill();
        let (rot, theirs) = Channel::pair().expect("pair");
        rot.set_nonblocking(true).expect("nonblocking");
        self.rot = rot;
        self.keyd = None;
        self.dataplane = None;
        self.child = Some(spawn_agent(self.dir.path(), theirs));
        let hellos = self.count("rot hello");
        self.drive("hello", |world| world.count("rot hello") > hellos);
        let listener = self.listener.as_fd();
        self.rot
            .send(&FromRot::AdminListener, &[listener])
            .expect("send");
        self.announce(Role::Keyd);
        self.announce(Role::Dataplane);
    }

    /// A new generation of a peer, with a new channel to it.
    pub fn announce(&mut self, role: Role) {
        self.generation += 1;
        let (ours, theirs) = Channel::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let message = FromRot::Peer {
            role,
            generation: self.generation,
            measurement: [7; 48].into(),
            pid: std::process::id(),
        };
        // The agent keeps no pidfd; any descriptor stands in its place.
        let null = File::open("/dev/null").expect("null");
        let fds = [theirs.as_fd(), null.as_fd()];
        self.rot.send(&message, &fds).expect("send");
        match role {
            Role::Keyd => self.keyd = Some(ours),
            _ => self.dataplane = Some(ours),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("an agent").id()
    }

    /// Waits for the agent to end by itself, and gives its exit code.
    pub fn exit_code(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("an agent");
        child.wait().expect("wait").code()
    }

    pub fn count(&self, line: &str) -> usize {
        self.peers
            .log
            .iter()
            .filter(|l| l.starts_with(line))
            .count()
    }

    pub fn connect(&self) -> Channel {
        let fd = seqpacket();
        let address = UnixAddr::new(&self.path("admin.sock")).expect("address");
        connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).expect("connect");
        let channel = Channel::from(fd);
        channel.set_nonblocking(true).expect("nonblocking");
        channel
    }

    /// Sends an envelope and waits for nothing.
    pub fn send_apply(&self, envelope: &[u8], dry_run: bool) -> Channel {
        let client = self.connect();
        let fd = to_memfd(envelope).expect("memfd");
        let request = AdminRequest::Apply { dry_run };
        client.send(&request, &[fd.as_fd()]).expect("send");
        client
    }

    pub fn apply(&mut self, envelope: &[u8]) -> AdminReply {
        let client = self.send_apply(envelope, false);
        self.reply(&client)
    }

    /// Applies a bundle, which has to succeed with nothing left to do.
    pub fn apply_fully(&mut self, bundle: &bulkhead_bundle::HostBundle) -> Vec<String> {
        match self.apply(&crate::bundles::signed(bundle)) {
            AdminReply::Applied {
                epoch,
                steps,
                pending,
            } => {
                assert_eq!(epoch, bundle.epoch);
                assert_eq!(pending, Vec::<String>::new());
                steps
            }
            other => panic!("not applied: {other:?}"),
        }
    }

    pub fn reply(&mut self, client: &Channel) -> AdminReply {
        let mut reply = None;
        self.drive("reply", |_| {
            match client.receive::<AdminReply>() {
                Ok(received) => reply = Some(received.message),
                Err(ChannelError::WouldBlock) => {}
                Err(error) => panic!("no reply: {error}"),
            }
            reply.is_some()
        });
        // What was sent before the reply has arrived by now; and the agent closes the connection.
        self.serve();
        self.drive("the end", |_| {
            matches!(client.receive::<AdminReply>(), Err(ChannelError::Closed))
        });
        reply.expect("set")
    }

    pub fn status(&mut self) -> HostStatus {
        let client = self.connect();
        client.send(&AdminRequest::Status, &[]).expect("send");
        match self.reply(&client) {
            AdminReply::Status { status } => status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// Waits until a bundle of this epoch is in force and nothing is pending.
    pub fn settle(&mut self, epoch: u64) -> HostStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            let all = status.volumes.iter().all(|volume| {
                let state = volume.state.as_ref();
                state.is_some_and(|state| state.attached)
            });
            let quiet = self.peers.prepared.is_empty();
            if status.epoch == Some(epoch) && status.pending.is_empty() && all && quiet {
                return status;
            }
            assert!(
                Instant::now() < end,
                "never settled: {status:?} {:?}",
                self.peers
            );
            self.drive_for(Duration::from_millis(30));
        }
    }

    /// Plays the peers until a condition holds.
    pub fn drive(&mut self, what: &str, mut until: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !until(self) {
            assert!(
                Instant::now() < end,
                "{what} never came: {:?}",
                self.peers.log
            );
            self.wait();
            self.serve();
        }
    }

    pub fn drive_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.wait();
            self.serve();
        }
    }

    fn wait(&self) {
        let peers = [Some(&self.rot), self.keyd.as_ref(), self.dataplane.as_ref()];
        let wanted = |channel| PollFd::new(channel, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = peers
            .into_iter()
            .flatten()
            .map(|channel| wanted(channel.as_fd()))
            .collect();
        nix::poll::poll(&mut fds, PollTimeout::from(5u8)).expect("poll");
        // A dead agent's channels are ready at once, always.
        if fds
            .iter()
            .any(|fd| fd.revents().is_some_and(|r| r.contains(PollFlags::POLLHUP)))
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Answers what has arrived.
    pub fn serve(&mut self) {
        loop {
            let mut idle = true;
            if let Ok(received) = self.rot.receive::<ToRot>() {
                idle = false;
                if let Some(answer) = self.peers.rot(received.message) {
                    let _ = self.rot.send(&answer, &[]);
                }
            }
            if let Some(keyd) = &self.keyd
                && let Ok(received) = keyd.receive::<AgentToKeyd>()
            {
                idle = false;
                if let Some(answer) = self.peers.keyd(received) {
                    let _ = keyd.send(&answer, &[]);
                }
            }
            if let Some(dataplane) = &self.dataplane
                && let Ok(received) = dataplane.receive::<AgentToDataplane>()
            {
                idle = false;
                if let Some(answer) = self.peers.dataplane(received) {
                    let _ = dataplane.send(&answer, &[]);
                }
            }
            if idle {
                return;
            }
        }
    }

    pub fn snapshot(&mut self) -> Snapshot {
        let status = self.status();
        let entries = fs::read_dir(self.path("state")).expect("list");
        let kept = entries.map(|entry| {
            let entry = entry.expect("entry");
            let name = entry.file_name().into_string().expect("text");
            let digest = digest_of(&fs::read(entry.path()).expect("read"));
            (name, to_hex(&digest))
        });
        let descriptors = format!("/proc/{}/fd", self.pid());
        let bound = self.peers.bound.iter();
        Snapshot {
            kept: kept.collect(),
            descriptors: fs::read_dir(descriptors).expect("list").count(),
            floor: self.peers.floor,
            bound: bound
                .map(|(name, spec)| (name.to_string(), *spec))
                .collect(),
            inodes: self.peers.inodes(),
            prepared: self.peers.prepared.len(),
            connected: self.peers.connected.len(),
            status,
        }
    }
}

/// The agent's command line.
fn command(dir: &Path) -> Command {
    // A shell puts the channel where rot puts it; then it is the agent, with the same pid.
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg("exec \"$0\" \"$@\" 3<&0 </dev/null")
        .arg(env!("CARGO_BIN_EXE_bulkhead-agent"))
        .args(["--host", "host-a"]);
    for (name, file) in [
        ("--state-dir", "state"),
        ("--trust", "trust.toml"),
        ("--vhost-dir", "run"),
        ("--volume-dir", "volumes"),
        ("--volume-dir", "other"),
        ("--mirror-dir", "mirrors"),
    ] {
        command.arg(name).arg(dir.join(file));
    }
    command.env("BULKHEAD_ROT", "1");
    command
}

fn spawn_agent(dir: &Path, channel: Channel) -> Child {
    let stdin = Stdio::from(OwnedFd::from(channel));
    command(dir).stdin(stdin).spawn().expect("spawn")
}

/// Runs an agent that is expected not to start, and gives its log.
pub fn start_in_vain(world: &mut World) -> String {
    world.kill();
    let (_ours, theirs) = Channel::pair().expect("pair");
    let output = command(world.dir.path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::piped())
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}
