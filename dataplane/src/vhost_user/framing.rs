//! A byte stream with descriptors, cut into messages: any pieces, nothing blocks, nothing is read
//! beyond the message it belongs to, replies that the frontend does not read are bounded.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::{self, ErrorKind, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::message::{HEADER_BYTES, Header, MAX_TABLE_REGIONS, Message, ProtocolError};
use crate::fds::{ControlBuffer, receive};

/// What reading gave.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(Message),
    /// Nothing more for now.
    Later,
    /// The frontend is gone.
    End,
}

/// A connection's stream and what was read of the next message.
#[derive(Debug)]
pub struct Framing {
    stream: UnixStream,
    header: Option<Header>,
    /// Of the header, or with one of the body.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Replies that the frontend has not read, and the descriptor that goes with their first byte.
    unsent: Vec<u8>,
    unsent_fd: Option<OwnedFd>,
    control: ControlBuffer,
}

impl AsFd for Framing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Framing {
    /// Over a stream, which is made non-blocking.
    ///
    /// # Errors
    /// What `fcntl` fails with.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            header: None,
            bytes: Vec::new(),
            fds: Vec::new(),
            unsent: Vec::new(),
            unsent_fd: None,
            control: ControlBuffer::default(),
        })
    }

    /// The next message, as far as it is there.
    ///
    /// # Errors
    /// [`ProtocolError`]: the connection is of no more use.
    pub fn receive(&mut self) -> Result<Incoming, ProtocolError> {
        loop {
            let wanted = match self.header {
                None => HEADER_BYTES,
                Some(header) => usize::try_from(header.body_bytes).unwrap_or(0),
            };
            if self.bytes.len() == wanted {
                if let Some(message) = self.complete()? {
                    return Ok(Incoming::Message(message));
                }
                continue;
            }
            match self.read(wanted - self.bytes.len())? {
                Some(0) => return Ok(Incoming::End),
                Some(_) => {}
                None => return Ok(Incoming::Later),
            }
        }
    }

    /// Header or body is whole.
    fn complete(&mut self) -> Result<Option<Message>, ProtocolError> {
        let bytes = std::mem::take(&mut self.bytes);
        match self.header.take() {
            None => {
                let header = bytes.try_into().map(Header::parse);
                self.header = Some(header.map_err(|_| ProtocolError::Header("its length"))??);
                Ok(None)
            }
            Some(header) => Ok(Some(Message {
                header,
                body: bytes,
                fds: std::mem::take(&mut self.fds),
            })),
        }
    }

    /// Reads at most `most` bytes; none if there are none yet.
    fn read(&mut self, most: usize) -> Result<Option<usize>, ProtocolError> {
        let mut buffer = vec![0u8; most];
        let received = loop {
            match receive(self.stream.as_fd(), &mut buffer, &mut self.control) {
                Ok(received) => break received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Some(0)),
                Err(error) => return Err(ProtocolError::Io(error)),
            }
        };
        self.fds.extend(received.fds);
        if received.cut_short || self.fds.len() > MAX_TABLE_REGIONS {
            self.fds.clear();
            return Err(ProtocolError::TooManyFds);
        }
        self.bytes
            .extend(buffer.get(..received.bytes).unwrap_or_default());
        Ok(Some(received.bytes))
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
        let Some(fd) = &self.unsent_fd else {
            return self.stream.write(&self.unsent);
        };
        let fds = [fd.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(&self.unsent)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
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
