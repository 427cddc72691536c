//! The fence: how a process knows that the last request of the one before it has ended.
//!
//! A killed process's requests go on for a while after it is gone (40 to 320 ms were seen). So each makes a
//! pipe, has every one of its rings keep the write end as a fixed file, and closes its own. The read end is
//! kept where it outlives the process. A ring lets go of its files when its last request has ended: then the
//! read end hangs up, and whoever comes after may submit (ADR 0029).
//!
//! A lock on a volume's file would say nothing: the successor has the same open file description.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::pipe2;

/// The write end of this process's fence, on its way into the rings. Whoever has one drops it as soon as the
/// ring has it: what is open anywhere else keeps the fence up.
#[derive(Debug, Clone)]
pub struct Fence(Arc<OwnedFd>);

impl AsFd for Fence {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Fence {
    /// A fence, and its read end, which hangs up (`POLLHUP`) when the last ring that keeps the fence has ended its last
    /// request.
    ///
    /// # Errors
    /// What `pipe2` fails with.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((Self(Arc::new(write)), read))
    }
}

/// The read end of an earlier process's fence, from a descriptor that was stored as one.
///
/// # Errors
/// InvalidInput if it is not a pipe, which would never hang up.
pub fn earlier(fd: OwnedFd) -> io::Result<OwnedFd> {
    let stat = fstat(&fd)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFIFO {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the stored fence is not a pipe",
        ));
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::worker::ring::Ring;
    use crate::worker::staging::Staging;

    fn hangs_up(end: &OwnedFd, wait: PollTimeout) -> bool {
        let mut fds = [PollFd::new(end.as_fd(), PollFlags::empty())];
        poll(&mut fds, wait).expect("poll") == 1
    }

    #[test]
    fn it_hangs_up_when_the_last_ring_is_gone_or_has_let_go_of_it() {
        let (fence, end) = Fence::new().expect("a fence");
        let staging = Staging::new().expect("staging memory");
        let mut rings = [0; 2].map(|_| Ring::new(&staging).expect("a ring"));
        for ring in &mut rings {
            ring.keep_fence(fence.as_fd()).expect("room in the table");
        }
        drop(fence);
        assert!(!hangs_up(&end, PollTimeout::ZERO), "two rings keep it");
        let [mut first, second] = rings;
        first.let_go_of_fence();
        assert!(!hangs_up(&end, PollTimeout::ZERO), "one ring keeps it");
        // The kernel takes a ring down at its leisure.
        drop(second);
        assert!(hangs_up(&end, PollTimeout::from(10_000u16)));
    }

    #[test]
    fn what_is_no_pipe_is_no_fence() {
        let (_fence, end) = Fence::new().expect("a fence");
        assert!(earlier(end).is_ok());
        let file = std::fs::File::open("/dev/null").expect("open");
        assert!(earlier(file.into()).is_err());
    }
}
