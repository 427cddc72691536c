//! A byte stream with descriptors, cut into messages: any pieces, nothing blocks, nothing is read
//! beyond the message it belongs to, replies that the frontend does not read are bounded.
//!
//! A message stays in the socket until what it asked for can't be lost any more: [`Framing::receive`] looks
//! at it (`MSG_PEEK`), and [`Framing::consume`] takes it out. How far a socket was looked at is the socket's
//! own (`SO_PEEK_OFF`), and taking a message out takes it back in the same step: whoever comes after a process
//! that died sees by it whether the message is still there, byte by byte ([`Framing::resumed`]).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::message::{HEADER_BYTES, Header, MAX_TABLE_REGIONS, Message, ProtocolError};
use crate::fds::{ControlBuffer, peek, peek_from, peeks_from};
use crate::stored::{Fd, Reply, Step};

/// What reading gave.
#[derive(Debug)]
pub enum Incoming {
    /// A message, which is to be taken out with [`Framing::consume`].
    Message(Message),
    /// Nothing more for now.
    Later,
    /// The frontend is gone.
    End,
}

/// A connection's stream.
#[derive(Debug)]
pub struct Framing {
    socket: Fd,
    /// Bytes of the message that was given and is not taken out yet.
    in_hand: usize,
    /// Replies that the frontend has not read, and the descriptor that goes with their first byte.
    unsent: Vec<u8>,
    unsent_fd: Option<OwnedFd>,
    control: ControlBuffer,
}

impl AsFd for Framing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What looking at the socket gave.
enum Look {
    Whole(Seen),
    Later,
    End,
}

/// The first bytes in the socket.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    /// Descriptors that came with these bytes.
    fds: Vec<OwnedFd>,
    /// Descriptors that came with the last of them, or with what follows.
    doubtful: Vec<OwnedFd>,
    /// There were more of the latter, which are lost.
    cut_short: bool,
}

impl Framing {
    /// Over a stream, which is made non-blocking.
    ///
    /// # Errors
    /// What `fcntl` fails with.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::over(Arc::new(stream.into())))
    }

    fn over(socket: Fd) -> Self {
        Self {
            socket,
            in_hand: 0,
            unsent: Vec::new(),
            unsent_fd: None,
            control: ControlBuffer::default(),
        }
    }

    /// Over the stream of a process that is no more, which left the first message there. What is left of a
    /// message that was done is taken out; one that was not is read again.
    ///
    /// # Errors
    /// [`ProtocolError::ReplyUnsure`] where nobody can tell whether the frontend has the reply;
    /// [`ProtocolError::Io`]. Whatever it is, the connection is of no more use.
    pub fn resumed(socket: Fd, step: Step) -> Result<Self, ProtocolError> {
        let mut framing = Self::over(socket);
        match step {
            Step::Idle => {}
            Step::Applied {
                reply: Reply::Owed, ..
            } => return Err(ProtocolError::ReplyUnsure),
            Step::Applied { bytes, .. } => {
                // What is gone of it is gone from there, too.
                let left = u32::try_from(peeks_from(framing.as_fd())?);
                let left = left.ok().filter(|left| *left <= bytes);
                let left = left.and_then(|left| usize::try_from(left).ok());
                framing.in_hand = left.ok_or(ProtocolError::Header("its end is not known"))?;
                framing.consume()?;
            }
        }
        Ok(framing)
    }

    /// Its socket, for a successor.
    #[must_use]
    pub fn socket(&self) -> &Fd {
        &self.socket
    }

    /// The next message, as far as it is there. The one before must have been taken out.
    ///
    /// # Errors
    /// [`ProtocolError`]: the connection is of no more use.
    pub fn receive(&mut self) -> Result<Incoming, ProtocolError> {
        debug_assert_eq!(self.in_hand, 0, "the message before is still there");
        let header = match self.look(HEADER_BYTES)? {
            Look::Whole(seen) => seen.bytes.try_into().map(Header::parse),
            Look::Later => return Ok(Incoming::Later),
            Look::End => return Ok(Incoming::End),
        };
        let header = header.map_err(|_| ProtocolError::Header("its length"))??;
        let whole = HEADER_BYTES + usize::try_from(header.body_bytes).unwrap_or(0);
        let mut seen = match self.look(whole)? {
            Look::Whole(seen) => seen,
            Look::Later => return Ok(Incoming::Later),
            Look::End => return Ok(Incoming::End),
        };
        let mut message = Message {
            header,
            body: seen.bytes.split_off(HEADER_BYTES),
            fds: seen.fds,
        };
        if message.fds.len() < message.wanted_fds() {
            message.fds.extend(seen.doubtful);
            if seen.cut_short || message.fds.len() > MAX_TABLE_REGIONS {
                return Err(ProtocolError::TooManyFds);
            }
        }
        // From where a successor sees that it is there.
        peek_from(self.socket.as_fd(), i32::try_from(whole).unwrap_or(0))?;
        self.in_hand = whole;
        Ok(Incoming::Message(message))
    }

    /// Bytes of the message that was given and not taken out yet; 0: there is none.
    #[must_use]
    pub fn in_hand(&self) -> u32 {
        u32::try_from(self.in_hand).unwrap_or(u32::MAX)
    }

    /// Looks at the first `wanted` bytes that were not taken out.
    ///
    /// The kernel gives with any bytes the descriptors of the first piece with descriptors that lies there or
    /// behind (a piece is what was sent at once), and stops at that piece's end. So it is asked for one byte
    /// more: if it does not give it, what it gave came with bytes that were wanted; if it does, nobody can tell,
    /// and a message that lacks descriptors is taken to have them. (Of a frontend that sends each message by
    /// itself, with its descriptors, none ever does.)
    fn look(&mut self, wanted: usize) -> Result<Look, ProtocolError> {
        let mut seen = Seen::default();
        let mut buffer = vec![0; wanted + 1];
        while seen.bytes.len() < wanted {
            let got = seen.bytes.len();
            let room = buffer.get_mut(got..).unwrap_or_default();
            peek_from(self.socket.as_fd(), i32::try_from(got).unwrap_or(0))?;
            let received = match peek(self.socket.as_fd(), room, &mut self.control) {
                Ok(received) if received.bytes == 0 => return Ok(Look::End),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Look::Later),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Look::End),
                Err(error) => return Err(ProtocolError::Io(error)),
            };
            let given = room.get(..received.bytes).unwrap_or_default();
            seen.bytes.extend_from_slice(given);
            if seen.bytes.len() > wanted {
                seen.bytes.truncate(wanted);
                (seen.doubtful, seen.cut_short) = (received.fds, received.cut_short);
            } else {
                seen.fds.extend(received.fds);
                if received.cut_short || seen.fds.len() > MAX_TABLE_REGIONS {
                    return Err(ProtocolError::TooManyFds);
                }
            }
        }
        Ok(Look::Whole(seen))
    }

    /// Takes the message out of the socket that [`Framing::receive`] gave, and closes the descriptors that came
    /// with it. (The message has its own.)
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn consume(&mut self) -> Result<(), ProtocolError> {
        let mut bytes = vec![0; self.in_hand];
        while let Some(rest) = bytes.get_mut(..self.in_hand).filter(|r| !r.is_empty()) {
            match nix::unistd::read(&self.socket, rest).map_err(io::Error::from) {
                Ok(0) => return Err(ProtocolError::Io(ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.in_hand -= count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ProtocolError::Io(error)),
            }
        }
        Ok(())
    }

    /// Sends a reply, with the descriptor that belongs to it, or keeps what the frontend does not take
    /// now. Nothing else is unsent when a descriptor comes ([`Framing::has_unsent`]).
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn send(&mut self, bytes: &[u8], fd: Option<OwnedFd>) -> Result<(), ProtocolError> {
        debug_assert!(fd.is_none() || self.unsent.is_empty());
        self.unsent.extend_from_slice(bytes);
        self.unsent_fd = fd.or(self.unsent_fd.take());
        self.flush()
    }

    fn write(&mut self) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let socket = self.socket.as_raw_fd();
        let Some(fd) = &self.unsent_fd else {
            return Ok(nix::sys::socket::send(socket, &self.unsent, flags)?);
        };
        let fds = [fd.as_raw_fd()];
        let sent = sendmsg::<()>(
            socket,
            &[IoSlice::new(&self.unsent)],
            &[ControlMessage::ScmRights(&fds)],
            flags,
            None,
        )?;
        self.unsent_fd = None;
        Ok(sent)
    }

    /// Sends what was kept, as far as the frontend takes it.
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn flush(&mut self) -> Result<(), ProtocolError> {
        while !self.unsent.is_empty() {
            match self.write() {
                Ok(count) => {
                    self.unsent.drain(..count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ProtocolError::Io(error)),
            }
        }
        Ok(())
    }

    /// Whether replies are waiting to be sent: nothing is read meanwhile, so that they don't pile up.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }
}
