//! The socket to systemd (`NOTIFY_SOCKET`, sd_notify(3)) and what waits to be sent there.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

/// A message and the descriptor with it.
type Waiting = (String, Option<Rc<OwnedFd>>);

/// The connected socket. Nothing here blocks.
#[derive(Debug)]
pub struct Notify {
    socket: OwnedFd,
    queue: VecDeque<Waiting>,
    failed: bool,
}

impl Notify {
    /// Connects to the socket of that name: an absolute path, or an abstract one after an `@`.
    ///
    /// # Errors
    /// Another kind of name, or what `connect` fails with.
    pub fn connect(name: &str) -> io::Result<Self> {
        let address = match name.strip_prefix('@') {
            Some(abstract_name) => UnixAddr::new_abstract(abstract_name.as_bytes())?,
            None if name.starts_with('/') => UnixAddr::new(name)?,
            None => return Err(io::Error::other("it is no path of a unix socket")),
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        connect(socket.as_raw_fd(), &address)?;
        Ok(Self {
            socket,
            queue: VecDeque::new(),
            failed: false,
        })
    }

    /// Stores a descriptor under a name.
    pub fn store(&mut self, name: &str, fd: Rc<OwnedFd>) {
        // systemd would drop what hangs up, a frontend's connection for one.
        self.push(format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(fd));
    }

    /// Drops the descriptors of a name.
    pub fn remove(&mut self, name: &str) {
        self.push(format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    /// Has systemd close `fd` after everything before.
    pub fn barrier(&mut self, fd: OwnedFd) {
        self.push("BARRIER=1".to_owned(), Some(Rc::new(fd)));
    }

    fn push(&mut self, message: String, fd: Option<Rc<OwnedFd>>) {
        if !self.failed {
            self.queue.push_back((message, fd));
        }
    }

    /// How many messages wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&mut self) {
        while let Some((message, fd)) = self.queue.front() {
            match self.send(message, fd.as_deref()) {
                Ok(_) => drop(self.queue.pop_front()),
                // The second: too many descriptors are on their way to systemd.
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ETOOMANYREFS) => return,
                Err(error) => {
                    tracing::error!(
                        "systemd takes no more descriptors ({error}): if rot dies now, frontends lose their connections"
                    );
                    self.failed = true;
                    self.queue.clear();
                }
            }
        }
    }

    fn send(&self, message: &str, fd: Option<&OwnedFd>) -> nix::Result<usize> {
        let iov = [IoSlice::new(message.as_bytes())];
        let raw: Vec<_> = fd.map(AsRawFd::as_raw_fd).into_iter().collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = rights.get(..raw.len()).unwrap_or_default();
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &iov, control, flags, None)
    }
}

impl From<OwnedFd> for Notify {
    /// A socket that was connected before.
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            queue: VecDeque::new(),
            failed: false,
        }
    }
}

impl AsFd for Notify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
