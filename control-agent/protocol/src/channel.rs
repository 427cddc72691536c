//! The channel: one CBOR message per `SOCK_SEQPACKET` datagram, descriptors beside it.
//!
//! What a peer sends is untrusted until decoded. A datagram over the cap, with more
//! descriptors than the cap, cut short or followed by other bytes is an error, and every
//! descriptor that came with it is closed.
//!
//! UNSAFETY: one `setsockopt` that no crate in the tree wraps; the option must live through the
//! call, given with its size.
#![expect(unsafe_code, reason = "SO_PASSPIDFD is not wrapped by a crate")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use minicbor::{Decode, Encode};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

use crate::datagram;

/// Longest message in bytes: room for what can be said of 256 volumes, and within what the kernel takes in one
/// datagram without being asked for more (212,992 bytes, `net.core.wmem_default`).
pub const MAX_MESSAGE_BYTES: usize = 192 * 1024;
/// Most descriptors with one message: those of a network card with [`crate::net::MAX_QUEUE_PAIRS`], and one that
/// belongs to all of them.
pub const MAX_FDS: usize = 17;

/// `SO_PASSPIDFD`, `include/uapi/asm-generic/socket.h` (Linux 6.5).
const SO_PASSPIDFD: libc::c_int = 76;

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
        datagram::send(self.as_fd(), &bytes, fds, MsgFlags::empty()).map_err(classify)
    }

    /// Receives one message of type `M`.
    ///
    /// # Errors
    /// See [`ChannelError`]. After [`ChannelError::Malformed`] or [`ChannelError::TooLarge`] the
    /// datagram is consumed and the next one can be received.
    pub fn receive<M: for<'b> Decode<'b, ()>>(&self) -> Result<Received<M>, ChannelError> {
        let mut bytes = vec![0u8; MAX_MESSAGE_BYTES];
        let mut control = [0u64; CONTROL_WORDS];
        let datagram = datagram::receive(self.as_fd(), &mut bytes, &mut control, MsgFlags::empty())
            .map_err(classify)?;
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
    use std::os::fd::{AsFd, FromRawFd};

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
