//! How the data plane locks itself in before it serves.
//!
//! | step | bound to | takes away |
//! | --- | --- | --- |
//! | not dumpable, no core file | process | reading its memory from outside |
//! | no new privileges | thread, and those it starts | set-uid programs |
//! | empty Landlock ruleset | thread, and those it starts | every path, TCP, abstract sockets and signals to others |
//! | no capabilities | thread, and those it starts | what is left of being root |
//! | seccomp allow list ([`calls`]) | thread | every system call that serving does not need |
//!
//! seccomp doesn't see what an io_uring is asked for: each ring is restricted by itself
//! ([`crate::worker::ring`]), and `io_uring_setup` is refused afterwards.
//!
//! [`lock_process`] runs first, while there is one thread. It leaves CAP_IPC_LOCK, if the process has
//! it, so that workers can still make rings whose memory does not count as locked; each thread drops it
//! with [`lock_worker_thread`] or [`lock_control_thread`], when it has made what it needs.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod calls;
mod heap;

use std::io;

use bulkhead_protocol::process::{StartError, keep_capabilities, no_dump_no_privileges};
use caps::Capability;
use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Every right that this version of Landlock's interface knows; the kernel's own is the limit.
const LANDLOCK: ABI = ABI::V10;

/// A step of the lock-in that failed: the process must not serve.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Dumping, privileges or capabilities.
    #[error(transparent)]
    Process(#[from] StartError),
    /// The limit on core files.
    #[error("can't forbid core files: {0}")]
    CoreFile(#[source] io::Error),
    /// Landlock.
    #[error("can't enforce the Landlock ruleset: {0}")]
    Landlock(#[from] RulesetError),
    /// The filter can't be made.
    #[error("can't make the system call filter: {0}")]
    Filter(#[from] BackendError),
    /// The filter can't be put in place.
    #[error("can't put the system call filter in place: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// What a thread does, and so which system calls it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The one thread that talks to rot, keyd, the agent and the frontends.
    Control,
    /// A thread that owns a ring and queues.
    Worker,
}

/// Locks in what the process has as a whole, and everything that its threads inherit. To be called
/// once, before the first other thread starts.
///
/// # Errors
/// [`SandboxError`] names the step.
pub fn lock_process() -> Result<(), SandboxError> {
    no_dump_no_privileges()?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| SandboxError::CoreFile(e.into()))?;
    refuse_paths_and_network()?;
    keep_capabilities(&[Capability::CAP_IPC_LOCK])?;
    Ok(())
}

/// Locks a worker thread in, after it has made its ring. Nothing lifts it again.
///
/// # Errors
/// [`SandboxError`] names the step.
pub fn lock_worker_thread() -> Result<(), SandboxError> {
    lock_thread(ThreadKind::Worker)
}

/// Locks the control thread in, after it has made its event loop and started the workers. Nothing
/// lifts it again.
///
/// # Errors
/// [`SandboxError`] names the step.
pub fn lock_control_thread() -> Result<(), SandboxError> {
    lock_thread(ThreadKind::Control)
}

fn lock_thread(kind: ThreadKind) -> Result<(), SandboxError> {
    keep_capabilities(&[])?;
    heap::never_shrink();
    let filter = SeccompFilter::new(
        calls::allowed(kind)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}

/// A Landlock ruleset that handles everything and allows nothing.
fn refuse_paths_and_network() -> Result<(), SandboxError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!(
            "this kernel has no Landlock: only the system call filter keeps the data plane from paths"
        );
    }
    Ok(())
}
