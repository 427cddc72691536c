//! The descriptors that whoever started rot passes it (`LISTEN_PID`, `LISTEN_FDS`,
//! `LISTEN_FDNAMES`: sd_listen_fds(3)).
//!
//! UNSAFETY: taking ownership of them, a contract with whoever executed this process: `LISTEN_PID`
//! says that they are meant for it, and nobody else in it owns these numbers.
#![expect(unsafe_code, reason = "adopting the inherited descriptors")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Number of the first (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

fn number(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

/// Those meant for this process, with their names. Once; none from the second call on.
///
/// # Errors
/// One of them is not open.
pub fn descriptors() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").unwrap_or(0);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut given = Vec::new();
    for fd in FIRST_FD..FIRST_FD.saturating_add_unsigned(count) {
        // SAFETY: fcntl on an integer; fails if the descriptor is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::other(format!(
                "LISTEN_FDS={count}, but descriptor {fd} is not open"
            )));
        }
        // SAFETY: it is open and, by LISTEN_PID, passed for this process to own; TAKEN makes this
        // its only owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        given.push((names.next().unwrap_or_default().to_owned(), fd));
    }
    Ok(given)
}
