//! The backend channel (SET_BACKEND_REQ_FD): the only messages that we begin.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

use super::message::notice;
use crate::stored::Fd;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// A frontend's end of the channel, and what it has not been told.
#[derive(Debug)]
pub struct BackendChannel {
    socket: Fd,
    config_changed: bool,
}

impl BackendChannel {
    /// Over a socket of the frontend's.
    ///
    /// # Errors
    /// When it is none.
    pub fn new(socket: Fd) -> Result<Self, String> {
        let stat = fstat(&socket).map_err(|e| e.to_string())?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
            return Err("the backend channel is not a socket".to_owned());
        }
        Ok(Self {
            socket,
            config_changed: false,
        })
    }

    /// Its socket, for a successor.
    #[must_use]
    pub fn socket(&self) -> &Fd {
        &self.socket
    }

    /// The configuration space changed: the frontend is to read it again.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
        self.flush();
    }

    /// Tells the frontend what it was not told, unless its socket is full. Never waits, whatever the
    /// frontend has set its socket to.
    pub fn flush(&mut self) {
        if !self.config_changed {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.socket.as_raw_fd(), &notice(CONFIG_CHANGE), flags) {
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => {}
            Ok(_) => self.config_changed = false,
            Err(error) => {
                self.config_changed = false;
                tracing::warn!("a frontend can't be told of a new configuration: {error}");
            }
        }
    }

    /// Whether there is something that it was not told.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.config_changed
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_change_is_told_once_and_again_when_the_socket_was_full() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        // A blocking socket, filled to the brim.
        let mut filled = 0;
        while let Ok(n) = send(ours.as_raw_fd(), &[0; 4096], MsgFlags::MSG_DONTWAIT) {
            filled += n;
        }
        let mut channel = BackendChannel::new(Fd::new(ours.into())).expect("a socket");
        channel.config_changed();
        assert!(channel.is_due());
        let mut rest = vec![0; filled];
        theirs.read_exact(&mut rest).expect("read");
        channel.flush();
        assert!(!channel.is_due());
        let mut message = [0; 12];
        theirs.read_exact(&mut message).expect("read");
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_no_socket_is_refused_and_a_closed_one_is_given_up() {
        let file = std::fs::File::open("/dev/null").expect("open");
        assert!(BackendChannel::new(Fd::new(file.into())).is_err());
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        drop(theirs);
        let mut channel = BackendChannel::new(Fd::new(ours.into())).expect("a socket");
        channel.config_changed();
        assert!(!channel.is_due());
    }
}
