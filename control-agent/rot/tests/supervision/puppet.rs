//! The puppet: a child of rot that connects to its test, passes on what rot sends, descriptors
//! included, and does what the test orders.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::exit;

use bulkhead_protocol::channel::{Channel, ChannelError};
use bulkhead_protocol::fd_store::{Change, FdName, Store};
use bulkhead_protocol::process::inherited_channel;
use bulkhead_protocol::release::ProgramStatus;
use bulkhead_protocol::rot::{FromRot, ToRot};
use minicbor::{Decode, Encode};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

/// File name of the test's socket, beside the run directory.
pub const PUPPETS_SOCKET: &str = "puppets.sock";

/// From the test to the puppet.
#[derive(Debug, Encode, Decode)]
pub enum Order {
    /// Send rot a message.
    #[n(0)]
    Say(#[n(0)] ToRot),
    /// Send rot a message with a descriptor, which none of them has.
    #[n(1)]
    SayWithDescriptor(#[n(0)] ToRot),
    /// Send rot these bytes.
    #[n(2)]
    SayBytes(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// End with this status.
    #[n(3)]
    Exit(#[n(0)] i32),
    /// Close the channel to rot and live on.
    #[n(4)]
    CloseChannel,
    /// Read nothing more from rot, and so live on after its end; answered with `Obeyed`.
    #[n(5)]
    StopReading,
    /// Live on after rot's Stop.
    #[n(6)]
    IgnoreStop,
    /// Make an internet socket.
    #[n(7)]
    MakeInternetSocket,
    /// Report what an earlier process of this role stored. This and what follows is answered.
    #[n(8)]
    ReportTaken,
    /// Store the descriptors of this message.
    #[n(9)]
    Push(#[n(0)] String),
    /// Remove what is stored under a name.
    #[n(10)]
    Remove(#[n(0)] String),
    /// Remove all that is stored.
    #[n(11)]
    RemoveAll,
    /// Wait for a barrier.
    #[n(12)]
    Barrier,
    /// Ask for a barrier and report its pipe at once.
    #[n(13)]
    ReportBarrier,
    /// Send the store these bytes, with that many descriptors.
    #[n(14)]
    StoreBytes(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>, #[n(1)] u32),
    /// Store numbered files until killed, see [`super::storing`].
    #[n(15)]
    StoreForEver,
    /// Store that many numbered files under names of full length.
    #[n(16)]
    StoreMany(#[n(0)] u32),
    /// Compare what was taken with what `StoreMany` stores.
    #[n(17)]
    CheckMany(#[n(0)] u32),
    /// Report what the process before it stored and removed meanwhile.
    #[n(18)]
    ReportFollowed,
    /// Report what rot said last of the programs that run.
    #[n(19)]
    ReportPrograms,
}

/// From the puppet to the test.
#[derive(Debug, Encode, Decode)]
pub enum Report {
    /// The first: who it is.
    #[n(0)]
    Started(#[n(0)] Started),
    /// What rot sent. Descriptors: those of the message.
    #[n(1)]
    FromRot(#[n(0)] FromRot),
    /// It did what it was told.
    #[n(2)]
    Obeyed,
    /// What was stored, in order: up to four names with their descriptors, none at the end.
    #[n(3)]
    Taken(#[n(0)] Vec<String>),
    /// The barrier's pipe, as descriptor.
    #[n(4)]
    Barrier,
    /// The number of the file that was stored last.
    #[n(5)]
    Stored(#[n(0)] u32),
    /// What the process before it did: `+` or `-` and a name each.
    #[n(6)]
    Followed(#[n(0)] Vec<String>),
    /// What rot said last of the programs that run.
    #[n(7)]
    Programs(#[n(0)] Vec<ProgramStatus>),
}

/// What a puppet knows of itself at its start.
#[derive(Debug, Clone, Encode, Decode)]
pub struct Started {
    /// Command line.
    #[n(0)]
    pub arguments: Vec<String>,
    /// Process id.
    #[n(1)]
    pub pid: u32,
    /// User and group ids.
    #[n(2)]
    pub ids: [u32; 2],
    /// Number of supplementary groups.
    #[n(3)]
    pub groups: u32,
    /// Open descriptors.
    #[n(4)]
    pub descriptors: Vec<String>,
    /// Environment.
    #[n(5)]
    pub environment: Vec<String>,
}

fn open_descriptors() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("proc");
    let open = entries.map(|entry| entry.expect("entry")).filter(|entry| {
        // The directory that is being read is one of them.
        let to = std::fs::read_link(entry.path());
        to.is_ok_and(|to| !to.to_string_lossy().ends_with("/fd"))
    });
    let mut names: Vec<String> = open
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The folder of the test, from rot's command line: a child gets no word of its test from rot.
fn test_directory() -> PathBuf {
    let line = std::fs::read(format!("/proc/{}/cmdline", nix::unistd::getppid())).expect("cmdline");
    let mut words = line.split(|&byte| byte == 0);
    words.find(|word| *word == b"--run-dir").expect("--run-dir");
    let run_dir = String::from_utf8(words.next().expect("a directory").to_vec()).expect("text");
    PathBuf::from(run_dir).parent().expect("parent").to_owned()
}

fn connect_to_test() -> Channel {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd =
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("socket");
    let address = UnixAddr::new(&test_directory().join(PUPPETS_SOCKET)).expect("address");
    let raw = fd.as_raw_fd();
    connect(raw, &address).expect("the test listens");
    Channel::from(fd)
}

fn started(descriptors: Vec<String>) -> Started {
    Started {
        arguments: std::env::args().collect(),
        pid: std::process::id(),
        ids: [
            nix::unistd::getuid().as_raw(),
            nix::unistd::getgid().as_raw(),
        ],
        groups: u32::try_from(nix::unistd::getgroups().expect("groups").len()).expect("few"),
        descriptors,
        environment: std::env::vars().map(|(k, v)| format!("{k}={v}")).collect(),
    }
}

struct Puppet {
    rot: Option<Channel>,
    reads: bool,
    ignores_stop: bool,
    programs: Vec<ProgramStatus>,
    test: Channel,
    store: Store,
}

/// Runs until rot or the test ends it.
pub fn main() -> ! {
    let descriptors = open_descriptors();
    let mut puppet = Puppet {
        rot: Some(inherited_channel().expect("a channel to rot")),
        reads: true,
        ignores_stop: false,
        programs: Vec::new(),
        test: connect_to_test(),
        store: Store::inherited().expect("a store"),
    };
    puppet.report(&Report::Started(started(descriptors)), &[]);
    loop {
        let (from_test, from_rot) = puppet.wait();
        if from_test {
            match puppet.test.receive::<Order>() {
                Ok(order) => puppet.obey(order.message, &order.fds),
                Err(_) => exit(0),
            }
        }
        if from_rot {
            puppet.pass_on();
        }
    }
}

impl Puppet {
    fn wait(&self) -> (bool, bool) {
        let mut fds = vec![PollFd::new(self.test.as_fd(), PollFlags::POLLIN)];
        if let Some(rot) = self.rot.as_ref().filter(|_| self.reads) {
            fds.push(PollFd::new(rot.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, PollTimeout::NONE).expect("poll");
        let any = |i: usize| fds.get(i).is_some_and(|fd| fd.any() == Some(true));
        (any(0), any(1))
    }

    fn report(&self, report: &Report, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if self.test.send(report, &fds).is_err() {
            exit(0);
        }
    }

    fn pass_on(&mut self) {
        let Some(rot) = &self.rot else { return };
        match rot.receive::<FromRot>() {
            // Not passed on: it comes at moments that most tests don't care for.
            Ok(got) if matches!(got.message, FromRot::Programs { .. }) => {
                if let FromRot::Programs { programs } = got.message {
                    self.programs = programs;
                }
            }
            Ok(got) => {
                let stop = got.message == FromRot::Stop;
                self.report(&Report::FromRot(got.message), &got.fds);
                if stop && !self.ignores_stop {
                    exit(0);
                }
            }
            Err(ChannelError::Closed) => exit(1),
            Err(error) => panic!("rot sent what does not decode: {error}"),
        }
    }

    fn obey(&mut self, order: Order, fds: &[OwnedFd]) {
        let rot = self.rot.as_ref();
        match order {
            Order::Say(message) => rot.expect("open").send(&message, &[]).expect("send"),
            Order::SayWithDescriptor(message) => {
                let file = std::fs::File::open("/dev/null").expect("open");
                let rot = rot.expect("open");
                rot.send(&message, &[file.as_fd()]).expect("send");
            }
            Order::SayBytes(bytes) => {
                nix::unistd::write(rot.expect("open"), &bytes).expect("write");
            }
            Order::Exit(status) => exit(status),
            Order::CloseChannel => self.rot = None,
            Order::StopReading => {
                self.reads = false;
                self.report(&Report::Obeyed, &[]);
            }
            Order::IgnoreStop => self.ignores_stop = true,
            Order::ReportPrograms => {
                self.report(&Report::Programs(self.programs.clone()), &[]);
            }
            Order::MakeInternetSocket => {
                let made = TcpListener::bind("127.0.0.1:0");
                unreachable!("the filter should have ended this process: {made:?}");
            }
            storing => self.obey_storing(storing, fds),
        }
    }

    /// Each is answered, with `Obeyed` if with nothing else.
    fn obey_storing(&mut self, order: Order, fds: &[OwnedFd]) {
        let name = |text: String| text.parse::<FdName>().expect("a name");
        match order {
            Order::ReportTaken => return self.report_taken(),
            Order::ReportFollowed => return self.report_followed(),
            Order::Push(text) => {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                self.store.push(name(text), &fds).expect("push");
            }
            Order::Remove(text) => self.store.remove(name(text)).expect("remove"),
            Order::RemoveAll => self.store.remove_all().expect("remove"),
            Order::Barrier => {
                let barrier = self.store.barrier().expect("barrier");
                let reached = self.store.reached(&barrier, crate::host::PATIENCE);
                assert!(reached.expect("rot lives"), "the barrier was not reached");
            }
            Order::ReportBarrier => {
                let barrier = self.store.barrier().expect("barrier");
                let pipe = barrier.as_fd().try_clone_to_owned().expect("dup");
                return self.report(&Report::Barrier, &[pipe]);
            }
            Order::StoreBytes(bytes, count) => self.store_bytes(&bytes, count),
            Order::StoreForEver => self.store_for_ever(),
            Order::StoreMany(count) => {
                for number in 0..count {
                    let file = numbered_file(number);
                    let name = long_name(number);
                    self.store.push(name, &[file.as_fd()]).expect("push");
                }
            }
            Order::CheckMany(count) => {
                let taken = self.store.taken();
                assert_eq!(taken.len(), count as usize);
                for (number, (name, fd)) in (0..count).zip(taken) {
                    assert_eq!(name, long_name(number));
                    assert_eq!(number_of(&fd), number);
                }
            }
            other => unreachable!("{other:?} has nothing to do with the store"),
        }
        self.report(&Report::Obeyed, &[]);
    }

    fn report_taken(&mut self) {
        let mut taken = self.store.taken().into_iter().peekable();
        while taken.peek().is_some() {
            let some = taken.by_ref().take(4);
            let (names, fds): (Vec<_>, Vec<_>) = some.map(|(n, fd)| (n.to_string(), fd)).unzip();
            self.report(&Report::Taken(names), &fds);
        }
        self.report(&Report::Taken(Vec::new()), &[]);
    }

    fn report_followed(&mut self) {
        let mut followed = Vec::new();
        while let Some(change) = self.store.follow().expect("rot lives") {
            match change {
                Change::Removed(name) => followed.push(format!("-{name}")),
                Change::Stored(fds) => {
                    followed.extend(fds.iter().map(|(name, _)| format!("+{name}")));
                }
            }
        }
        self.report(&Report::Followed(followed), &[]);
    }

    fn store_bytes(&self, bytes: &[u8], count: u32) {
        let file = std::fs::File::open("/dev/null").expect("open");
        let raw = vec![file.as_raw_fd(); count as usize];
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        let socket = self.store.as_fd().as_raw_fd();
        let iov = [std::io::IoSlice::new(bytes)];
        // Too many at once for this user: rot takes those under way meanwhile.
        while let Err(error) = sendmsg::<()>(socket, &iov, rights, MsgFlags::MSG_NOSIGNAL, None) {
            match error {
                Errno::ETOOMANYREFS => std::thread::yield_now(),
                Errno::EPIPE => return,
                other => panic!("send: {other}"),
            }
        }
    }

    /// Stores file i as `n<i>` and drops the one eight before; each is reported once it was sent.
    fn store_for_ever(&mut self) {
        for number in 0.. {
            let file = numbered_file(number);
            let name = |number: u32| format!("n{number}").parse::<FdName>().expect("a name");
            self.store
                .push(name(number), &[file.as_fd()])
                .expect("push");
            self.report(&Report::Stored(number), &[]);
            if let Some(old) = number.checked_sub(8) {
                self.store.remove(name(old)).expect("remove");
            }
        }
    }
}

fn long_name(number: u32) -> FdName {
    format!("device-{number:09}").parse().expect("a name")
}

/// A memfd with a number in it.
pub fn numbered_file(number: u32) -> OwnedFd {
    let fd = memfd_create("numbered", MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::write(&fd, &number.to_le_bytes()).expect("write");
    fd
}

/// The number in a [`numbered_file`].
pub fn number_of(fd: &OwnedFd) -> u32 {
    let mut bytes = [0; 4];
    let read = nix::sys::uio::pread(fd, &mut bytes, 0).expect("read");
    assert_eq!(read, 4);
    u32::from_le_bytes(bytes)
}
