//! Starting a child from its measured memfd, with the descriptors, user and limits it is meant to have.
//!
//! UNSAFETY: between `fork` and `execveat` the child may call async-signal-safe functions only:
//! everything it needs (strings, pointer arrays, descriptors above the target numbers) is made
//! before the fork, and the child neither allocates nor unwinds.
#![expect(unsafe_code, reason = "fork and execveat")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use bulkhead_protocol::fd_store::STORE_FD;
use bulkhead_protocol::process::ROT_FD;
use caps::Capability;
use nix::fcntl::{FcntlArg, fcntl};

/// Descriptors are moved to here or above before the fork, clear of those the child gets.
const CLEAR_OF_TARGETS: RawFd = 10;

/// A child to start.
#[derive(Debug)]
pub struct Start<'a> {
    /// The sealed memfd of its binary.
    pub binary: BorrowedFd<'a>,
    /// Becomes descriptor [`ROT_FD`].
    pub channel: BorrowedFd<'a>,
    /// Becomes descriptor [`STORE_FD`].
    pub store: BorrowedFd<'a>,
    /// Its arguments, the name first.
    pub arguments: &'a [CString],
    /// Its whole environment, `NAME=value` each.
    pub environment: &'a [CString],
    /// User and group id to take, without supplementary groups; none keeps rot's own.
    pub uid: Option<u32>,
    /// The only capability that survives the change of user. rot must hold it.
    pub keeps: Option<Kept>,
}

/// A started child; not reaped when this drops.
#[derive(Debug)]
pub struct Child {
    /// Its process id, for people to read.
    pub pid: libc::pid_t,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
}

fn clear_of_targets(fd: impl AsFd) -> io::Result<OwnedFd> {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(CLEAR_OF_TARGETS))?;
    // SAFETY: F_DUPFD_CLOEXEC has just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let ends = std::iter::once(ptr::null());
    strings.iter().map(|s| s.as_ptr()).chain(ends).collect()
}

/// Everything the child touches between fork and exec.
struct Prepared {
    binary: OwnedFd,
    channel: OwnedFd,
    store: OwnedFd,
    null: OwnedFd,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    uid: Option<u32>,
    keeps: Option<Kept>,
    parent: libc::pid_t,
}

/// `cap_user_header_t` of capset(2).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

/// `cap_user_data_t` of capset(2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// A capability that a child keeps under its own user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// CAP_IPC_LOCK, for locked memory.
    IpcLock,
    /// CAP_NET_RAW, for AF_XDP sockets.
    NetRaw,
}

impl Kept {
    /// Which.
    #[must_use]
    pub fn capability(self) -> Capability {
        match self {
            Self::IpcLock => Capability::CAP_IPC_LOCK,
            Self::NetRaw => Capability::CAP_NET_RAW,
        }
    }
}

/// Forks and executes. The child ends with status 127 and one line on standard error if a step
/// before the exec fails.
///
/// # Errors
/// What `dup`, `fork` or `pidfd_open` fail with.
pub fn start(what: &Start<'_>) -> io::Result<Child> {
    let prepared = Prepared {
        binary: clear_of_targets(what.binary)?,
        channel: clear_of_targets(what.channel)?,
        store: clear_of_targets(what.store)?,
        null: clear_of_targets(File::open("/dev/null")?)?,
        argv: pointers(what.arguments),
        envp: pointers(what.environment),
        uid: what.uid,
        keeps: what.keeps,
        // SAFETY: getpid has no preconditions.
        parent: unsafe { libc::getpid() },
    };
    // SAFETY: the child calls run_child only, which keeps to async-signal-safe calls.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => run_child(&prepared),
        pid => Ok(Child {
            pid,
            pidfd: open_pidfd(pid)?,
        }),
    }
}

/// The child is ours and not reaped yet, so the number can't have been taken by another process. One of which there is no
/// pidfd is ended: nobody would ever hear of its end.
pub(crate) fn open_pidfd(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: plain integers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(raw) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => {
            let error = io::Error::last_os_error();
            // SAFETY: plain integers, and nobody wants to know how it ended.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, ptr::null_mut(), 0);
            }
            Err(error)
        }
    }
}

/// Sends a signal to the process of a pidfd, whatever its number has become.
///
/// # Errors
/// ESRCH if it has ended; EPERM without the right to.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let no_info = ptr::null::<libc::siginfo_t>();
    // SAFETY: a live descriptor and plain integers; a null siginfo means that of kill(2).
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn run_child(p: &Prepared) -> ! {
    let message = match to_exec(p) {
        Ok(never) => match never {},
        Err(step) => step,
    };
    // SAFETY: the message is a live static string, given with its length; _exit never returns.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.count_bytes());
        libc::_exit(127)
    }
}

fn check(rc: libc::c_int, step: &'static CStr) -> Result<(), &'static CStr> {
    if rc < 0 { Err(step) } else { Ok(()) }
}

fn to_exec(p: &Prepared) -> Result<std::convert::Infallible, &'static CStr> {
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: async-signal-safe calls on integers and on structs that live through the call. An
    // unprivileged rot can't raise the memlock limit; rot says so once at its start.
    unsafe {
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited);
        check(
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none),
            c"rot child: RLIMIT_CORE failed\n",
        )?;
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        check(
            libc::sigprocmask(libc::SIG_SETMASK, &raw const signals, ptr::null_mut()),
            c"rot child: sigprocmask failed\n",
        )?;
        check(
            libc::dup2(p.null.as_raw_fd(), 0),
            c"rot child: stdin failed\n",
        )?;
        check(
            libc::dup2(p.channel.as_raw_fd(), ROT_FD),
            c"rot child: channel failed\n",
        )?;
        check(
            libc::dup2(p.store.as_raw_fd(), STORE_FD),
            c"rot child: store failed\n",
        )?;
    }
    if let Some(uid) = p.uid {
        take_user(uid, p.keeps)?;
    }
    // After the change of uid, which clears it.
    // SAFETY: plain integers; the argument and environment arrays end with null and, like the
    // empty path, live until the exec replaces this process.
    unsafe {
        check(
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
            c"rot child: PDEATHSIG failed\n",
        )?;
        if libc::getppid() != p.parent {
            return Err(c"rot child: rot is gone\n");
        }
        let first = STORE_FD.unsigned_abs() + 1;
        if libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) != 0
        {
            return Err(c"rot child: close_range failed\n");
        }
        libc::syscall(
            libc::SYS_execveat,
            p.binary.as_raw_fd(),
            c"".as_ptr(),
            p.argv.as_ptr(),
            p.envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(c"rot child: execveat failed\n")
}

fn take_user(uid: u32, keeps: Option<Kept>) -> Result<(), &'static CStr> {
    // SAFETY: plain system calls on integers; the C library's wrappers would signal other threads,
    // of which this process has none.
    unsafe {
        if keeps.is_some() {
            check(
                libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0),
                c"rot child: KEEPCAPS failed\n",
            )?;
        }
        check(
            libc::setgroups(0, ptr::null()),
            c"rot child: setgroups failed\n",
        )?;
        check(
            libc::setresgid(uid, uid, uid),
            c"rot child: setresgid failed\n",
        )?;
        check(
            libc::setresuid(uid, uid, uid),
            c"rot child: setresuid failed\n",
        )?;
    }
    if let Some(kept) = keeps {
        keep_alone(kept)?;
    }
    Ok(())
}

/// Of what KEEPCAPS left permitted, one capability passes the exec, as an ambient one.
fn keep_alone(kept: Kept) -> Result<(), &'static CStr> {
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let number = libc::c_ulong::from(kept.capability().index());
    let bit = 1 << number;
    let low = CapabilitySets {
        effective: bit,
        permitted: bit,
        inheritable: bit,
    };
    let sets = [low, CapabilitySets::default()];
    // SAFETY: the header names the layout that `sets` has, and both live through the call; prctl
    // takes plain integers.
    unsafe {
        if libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) != 0 {
            return Err(c"rot child: capset failed\n");
        }
        check(
            libc::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE,
                number,
                0,
                0,
            ),
            c"rot child: PR_CAP_AMBIENT failed\n",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binary::MeasuredBinary;
    use nix::sys::wait::{WaitStatus, waitpid};

    /// Runs in the child that the test below starts from this same test binary.
    #[test]
    fn as_child() {
        if std::env::var("BULKHEAD_ROT").is_err() {
            return;
        }
        let dir = std::fs::read_dir("/proc/self/fd").unwrap();
        let open: Vec<String> = dir
            .map(|e| e.unwrap())
            .filter(|e| std::fs::read_link(e.path()).is_ok_and(|to| !to.ends_with("fd")))
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        assert_eq!(open.len(), 5, "{open:?}");
        if let Ok(uid) = std::env::var("EXPECTED_UID") {
            assert_eq!(nix::unistd::getuid().to_string(), uid);
            assert!(nix::unistd::getgroups().unwrap().is_empty());
        }
    }

    #[test]
    fn a_child_has_descriptors_0_to_4_and_its_own_uid() {
        let root = nix::unistd::getuid().is_root();
        let binary = MeasuredBinary::load(&std::env::current_exe().unwrap(), "t").unwrap();
        let (ours, theirs) = bulkhead_protocol::channel::Channel::pair().unwrap();
        let (keeper, store) = bulkhead_protocol::fd_store::Keeper::pair().unwrap();
        let mut environment = vec![c"BULKHEAD_ROT=1".to_owned()];
        if root {
            environment.push(c"EXPECTED_UID=64001".to_owned());
        }
        let child = start(&Start {
            binary: binary.as_fd(),
            channel: theirs.as_fd(),
            store: store.as_fd(),
            arguments: &[
                c"t".to_owned(),
                c"execute::tests::as_child".to_owned(),
                c"--exact".to_owned(),
            ],
            environment: &environment,
            uid: root.then_some(64001),
            keeps: None,
        })
        .unwrap();
        let ended = waitpid(nix::unistd::Pid::from_raw(child.pid), None).unwrap();
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
        drop((ours, keeper));
    }
}
