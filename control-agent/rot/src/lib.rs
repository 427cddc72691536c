//! The root of trust: measures, starts, connects and restarts the other processes.
//!
//! One thread, one loop ([`supervisor`]). It reads its command line and fixed messages, nothing
//! else: no configuration, no network, no memory of a guest. In the order of a start:
//! [`upstream`] (what systemd stored) -> [`directories`] -> [`listeners`] -> [`programs`]
//! ([`binary`]: a sealed, measured copy) -> [`lockdown`] -> [`supervisor`], which starts each
//! [`child`] through [`execute`] with what it had in its [`stores`].
//!
//! An upgrade of rot executes the new binary in the place of the old ([`replace`]): same process, same
//! children, and [`handoff`] says which descriptor is what ([`mod@resume`]).

pub mod arguments;
pub mod backoff;
pub mod binary;
pub mod child;
pub mod children;
pub mod directories;
pub mod execute;
pub mod handoff;
pub mod inherited;
mod interfaces;
pub mod link;
pub mod listeners;
pub mod lockdown;
pub mod programs;
pub mod replace;
pub mod resume;
pub mod same_file;
pub mod socket_file;
pub mod stores;
pub mod supervisor;
pub mod upstream;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_protocol::process::StartError;
use bulkhead_protocol::rot::Role;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::SockType;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getegid, geteuid};

pub use arguments::Arguments;
use child::Child;
use children::Children;
use directories::{Directory, DirectoryError};
use listeners::Listeners;
use programs::{Loader, ProgramError};
use socket_file::{Access, SocketFileError, listen_at, remove_socket};
use stores::Stores;
use supervisor::{Own, Supervisor};

/// File name of the operator's socket in the run directory.
pub const ADMIN_SOCKET: &str = "admin.sock";

/// Why rot does not run.
#[derive(Debug, thiserror::Error)]
pub enum RotError {
    /// A directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A binary or its command line.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The admin socket.
    #[error("admin socket: {0}")]
    AdminSocket(SocketFileError),
    /// Locking rot in.
    #[error(transparent)]
    Lockdown(#[from] StartError),
    /// The command line asks for what only root can do.
    #[error("{0} needs root: start rot as root, or leave it out")]
    NeedsRoot(&'static str),
    /// Any other system call.
    #[error("can't {step}: {source}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// With what it failed.
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> RotError {
    move |source| RotError::Io {
        step,
        source: source.into(),
    }
}

/// Runs until SIGTERM, SIGINT or SIGHUP has ended every child.
///
/// # Errors
/// See [`RotError`]; no child runs then for longer than rot.
pub fn run(arguments: Arguments) -> Result<(), RotError> {
    if let Some(ended) = resume::resume(&arguments)? {
        return ended;
    }
    let systemd = upstream::found::from_environment().map_err(failed("use systemd's store"))?;
    let arguments = arguments
        .with_absolute_paths()
        .map_err(failed("make the paths absolute"))?;
    check_users(&arguments)?;
    umask(Mode::from_bits_truncate(0o077));
    let signals = take_signals()?;
    let run_dir = Directory::own(&arguments.run_dir)?;
    let lock = run_dir.lock()?;
    let limits = lockdown::raise_limits().map_err(failed("raise the limits"))?;
    let loader = Loader::new(arguments.clone(), limits).map_err(failed("measure rot"))?;
    let children = load_programs(&loader)?;
    make_state(&arguments)?;
    let listeners = Listeners::new(run_dir.own_inside("vhost")?)
        .map_err(failed("clear the directory of the vhost-user sockets"))?;
    let admin = admin_socket(&run_dir, &arguments)?;
    std::env::set_current_dir("/").map_err(failed("leave the working directory"))?;
    warn_of_weaker_separation(&arguments, limits.memory_unlimited);
    let (upstream, found) = systemd.unzip();
    let mut stores = Stores::new(limits.files, upstream, found.unwrap_or_default());
    interfaces::prepare(&arguments.xdp, &mut stores);
    lockdown::lock_in(!arguments.xdp.is_empty())?;
    let own = Own {
        lock: lock.into(),
        admin: Rc::new(admin),
        signals,
    };
    let supervisor = Supervisor::new(children, loader, listeners, stores, own);
    supervise(supervisor, &run_dir)
}

fn supervise(mut supervisor: Supervisor, run_dir: &Directory) -> Result<(), RotError> {
    let ended = supervisor.run().map_err(failed("supervise the children"));
    remove_socket(run_dir, ADMIN_SOCKET).map_err(RotError::AdminSocket)?;
    ended
}

/// Without root a child can't be given another user, nor a socket another owner.
fn check_users(arguments: &Arguments) -> Result<(), RotError> {
    let own = geteuid();
    let other = |uid: Option<u32>| uid.is_some_and(|uid| uid != own.as_raw());
    let asked = [
        (arguments.keyd_uid, "--keyd-uid"),
        (arguments.agent_uid, "--agent-uid"),
        (arguments.dataplane_uid, "--dataplane-uid"),
        (arguments.admin_uid, "--admin-uid"),
    ];
    match asked.into_iter().find(|(uid, _)| other(*uid)) {
        Some((_, option)) if !own.is_root() => Err(RotError::NeedsRoot(option)),
        _ => Ok(()),
    }
}

/// One line if the children are kept apart by their sandboxes alone.
fn warn_of_weaker_separation(arguments: &Arguments, memory_unlimited: bool) {
    let own = geteuid();
    let children = Role::ALL.map(|role| arguments.uid(role).unwrap_or(own.as_raw()));
    let distinct: BTreeSet<u32> = children.into_iter().chain([own.as_raw()]).collect();
    if distinct.len() > children.len() {
        return;
    }
    let root = if own.is_root() { "" } else { " (as root)" };
    let memory = if memory_unlimited || lockdown::holds(caps::Capability::CAP_IPC_LOCK) {
        ""
    } else {
        "; the locked-memory limit stays as it is, raise it with ulimit -l if a volume is refused"
    };
    tracing::warn!(
        "rot and its children share user ids, so that only their sandboxes keep them apart: \
         give each its own with --keyd-uid, --agent-uid and --dataplane-uid{root}{memory}"
    );
}

/// The signals that end rot, to be read from a descriptor. Children get an empty mask.
fn take_signals() -> Result<SignalFd, RotError> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().map_err(failed("block signals"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(failed("make a signalfd"))
}

fn load_programs(loader: &Loader) -> Result<Children, RotError> {
    let now = Instant::now();
    let load = |role| -> Result<Child, RotError> { Ok(Child::new(loader.load(role)?, now)) };
    Ok(Children::new(
        load(Role::Keyd)?,
        load(Role::Dataplane)?,
        load(Role::Agent)?,
    ))
}

fn make_state(arguments: &Arguments) -> Result<(), RotError> {
    let state = Directory::own(&arguments.state_dir)?;
    for role in [Role::Keyd, Role::Agent] {
        let uid = arguments.uid(role).unwrap_or(geteuid().as_raw());
        state.child_inside(role.name(), uid)?;
    }
    Ok(())
}

fn admin_socket(run_dir: &Directory, arguments: &Arguments) -> Result<OwnedFd, RotError> {
    let access = Access {
        uid: arguments.admin_uid.unwrap_or(geteuid().as_raw()),
        gid: getegid().as_raw(),
        mode: 0o600,
    };
    remove_socket(run_dir, ADMIN_SOCKET).map_err(RotError::AdminSocket)?;
    listen_at(run_dir, ADMIN_SOCKET, SockType::SeqPacket, access).map_err(RotError::AdminSocket)
}
