//! The test plays rot, keyd and the agent for a real `bulkhead-dataplane`.
//!
//! UNSAFETY: between fork and exec the child moves one descriptor to the number that rot gives it;
//! `pidfd_open` takes integers and returns a descriptor that nobody else has.
#![expect(unsafe_code, reason = "the inherited descriptor; pidfd_open")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use bulkhead_crypto::SecretMemory;
use bulkhead_protocol::control::{
    AgentToDataplane, DataplaneToAgent, StorageState, VolumeStatus, WorkersStatus,
};
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane, VolumeGrant};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::process::{ROT_ENV, ROT_FD};
use bulkhead_protocol::rot::{FromRot, Measurement, Role, ToRot};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{Channel, DiscardPolicy, SocketName, VolumeId};
use tempfile::TempDir;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the volumes of these tests have.
pub const VOLUME_BYTES: u64 = 1 << 20;

/// A data plane and everybody it talks to.
pub struct Host {
    child: Child,
    rot: Channel,
    pub keyd: Channel,
    pub agent: Channel,
    pub dir: TempDir,
    pub request_id: u64,
    /// What was said unasked about the storage of volumes.
    pub storage_said: Vec<(VolumeId, StorageState)>,
}

/// Volume number `n`.
pub fn volume(n: u8) -> VolumeId {
    VolumeId([n; 16])
}

pub fn socket(n: u8) -> SocketName {
    format!("disk-{n}").parse().expect("a name")
}

/// What keyd grants for an encrypted volume of number `n`.
pub fn grant(n: u8) -> VolumeGrant {
    VolumeGrant {
        volume: volume(n),
        socket: socket(n),
        allowed_uid: nix::unistd::getuid().as_raw(),
        size_bytes: VOLUME_BYTES,
        logical_block_bytes: 4096,
        data_unit_bytes: Some(4096),
        read_only: false,
        serial: format!("serial-of-{n}"),
        queues: 2,
        discard: DiscardPolicy::Ignore,
        epoch: 1,
        rekey: None,
        limits: Limits::default(),
        group: None,
    }
}

/// A key without a byte twice in a row, different for each `n`.
pub fn key(n: u8) -> [u8; 64] {
    std::array::from_fn(|i| {
        u8::try_from(i).expect("small").wrapping_mul(73) ^ n.wrapping_mul(151) ^ 0x5c
    })
}

/// A page of secret memory that begins with the key.
pub fn key_page(key: &[u8; 64]) -> SecretMemory {
    let mut page = SecretMemory::new(64).expect("secret memory");
    page.as_mut_bytes().copy_from_slice(key);
    page
}

/// The process that the test is, as rot would name it.
pub fn pidfd_of(pid: u32) -> OwnedFd {
    // SAFETY: pidfd_open takes two integers and returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

fn start(their_end: OwnedFd, arguments: &[&str]) -> Child {
    let fd = their_end.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-dataplane"));
    command.args(arguments).env(ROT_ENV, "1");
    let give = move || {
        // SAFETY: dup2 and fcntl on integers; nothing else has number 3 in the new process.
        let rc = unsafe {
            if fd == ROT_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, ROT_FD)
            }
        };
        match rc {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(give) };
    command.spawn().expect("the data plane starts")
}

impl Host {
    /// A data plane that has said hello and knows a keyd and an agent.
    pub fn start() -> Self {
        Self::start_with(&["--workers", "2"])
    }

    /// The same with other arguments. Without workers among them it waits for keyd to say them.
    pub fn start_with(arguments: &[&str]) -> Self {
        let (rot, theirs) = Channel::pair().expect("socketpair");
        let child = start(theirs.into(), arguments);
        patient(&rot);
        let hello = rot.receive::<ToRot>().expect("hello");
        assert_eq!(hello.message, ToRot::Hello);
        let mut host = Self {
            child,
            rot,
            keyd: Channel::pair().expect("socketpair").0,
            agent: Channel::pair().expect("socketpair").0,
            dir: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("directory"),
            request_id: 0,
            storage_said: Vec::new(),
        };
        host.keyd = host.introduce(Role::Keyd, 1, &pidfd_of(std::process::id()));
        host.agent = host.introduce(Role::Agent, 1, &pidfd_of(std::process::id()));
        host
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells the data plane of a peer, as which `process` may speak; gives the peer's end.
    pub fn introduce(&self, role: Role, generation: u64, process: &OwnedFd) -> Channel {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        theirs.ask_for_sender().expect("SO_PASSPIDFD");
        patient(&ours);
        let peer = FromRot::Peer {
            role,
            generation,
            measurement: Measurement::from([0; 48]),
            pid: std::process::id(),
        };
        self.tell(&peer, &[theirs.as_fd(), process.as_fd()]);
        ours
    }

    pub fn tell(&self, message: &FromRot, fds: &[BorrowedFd<'_>]) {
        self.rot.send(message, fds).expect("rot's channel");
    }

    pub fn socket_path(&self, n: u8) -> PathBuf {
        self.dir.path().join(socket(n).as_str())
    }

    /// Sends the listener of volume `n`.
    pub fn listen(&self, n: u8) {
        let listener = UnixListener::bind(self.socket_path(n)).expect("bind");
        let name = socket(n);
        self.tell(&FromRot::Listener { name }, &[listener.as_fd()]);
    }

    /// The file of volume `n`, made when it is first asked for.
    pub fn file(&self, n: u8) -> File {
        self.file_of(n, VOLUME_BYTES)
    }

    pub fn file_of(&self, n: u8, bytes: u64) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true);
        let path = self.dir.path().join(format!("file-{n}"));
        let file = options.open(path).expect("file");
        file.set_len(bytes).expect("length");
        file
    }

    /// Sends a grant with what belongs to it; the answer.
    pub fn grant(&self, grant: &VolumeGrant, fds: &[BorrowedFd<'_>]) -> DataplaneToKeyd {
        let grant = grant.clone();
        self.ask_keyd(&KeydToDataplane::Grant { grant }, fds)
    }

    /// Grants an encrypted volume with its key; the data plane takes it.
    pub fn granted(&self, n: u8) {
        let page = key_page(&key(n)).into_fd();
        let volume = volume(n);
        let answer = self.grant(&grant(n), &[page.as_fd()]);
        assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    }

    pub fn revoke(&self, n: u8) {
        let volume = volume(n);
        let answer = self.ask_keyd(&KeydToDataplane::Revoke { id: volume.into() }, &[]);
        assert_eq!(answer, DataplaneToKeyd::Revoked { id: volume.into() });
    }

    /// Tells of the bundle's workers; whether the data plane ends for them.
    pub fn workers(&self, workers: Option<Workers>) -> bool {
        let answer = self.ask_keyd(&KeydToDataplane::Workers { workers }, &[]);
        match answer {
            DataplaneToKeyd::WorkersHeard { restarts, .. } => restarts,
            other => panic!("not about workers: {other:?}"),
        }
    }

    pub fn ask_keyd(&self, message: &KeydToDataplane, fds: &[BorrowedFd<'_>]) -> DataplaneToKeyd {
        self.keyd.send(message, fds).expect("keyd's channel");
        self.keyd.receive().expect("an answer to keyd").message
    }

    /// Asks as the agent; the answer has the request's number.
    pub fn ask(
        &mut self,
        make: impl FnOnce(u64) -> AgentToDataplane,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), String> {
        self.request_id += 1;
        let message = make(self.request_id);
        self.agent.send(&message, fds).expect("the agent's channel");
        match self.answer() {
            DataplaneToAgent::Done { request_id } if request_id == self.request_id => Ok(()),
            DataplaneToAgent::Refused { request_id, reason } if request_id == self.request_id => {
                Err(reason)
            }
            other => panic!("not an answer to request {}: {other:?}", self.request_id),
        }
    }

    /// The next answer to the agent.
    pub fn answer(&mut self) -> DataplaneToAgent {
        loop {
            let answer = self.agent.receive::<DataplaneToAgent>();
            match answer.expect("an answer to the agent").message {
                DataplaneToAgent::Storage { volume, status } => {
                    self.storage_said.push((volume, status.state));
                }
                answer => return answer,
            }
        }
    }

    /// Asks for volume `n` on the socket of volume `on`, with a file.
    pub fn attach_on(&mut self, n: u8, on: u8, file: &File) -> Result<(), String> {
        let make = |request_id| AgentToDataplane::Attach {
            request_id,
            volume: volume(n),
            socket: socket(on),
        };
        self.ask(make, &[file.as_fd()])
    }

    pub fn attach(&mut self, n: u8) -> Result<(), String> {
        let file = self.file(n);
        self.attach_on(n, n, &file)
    }

    pub fn detach(&mut self, n: u8) -> Result<(), String> {
        let volume = volume(n);
        let make = |request_id| AgentToDataplane::Detach {
            request_id,
            id: volume.into(),
        };
        self.ask(make, &[])
    }

    /// Detaches a volume whose storage hangs: how many of its requests are left.
    pub fn detach_hung(&mut self, n: u8) -> u32 {
        self.request_id += 1;
        let request_id = self.request_id;
        let message = AgentToDataplane::Detach {
            request_id,
            id: volume(n).into(),
        };
        self.agent.send(&message, &[]).expect("the agent's channel");
        match self.answer() {
            DataplaneToAgent::GivenUp {
                request_id: id,
                requests,
            } if id == request_id => requests,
            other => panic!("not given up: {other:?}"),
        }
    }

    pub fn prepare_remove(&mut self, n: u8, force: bool) -> Result<(), String> {
        let volume = volume(n);
        let make = |request_id| AgentToDataplane::PrepareRemove {
            request_id,
            id: volume.into(),
            force,
        };
        self.ask(make, &[])
    }

    pub fn cancel_remove(&mut self, n: u8) -> Result<(), String> {
        let volume = volume(n);
        let make = |request_id| AgentToDataplane::CancelRemove {
            request_id,
            id: volume.into(),
        };
        self.ask(make, &[])
    }

    /// A granted volume with its listener, served.
    pub fn served(&mut self, n: u8) {
        self.granted(n);
        self.listen(n);
        assert_eq!(self.attach(n), Ok(()));
    }

    pub fn status(&mut self) -> Vec<VolumeStatus> {
        self.whole_status().0
    }

    pub fn workers_status(&mut self) -> WorkersStatus {
        self.whole_status().1
    }

    fn whole_status(&mut self) -> (Vec<VolumeStatus>, WorkersStatus) {
        self.request_id += 1;
        let request_id = self.request_id;
        let message = AgentToDataplane::Status { request_id };
        self.agent.send(&message, &[]).expect("the agent's channel");
        match self.answer() {
            DataplaneToAgent::Status {
                request_id: id,
                volumes,
                workers,
            } if id == request_id => (volumes, workers),
            other => panic!("not an answer to status: {other:?}"),
        }
    }

    /// Waits until a volume's frontend is there, or isn't.
    pub fn wait_connected(&mut self, n: u8, connected: bool) {
        let deadline = Instant::now() + PATIENCE;
        while self.status_of(n).is_none_or(|s| s.connected != connected) {
            assert!(Instant::now() < deadline, "volume {n}: not {connected}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn status_of(&mut self, n: u8) -> Option<VolumeStatus> {
        self.status().into_iter().find(|s| s.volume == volume(n))
    }

    /// A frontend that has connected to volume `n`'s socket; whether it will be served is open.
    pub fn frontend(&self, n: u8) -> UnixStream {
        let stream = UnixStream::connect(self.socket_path(n)).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream
    }

    /// Ends it as rot does.
    pub fn stop(mut self) -> ExitStatus {
        self.tell(&FromRot::Stop, &[]);
        self.child.wait().expect("it ends")
    }

    /// Waits for it to end by itself.
    pub fn ended(mut self) -> ExitStatus {
        self.child.wait().expect("it ends")
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn patient(channel: &Channel) {
    let timeout = nix::sys::time::TimeVal::new(20, 0);
    nix::sys::socket::setsockopt(channel, nix::sys::socket::sockopt::ReceiveTimeout, &timeout)
        .expect("SO_RCVTIMEO");
}

/// Asks a device for its features, as a frontend does first; none if it was sent away.
pub fn features(stream: &mut UnixStream) -> Option<u64> {
    // Header: GET_FEATURES (1), version 1, no payload.
    let request: Vec<u8> = [1u32, 1, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
    stream.write_all(&request).ok()?;
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).ok()?;
    reply.last_chunk().map(|word| u64::from_le_bytes(*word))
}
