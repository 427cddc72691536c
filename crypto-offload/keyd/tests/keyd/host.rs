//! A host for the real keyd: its state directory and the ends of its channels.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_crypto::secret::SecretMemory;
use bulkhead_protocol::envelope::to_memfd;
use bulkhead_protocol::keys::{
    AgentToKeyd, DataplaneToKeyd, HostKeys, KeydToAgent, KeydToDataplane, Undelivered,
};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{Channel, ChannelError, Received, VolumeId};
use minicbor::Decode;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use crate::bundles::{HOST, host_key, trust};

/// Longer than any wait of keyd.
pub const PATIENCE: Duration = Duration::from_secs(40);

pub struct Host {
    pub dir: TempDir,
    child: Option<Child>,
    pub rot: Channel,
    pub agent: Channel,
    pub dataplane: Option<Channel>,
    generation: u64,
    request_id: u64,
}

/// A message that the data plane got, with the key that came with it.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivered {
    pub message: KeydToDataplane,
    pub key: Option<[u8; 64]>,
    /// With a re-key.
    pub previous: Option<[u8; 64]>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Host {
    /// A fresh host with a running keyd, an agent (this process) and a data plane.
    pub fn new() -> Self {
        let mut host = Self::without_peers();
        host.new_agent(own_pidfd());
        host.new_dataplane();
        host
    }

    pub fn without_peers() -> Self {
        let mut host = Self::prepared();
        host.start();
        host
    }

    /// Without a keyd.
    pub fn prepared() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        fs::create_dir(dir.path().join("keyd")).expect("mkdir");
        let key = dir.path().join("keyd/host.key");
        host_key().save(&key).expect("host key");
        fs::write(dir.path().join("trust.toml"), trust().to_text()).expect("trust");
        Self {
            dir,
            child: None,
            rot: Channel::pair().expect("pair").0,
            agent: Channel::pair().expect("pair").0,
            dataplane: None,
            generation: 0,
            request_id: 0,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts keyd, again too, with a new channel to rot and no peers.
    pub fn start(&mut self) {
        self.kill();
        let (ours, theirs) = Channel::pair().expect("pair");
        self.rot = ours;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("log");
        let child = command(self.dir.path())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(log)
            .spawn();
        self.child = Some(child.expect("spawn"));
        let hello: Received<ToRot> = next(&self.rot).expect("hello");
        assert_eq!(hello.message, ToRot::Hello);
    }

    /// Starts a keyd that is expected to refuse, and gives its log.
    pub fn start_in_vain(&mut self) -> String {
        self.kill();
        let (_ours, theirs) = Channel::pair().expect("pair");
        let output = command(self.dir.path())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .output()
            .expect("run");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// After a start: peers as before, with new channels.
    pub fn connect(&mut self) {
        self.new_agent(own_pidfd());
        self.new_dataplane();
    }

    /// Tells keyd of an agent: the process of the pidfd.
    pub fn new_agent(&mut self, pidfd: OwnedFd) {
        let (ours, theirs) = Channel::pair().expect("pair");
        // As rot does: what is sent before keyd looks names its sender too.
        theirs.ask_for_sender().expect("SO_PASSPIDFD");
        self.announce(Role::Agent, &theirs, &pidfd);
        self.agent = ours;
    }

    /// A data plane that has its workers; gives those that keyd told it of.
    pub fn new_dataplane(&mut self) -> Option<Workers> {
        self.new_dataplane_that_holds(&[])
    }

    /// The same, with the keys of these volumes from the one before it.
    pub fn new_dataplane_that_holds(&mut self, holds: &[VolumeId]) -> Option<Workers> {
        let (ours, theirs) = Channel::pair().expect("pair");
        self.announce(Role::Dataplane, &theirs, &own_pidfd());
        self.dataplane = Some(ours);
        let told = self.delivered().message;
        self.say(&DataplaneToKeyd::WorkersHeard {
            restarts: false,
            holds: holds.to_vec(),
        });
        match told {
            KeydToDataplane::Workers { workers } => workers,
            other => panic!("the first message: {other:?}"),
        }
    }

    pub fn announce(&mut self, role: Role, socket: &Channel, pidfd: &OwnedFd) {
        self.generation += 1;
        let peer = FromRot::Peer {
            role,
            generation: self.generation,
            measurement: [7; 48].into(),
            pid: std::process::id(),
        };
        let fds = [socket.as_fd(), pidfd.as_fd()];
        self.rot.send(&peer, &fds).expect("send");
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a keyd").id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits for keyd to end by itself, and gives its exit code.
    pub fn exit_code(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("a keyd");
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("wait") {
                return status.code();
            }
            if Instant::now() >= end {
                let _ = child.kill();
                panic!("keyd never ended: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).expect("log")
    }

    /// The agent asks; returns the number of the request.
    pub fn ask(&mut self, envelope: &[u8]) -> u64 {
        let fd = to_memfd(envelope).expect("memfd");
        self.ask_with(&[fd.as_fd()])
    }

    pub fn ask_with(&mut self, fds: &[std::os::fd::BorrowedFd<'_>]) -> u64 {
        self.request_id += 1;
        let request_id = self.request_id;
        let accept = AgentToKeyd::Accept { request_id };
        self.agent.send(&accept, fds).expect("send");
        request_id
    }

    /// The agent asks about a release statement.
    pub fn ask_release(&mut self, statement: &[u8]) {
        self.request_id += 1;
        let request_id = self.request_id;
        let fd = to_memfd(statement).expect("memfd");
        let check = AgentToKeyd::CheckRelease { request_id };
        self.agent.send(&check, &[fd.as_fd()]).expect("send");
    }

    /// keyd's answer to the request asked last.
    pub fn answer(&self) -> KeydToAgent {
        let mut answer: Received<KeydToAgent> = next(&self.agent).expect("answer");
        answer.take_fds::<0>().expect("no descriptor");
        let (KeydToAgent::Accepted { request_id, .. }
        | KeydToAgent::Refused { request_id, .. }
        | KeydToAgent::ReleaseApproved { request_id, .. }) = &answer.message;
        assert_eq!(*request_id, self.request_id);
        answer.message
    }

    pub fn refusal(&self) -> String {
        match self.answer() {
            KeydToAgent::Refused { reason, .. } => reason,
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Asks, expects a refusal, and that nothing reached the data plane.
    pub fn refuse(&mut self, envelope: &[u8]) -> String {
        self.ask(envelope);
        let reason = self.refusal();
        assert!(self.is_quiet());
        reason
    }

    pub fn accepted(&self) -> (u64, Vec<Undelivered>) {
        match self.answer() {
            KeydToAgent::Accepted {
                epoch, undelivered, ..
            } => (epoch, undelivered),
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// As [`Host::accepted`], with what keyd says of the host's key.
    pub fn accepted_with_keys(&self) -> (HostKeys, Vec<Undelivered>) {
        match self.answer() {
            KeydToAgent::Accepted {
                keys, undelivered, ..
            } => (keys, undelivered),
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// Whether the data plane got nothing.
    pub fn is_quiet(&self) -> bool {
        let dataplane = self.dataplane.as_ref().expect("a data plane");
        !is_readable(dataplane, Duration::ZERO)
    }

    /// What the data plane gets next.
    pub fn delivered(&self) -> Delivered {
        let dataplane = self.dataplane.as_ref().expect("a data plane");
        let mut received: Received<KeydToDataplane> = next(dataplane).expect("a message");
        let (key, previous) = match &received.message {
            KeydToDataplane::Grant { .. } if received.fds.is_empty() => (None, None),
            KeydToDataplane::Grant { grant } if grant.rekey.is_some() => {
                let [page, previous] = received.take_fds().expect("two pages");
                (Some(key_in(page)), Some(key_in(previous)))
            }
            KeydToDataplane::Grant { grant } if grant.data_unit_bytes.is_some() => {
                let [page] = received.take_fds().expect("a page");
                (Some(key_in(page)), None)
            }
            _ => {
                received.take_fds::<0>().expect("no descriptor");
                (None, None)
            }
        };
        Delivered {
            message: received.message,
            key,
            previous,
        }
    }

    pub fn say(&self, answer: &DataplaneToKeyd) {
        let dataplane = self.dataplane.as_ref().expect("a data plane");
        dataplane.send(answer, &[]).expect("send");
    }

    /// Takes so many messages and says yes to each.
    pub fn take(&self, count: usize) -> Vec<Delivered> {
        let take = |_| {
            let delivered = self.delivered();
            self.say(&yes_to(&delivered.message));
            delivered
        };
        (0..count).map(take).collect()
    }

    /// Asks, with a data plane that says yes to so many messages, and expects it accepted whole.
    pub fn apply(&mut self, envelope: &[u8], count: usize) -> Vec<Delivered> {
        self.ask(envelope);
        let delivered = self.take(count);
        let (_, undelivered) = self.accepted();
        assert_eq!(undelivered, []);
        assert!(self.is_quiet());
        delivered
    }
}

fn key_in(page: OwnedFd) -> [u8; 64] {
    // One page, and dropped it is wiped, as the data plane does.
    let page = SecretMemory::from_fd(page, 4096).expect("secret memory");
    assert_eq!(page.as_bytes()[64..], [0; 4096 - 64]);
    *page.as_bytes().first_chunk().expect("a key")
}

pub fn yes_to(message: &KeydToDataplane) -> DataplaneToKeyd {
    match message {
        KeydToDataplane::Grant { grant } => DataplaneToKeyd::Granted {
            id: grant.volume.into(),
        },
        KeydToDataplane::GrantNic { grant } => DataplaneToKeyd::Granted {
            id: grant.nic.into(),
        },
        KeydToDataplane::Revoke { id } => DataplaneToKeyd::Revoked { id: *id },
        KeydToDataplane::Workers { .. } => DataplaneToKeyd::WorkersHeard {
            restarts: false,
            holds: Vec::new(),
        },
    }
}

/// Waits for a message.
pub fn next<M: for<'b> Decode<'b, ()>>(channel: &Channel) -> Result<Received<M>, ChannelError> {
    assert!(is_readable(channel, PATIENCE), "nothing came");
    channel.receive()
}

pub fn is_readable(channel: &Channel, patience: Duration) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).expect("short");
    poll(&mut fds, timeout).expect("poll") > 0
}

pub fn wait_for(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn own_pidfd() -> OwnedFd {
    let (ours, theirs) = Channel::pair().expect("pair");
    theirs.ask_for_sender().expect("SO_PASSPIDFD");
    ours.send(&0u8, &[]).expect("send");
    let received: Received<u8> = next(&theirs).expect("message");
    received.sender.expect("a pidfd")
}

/// keyd's command line.
fn command(dir: &Path) -> Command {
    // A shell puts the channel where rot puts it; then it is keyd, with the same pid.
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg("exec \"$0\" \"$@\" 3<&0 </dev/null")
        .arg(env!("CARGO_BIN_EXE_bulkhead-keyd"))
        .args(["--host", HOST])
        .arg("--state-dir")
        .arg(dir.join("keyd"))
        .arg("--trust")
        .arg(dir.join("trust.toml"))
        .env("BULKHEAD_ROT", "1")
        .env_remove("BULKHEAD_LOG");
    command
}
