//! The puppet: a child of rot that connects to its test, passes on what rot sends, descriptors
//! included, and does what the test orders.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::exit;

use bulkhead_protocol::channel::{Channel, ChannelError};
use bulkhead_protocol::process::inherited_channel;
use bulkhead_protocol::rot::{FromRot, ToRot};
use minicbor::{Decode, Encode};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

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
    /// It reads nothing more from rot.
    #[n(2)]
    Obeyed,
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
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
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
    test: Channel,
}

/// Runs until rot or the test ends it.
pub fn main() -> ! {
    let descriptors = open_descriptors();
    let mut puppet = Puppet {
        rot: Some(inherited_channel().expect("a channel to rot")),
        reads: true,
        ignores_stop: false,
        test: connect_to_test(),
    };
    puppet.report(&Report::Started(started(descriptors)), &[]);
    loop {
        let (from_test, from_rot) = puppet.wait();
        if from_test {
            match puppet.test.receive::<Order>() {
                Ok(order) => puppet.obey(order.message),
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

    fn obey(&mut self, order: Order) {
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
            Order::MakeInternetSocket => {
                let made = TcpListener::bind("127.0.0.1:0");
                unreachable!("the filter should have ended this process: {made:?}");
            }
        }
    }
}
