//! The start of a rot that is executed in the place of another: everything is there already.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_protocol::rot::Role;
use nix::sys::stat::{Mode, umask};

use crate::arguments::Arguments;
use crate::binary::MeasuredBinary;
use crate::child::Child;
use crate::children::Children;
use crate::directories::Directory;
use crate::handoff::{Handoff, LeftChild, TRY_ENV};
use crate::listeners::Listeners;
use crate::lockdown;
use crate::programs::Loader;
use crate::replace::Inherited;
use crate::stores::Stores;
use crate::supervisor::{Own, Supervisor};
use crate::{RotError, failed, supervise, take_signals};

/// Runs on where the rot before this one left off, if there was one; gives how that ended. A try
/// ends here.
///
/// # Errors
/// It can't take over what was left. The rot before this one tried that out, so that it still is
/// what runs.
pub fn resume(arguments: &Arguments) -> Result<Option<Result<(), RotError>>, RotError> {
    let mut inherited = Inherited::default();
    let left = Handoff::inherited(&mut inherited).map_err(failed("read what rot left"))?;
    let Some(left) = left else {
        return Ok(None);
    };
    umask(Mode::from_bits_truncate(0o077));
    let run_dir = Directory::own(&arguments.run_dir)?;
    let supervisor = take_over(arguments, &run_dir, left, &mut inherited)?;
    if std::env::var_os(TRY_ENV).is_some() {
        // Without dropping anything: it is all another process's.
        std::process::exit(0);
    }
    lockdown::lock_in_again(!arguments.xdp.is_empty())?;
    tracing::info!("resumed: another rot was executed in the place of the one before");
    Ok(Some(supervise(supervisor, &run_dir)))
}

fn take_over(
    arguments: &Arguments,
    run_dir: &Directory,
    left: Handoff,
    inherited: &mut Inherited,
) -> Result<Supervisor, RotError> {
    let io = failed("take over what rot left");
    let limits = lockdown::raise_limits().map_err(failed("raise the limits"))?;
    let loader = Loader::new(arguments.clone(), limits).map_err(failed("measure rot"))?;
    let mut child = |role| child(role, &loader, &left.children, inherited);
    let children = Children::new(
        child(Role::Keyd)?,
        child(Role::Dataplane)?,
        child(Role::Agent)?,
    );
    let directory = run_dir.own_inside("vhost")?;
    let listeners = Listeners::resumed(directory, left.listeners, inherited).map_err(&io)?;
    let stores = Stores::resumed(limits.files, left.stored, left.systemd, inherited);
    let own = Own {
        lock: inherited.owned(left.lock).map_err(&io)?,
        admin: Rc::new(inherited.owned(left.admin).map_err(&io)?),
        signals: take_signals()?,
    };
    let stores = stores.map_err(&io)?;
    let mut supervisor = Supervisor::new(children, loader, listeners, stores, own);
    supervisor.goes_on(left.runs, left.failed, left.request_id);
    Ok(supervisor)
}

fn child(
    role: Role,
    loader: &Loader,
    left: &[LeftChild],
    inherited: &mut Inherited,
) -> Result<Child, RotError> {
    let io = failed("take over a child");
    let left = left.iter().find(|left| left.role == role);
    let left = left.ok_or_else(|| io(io::Error::other(format!("{role} was not left"))))?;
    let binary = inherited.owned(left.binary).map_err(&io)?;
    let binary = MeasuredBinary::adopt(binary).map_err(&io)?;
    let program = loader.with_binary(role, binary)?;
    Child::resumed(program, left, inherited, Instant::now()).map_err(&io)
}
