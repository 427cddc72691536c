//! The attempts, and how a process makes one.
//!
//! UNSAFETY: system calls are made with arguments that name no memory (or fresh memory), in processes
//! that end right after; a fork's child runs nothing but the closure, in a process that had one thread.
#![expect(unsafe_code, reason = "system calls by number; fork")]

use bulkhead_dataplane::sandbox::ThreadKind;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Which threads an attempt concerns: a call that the others make with such arguments is no
/// escape there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    All,
    /// All but the control thread.
    Rings,
}

/// A system call that must be deadly.
#[derive(Debug)]
pub struct Attempt {
    pub name: &'static str,
    pub number: i64,
    pub arguments: [i64; 6],
    only: Only,
}

impl Attempt {
    pub fn concerns(&self, kind: ThreadKind) -> bool {
        self.only == Only::All || kind != ThreadKind::Control
    }
}

const fn all(name: &'static str, number: i64, arguments: [i64; 6]) -> Attempt {
    Attempt {
        name,
        number,
        arguments,
        only: Only::All,
    }
}

const fn rings(name: &'static str, number: i64, arguments: [i64; 6]) -> Attempt {
    Attempt {
        only: Only::Rings,
        ..all(name, number, arguments)
    }
}

const NONE: [i64; 6] = [0; 6];
const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
const EXECUTABLE: i64 = (libc::PROT_READ | libc::PROT_EXEC) as i64;
const AT_CWD: i64 = libc::AT_FDCWD as i64;
const INET: [i64; 6] = [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0, 0, 0, 0];
const UNIX: [i64; 6] = [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0, 0, 0, 0];

/// All of them. The first four are what the product promises by name.
pub const ATTEMPTS: &[Attempt] = &[
    all("open", libc::SYS_open, NONE),
    all("socket", libc::SYS_socket, INET),
    all("connect", libc::SYS_connect, NONE),
    all("execve", libc::SYS_execve, NONE),
    // Files.
    all("openat", libc::SYS_openat, [AT_CWD, 0, 0, 0, 0, 0]),
    all("openat2", libc::SYS_openat2, [AT_CWD, 0, 0, 24, 0, 0]),
    all("creat", libc::SYS_creat, NONE),
    all("open_by_handle_at", libc::SYS_open_by_handle_at, NONE),
    all("unlink", libc::SYS_unlink, NONE),
    all(
        "stat_by_path",
        libc::SYS_newfstatat,
        [AT_CWD, 0, 0, 0, 0, 0],
    ),
    all("statx_by_path", libc::SYS_statx, [AT_CWD, 0, 0, 0, 0, 0]),
    rings("truncate", libc::SYS_ftruncate, [3, 0, 0, 0, 0, 0]),
    all("memfd_create", libc::SYS_memfd_create, NONE),
    // Sockets.
    all("socket_unix", libc::SYS_socket, UNIX),
    all("socketpair", libc::SYS_socketpair, UNIX),
    all("bind", libc::SYS_bind, NONE),
    all("listen", libc::SYS_listen, NONE),
    all("setsockopt", libc::SYS_setsockopt, NONE),
    all("send_to_address", libc::SYS_sendto, [3, 0, 0, 0, 4096, 16]),
    // Programs and processes.
    all("execveat", libc::SYS_execveat, NONE),
    all("fork", libc::SYS_fork, NONE),
    all("vfork", libc::SYS_vfork, NONE),
    all("clone", libc::SYS_clone, NONE),
    all("clone3", libc::SYS_clone3, NONE),
    all("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    all(
        "tgkill_other_process",
        libc::SYS_tgkill,
        [1, 1, libc::SIGABRT as i64, 0, 0, 0],
    ),
    all("pidfd_send_signal", libc::SYS_pidfd_send_signal, NONE),
    // Other processes' memory and descriptors.
    all("ptrace", libc::SYS_ptrace, NONE),
    all("process_vm_readv", libc::SYS_process_vm_readv, NONE),
    all("process_vm_writev", libc::SYS_process_vm_writev, NONE),
    all("pidfd_open", libc::SYS_pidfd_open, NONE),
    all("pidfd_getfd", libc::SYS_pidfd_getfd, NONE),
    all("userfaultfd", libc::SYS_userfaultfd, NONE),
    // Rings: no other, and no change of one.
    all(
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [8, 0, 0, 0, 0, 0],
    ),
    // IORING_REGISTER_RESTRICTIONS (11), IORING_REGISTER_BUFFERS (0).
    all(
        "io_uring_restrictions",
        libc::SYS_io_uring_register,
        [3, 11, 0, 0, 0, 0],
    ),
    all(
        "io_uring_buffers",
        libc::SYS_io_uring_register,
        [3, 0, 0, 0, 0, 0],
    ),
    // Code.
    all(
        "mmap_executable",
        libc::SYS_mmap,
        [0, 4096, EXECUTABLE, PRIVATE, -1, 0],
    ),
    all(
        "mprotect_executable",
        libc::SYS_mprotect,
        [0, 4096, EXECUTABLE, 0, 0, 0],
    ),
    all(
        "pkey_mprotect",
        libc::SYS_pkey_mprotect,
        [0, 4096, EXECUTABLE, 0, 0, 0],
    ),
    all("shmat", libc::SYS_shmat, NONE),
    all("remap_file_pages", libc::SYS_remap_file_pages, NONE),
    all(
        "personality",
        libc::SYS_personality,
        [0x0040_0000, 0, 0, 0, 0, 0],
    ),
    // The kernel.
    all("bpf", libc::SYS_bpf, NONE),
    all("perf_event_open", libc::SYS_perf_event_open, NONE),
    all("mount", libc::SYS_mount, NONE),
    all("unshare", libc::SYS_unshare, NONE),
    all("setns", libc::SYS_setns, NONE),
    all("chroot", libc::SYS_chroot, NONE),
    all("init_module", libc::SYS_init_module, NONE),
    all("keyctl", libc::SYS_keyctl, NONE),
    all("prctl", libc::SYS_prctl, NONE),
    all("seccomp", libc::SYS_seccomp, NONE),
    all("setuid", libc::SYS_setuid, NONE),
    all("capset", libc::SYS_capset, NONE),
    all("setrlimit", libc::SYS_setrlimit, NONE),
    all("prlimit", libc::SYS_prlimit64, NONE),
    all(
        "fcntl_owner",
        libc::SYS_fcntl,
        [0, libc::F_SETOWN as i64, 1, 0, 0, 0],
    ),
    all(
        "ioctl_terminal",
        libc::SYS_ioctl,
        [0, libc::TIOCSTI as i64, 0, 0, 0, 0],
    ),
    all(
        "madvise_hwpoison",
        libc::SYS_madvise,
        [0, 4096, 100, 0, 0, 0],
    ),
    all(
        "sigaction_sigsys",
        libc::SYS_rt_sigaction,
        [31, 0, 0, 8, 0, 0],
    ),
    // What only the control thread does.
    rings(
        "mmap_file",
        libc::SYS_mmap,
        [0, 4096, 1, libc::MAP_SHARED as i64, 3, 0],
    ),
    rings("recvmsg", libc::SYS_recvmsg, NONE),
    rings("sendmsg", libc::SYS_sendmsg, NONE),
    rings("accept4", libc::SYS_accept4, NONE),
    rings("read", libc::SYS_read, NONE),
    rings("pread", libc::SYS_pread64, NONE),
    rings("epoll_ctl", libc::SYS_epoll_ctl, NONE),
];

/// Makes a system call.
pub fn call(number: i64, arguments: [i64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the arguments name no memory of this process but what the kernel makes anew.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// The signal that ends a process which does this.
pub fn signal_of_fork(f: impl FnOnce()) -> Option<i32> {
    // SAFETY: this process has one thread; the child ends without returning.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            f();
            // SAFETY: ends the process at once; nothing of the parent's is run.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).expect("wait") {
            WaitStatus::Signaled(_, signal, _) => Some(signal as i32),
            _ => None,
        },
    }
}
