//! Descriptors from a frontend: taken over once, and known for what they are before they are used.
//!
//! UNSAFETY: `SO_PEEK_OFF` is set and read through libc, as nix does not know it. So is `recvmsg` called, because
//! nix's gives up the control message when it was cut short (as at the limit on open files), and with it the
//! descriptors that did arrive. The kernel must get buffers that live through the call, with their true lengths, and each descriptor
//! that it gives must be owned exactly once.
#![expect(unsafe_code, reason = "recvmsg with descriptors, SO_PEEK_OFF")]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::fstat;

/// Length of an option of a socket that is a C `int`.
const INT_BYTES: libc::socklen_t = 4;
/// Words of a control buffer with room for one header and the most descriptors that the kernel passes
/// at once (253, `SCM_MAX_FD`); words for its alignment.
const CONTROL_WORDS: usize = 2 + 253_usize.div_ceil(2);

/// Where descriptors arrive.
#[derive(Debug)]
pub(crate) struct ControlBuffer(Box<[u64; CONTROL_WORDS]>);

impl Default for ControlBuffer {
    fn default() -> Self {
        Self(Box::new([0; CONTROL_WORDS]))
    }
}

/// What [`receive`] got.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes; 0: the peer is gone.
    pub bytes: usize,
    /// Descriptors that came with them, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// There were more, which are lost.
    pub cut_short: bool,
}

/// Looks at bytes of a stream, from where [`peek_from`] said and behind what was looked at since, and at the
/// descriptors that came with them: copies of them. Everything stays in the socket. Never waits, and never
/// goes past bytes that descriptors came with in one call.
///
/// # Errors
/// What `recvmsg` fails with; no descriptor has arrived then.
pub(crate) fn peek(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut ControlBuffer,
) -> io::Result<Received> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeroes is a valid value of this plain C struct.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(&*control.0);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: the header names live buffers with their lengths.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let bytes = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    Ok(Received {
        bytes,
        fds: adopt(&header),
        cut_short: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The socket is looked at from this byte on, counted from the first that was not read. It is the socket's
/// own, and outlives the process: looking moves it on, and reading moves it back by as much as is read.
///
/// # Errors
/// What `setsockopt` fails with.
pub(crate) fn peek_from(socket: BorrowedFd<'_>, byte: i32) -> io::Result<()> {
    // SAFETY: the value lives through the call, and has that length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const byte).cast(),
            INT_BYTES,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// From which byte on the socket is looked at; negative: [`peek_from`] was never called.
///
/// # Errors
/// What `getsockopt` fails with.
pub(crate) fn peeks_from(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut byte = 0_i32;
    let mut length = INT_BYTES;
    // SAFETY: both values live through the call, and the length is that of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut byte).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(byte);
    }
    Err(io::Error::last_os_error())
}

/// Owns the descriptors that the kernel has just made for us.
fn adopt(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: recvmsg has filled the header's control buffer.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: the macros stay within the control buffer, whose length the kernel has set.
        let (message, data, lead) =
            unsafe { (*control, libc::CMSG_DATA(control), libc::CMSG_LEN(0)) };
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let bytes = message.cmsg_len.saturating_sub(lead as usize);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: so many numbers lie there, each a new descriptor, taken over once.
                let fd = unsafe {
                    OwnedFd::from_raw_fd(data.cast::<RawFd>().add(index).read_unaligned())
                };
                fds.push(fd);
            }
        }
        // SAFETY: as above.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    fds
}

/// Device and inode of every eventfd of this kernel; made before the process locks itself in.
///
/// # Errors
/// What making one fails with.
pub fn know_eventfds() -> io::Result<(u64, u64)> {
    static KNOWN: OnceLock<(u64, u64)> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let stat = fstat(&EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?)?;
    Ok(*KNOWN.get_or_init(|| (stat.st_dev, stat.st_ino)))
}

/// An eventfd, from a descriptor that a frontend sent as one.
///
/// The kernel gives all its event objects one inode, so that a socket, pipe, file or terminal is told
/// apart; what else shares it (epoll, timers) can be written and read without harm. It is set not to
/// block, which spares the kernel a detour, but the frontend shares the open file and can undo that: only
/// a ring may read or write it, which waits for nobody (ADR 0008).
///
/// # Errors
/// InvalidInput for anything else; the descriptor is closed.
pub fn as_event(fd: OwnedFd) -> io::Result<OwnedFd> {
    let stat = fstat(&fd)?;
    if (stat.st_dev, stat.st_ino) != know_eventfds()? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the descriptor is not an eventfd",
        ));
    }
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eventfd_is_taken_and_does_not_block() {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).expect("eventfd");
        let fd = event.as_fd().try_clone_to_owned().expect("dup");
        let fd = as_event(fd).expect("an eventfd");
        let mut word = [0; 8];
        assert_eq!(
            nix::unistd::read(&fd, &mut word),
            Err(nix::errno::Errno::EAGAIN)
        );
    }

    #[test]
    fn what_is_no_event_is_refused() {
        let (read, write) = nix::unistd::pipe().expect("pipe");
        let (left, right) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let file = std::fs::File::open("/dev/zero").expect("open");
        let memory = nix::sys::memfd::memfd_create("m", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let memory = memory.expect("memfd");
        for fd in [read, write, left.into(), right.into(), file.into(), memory] {
            assert!(as_event(fd).is_err());
        }
    }
}
