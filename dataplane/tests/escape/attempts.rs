//! The attempts, and how a process makes one.
//!
//! UNSAFETY: system calls are made with arguments that name no memory (or fresh memory), in processes
//! that end right after; a fork's child runs nothing but the closure, in a process that had one thread.
#![expect(unsafe_code, reason = "system calls by number; fork")]

use bulkhead_dataplane::sandbox::ThreadKind;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Which threads an attempt concerns: a call that the other kind makes with such arguments is no
/// escape there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    Both,
    Worker,
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
        self.only == Only::Both || kind == ThreadKind::Worker
    }
}

const fn both(name: &'static str, number: i64, arguments: [i64; 6]) -> Attempt {
    Attempt {
        name,
        number,
        arguments,
        only: Only::Both,
    }
}

const fn worker(name: &'static str, number: i64, arguments: [i64; 6]) -> Attempt {
    Attempt {
        only: Only::Worker,
        ..both(name, number, arguments)
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
    both("open", libc::SYS_open, NONE),
    both("socket", libc::SYS_socket, INET),
    both("connect", libc::SYS_connect, NONE),
    both("execve", libc::SYS_execve, NONE),
    // Files.
    both("openat", libc::SYS_openat, [AT_CWD, 0, 0, 0, 0, 0]),
    both("openat2", libc::SYS_openat2, [AT_CWD, 0, 0, 24, 0, 0]),
    both("creat", libc::SYS_creat, NONE),
    both("open_by_handle_at", libc::SYS_open_by_handle_at, NONE),
    both("unlink", libc::SYS_unlink, NONE),
    both(
        "stat_by_path",
        libc::SYS_newfstatat,
        [AT_CWD, 0, 0, 0, 0, 0],
    ),
    both("statx_by_path", libc::SYS_statx, [AT_CWD, 0, 0, 0, 0, 0]),
    worker("truncate", libc::SYS_ftruncate, [3, 0, 0, 0, 0, 0]),
    both("memfd_create", libc::SYS_memfd_create, NONE),
    // Sockets.
    both("socket_unix", libc::SYS_socket, UNIX),
    both("socketpair", libc::SYS_socketpair, UNIX),
    both("bind", libc::SYS_bind, NONE),
    both("listen", libc::SYS_listen, NONE),
    both("setsockopt", libc::SYS_setsockopt, NONE),
    both("send_to_address", libc::SYS_sendto, [3, 0, 0, 0, 4096, 16]),
    // Programs and processes.
    both("execveat", libc::SYS_execveat, NONE),
    both("fork", libc::SYS_fork, NONE),
    both("vfork", libc::SYS_vfork, NONE),
    both("clone", libc::SYS_clone, NONE),
    both("clone3", libc::SYS_clone3, NONE),
    both("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    both(
        "tgkill_other_process",
        libc::SYS_tgkill,
        [1, 1, libc::SIGABRT as i64, 0, 0, 0],
    ),
    both("pidfd_send_signal", libc::SYS_pidfd_send_signal, NONE),
    // Other processes' memory and descriptors.
    both("ptrace", libc::SYS_ptrace, NONE),
    both("process_vm_readv", libc::SYS_process_vm_readv, NONE),
    both("process_vm_writev", libc::SYS_process_vm_writev, NONE),
    both("pidfd_open", libc::SYS_pidfd_open, NONE),
    both("pidfd_getfd", libc::SYS_pidfd_getfd, NONE),
    both("userfaultfd", libc::SYS_userfaultfd, NONE),
    // Rings: no other, and no change of one.
    both(
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [8, 0, 0, 0, 0, 0],
    ),
    // IORING_REGISTER_RESTRICTIONS (11), IORING_REGISTER_BUFFERS (0).
    both(
        "io_uring_restrictions",
        libc::SYS_io_uring_register,
        [3, 11, 0, 0, 0, 0],
    ),
    both(
        "io_uring_buffers",
        libc::SYS_io_uring_register,
        [3, 0, 0, 0, 0, 0],
    ),
    // Code.
    both(
        "mmap_executable",
        libc::SYS_mmap,
        [0, 4096, EXECUTABLE, PRIVATE, -1, 0],
    ),
    both(
        "mprotect_executable",
        libc::SYS_mprotect,
        [0, 4096, EXECUTABLE, 0, 0, 0],
    ),
    both(
        "pkey_mprotect",
        libc::SYS_pkey_mprotect,
        [0, 4096, EXECUTABLE, 0, 0, 0],
    ),
    both("shmat", libc::SYS_shmat, NONE),
    both("remap_file_pages", libc::SYS_remap_file_pages, NONE),
    both(
        "personality",
        libc::SYS_personality,
        [0x0040_0000, 0, 0, 0, 0, 0],
    ),
    // The kernel.
    both("bpf", libc::SYS_bpf, NONE),
    both("perf_event_open", libc::SYS_perf_event_open, NONE),
    both("mount", libc::SYS_mount, NONE),
    both("unshare", libc::SYS_unshare, NONE),
    both("setns", libc::SYS_setns, NONE),
    both("chroot", libc::SYS_chroot, NONE),
    both("init_module", libc::SYS_init_module, NONE),
    both("keyctl", libc::SYS_keyctl, NONE),
    both("prctl", libc::SYS_prctl, NONE),
    both("seccomp", libc::SYS_seccomp, NONE),
    both("setuid", libc::SYS_setuid, NONE),
    both("capset", libc::SYS_capset, NONE),
    both("setrlimit", libc::SYS_setrlimit, NONE),
    both("prlimit", libc::SYS_prlimit64, NONE),
    both(
        "fcntl_owner",
        libc::SYS_fcntl,
        [0, libc::F_SETOWN as i64, 1, 0, 0, 0],
    ),
    both(
        "ioctl_terminal",
        libc::SYS_ioctl,
        [0, libc::TIOCSTI as i64, 0, 0, 0, 0],
    ),
    both(
        "madvise_hwpoison",
        libc::SYS_madvise,
        [0, 4096, 100, 0, 0, 0],
    ),
    both(
        "sigaction_sigsys",
        libc::SYS_rt_sigaction,
        [31, 0, 0, 8, 0, 0],
    ),
    // What only the control thread does.
    worker(
        "mmap_file",
        libc::SYS_mmap,
        [0, 4096, 1, libc::MAP_SHARED as i64, 3, 0],
    ),
    worker("recvmsg", libc::SYS_recvmsg, NONE),
    worker("sendmsg", libc::SYS_sendmsg, NONE),
    worker("accept4", libc::SYS_accept4, NONE),
    worker("read", libc::SYS_read, NONE),
    worker("pread", libc::SYS_pread64, NONE),
    // Without a position they read sockets too.
    both("readv", libc::SYS_readv, NONE),
    both("preadv2", libc::SYS_preadv2, NONE),
    both("pwritev2", libc::SYS_pwritev2, NONE),
    worker("epoll_ctl", libc::SYS_epoll_ctl, NONE),
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
