//! What rot takes from itself, and so from every child, before it starts the first.
//!
//! It stays root where it was (it gives each child its uid), but with a handful of capabilities,
//! not dumpable, without new privileges, and behind a filter that ends the process at any socket
//! but a unix one and at calls that neither rot nor a child ever makes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::io;

use bulkhead_protocol::process::{StartError, no_dump_no_privileges, xdp_exceptions};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What rot needs to give uids, own socket files and end its children. A child with rot's own uid
/// can have no more: IPC_LOCK is for the data plane where the limit
/// on locked memory can't be lifted (under its own uid it keeps that one alone), SETPCAP lets a child
/// empty its bounding set.
const ALWAYS_KEPT: [Capability; 8] = [
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_KILL,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_SETPCAP,
];

/// What the agent needs to make AF_XDP sockets, if there are interfaces for these.
const KEPT_FOR_XDP: Capability = Capability::CAP_NET_RAW;

/// Calls that end the process: neither rot nor a child makes them.
const DEADLY: [libc::c_long; 20] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
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
    libc::SYS_kexec_file_load,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
];

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    step: &'static str,
) -> impl Fn(E) -> StartError {
    move |e| StartError::Lockdown {
        step,
        source: io::Error::other(e),
    }
}

/// Open files that 256 devices with 16 queues each ask for: what is stored of them (16,384), and in
/// the data plane as many again, the rings' own, and two more for each queue that has moved.
const WANTED_FILES: u64 = 65_536;

/// The limits that rot has and its children inherit.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open files.
    pub files: u64,
    /// Locked memory is without limit.
    pub memory_unlimited: bool,
}

/// Raises the limits: open files as far as allowed, locked memory without end. The latter takes
/// CAP_SYS_RESOURCE, which a container lacks.
///
/// # Errors
/// What `getrlimit` or the allowed `setrlimit` fails with.
pub fn raise_limits() -> io::Result<Limits> {
    let (_, most_files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = most_files.max(WANTED_FILES);
    let files = match setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted) {
        Ok(()) => wanted,
        Err(_) => {
            setrlimit(Resource::RLIMIT_NOFILE, most_files, most_files)?;
            most_files
        }
    };
    if files < WANTED_FILES {
        tracing::warn!(
            "the limit on open files is {files}: too low for 256 devices with 16 queues each, raise it to {WANTED_FILES} (LimitNOFILE=, ulimit -Hn)"
        );
    }
    Ok(Limits {
        files,
        memory_unlimited: setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok(),
    })
}

/// Does rot hold a capability, to leave it to a child?
#[must_use]
pub fn holds(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Permitted, capability).unwrap_or(false)
}

/// Locks rot in. `xdp`: the agent is to make AF_XDP sockets, for which CAP_NET_RAW stays and the filter has an exception.
///
/// # Errors
/// [`StartError::Lockdown`] names the step.
pub fn lock_in(xdp: bool) -> Result<(), StartError> {
    no_dump_no_privileges()?;
    reduce_capabilities(xdp).map_err(failed("capabilities"))?;
    let program = filter(xdp).map_err(failed("seccomp"))?;
    seccompiler::apply_filter(&program).map_err(failed("seccomp"))
}

/// Locks in a rot that was executed in the place of one that was: the filter is there already, and
/// another on top of it would only cost.
///
/// # Errors
/// [`StartError::Lockdown`] names the step.
pub fn lock_in_again(xdp: bool) -> Result<(), StartError> {
    no_dump_no_privileges()?;
    reduce_capabilities(xdp).map_err(failed("capabilities"))
}

fn reduce_capabilities(xdp: bool) -> Result<(), caps::errors::CapsError> {
    let for_xdp = xdp.then_some(KEPT_FOR_XDP);
    let kept: CapsHashSet = ALWAYS_KEPT.into_iter().chain(for_xdp).collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&kept).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

fn filter(xdp: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let unix = u64::from(libc::AF_UNIX.unsigned_abs());
    let other_domain = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, unix)?;
    let socket = vec![SeccompRule::new(vec![other_domain])?];
    let always = DEADLY.iter().map(|&call| (call, Vec::new()));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.chain([(libc::SYS_socket, socket)]).collect();
    if xdp {
        rules.extend(xdp_exceptions(Some(libc::AF_UNIX))?);
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    )?;
    filter.try_into()
}
