//! AF_XDP: an interface whose frames go to sockets, one for each of its queues.
//!
//! [`Prepared::new`] makes a map of sockets and a program that gives each frame to the socket of the queue that it came
//! by, and attaches it by a link: the program is gone as soon as nobody has the link open any more, and while
//! a queue has no socket its frames go to the host's own stack as before. That takes CAP_NET_ADMIN and CAP_BPF, once.
//! [`Prepared::socket`] makes a socket for a queue, which takes CAP_NET_RAW.
//!
//! The socket is given away as it is: the receiver registers memory of its own with it, makes the other rings and
//! binds it. Its receive ring is made here, because the kernel takes no socket without one into the map.
//!
//! UNSAFETY: `socket`, `setsockopt` on integers that live through the calls.
#![expect(unsafe_code, reason = "an AF_XDP socket")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_protocol::net::{AF_XDP_QUEUES, InterfaceName};

use crate::bpf;

/// Frames that a socket's receive ring has room for.
pub const RECEIVE_ENTRIES: u32 = 1024;
/// How long a queue's socket may take to be gone. It takes a few milliseconds.
const QUEUE_PATIENCE: Duration = Duration::from_millis(300);

/// An interface that is prepared for AF_XDP.
#[derive(Debug)]
pub struct Prepared {
    name: InterfaceName,
    index: u32,
    map: OwnedFd,
    link: OwnedFd,
}

/// A socket for one queue of an interface.
#[derive(Debug)]
pub struct Socket {
    /// Not bound yet.
    pub socket: OwnedFd,
    /// The interface's index, to bind it to.
    pub interface_index: u32,
    /// The queue, to bind it to.
    pub queue: u32,
    /// Keeps the program attached: to be held for as long as the socket.
    pub link: OwnedFd,
}

/// Why an interface can't be used.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// No such interface.
    #[error("there is no interface {0}")]
    NotThere(InterfaceName),
    /// Somebody else's program is there.
    #[error("interface {0} has another XDP program: remove it (`ip link set dev {0} xdp off`)")]
    Busy(InterfaceName),
    /// Rights that it takes.
    #[error("interface {name}: {step} takes {rights}: {source}")]
    NotPermitted {
        /// Which.
        name: InterfaceName,
        /// What was tried.
        step: &'static str,
        /// What it takes.
        rights: &'static str,
        /// What it failed with.
        source: io::Error,
    },
    /// A queue that it can't have.
    #[error(
        "interface {name}: queue {queue} is not among the {AF_XDP_QUEUES} that can have a socket"
    )]
    Queue {
        /// Which.
        name: InterfaceName,
        /// What was asked for.
        queue: u32,
    },
    /// A queue that somebody has.
    #[error(
        "interface {name}: queue {queue} has a socket already, of a NIC that is attached or is still being detached"
    )]
    Taken {
        /// Which.
        name: InterfaceName,
        /// Which of its queues.
        queue: u32,
    },
    /// Any other failure.
    #[error("interface {name}: {step}: {source}")]
    Io {
        /// Which.
        name: InterfaceName,
        /// What was tried.
        step: &'static str,
        /// What it failed with.
        source: io::Error,
    },
}

impl Prepared {
    /// Attaches the program to an interface. Its driver runs it if it can, else the kernel does.
    ///
    /// # Errors
    /// See [`XdpError`].
    pub fn new(name: &InterfaceName) -> Result<Self, XdpError> {
        let index = nix::net::if_::if_nametoindex(name.as_str())
            .map_err(|_| XdpError::NotThere(name.clone()))?;
        let failed = |step| move |error| explain(error, name, step, "CAP_NET_ADMIN and CAP_BPF");
        let map =
            bpf::socket_map(AF_XDP_QUEUES.into()).map_err(failed("making a map of sockets"))?;
        let program = bpf::redirect_program(map.as_fd()).map_err(failed("loading its program"))?;
        let link = bpf::attach(program.as_fd(), index).map_err(failed("attaching its program"))?;
        Ok(Self {
            name: name.clone(),
            index,
            map,
            link,
        })
    }

    /// From the descriptors of an earlier one ([`Prepared::descriptors`]).
    ///
    /// # Errors
    /// The link is none, or its interface is gone.
    pub fn from_descriptors(
        name: InterfaceName,
        map: OwnedFd,
        link: OwnedFd,
    ) -> Result<Self, XdpError> {
        let index = bpf::interface_of(link.as_fd()).map_err(|source| XdpError::Io {
            name: name.clone(),
            step: "looking at its program",
            source,
        })?;
        let index = index.ok_or_else(|| XdpError::NotThere(name.clone()))?;
        Ok(Self {
            name,
            index,
            map,
            link,
        })
    }

    /// Its map and its link, for another process.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.map.as_fd(), self.link.as_fd()]
    }

    /// Whether its program is on the interface that has its name now: that may have been made anew, or given to another.
    #[must_use]
    pub fn is_on_its_name(&self) -> bool {
        nix::net::if_::if_nametoindex(self.name.as_str()) == Ok(self.index)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &InterfaceName {
        &self.name
    }

    /// A socket for a queue that has none; one whose socket is just being closed is waited for. From the moment that it is bound, the frames of that queue go to it.
    ///
    /// # Errors
    /// See [`XdpError`].
    pub fn socket(&self, queue: u32) -> Result<Socket, XdpError> {
        let name = &self.name;
        if queue >= AF_XDP_QUEUES.into() {
            let name = name.clone();
            return Err(XdpError::Queue { name, queue });
        }
        let failed = |step| move |error| explain(error, name, step, "CAP_NET_RAW");
        let socket = new_socket().map_err(failed("making a socket"))?;
        let put = put_soon(self.map.as_fd(), queue, socket.as_fd());
        put.map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => {
                let name = name.clone();
                XdpError::Taken { name, queue }
            }
            _ => failed("giving a queue its socket")(error),
        })?;
        let link = self.link.try_clone();
        Ok(Socket {
            socket,
            interface_index: self.index,
            queue,
            link: link.map_err(failed("keeping the program"))?,
        })
    }
}

/// Puts a socket into a map, also where the one before is still being closed: the data plane has let go of it, and whoever
/// stores its descriptors does, too.
fn put_soon(map: BorrowedFd<'_>, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let until = Instant::now() + QUEUE_PATIENCE;
    loop {
        match bpf::put_socket(map, queue, socket) {
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists && Instant::now() < until =>
            {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}

/// A socket with its receive ring.
fn new_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: plain integers.
    let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, for nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let entries = RECEIVE_ENTRIES;
    let bytes = libc::socklen_t::try_from(size_of_val(&entries)).map_err(io::Error::other)?;
    // SAFETY: a u32 with its length, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_RX_RING,
            (&raw const entries).cast(),
            bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

fn explain(
    source: io::Error,
    name: &InterfaceName,
    step: &'static str,
    rights: &'static str,
) -> XdpError {
    let name = name.clone();
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => XdpError::Busy(name),
        Some(libc::ENODEV) => XdpError::NotThere(name),
        Some(libc::EPERM | libc::EACCES) => XdpError::NotPermitted {
            name,
            step,
            rights,
            source,
        },
        _ => XdpError::Io { name, step, source },
    }
}
