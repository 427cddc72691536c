//! rot's end of one process's store: it never blocks.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, setsockopt, socketpair, sockopt,
};

use super::MAX_FDS;
use super::message::{BadNotification, MAX_NOTIFICATION_BYTES, Notification, hand_over_text};
use super::name::FdName;
use crate::datagram;

/// Room in the socket, in bytes: for what is handed over before the process reads it. The kernel
/// cuts it to `net.core.wmem_max` and then doubles it for its own overhead.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// Descriptors of one datagram that is handed over: as many as, with names of full length, still
/// lie in 2 KiB of the kernel's, so that 16,384 fit the socket of a kernel with default limits.
const HAND_OVER_FDS: usize = 96;

/// Words of control data: a header and [`MAX_FDS`] descriptors. More make the datagram refused.
const CONTROL_WORDS: usize = 2 + MAX_FDS / 2;

/// rot's end.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
}

/// A datagram of the child's.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub notification: Result<Notification, BadNotification>,
    /// What came with it, also if it is refused.
    pub fds: Vec<OwnedFd>,
}

impl Keeper {
    /// rot's end and the child's, both close-on-exec.
    ///
    /// # Errors
    /// What `socketpair` or `setsockopt` fails with.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER_BYTES)?;
        Ok((Self { socket }, theirs))
    }

    /// One datagram; none if the child closed its end and everything was read. An empty datagram
    /// says the same: no message is empty.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none now; any other failure of `recvmsg`.
    pub fn receive(&self) -> io::Result<Option<Received>> {
        let mut buffer = [0u8; MAX_NOTIFICATION_BYTES];
        let mut control = [0u64; CONTROL_WORDS];
        let flags = MsgFlags::MSG_DONTWAIT;
        let got = datagram::receive(self.as_fd(), &mut buffer, &mut control, flags)?;
        if got.bytes == 0 && got.fds.is_empty() && !got.truncated {
            return Ok(None);
        }
        let notification = if got.truncated {
            let reason =
                "it is too long, has too many descriptors, or rot has no number left for them";
            Err(BadNotification(reason.to_owned()))
        } else {
            let message = buffer.get(..got.bytes).unwrap_or_default();
            Notification::parse(message, got.fds.len())
        };
        Ok(Some(Received {
            notification,
            fds: got.fds,
        }))
    }

    /// Tells a candidate that every descriptor of a name was dropped.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it does not fit; any other failure of `sendmsg`.
    pub fn hand_removal(&self, name: FdName) -> io::Result<()> {
        let text = Notification::Remove { name }.text();
        datagram::send(self.as_fd(), text.as_bytes(), &[], MsgFlags::MSG_DONTWAIT)
    }

    /// Puts what is stored into the socket, for a process that need not exist yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it does not fit (17,000 do, unless `net.core.wmem_max` was
    /// lowered below its default); ETOOMANYREFS if this user
    /// has more descriptors in sockets than `RLIMIT_NOFILE` allows.
    pub fn hand_over(&self, stored: &[(FdName, BorrowedFd<'_>)]) -> io::Result<()> {
        for part in stored.chunks(HAND_OVER_FDS) {
            let (names, fds): (Vec<FdName>, Vec<BorrowedFd<'_>>) = part.iter().copied().unzip();
            let text = hand_over_text(&names);
            let flags = MsgFlags::MSG_DONTWAIT;
            datagram::send(self.as_fd(), text.as_bytes(), &fds, flags)?;
        }
        Ok(())
    }
}

impl From<OwnedFd> for Keeper {
    /// The keeping end of a socket that was made elsewhere.
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
