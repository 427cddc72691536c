//! Real servers that die at each step of a frontend's message, and others that go on: every message is done
//! once and answered once, whatever follows it in the socket, and the one connection that ends is the one
//! whose reply may or may not have been sent.

use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::crash::SWITCH;
use bulkhead_dataplane::server::{Access, Event, Manager, Offer, Server, ServerConfig};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::stored::{Fd, Keeper, StoredConnection, StoredPhase};
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::vhost_user::protocol_feature;
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_protocol::fd_store::Store;
use mio::{Registry, Token};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::messages::{
    MEMORY_BYTES, QUEUES, SPLIT, addresses, bytes, event, halves, memfd, table, with_fd, words,
};
use crate::rot::Rot;
use crate::sample::{fd, idle, same};

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Names the point at which the process that is a server dies; empty: it does not.
const DIES_AT: &str = "BULKHEAD_TEST_DIES_AT";

/// A message: number, body, descriptors, and whether an acknowledgement is asked for.
struct Said {
    code: u32,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    acknowledge: bool,
}

fn say(code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Said {
    Said {
        code,
        body,
        fds,
        acknowledge: true,
    }
}

fn quietly(code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Said {
    Said {
        acknowledge: false,
        ..say(code, body, fds)
    }
}

/// What a process that this test starts does: serves the volume in its store.
#[test]
fn serve_what_is_stored() {
    let Ok(point) = std::env::var(DIES_AT) else {
        return;
    };
    let store = std::io::stdin().as_fd().try_clone_to_owned().expect("dup");
    let store = Store::new(store, 4096).expect("a store");
    SWITCH.arm(&point, 0);
    serve(store, &mut Nothing);
}

/// Serves the volume in a store.
fn serve(store: Store, manager: &mut dyn Manager) {
    let (_keeper, mut found) = Keeper::take(store).expect("rot");
    let place = found.places.pop().expect("a volume");
    let listener = Arc::clone(&place.volume().expect("kept").listener);
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: QUEUES,
        discard: false,
    };
    let config = ServerConfig {
        workers: vec![WorkerConfig::default()],
        ..ServerConfig::default()
    };
    let mut server = Server::new(&config).expect("server");
    let offer = Offer {
        device: BlkDevice::new(geometry, 2048, StorageSpec::Null, None).into(),
        listener: UnixListener::from(listener.try_clone().expect("dup")),
        access: Access { allowed_uid: None },
        label: "disk".to_owned(),
        place,
        aside: None,
    };
    server.offer(offer).expect("watched");
    server.run(manager).expect("it is killed or told before");
}

struct Nothing;

impl Manager for Nothing {
    fn register(&mut self, _: &Registry) -> std::io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: &mut Server, _: Token) {}

    fn event(&mut self, _: &mut Server, _: Event) {}
}

/// Counts what a frontend was answered by the time its connection has resumed, and ends the server then.
struct Listens {
    frontend: UnixStream,
    answered: Option<i32>,
}

impl Manager for Listens {
    fn register(&mut self, _: &Registry) -> std::io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: &mut Server, _: Token) {}

    fn event(&mut self, server: &mut Server, event: Event) {
        if matches!(event, Event::Resumed { .. }) {
            self.answered = Some(readable(&self.frontend) / ANSWER_BYTES);
            server.stop();
        }
    }
}

/// A server in a process of its own.
struct Process(Child);

impl Process {
    fn start(rot: &mut Rot, dies_at: &str) -> Self {
        let this = std::env::current_exe().expect("this test");
        let child = Command::new(this)
            .args(["deaths::serve_what_is_stored", "--exact", "--nocapture"])
            .env(DIES_AT, dies_at)
            .stdin(rot.start_elsewhere())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn();
        Self(child.expect("a process"))
    }

    /// How it ended, if it does within this time.
    fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + within;
        loop {
            if let Some(status) = self.0.try_wait().expect("a child") {
                return Some(status);
            }
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Frontend(UnixStream);

impl Frontend {
    fn send(&self, said: &Said) {
        let raw: Vec<_> = said.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let flags = if said.acknowledge { 9 } else { 1 };
        let bytes = bytes(said.code, flags, &said.body);
        let part = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &part, control, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// The next reply: its number and body; none: the connection ended.
    fn reply(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        match self.0.read_exact(&mut header) {
            Ok(()) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                return None;
            }
            Err(error) => panic!("no reply: {error}"),
        }
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let mut body = vec![0; usize::try_from(field(8)).expect("short")];
        self.0.read_exact(&mut body).expect("a body");
        Some((field(0), body))
    }

    fn ask(&mut self, said: &Said) -> Vec<u8> {
        self.send(said);
        let (code, body) = self.reply().expect("a reply");
        assert_eq!(code, said.code);
        body
    }

    /// Everything that was sent has been taken out of the socket.
    fn settle(&self) {
        let until = Instant::now() + PATIENCE;
        while unread(&self.0) > 0 {
            assert!(Instant::now() < until, "a message is not taken");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether something is there, or the connection ended.
    fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll") > 0
    }
}

fn is_socket(fd: &OwnedFd) -> bool {
    use nix::sys::stat::{SFlag, fstat};
    let mode = fstat(fd).expect("stat").st_mode;
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFSOCK
}

fn is_listener(fd: &OwnedFd) -> bool {
    use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
    getsockopt(fd, AcceptConn).expect("a socket")
}

/// Bytes of an acknowledgement.
const ANSWER_BYTES: i32 = 20;

/// Bytes that are there to be read.
fn readable(stream: &UnixStream) -> i32 {
    nix::ioctl_read_bad!(inq, nix::libc::FIONREAD, nix::libc::c_int);
    let mut bytes = 0;
    // SAFETY: the descriptor is open and the number is one of this process.
    unsafe { inq(stream.as_raw_fd(), &raw mut bytes) }.expect("a socket");
    bytes
}

/// Bytes that the other end has not read, with what the kernel adds to them.
fn unread(stream: &UnixStream) -> i32 {
    nix::ioctl_read_bad!(outq, nix::libc::TIOCOUTQ, nix::libc::c_int);
    let mut bytes = 0;
    // SAFETY: the descriptor is open and the number is one of this process.
    unsafe { outq(stream.as_raw_fd(), &raw mut bytes) }.expect("a socket");
    bytes
}

/// A volume that is served, and a frontend whose first queue runs.
struct World {
    rot: Rot,
    frontend: Frontend,
    server: Process,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("disk.sock");
        let listener: OwnedFd = UnixListener::bind(&path).expect("bind").into();
        let mut rot = Rot::new();
        let (keeper, _) = Keeper::take(rot.start()).expect("rot");
        let mut volume = idle(QUEUES, &mut fd);
        volume.listener = Fd::new(listener);
        let place = keeper.place(volume).expect("room");
        drop((keeper, place));
        let server = Process::start(&mut rot, "");
        let stream = UnixStream::connect(&path).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut frontend = Frontend(stream);
        prelude(&mut frontend);
        frontend.settle();
        Self {
            rot,
            frontend,
            server,
            _dir: dir,
        }
    }

    /// The server is killed, and the next dies at this point.
    fn next(&mut self, dies_at: &str) {
        let _ = self.server.0.kill();
        let _ = self.server.0.wait();
        self.server = Process::start(&mut self.rot, dies_at);
    }

    /// rot has closed its copies of the connection: the server had it removed.
    fn rot_forgets(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            self.rot.settle();
            if !self
                .rot
                .stored
                .iter()
                .any(|(_, fd)| is_socket(fd) && !is_listener(fd))
            {
                return;
            }
            assert!(Instant::now() < until, "the connection stays stored");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What is stored of the connection.
    fn connection(&mut self) -> Option<StoredConnection<Fd>> {
        self.frontend.settle();
        let _ = self.server.0.kill();
        let _ = self.server.0.wait();
        let (_, found) = Keeper::take(self.rot.start()).expect("rot");
        assert!(found.lost.is_empty(), "{:?}", found.lost);
        let volume = found.places[0].volume().expect("kept");
        volume.connection.clone()
    }
}

fn prelude(frontend: &mut Frontend) {
    frontend.send(&quietly(code::SET_FEATURES, words(&[SPLIT]), vec![]));
    let all = words(&[protocol_feature::OFFERED]);
    let done = words(&[0]);
    for said in [
        say(code::SET_PROTOCOL_FEATURES, all, vec![]),
        say(
            code::SET_MEM_TABLE,
            table(&[(0, MEMORY_BYTES)]),
            vec![memfd(MEMORY_BYTES)],
        ),
        say(code::SET_VRING_NUM, halves(&[0, 8]), vec![]),
        say(code::SET_VRING_ADDR, addresses(0), vec![]),
        say(code::SET_VRING_CALL, with_fd(0), vec![event()]),
        say(code::SET_VRING_KICK, with_fd(0), vec![event()]),
        say(code::SET_VRING_ENABLE, halves(&[0, 1]), vec![]),
        say(code::SET_VRING_NUM, halves(&[1, 8]), vec![]),
        say(code::SET_VRING_ADDR, addresses(1), vec![]),
    ] {
        assert_eq!(frontend.ask(&said), done, "{}", said.code);
    }
}

/// A message, and what is right once it was done.
type Case = (
    &'static str,
    fn() -> Said,
    fn(&Said, &StoredConnection<Fd>) -> bool,
);

const CASES: [Case; 7] = [
    (
        "a question",
        || say(code::GET_STATUS, vec![], vec![]),
        |_, _| true,
    ),
    (
        "a value",
        || say(code::SET_STATUS, words(&[3]), vec![]),
        |_, c| c.status == 3,
    ),
    (
        "a value, quietly",
        || quietly(code::SET_VRING_BASE, halves(&[1, 7]), vec![]),
        |_, c| c.vrings[1].base == Some(7),
    ),
    (
        "a descriptor",
        || say(code::SET_VRING_CALL, with_fd(1), vec![event()]),
        |_, c| c.vrings[1].call.is_some(),
    ),
    (
        "memory, quietly",
        || {
            let file = memfd(2 * MEMORY_BYTES);
            quietly(
                code::SET_MEM_TABLE,
                table(&[(0, 2 * MEMORY_BYTES)]),
                vec![file],
            )
        },
        |said, c| c.memory.len() == 1 && same(&*c.memory[0].fd, &said.fds[0]),
    ),
    (
        "the start of a queue",
        || say(code::SET_VRING_KICK, with_fd(1), vec![event()]),
        |_, c| c.vrings[1].phase == StoredPhase::Running && c.vrings[1].kick.is_some(),
    ),
    (
        "the end of a queue",
        || say(code::GET_VRING_BASE, halves(&[0, 0]), vec![]),
        |_, c| c.vrings[0].phase == StoredPhase::Stopped && c.vrings[0].anew,
    ),
];

/// Every point, in the order in which a message passes them.
const POINTS: [&str; 7] = [
    "message.looked",
    "message.applied",
    "state.stored",
    "message.recorded",
    "message.sent",
    "message.marked",
    "message.taken",
];

/// Points between which nobody knows whether the reply was sent.
fn is_window(point: &str, answered: bool) -> bool {
    answered && matches!(point, "message.recorded" | "message.sent")
}

fn dies_once(point: &str, case: &Case) {
    let (name, make, right) = case;
    println!("{name}, {point}");
    let mut world = World::new();
    world.next(point);
    let said = make();
    let answered = said.acknowledge || said.code == code::GET_VRING_BASE;
    // The next is there already, is as long as the first where that is possible, and asks for nothing.
    let follower = |size| quietly(code::SET_VRING_NUM, halves(&[1, size]), vec![]);
    let others = [follower(32), follower(16)];
    world.frontend.send(&said);
    if !matches!(said.code, code::SET_VRING_KICK) {
        others.iter().for_each(|said| world.frontend.send(said));
    }
    let passes = answered || !matches!(point, "message.sent" | "message.marked");
    if passes {
        let status = world.server.ended(PATIENCE);
        let status = status.unwrap_or_else(|| panic!("{name}, {point}: it lives"));
        assert!(!status.success(), "{name}, {point}: {status}");
    }
    world.next("");
    if is_window(point, answered) {
        world.rot_forgets();
        while let Some((code, _)) = world.frontend.reply() {
            assert_eq!((point, code), ("message.sent", said.code), "{name}");
        }
        return;
    }
    if answered {
        let reply = world.frontend.reply();
        let (code, _) = reply.unwrap_or_else(|| panic!("{name}, {point}: it ended"));
        assert_eq!(code, said.code, "{name}, {point}");
    }
    let status = world.frontend.ask(&say(code::GET_STATUS, vec![], vec![]));
    assert_eq!(status.len(), 8, "{name}, {point}");
    assert!(
        !world.frontend.is_readable(),
        "{name}, {point}: one reply each"
    );
    let connection = world.connection();
    let connection = connection.unwrap_or_else(|| panic!("{name}, {point}: it is not stored"));
    assert!(right(&said, &connection), "{name}, {point}: {connection:?}");
    let size = if said.code == code::SET_VRING_KICK {
        8
    } else {
        16
    };
    assert_eq!(connection.vrings[1].size, size, "{name}, {point}");
    assert_eq!(connection.features, SPLIT);
}

#[test]
fn a_message_is_done_once_wherever_the_process_dies() {
    for point in POINTS {
        for case in &CASES {
            dies_once(point, case);
        }
    }
}

/// Three processes in a row die at the same step.
#[test]
fn a_message_outlives_several_deaths() {
    for point in ["message.looked", "message.applied", "state.stored"] {
        let mut world = World::new();
        let said = say(code::SET_STATUS, words(&[7]), vec![]);
        world.next(point);
        world.frontend.send(&said);
        for _ in 0..3 {
            assert!(world.server.ended(PATIENCE).is_some(), "{point}: it lives");
            world.next(point);
        }
        assert!(world.server.ended(PATIENCE).is_some(), "{point}: it lives");
        world.next("");
        assert_eq!(
            world.frontend.reply(),
            Some((code::SET_STATUS, words(&[0])))
        );
        let connection = world.connection().expect("stored");
        assert_eq!(connection.status, 7, "{point}");
    }
}

/// A connection has resumed once its queues have started, whatever its frontend says meanwhile: the process is up by that.
#[test]
fn a_frontend_that_talks_on_does_not_hold_up_its_own_resumption() {
    const MESSAGES: i32 = 100;
    let mut world = World::new();
    let _ = world.server.0.kill();
    let _ = world.server.0.wait();
    // Each waits for a worker.
    for _ in 0..MESSAGES {
        world
            .frontend
            .send(&say(code::SET_VRING_ENABLE, halves(&[0, 1]), vec![]));
    }
    let mut listens = Listens {
        frontend: world.frontend.0.try_clone().expect("dup"),
        answered: None,
    };
    let limit = world.rot.limit;
    let store = Store::new(world.rot.start_elsewhere(), limit).expect("a store");
    serve(store, &mut listens);
    let answered = listens.answered.expect("it has resumed");
    assert!(answered < MESSAGES, "only after all that it said");
}
