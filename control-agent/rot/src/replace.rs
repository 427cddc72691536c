//! Executing another binary in the place of this process, and trying it out before.
//!
//! UNSAFETY: `execveat` gets arrays that end with null and live until it replaces the process or
//! fails; between `fork` and `execveat` the child makes no other call, and this process has one
//! thread. Descriptors are adopted by number, which the process before this one left open for it.
#![expect(unsafe_code, reason = "fork, execveat, and descriptors by number")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::child::happens_within;
use crate::execute::{open_pidfd, send_signal};

/// A binary with its command line and whole environment.
#[derive(Debug)]
pub struct Image<'a> {
    /// The sealed memfd of the binary.
    pub binary: BorrowedFd<'a>,
    /// The command line, the name first.
    pub arguments: Vec<CString>,
    /// `NAME=value` each.
    pub environment: Vec<CString>,
}

/// Null-terminated, for as long as the strings live.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let ends = std::iter::once(ptr::null());
    strings.iter().map(|s| s.as_ptr()).chain(ends).collect()
}

impl Image<'_> {
    /// Executes it in the place of this process: same process id, same children, and every
    /// descriptor that is not closed on exec. Returns only if that fails.
    #[must_use]
    pub fn replace_this(&self) -> io::Error {
        let (argv, envp) = (pointers(&self.arguments), pointers(&self.environment));
        // SAFETY: the arrays end with null, and they and the empty path live until this returns.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                self.binary.as_raw_fd(),
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        io::Error::last_os_error()
    }

    /// Runs it as a child with a copy of those descriptors, and waits for its end.
    ///
    /// # Errors
    /// It did not end with status 0 in time, or can't be run.
    pub fn try_out(&self, within: Duration) -> io::Result<()> {
        let (argv, envp) = (pointers(&self.arguments), pointers(&self.environment));
        // SAFETY: the child makes two system calls on values made before, and neither allocates
        // nor unwinds.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            // SAFETY: as in `replace_this`; _exit never returns.
            unsafe {
                libc::syscall(
                    libc::SYS_execveat,
                    self.binary.as_raw_fd(),
                    c"".as_ptr(),
                    argv.as_ptr(),
                    envp.as_ptr(),
                    libc::AT_EMPTY_PATH,
                );
                libc::_exit(127)
            }
        }
        let pidfd = open_pidfd(pid)?;
        if !happens_within(pidfd.as_fd(), within) {
            send_signal(pidfd.as_fd(), libc::SIGKILL)?;
        }
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, code) => Err(io::Error::other(format!("exit status {code}"))),
            WaitStatus::Signaled(_, signal, _) => {
                Err(io::Error::other(format!("killed by {signal}")))
            }
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

/// Says whether a descriptor is closed on exec.
///
/// # Errors
/// It is not open.
pub fn close_on_exec(fd: BorrowedFd<'_>, closed: bool) -> io::Result<()> {
    let mut flags = FdFlag::empty();
    flags.set(FdFlag::FD_CLOEXEC, closed);
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(())
}

/// The descriptors that the process before this one left open, by number.
#[derive(Debug, Default)]
pub struct Inherited {
    adopted: BTreeMap<RawFd, Rc<OwnedFd>>,
}

impl Inherited {
    /// The descriptor of a number, closed on exec from now on. A number that is asked for again is
    /// the same descriptor.
    ///
    /// # Errors
    /// It is not open, or one that every process has.
    pub fn shared(&mut self, number: RawFd) -> io::Result<Rc<OwnedFd>> {
        if let Some(fd) = self.adopted.get(&number) {
            return Ok(Rc::clone(fd));
        }
        if number <= 2 {
            return Err(io::Error::other(format!(
                "descriptor {number} is none of these"
            )));
        }
        // SAFETY: fcntl on an integer; fails if the descriptor is not open.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is open, and the process before this one, which was this process, left it
        // open for this purpose; the map makes this its only owner.
        let fd = Rc::new(unsafe { OwnedFd::from_raw_fd(number) });
        self.adopted.insert(number, Rc::clone(&fd));
        Ok(fd)
    }

    /// A descriptor that nothing else has.
    ///
    /// # Errors
    /// As [`Self::shared`], or it was asked for before.
    pub fn owned(&mut self, number: RawFd) -> io::Result<OwnedFd> {
        let fd = self.shared(number)?;
        self.adopted.remove(&number);
        Rc::try_unwrap(fd)
            .map_err(|_| io::Error::other(format!("descriptor {number} is named twice")))
    }
}
