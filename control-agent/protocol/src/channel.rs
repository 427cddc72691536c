//! The channel: one CBOR message per `SOCK_SEQPACKET` datagram, descriptors beside it.
//!
//! What a peer sends is untrusted until decoded. A datagram over the cap, with more
//! descriptors than the cap, cut short or followed by other bytes is an error, and every
//! descriptor that came with it is closed.
//!
//! UNSAFETY: `recvmsg` and `sendmsg` are called through libc because no crate in the tree
//! wraps `SCM_PIDFD`. The module must hand the kernel buffers that live through the call,
//! with their true lengths, and take ownership of each received descriptor exactly once.
#![expect(
    unsafe_code,
    reason = "recvmsg with SCM_PIDFD is not wrapped by a crate"
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use minicbor::{Decode, Encode};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Longest message in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Most descriptors with one message.
pub const MAX_FDS: usize = 4;

/// `SO_PASSPIDFD`, `include/uapi/asm-generic/socket.h` (Linux 6.5).
const SO_PASSPIDFD: libc::c_int = 76;
/// `SCM_PIDFD`, `include/linux/socket.h` (Linux 6.5).
const SCM_PIDFD: libc::c_int = 4;

/// Room for [`MAX_FDS`] descriptors and one pidfd, each with its header; u64 for alignment.
/// One descriptor more than the cap fits, so that "too many" is seen as such.
const CONTROL_WORDS: usize = 16;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed its end, or is gone.
    #[error("the peer closed the channel")]
    Closed,
    /// Nothing to read, or no room to write, on a non-blocking channel.
    #[error("the channel would block")]
    WouldBlock,
    /// The message is longer than [`MAX_MESSAGE_BYTES`] or has more than [`MAX_FDS`] descriptors.
    #[error(
        "the message exceeds the channel's caps ({MAX_MESSAGE_BYTES} bytes, {MAX_FDS} descriptors)"
    )]
    TooLarge,
    /// The bytes are not one message of the expected type.
    #[error("the message does not decode: {0}")]
    Malformed(String),
    /// The message came with another number of descriptors than its kind has.
    #[error("the message came with {given} descriptors, its kind has {expected}")]
    WrongFdCount {
        /// How many came.
        given: usize,
        /// How many belong to it.
        expected: usize,
    },
    /// Any other failure of the system call.
    #[error("the channel failed: {0}")]
    Io(#[from] io::Error),
}

/// One end of a channel.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

/// A message as it was received. Descriptors not taken are closed when it drops.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// The descriptors that came with it, in order, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// pidfd of the sending process, if [`Channel::ask_for_sender`] was called and the kernel has it.
    pub sender: Option<OwnedFd>,
}

impl<M> Received<M> {
    /// Exactly `N` descriptors, or an error that closes all of them.
    ///
    /// # Errors
    /// [`ChannelError::WrongFdCount`].
    pub fn take_fds<const N: usize>(&mut self) -> Result<[OwnedFd; N], ChannelError> {
        let fds = mem::take(&mut self.fds);
        let given = fds.len();
        fds.try_into()
            .map_err(|_| ChannelError::WrongFdCount { given, expected: N })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.fd
    }
}

impl Channel {
    /// Two connected ends, close-on-exec, blocking.
    ///
    /// # Errors
    /// What `socketpair` fails with.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Sets or clears `O_NONBLOCK`.
    ///
    /// # Errors
    /// What `fcntl` fails with.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let mut flags = OFlag::from_bits_retain(fcntl(&self.fd, FcntlArg::F_GETFL)?);
        flags.set(OFlag::O_NONBLOCK, nonblocking);
        fcntl(&self.fd, FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// From now on each received message names its sender by pidfd (`SO_PASSPIDFD`): the process
    /// that called `sendmsg`, not the one that made the socketpair.
    ///
    /// # Errors
    /// ENOPROTOOPT before Linux 6.5.
    pub fn ask_for_sender(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the option value is a live c_int, given with its size.
        let rc = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PASSPIDFD,
                (&raw const on).cast(),
                size_of_u32(&on),
            )
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends one message with its descriptors (they are duplicated; the caller keeps its own).
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`] before anything is sent; [`ChannelError::WouldBlock`] with
    /// nothing sent; [`ChannelError::Closed`] if the peer is gone (no SIGPIPE is raised).
    pub fn send<M: Encode<()>>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes =
            minicbor::to_vec(message).map_err(|e| ChannelError::Malformed(e.to_string()))?;
        if bytes.len() > MAX_MESSAGE_BYTES || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        let iov = [io::IoSlice::new(&bytes)];
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        loop {
            let sent = nix::sys::socket::sendmsg::<()>(
                self.fd.as_raw_fd(),
                &iov,
                control,
                nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
                None,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => Err(classify(e.into())),
            };
        }
    }

    /// Receives one message of type `M`.
    ///
    /// # Errors
    /// See [`ChannelError`]. After [`ChannelError::Malformed`] or [`ChannelError::TooLarge`] the
    /// datagram is consumed and the next one can be received.
    pub fn receive<M: for<'b> Decode<'b, ()>>(&self) -> Result<Received<M>, ChannelError> {
        let mut bytes = vec![0u8; MAX_MESSAGE_BYTES];
        let datagram = self.receive_raw(&mut bytes)?;
        // An empty datagram can't be told from the end; no message encodes to nothing.
        if datagram.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        if datagram.truncated || datagram.fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        let body = bytes.get(..datagram.bytes).unwrap_or_default();
        let mut decoder = minicbor::Decoder::new(body);
        let message = decoder
            .decode()
            .map_err(|e| ChannelError::Malformed(e.to_string()))?;
        if decoder.position() != body.len() {
            return Err(ChannelError::Malformed(
                "bytes follow the message".to_owned(),
            ));
        }
        Ok(Received {
            message,
            fds: datagram.fds,
            sender: datagram.sender,
        })
    }

    fn receive_raw(&self, buffer: &mut [u8]) -> Result<Datagram, ChannelError> {
        let mut iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut control = [0u64; CONTROL_WORDS];
        // SAFETY: an all-zero msghdr is a valid value of this plain C struct.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control);
        let received = loop {
            // SAFETY: header points at one iovec over `buffer` and at `control`, all of which live
            // through the call, with their true lengths.
            let n = unsafe {
                libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC)
            };
            if n >= 0 {
                break n.unsigned_abs();
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(classify(error));
            }
        };
        let (fds, sender) = take_control(&header);
        let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        Ok(Datagram {
            bytes: received,
            truncated,
            fds,
            sender,
        })
    }
}

struct Datagram {
    bytes: usize,
    truncated: bool,
    fds: Vec<OwnedFd>,
    sender: Option<OwnedFd>,
}

/// Takes ownership of every descriptor in the control part of a received header.
fn take_control(header: &libc::msghdr) -> (Vec<OwnedFd>, Option<OwnedFd>) {
    let mut fds = Vec::new();
    let mut sender = None;
    // SAFETY: the kernel filled msg_control and set msg_controllen to what it wrote.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole cmsghdr inside msg_control.
        let (level, kind, length) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len,
            )
        };
        // SAFETY: as above; CMSG_DATA is the first byte after that header.
        let data = unsafe { libc::CMSG_DATA(message) };
        let payload = length.saturating_sub(data.addr().wrapping_sub(message.addr()));
        if level == libc::SOL_SOCKET && (kind == libc::SCM_RIGHTS || kind == SCM_PIDFD) {
            for i in 0..payload / mem::size_of::<RawFd>() {
                // SAFETY: i stays inside the payload; descriptors may be unaligned.
                let raw = unsafe { data.cast::<RawFd>().add(i).read_unaligned() };
                if raw < 0 {
                    continue; // SCM_PIDFD of a process that is already gone
                }
                // SAFETY: the kernel installed this descriptor for us with this message; nobody
                // else owns it and each payload slot is visited once.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                if kind == SCM_PIDFD {
                    sender = Some(fd)
                } else {
                    fds.push(fd)
                }
            }
        }
        // SAFETY: message is a header of this control buffer.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    (fds, sender)
}

fn classify(error: io::Error) -> ChannelError {
    match error.kind() {
        io::ErrorKind::WouldBlock => ChannelError::WouldBlock,
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::NotConnected => ChannelError::Closed,
        _ => ChannelError::Io(error),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the size of a C int")]
fn size_of_u32<T>(value: &T) -> libc::socklen_t {
    mem::size_of_val(value) as libc::socklen_t
}

/// Do two pidfds name the same process? On pidfs (Linux 6.9) a process has one inode number for
/// as long as the machine runs, so that this also holds when the pid was reused.
///
/// # Errors
/// What `fstat` fails with.
pub fn same_process(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    let a = nix::sys::stat::fstat(a)?;
    let b = nix::sys::stat::fstat(b)?;
    Ok(a.st_dev == b.st_dev && a.st_ino == b.st_ino)
}

/// The pid, uid and gid that a connected unix socket's peer had when it connected.
///
/// # Errors
/// What `getsockopt` fails with.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<nix::sys::socket::UnixCredentials> {
    Ok(nix::sys::socket::getsockopt(
        &socket,
        nix::sys::socket::sockopt::PeerCredentials,
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// A file of our own that nothing else in this process has open, and how many descriptors
    /// of it are open (other tests run beside this one).
    fn counted(name: &str) -> (std::fs::File, impl Fn() -> usize) {
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .expect("memfd");
        let link = format!("/memfd:{name} (deleted)");
        let count = move || {
            std::fs::read_dir("/proc/self/fd")
                .expect("proc")
                .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
                .filter(|target| target.as_os_str() == link.as_str())
                .count()
        };
        (fd.into(), count)
    }

    #[test]
    fn a_message_and_its_fds_arrive() {
        let (a, b) = Channel::pair().expect("pair");
        let file = std::fs::File::open("/dev/null").expect("open");
        a.send(&"hello".to_owned(), &[file.as_fd(), file.as_fd()])
            .expect("send");
        let mut got = b.receive::<String>().expect("receive");
        assert_eq!(got.message, "hello");
        assert!(got.sender.is_none());
        let [_, _] = got.take_fds::<2>().expect("two");
    }

    #[test]
    fn the_sender_is_named_by_pidfd() {
        let (a, b) = Channel::pair().expect("pair");
        b.ask_for_sender().expect("SO_PASSPIDFD");
        a.send(&1u8, &[]).expect("send");
        let got = b.receive::<u8>().expect("receive");
        let sender = got.sender.expect("pidfd");
        // SAFETY: pidfd_open takes two integers and returns a descriptor or -1.
        let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
        // SAFETY: the descriptor was just made and is ours.
        let own = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(own).expect("fd")) };
        assert!(same_process(sender.as_fd(), own.as_fd()).expect("fstat"));
    }

    #[test]
    fn a_wrong_fd_count_closes_them_all() {
        let (a, b) = Channel::pair().expect("pair");
        let (file, count) = counted("wrong-count");
        a.send(&1u8, &[file.as_fd(), file.as_fd()]).expect("send");
        let mut got = b.receive::<u8>().expect("receive");
        assert_eq!(count(), 3);
        assert!(matches!(
            got.take_fds::<1>(),
            Err(ChannelError::WrongFdCount {
                given: 2,
                expected: 1
            })
        ));
        assert_eq!(count(), 1);
    }

    #[test]
    fn garbage_and_trailing_bytes_are_refused_and_the_channel_goes_on() {
        let (a, b) = Channel::pair().expect("pair");
        for bytes in [&[0xff_u8, 0xff][..], &[0x01, 0x02][..]] {
            nix::unistd::write(&a, bytes).expect("write");
            assert!(matches!(b.receive::<u8>(), Err(ChannelError::Malformed(_))));
        }
        a.send(&7u8, &[]).expect("send");
        assert_eq!(b.receive::<u8>().expect("receive").message, 7);
    }

    #[test]
    fn too_many_fds_are_refused_and_closed() {
        let (a, b) = Channel::pair().expect("pair");
        let (file, count) = counted("too-many");
        let raw = [file.as_raw_fd(); 40];
        let iov = [io::IoSlice::new(&[1u8])];
        nix::sys::socket::sendmsg::<()>(
            a.as_raw_fd(),
            &iov,
            &[nix::sys::socket::ControlMessage::ScmRights(&raw)],
            nix::sys::socket::MsgFlags::empty(),
            None,
        )
        .expect("sendmsg");
        assert!(matches!(b.receive::<u8>(), Err(ChannelError::TooLarge)));
        assert_eq!(count(), 1);
    }

    #[test]
    fn a_message_over_the_cap_is_refused_before_it_is_sent() {
        let (a, _b) = Channel::pair().expect("pair");
        let long = "x".repeat(MAX_MESSAGE_BYTES);
        assert!(matches!(a.send(&long, &[]), Err(ChannelError::TooLarge)));
    }

    #[test]
    fn a_closed_peer_is_told_apart_from_silence() {
        let (a, b) = Channel::pair().expect("pair");
        b.set_nonblocking(true).expect("fcntl");
        assert!(matches!(b.receive::<u8>(), Err(ChannelError::WouldBlock)));
        drop(a);
        assert!(matches!(b.receive::<u8>(), Err(ChannelError::Closed)));
        assert!(matches!(b.send(&1u8, &[]), Err(ChannelError::Closed)));
    }
}
