//! Descriptors that come with a message of the backend.
//!
//! UNSAFETY: the kernel has put the numbers that a control message names into this process's table
//! for its receiver, who is here: each becomes an owner once.
#![expect(unsafe_code, reason = "descriptors that the kernel hands over")]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Most that are taken of one message.
const MOST: usize = 8;

/// Reads some bytes, and the descriptors that come with the first of them.
///
/// # Errors
/// What `recvmsg` fails with.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; MOST]);
    let mut parts = [IoSliceMut::new(buffer)];
    let got = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: just received, and named by this message alone.
            fds.extend(
                numbers
                    .iter()
                    .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((got.bytes, fds))
}
