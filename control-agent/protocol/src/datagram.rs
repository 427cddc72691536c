//! One datagram with the descriptors beside it, in and out.
//!
//! UNSAFETY: `recvmsg` is called through libc because no crate in the tree wraps `SCM_PIDFD`, and
//! because nix gives no descriptor at all once a message was cut short. The module must hand the
//! kernel buffers that live through the call, with their true lengths, and take ownership of each
//! received descriptor exactly once.
#![expect(
    unsafe_code,
    reason = "recvmsg with SCM_PIDFD is not wrapped by a crate"
)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// `SCM_PIDFD`, `include/linux/socket.h` (Linux 6.5).
const SCM_PIDFD: libc::c_int = 4;

/// What came.
pub(crate) struct Datagram {
    /// Bytes of the buffer that were filled.
    pub(crate) bytes: usize,
    /// Bytes or descriptors were lost: too many of them, or none free in this process.
    pub(crate) truncated: bool,
    /// In order, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// pidfd of the sender, where the socket was asked for it.
    pub(crate) sender: Option<OwnedFd>,
}

/// Sends one datagram, and never raises SIGPIPE.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> io::Result<()> {
    let iov = [IoSlice::new(bytes)];
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() {
        &rights[..0]
    } else {
        &rights[..]
    };
    loop {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        return match sendmsg::<()>(socket.as_raw_fd(), &iov, control, flags, None) {
            Ok(_) => Ok(()),
            Err(Errno::EINTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

/// Receives one datagram. `control` is room for the descriptors and their headers: more of them
/// than fit make the datagram a truncated one.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut [u64],
    flags: MsgFlags,
) -> io::Result<Datagram> {
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is a valid value of this plain C struct.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(control);
    let flags = flags.bits() | libc::MSG_CMSG_CLOEXEC;
    let bytes = loop {
        // SAFETY: header points at one iovec over `buffer` and at `control`, all of which live
        // through the call, with their true lengths.
        let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        if n >= 0 {
            break n.unsigned_abs();
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    };
    let (fds, sender) = take_control(&header);
    Ok(Datagram {
        bytes,
        truncated: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
        fds,
        sender,
    })
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
