//! The system calls that a thread may make once it is locked in, each with who needs it. Any other ends
//! the process.
//!
//! Threads share memory and descriptors: a list says what broken code in that thread can ask the kernel
//! for, not which of the process's descriptors it can reach.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::vhost_user::inflight_flags;
use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::ThreadKind;

/// Rules by call; none: whatever the arguments.
pub type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u64 = 6;
/// `IORING_REGISTER_BUFFERS_UPDATE`.
const REGISTER_BUFFERS_UPDATE: u64 = 16;
/// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: u64 = 0x8008_1272;
/// `BLKIOMIN`, `BLKIOOPT`, `BLKALIGNOFF` and `BLKPBSZGET`: `_IO(0x12, 120)` and those behind it.
const BLOCK_DEVICE_TOPOLOGY: [u64; 4] = [0x1278, 0x1279, 0x127a, 0x127b];

/// Both kinds, whatever the arguments.
const BOTH: [c_long; 17] = [
    libc::SYS_write, // the log; eventfds: wake-ups of workers, calls of drivers
    libc::SYS_close, // descriptors of frontends; a volume's file, by whoever drops it last
    // Allocator: the heap, large blocks and their growth.
    libc::SYS_brk,
    libc::SYS_munmap, // also guest memory, by whoever drops it last
    libc::SYS_mremap,
    // Locks and channels.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall, // a wait that a stop and continue interrupted
    libc::SYS_clock_gettime,   // where the vDSO can't tell the time
    libc::SYS_getrandom,       // hash maps' keys
    // Signals: back from the SIGBUS handler; masked while a thread ends or the process aborts.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack, // taken down when a thread ends
    libc::SYS_getpid,      // abort
    libc::SYS_gettid,
    libc::SYS_exit, // the end of a thread, of the process
    libc::SYS_exit_group,
];

/// The control thread alone, whatever the arguments.
const CONTROL: [c_long; 13] = [
    libc::SYS_read, // eventfds: the event loop's and that of the workers' answers
    // The event loop.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    // Channels and frontends.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    // What a descriptor from a peer is.
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_pread64,   // the trial read of a volume
    libc::SYS_pwrite64,  // a volume's state, for the next process
    libc::SYS_mlock,     // a key's page that is not memfd_secret
    libc::SYS_ftruncate, // the length of an in-flight region, of an AF_XDP port's memory
    libc::SYS_flock,     // whose a volume is
];

/// What a thread of this kind may call.
///
/// # Errors
/// A rule that seccompiler does not take.
pub fn allowed(kind: ThreadKind) -> Result<Calls, BackendError> {
    let mut calls: Calls = BOTH.iter().map(|&call| (call, Vec::new())).collect();
    calls.extend(restricted()?);
    match kind {
        ThreadKind::Worker => {
            calls.insert(libc::SYS_io_uring_enter, Vec::new());
            // Volumes that lie in memory. By position only: no socket, pipe or eventfd takes these.
            calls.insert(libc::SYS_preadv, Vec::new());
            calls.insert(libc::SYS_pwritev, Vec::new());
            // Volumes and kicks come and go; a ring's restrictions say the same.
            calls.insert(
                libc::SYS_io_uring_register,
                vec![
                    one_of(1, REGISTER_FILES_UPDATE)?,
                    one_of(1, REGISTER_BUFFERS_UPDATE)?, // staging memory, as it is wanted
                ],
            );
            // The SIGBUS handler and the allocator; no file.
            let anonymous = masked(3, libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS)?;
            let map = SeccompRule::new(vec![not_executable()?, anonymous])?;
            calls.insert(libc::SYS_mmap, vec![map]);
        }
        ThreadKind::Control => {
            calls.extend(CONTROL.iter().map(|&call| (call, Vec::new())));
            calls.extend(restricted_control()?);
        }
    }
    Ok(calls)
}

/// Both kinds, with some arguments only.
fn restricted() -> Result<Calls, BackendError> {
    Ok(BTreeMap::from([
        // The allocator makes more of an arena usable. Never executable.
        (
            libc::SYS_mprotect,
            vec![SeccompRule::new(vec![not_executable()?])?],
        ),
        (
            libc::SYS_madvise,
            vec![
                one_of(2, number(libc::MADV_DONTNEED))?, // allocator; a thread's stack at its end
                one_of(2, number(libc::MADV_FREE))?,
                one_of(2, number(libc::MADV_POPULATE_WRITE))?, // staging memory in reserved pages
                one_of(2, number(libc::MADV_DONTDUMP))?, // a key's page that is not memfd_secret
            ],
        ),
        // A fault that is not guest memory's gets its default action back and ends the process.
        (
            libc::SYS_rt_sigaction,
            vec![
                one_of(0, number(libc::SIGBUS))?,
                one_of(0, number(libc::SIGSEGV))?,
                one_of(0, number(libc::SIGABRT))?,
            ],
        ),
        // abort, and nobody else's end.
        (
            libc::SYS_tgkill,
            vec![SeccompRule::new(vec![
                equals(0, u64::from(std::process::id()))?,
                equals(2, number(libc::SIGABRT))?,
            ])?],
        ),
        (libc::SYS_fcntl, fcntl()?),
    ]))
}

/// Descriptor flags can be read; status flags also set, for O_NONBLOCK and O_DIRECT.
fn fcntl() -> Result<Vec<SeccompRule>, BackendError> {
    [
        libc::F_GETFD, // the standard library, before it closes
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_GET_SEALS, // of a key's page that is not memfd_secret
        libc::F_ADD_SEALS, // of an in-flight region
    ]
    .into_iter()
    .map(|command| one_of(1, number(command)))
    .collect()
}

/// Sizes of a block device; the standard library makes a socket non-blocking with FIONBIO.
fn ioctl() -> Result<Vec<SeccompRule>, BackendError> {
    [BLKGETSIZE64, libc::FIONBIO]
        .into_iter()
        .chain(BLOCK_DEVICE_TOPOLOGY)
        .map(|command| one_of(1, command))
        .collect()
}

/// The control thread alone, with some arguments only.
fn restricted_control() -> Result<Calls, BackendError> {
    let by_descriptor = |flags: u8| masked(flags, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH);
    Ok(BTreeMap::from([
        // Guest memory, key pages, the allocator. Never executable.
        (
            libc::SYS_mmap,
            vec![SeccompRule::new(vec![not_executable()?])?],
        ),
        // Another fence, when no other process goes on after this one had stopped for it.
        (
            libc::SYS_pipe2,
            vec![one_of(1, number(libc::O_CLOEXEC | libc::O_NONBLOCK))?],
        ),
        // An in-flight region, an AF_XDP port's memory. Nothing is ever executed.
        (
            libc::SYS_memfd_create,
            vec![one_of(1, u64::from(inflight_flags().bits()))?],
        ),
        // Who a frontend is; how much of its first message is left.
        (
            libc::SYS_getsockopt,
            vec![
                socket_option(libc::SO_PEERCRED)?,
                socket_option(libc::SO_PEEK_OFF)?,
                xdp_option(libc::XDP_MMAP_OFFSETS)?,
                xdp_option(libc::XDP_OPTIONS)?,
            ],
        ),
        // Where a frontend's messages are looked at; memory and rings of an AF_XDP socket.
        (
            libc::SYS_setsockopt,
            vec![
                socket_option(libc::SO_PEEK_OFF)?,
                xdp_option(libc::XDP_UMEM_REG)?,
                xdp_option(libc::XDP_UMEM_FILL_RING)?,
                xdp_option(libc::XDP_UMEM_COMPLETION_RING)?,
                xdp_option(libc::XDP_TX_RING)?,
            ],
        ),
        // Such a socket to its queue. A filter can't see the address, only that it is as long as that of an AF_XDP
        // socket. The other sockets here are connections and listeners of frontends, and channels, all unix ones:
        // the name that one of those could get leads nobody anywhere, because nothing here may listen.
        (
            libc::SYS_bind,
            vec![one_of(2, size_of::<libc::sockaddr_xdp>() as u64)?],
        ),
        // `send`: replies to frontends, to no address but the socket's peer.
        (
            libc::SYS_sendto,
            vec![SeccompRule::new(vec![SeccompCondition::new(
                4,
                SeccompCmpArgLen::Qword,
                SeccompCmpOp::Eq,
                0,
            )?])?],
        ),
        (libc::SYS_ioctl, ioctl()?),
        // fstat, as some C libraries make it, and the alignment of a volume.
        (
            libc::SYS_newfstatat,
            vec![SeccompRule::new(vec![by_descriptor(3)?])?],
        ),
        (
            libc::SYS_statx,
            vec![SeccompRule::new(vec![by_descriptor(2)?])?],
        ),
    ]))
}

fn one_of(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![equals(argument, value)?])
}

/// An option of sockets of any kind.
fn socket_option(option: i32) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![
        equals(1, number(libc::SOL_SOCKET))?,
        equals(2, number(option))?,
    ])
}

/// An option of AF_XDP sockets.
fn xdp_option(option: i32) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![
        equals(1, number(libc::SOL_XDP))?,
        equals(2, number(option))?,
    ])
}

/// The kernel takes these arguments as 32 bits.
fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: i32, value: i32) -> Result<SeccompCondition, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(number(mask));
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, number(value))
}

/// The protection of mmap and mprotect, argument 2 of both.
fn not_executable() -> Result<SeccompCondition, BackendError> {
    masked(2, libc::PROT_EXEC, 0)
}

/// A constant of the C library, none of which is negative.
fn number(constant: i32) -> u64 {
    u64::from(constant.unsigned_abs())
}
