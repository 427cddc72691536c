//! What every process that rot starts does the same way: takes its two inherited
//! descriptors, writes its log to standard error, and locks itself in.
//!
//! UNSAFETY: taking ownership of the inherited descriptors (a contract with rot: nobody else in
//! the process owns the numbers [`ROT_FD`] and [`STORE_FD`]), and `prctl` calls on plain integers.
#![expect(unsafe_code, reason = "adopting the inherited descriptors; prctl")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::channel::Channel;
use crate::fd_store::{STORE_ENV, STORE_FD};

/// Number of the descriptor of the channel that a child inherits from rot.
pub const ROT_FD: RawFd = 3;

/// Environment variable that rot sets for its children: `1` when they inherited [`ROT_FD`].
pub const ROT_ENV: &str = "BULKHEAD_ROT";

/// Environment variable that rot sets for a candidate: a data plane that is to take over from one
/// that serves.
pub const CANDIDATE_ENV: &str = "BULKHEAD_CANDIDATE";

/// Did rot start this process beside the one that serves, to take over from it
/// ([`crate::rot`] has the steps)?
#[must_use]
pub fn is_candidate() -> bool {
    std::env::var_os(CANDIDATE_ENV).is_some_and(|v| v == "1")
}

/// Why a process can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Started by hand.
    #[error(
        "this program is started by bulkhead-rot, which gives it its channel; start that instead"
    )]
    NotAChild,
    /// The descriptor was taken before.
    #[error("the descriptor that rot passed was already taken")]
    Taken,
    /// A lock-down step failed.
    #[error("can't lock the process in ({step}): {source}")]
    Lockdown {
        /// Which.
        step: &'static str,
        /// With what.
        source: io::Error,
    },
}

/// The channel to rot. Succeeds once.
///
/// # Errors
/// [`StartError::NotAChild`] if rot did not start this process.
pub fn inherited_channel() -> Result<Channel, StartError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if std::env::var_os(ROT_ENV).is_none_or(|v| v != "1") {
        return Err(StartError::NotAChild);
    }
    adopt(ROT_FD, &TAKEN).map(Channel::from)
}

/// The socket of the descriptor store. Succeeds once.
pub(crate) fn inherited_store() -> Result<OwnedFd, StartError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if std::env::var_os(STORE_ENV).is_none() {
        return Err(StartError::NotAChild);
    }
    adopt(STORE_FD, &TAKEN)
}

/// Takes a descriptor that rot passed under a fixed number; `taken` is that number's alone.
fn adopt(number: RawFd, taken: &AtomicBool) -> Result<OwnedFd, StartError> {
    if taken.swap(true, Ordering::SeqCst) {
        return Err(StartError::Taken);
    }
    // SAFETY: fcntl on an integer; tells whether the descriptor is open. Closing on exec is set
    // because nothing this process might start is meant to have it.
    let rc = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if rc != 0 {
        return Err(StartError::NotAChild);
    }
    // SAFETY: rot passed this number for this purpose, and `taken` makes this the only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Log lines to standard error, `BULKHEAD_LOG` as the filter (`info` without it), each with the
/// process name. Standard error is inherited from rot.
pub fn init_logging(process: &'static str) {
    use tracing_subscriber::fmt::format::{Format, Writer};
    struct Prefixed(&'static str);
    impl tracing_subscriber::fmt::time::FormatTime for Prefixed {
        fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
            tracing_subscriber::fmt::time::SystemTime.format_time(w)?;
            write!(w, " {}", self.0)
        }
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("BULKHEAD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let format = Format::default()
        .with_timer(Prefixed(process))
        .with_target(false);
    // A second initialisation (tests) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .event_format(format)
        .try_init();
}

/// Not dumpable and no new privileges: no core file, no ptrace or `/proc/<pid>/mem` by the same
/// uid, and no set-uid way out.
///
/// # Errors
/// [`StartError::Lockdown`].
pub fn no_dump_no_privileges() -> Result<(), StartError> {
    prctl("PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, 0)?;
    prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Drops every capability of this thread but those named, for good.
///
/// # Errors
/// [`StartError::Lockdown`].
pub fn keep_capabilities(kept: &[Capability]) -> Result<(), StartError> {
    reduce_capabilities(kept).map_err(|e| StartError::Lockdown {
        step: "capabilities",
        source: io::Error::other(e),
    })
}

fn reduce_capabilities(kept: &[Capability]) -> Result<(), caps::errors::CapsError> {
    // Without CAP_SETPCAP the bounding set stays; without exec it has no effect.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    let kept: CapsHashSet = kept.iter().copied().collect();
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&kept).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

fn prctl(step: &'static str, option: libc::c_int, value: libc::c_ulong) -> Result<(), StartError> {
    // SAFETY: both options take plain integers; the unused arguments are zero as the kernel demands.
    let rc = unsafe { libc::prctl(option, value, 0, 0, 0) };
    if rc != 0 {
        return Err(StartError::Lockdown {
            step,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// `BPF_MAP_UPDATE_ELEM`: puts something into a map that the process has open.
const BPF_MAP_UPDATE: u64 = 2;
/// `BPF_OBJ_GET_INFO_BY_FD`: what something of bpf's is that the process has open.
const BPF_OBJECT_INFO: u64 = 15;

/// What AF_XDP sockets take, as exceptions from a filter that ends the process: of `socket` that family alone, of `bpf` what
/// is done with something that is open already.
///
/// # Errors
/// A rule that seccompiler does not take.
pub fn xdp_exceptions(
    other_family: Option<libc::c_int>,
) -> Result<[(i64, Vec<SeccompRule>); 2], seccompiler::BackendError> {
    let unlike = |number: u64| SeccompCondition::new(0, Dword, SeccompCmpOp::Ne, number);
    let families = [Some(libc::AF_XDP), other_family];
    let families = families.into_iter().flatten();
    let socket: Result<_, _> = families
        .map(|family| unlike(u64::from(family.unsigned_abs())))
        .collect();
    let bpf = vec![unlike(BPF_MAP_UPDATE)?, unlike(BPF_OBJECT_INFO)?];
    Ok([
        (libc::SYS_socket, vec![SeccompRule::new(socket?)?]),
        (libc::SYS_bpf, vec![SeccompRule::new(bpf)?]),
    ])
}

/// For agent and keyd: from now on, in this thread and those it starts, making sockets, executing,
/// attaching to processes, io_uring, namespaces, mounts and kernel modules end the process.
/// (The data plane has a filter of its own, an allow list.) `xdp`: it may still make AF_XDP sockets, which it can't bind
/// ([`xdp_exceptions`]).
///
/// # Errors
/// [`StartError::Lockdown`].
pub fn refuse_network_and_exec(xdp: bool) -> Result<(), StartError> {
    const DEADLY: &[libc::c_long] = &[
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
    ];
    let lockdown = |source: io::Error| StartError::Lockdown {
        step: "seccomp",
        source,
    };
    let always = DEADLY.iter();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.map(|&call| (call, Vec::new())).collect();
    if xdp {
        rules.extend(xdp_exceptions(None).map_err(|e| lockdown(io::Error::other(e)))?);
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    )
    .map_err(|e| lockdown(io::Error::other(e)))?;
    let program: BpfProgram = filter
        .try_into()
        .map_err(|e| lockdown(io::Error::other(e)))?;
    seccompiler::apply_filter(&program).map_err(|e| lockdown(io::Error::other(e)))
}
