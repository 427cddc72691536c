//! Descriptors from a frontend: taken over once, and known for what they are before they are used.
//!
//! UNSAFETY: [`adopt_received`] takes ownership of a number; its one caller passes what `recvmsg` has
//! just given, each once.
#![expect(
    unsafe_code,
    reason = "owning descriptors that recvmsg gives as numbers"
)]

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::fstat;

/// Owns a descriptor that `recvmsg` has just put into this process.
pub(crate) fn adopt_received(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and the caller passes it once.
    unsafe { OwnedFd::from_raw_fd(raw) }
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

/// An eventfd that never blocks us, from a descriptor that a frontend sent as one.
///
/// The kernel gives all its event objects one inode, so that a socket, pipe, file or terminal is told
/// apart; what else shares it (epoll, timers) can be written and read without harm or delay.
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
