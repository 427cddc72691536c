//! A vhost-user frontend: one connection, any bytes in any pieces with any descriptors.
//!
//! It shares nothing with the data plane, so that a misreading of the specification there is
//! not repeated here. Nothing blocks for longer than [`TIMEOUT`].

mod descriptors;
pub mod message;
mod queues;

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use message::{FLAG_NEED_REPLY, FLAG_REPLY, HEADER_BYTES, RegionEntry, VERSION, request};

pub use queues::{Addresses, Events};

/// Longest wait for an answer.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a frontend call failed.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// The backend closed the connection.
    #[error("the backend closed the connection")]
    Closed,
    /// No answer within [`TIMEOUT`].
    #[error("the backend did not answer {0} within {TIMEOUT:?}")]
    Timeout(&'static str),
    /// The backend acknowledged with a failure.
    #[error("the backend refused request {request} (acknowledged with {code})")]
    Refused {
        /// Number of the request.
        request: u32,
        /// The acknowledgement, not zero.
        code: u64,
    },
    /// The answer is not what the specification says.
    #[error("the answer to request {request} is wrong: {what}")]
    Protocol {
        /// Number of the request.
        request: u32,
        /// What is wrong.
        what: String,
    },
    /// A system call failed.
    #[error("vhost-user socket: {0}")]
    Io(#[from] io::Error),
}

/// A message from the backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Flags word.
    pub flags: u32,
    /// The body.
    pub body: Vec<u8>,
}

/// A connection to a backend.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    /// Protocol features as negotiated.
    pub protocol_features: u64,
    /// Send each message in pieces of so many bytes.
    pub piece_bytes: Option<usize>,
    /// Questions ask for an acknowledgement too, as some frontends' do; their answer is it.
    pub questions_need_reply: bool,
}

impl Frontend {
    /// Connects, and tries again until `patience` is over: the backend may still be starting.
    ///
    /// # Errors
    /// What `connect` failed with last.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, FrontendError> {
        let deadline = Instant::now() + patience;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(TIMEOUT))?;
                    stream.set_write_timeout(Some(TIMEOUT))?;
                    return Ok(Self {
                        stream,
                        protocol_features: 0,
                        piece_bytes: None,
                        questions_need_reply: false,
                    });
                }
                Err(e) if Instant::now() >= deadline => return Err(e.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Sends bytes as they are, the descriptors with the first of them.
    ///
    /// # Errors
    /// [`FrontendError::Closed`], or a failed system call.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut rest = bytes;
        let mut first = true;
        while !rest.is_empty() {
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = if first && !raw.is_empty() {
                &rights[..]
            } else {
                &[]
            };
            let sent = sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(rest)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::EINTR) => continue,
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => {
                    return Err(FrontendError::Closed);
                }
                Err(e) => return Err(io::Error::from(e).into()),
            }
            first = false;
        }
        Ok(())
    }

    /// Sends bytes in pieces with a pause between them, the descriptors with the first piece.
    ///
    /// # Errors
    /// As [`Frontend::send_raw`].
    pub fn send_pieces(
        &self,
        bytes: &[u8],
        piece_bytes: usize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        for (i, piece) in bytes.chunks(piece_bytes.max(1)).enumerate() {
            self.send_raw(piece, if i == 0 { fds } else { &[] })?;
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// The next message of the backend.
    ///
    /// # Errors
    /// [`FrontendError::Closed`] at the end of the stream, [`FrontendError::Timeout`].
    pub fn receive(&self) -> Result<Message, FrontendError> {
        Ok(self.receive_with_fds()?.0)
    }

    /// The next message of the backend, and the descriptors that came with its header.
    ///
    /// # Errors
    /// As [`Frontend::receive`].
    pub fn receive_with_fds(&self) -> Result<(Message, Vec<OwnedFd>), FrontendError> {
        let mut header = [0u8; HEADER_BYTES];
        let (got, fds) = descriptors::receive(&self.stream, &mut header).map_err(failed_read)?;
        if got == 0 {
            return Err(FrontendError::Closed);
        }
        self.read_exact(header.get_mut(got..).unwrap_or_default())?;
        let mut parts = header
            .chunks_exact(4)
            .map(|c| c.iter().rev().fold(0u32, |v, b| (v << 8) | u32::from(*b)));
        let mut next = || parts.next().unwrap_or_default();
        let (request, flags, size) = (next(), next(), next());
        if size > 4096 {
            return Err(FrontendError::Protocol {
                request,
                what: format!("a body of {size} bytes"),
            });
        }
        let mut body = vec![0; size as usize];
        self.read_exact(&mut body)?;
        let message = Message {
            request,
            flags,
            body,
        };
        Ok((message, fds))
    }

    fn read_exact(&self, buffer: &mut [u8]) -> Result<(), FrontendError> {
        (&self.stream).read_exact(buffer).map_err(failed_read)
    }

    /// GET_INFLIGHT_FD: the region that the backend made, and its file.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn get_inflight(
        &self,
        asked: &message::Inflight,
    ) -> Result<(message::Inflight, OwnedFd), FrontendError> {
        let request = request::GET_INFLIGHT_FD;
        let wrong = |what: &str| FrontendError::Protocol {
            request,
            what: what.to_owned(),
        };
        let flags = self.question_flags();
        self.send(&message::encode(request, flags, &asked.body()), &[])?;
        let (answer, mut fds) = self.receive_with_fds()?;
        if answer.request != request || answer.flags & 0x7 != VERSION | FLAG_REPLY {
            return Err(wrong("its header is another's"));
        }
        let region = message::Inflight::parse(&answer.body);
        let region = region.filter(|region| region.padded == asked.padded);
        let region = region.ok_or_else(|| wrong("its body has another length"))?;
        let fd = fds.pop().ok_or_else(|| wrong("it came without a file"))?;
        Ok((region, fd))
    }

    fn question_flags(&self) -> u32 {
        if self.questions_need_reply {
            VERSION | FLAG_NEED_REPLY
        } else {
            VERSION
        }
    }

    /// A request that has an answer of its own: its body.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn ask(
        &self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, FrontendError> {
        self.send(&message::encode(request, self.question_flags(), body), fds)?;
        self.answer(request)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        match self.piece_bytes {
            Some(piece) => self.send_pieces(bytes, piece, fds),
            None => self.send_raw(bytes, fds),
        }
    }

    /// The answer to `request`, checked for its header.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn answer(&self, request: u32) -> Result<Vec<u8>, FrontendError> {
        let reply = self.receive()?;
        if reply.request != request || reply.flags & 0x7 != VERSION | FLAG_REPLY {
            return Err(FrontendError::Protocol {
                request,
                what: format!("header {} flags {:#x}", reply.request, reply.flags),
            });
        }
        Ok(reply.body)
    }

    /// A request whose answer is one 64-bit word.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn ask_u64(&self, request: u32) -> Result<u64, FrontendError> {
        let body = self.ask(request, &[], &[])?;
        word(request, &body)
    }

    /// A request without an answer of its own. With REPLY_ACK negotiated it asks for the
    /// acknowledgement and waits for it.
    ///
    /// # Errors
    /// [`FrontendError::Refused`] for an acknowledgement that is not zero.
    pub fn set(
        &self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        if !self.has_acks() {
            return self.send(&message::encode(request, VERSION, body), fds);
        }
        let flags = VERSION | FLAG_NEED_REPLY;
        self.send(&message::encode(request, flags, body), fds)?;
        let code = word(request, &self.answer(request)?)?;
        if code != 0 {
            return Err(FrontendError::Refused { request, code });
        }
        Ok(())
    }

    /// Whether REPLY_ACK was negotiated.
    #[must_use]
    pub fn has_acks(&self) -> bool {
        self.protocol_features & message::protocol_feature::REPLY_ACK != 0
    }

    /// SET_MEM_TABLE with one descriptor per region.
    ///
    /// # Errors
    /// As [`Frontend::set`].
    pub fn set_memory_table(
        &self,
        regions: &[RegionEntry],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let body = message::memory_table(count, regions);
        self.set(request::SET_MEM_TABLE, &body, fds)
    }

    /// SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR.
    ///
    /// # Errors
    /// As [`Frontend::set`].
    pub fn set_vring_fd(
        &self,
        request: u32,
        index: u8,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrontendError> {
        let body = message::vring_fd(index, fd.is_some());
        self.set(request, &body, fd.as_slice())
    }

    /// SET_VRING_NUM, SET_VRING_BASE or SET_VRING_ENABLE.
    ///
    /// # Errors
    /// As [`Frontend::set`].
    pub fn set_vring_state(
        &self,
        request: u32,
        index: u32,
        value: u32,
    ) -> Result<(), FrontendError> {
        self.set(request, &message::halves(&[index, value]), &[])
    }

    /// GET_VRING_BASE: stops the queue; the next avail index it would have looked at.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn get_vring_base(&self, index: u32) -> Result<u32, FrontendError> {
        let request = request::GET_VRING_BASE;
        let body = self.ask(request, &message::halves(&[index, 0]), &[])?;
        let answer = word(request, &body)?;
        if answer & 0xffff_ffff != u64::from(index) {
            return Err(FrontendError::Protocol {
                request,
                what: format!("it names queue {}", answer & 0xffff_ffff),
            });
        }
        Ok(u32::try_from(answer >> 32).unwrap_or(u32::MAX))
    }

    /// GET_CONFIG: `size` bytes from `offset`.
    ///
    /// # Errors
    /// [`FrontendError::Protocol`] if the answer has another length than the question.
    pub fn get_config(&self, offset: u32, size: u32) -> Result<Vec<u8>, FrontendError> {
        let request = request::GET_CONFIG;
        let body = message::config(offset, size, 0, &vec![0; size as usize]);
        let answer = self.ask(request, &body, &[])?;
        match answer.get(12..) {
            Some(payload) if payload.len() == size as usize => Ok(payload.to_vec()),
            _ => Err(FrontendError::Protocol {
                request,
                what: format!("{} bytes for a read of {size}", answer.len()),
            }),
        }
    }

    /// Whether the backend closes the connection within `patience`; answers that come first
    /// are read and dropped.
    #[must_use]
    pub fn closes_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut buffer = [0u8; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !wait_readable(self.stream.as_fd(), left) {
                return false;
            }
            match (&self.stream).read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return true,
            }
        }
    }

    /// No more bytes from here; what the backend sends is still received.
    ///
    /// # Errors
    /// What `shutdown` fails with.
    pub fn shut_down_sending(&self) -> io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Write)
    }

    /// The socket, for what this type does not do.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

fn failed_read(error: io::Error) -> FrontendError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => FrontendError::Closed,
        io::ErrorKind::WouldBlock => FrontendError::Timeout("a request"),
        _ => FrontendError::Io(error),
    }
}

fn word(request: u32, body: &[u8]) -> Result<u64, FrontendError> {
    let bytes: [u8; 8] = body.try_into().map_err(|_| FrontendError::Protocol {
        request,
        what: format!("{} bytes where 8 belong", body.len()),
    })?;
    Ok(u64::from_le_bytes(bytes))
}

/// Waits until `fd` can be read or is closed at the other end.
#[must_use]
pub fn wait_readable(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(n) if n > 0 => return true,
            Ok(_) | Err(Errno::EINTR) if left.is_zero() => return false,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
