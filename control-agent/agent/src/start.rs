//! The start: everything is opened and checked, then the process locks itself in, says hello to
//! rot and serves.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use bulkhead_bundle::validate::check_host_name;
use bulkhead_bundle::{KeyError, TrustRoot};
use bulkhead_protocol::fd_store::{self, FdName};
use bulkhead_protocol::process::{self, StartError};
use bulkhead_protocol::rot::ToRot;

use crate::agent::{Agent, Host};
use crate::arguments::Arguments;
use crate::event_loop::{EventLoop, LoopError};
use crate::lockdown;
use crate::mirror_file::MirrorDirectory;
use crate::prepared;
use crate::store::{Store, StoreError};
use crate::volume_file::VolumeDirectories;

/// Why the agent can't start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// Not started by rot, or can't be locked in.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The name given is none.
    #[error("--host: {0}")]
    HostName(String),
    /// The trust root can't be read.
    #[error("the trust root: {0}")]
    Trust(#[from] KeyError),
    /// What was kept can't be used.
    #[error(transparent)]
    State(#[from] StoreError),
    /// A volume directory can't be opened.
    #[error("--volume-dir {0}")]
    VolumeDirectory(io::Error),
    /// The event loop.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

/// What rot stores for the agent.
fn stored() -> Vec<(FdName, OwnedFd)> {
    match fd_store::Store::inherited() {
        Ok(mut store) => store.taken(),
        Err(error) => {
            tracing::debug!("nothing is stored for the agent: {error}");
            Vec::new()
        }
    }
}

/// The directory for mirrors. One that can't be opened is named in the log, and everything but mirrors is served all the same.
fn mirror_directory(arguments: &Arguments) -> Option<MirrorDirectory> {
    let opened = MirrorDirectory::open(arguments.mirror_dir.as_deref()?);
    let failed = |error: &io::Error| {
        tracing::error!(
            "no NIC can be mirrored: --mirror-dir {error}; make it, for the agent's user alone, and start rot again"
        );
    };
    opened.inspect_err(failed).ok()
}

/// Starts the agent and runs it until rot says stop.
///
/// # Errors
/// See [`StartupError`].
pub fn run(arguments: &Arguments) -> Result<(), StartupError> {
    let rot = process::inherited_channel()?;
    check_host_name(&arguments.host).map_err(StartupError::HostName)?;
    let trust = TrustRoot::load(&arguments.trust)?;
    let found = Store::open(&arguments.state_dir, &arguments.host, &trust)?;
    let directories =
        VolumeDirectories::open(&arguments.volume_dirs).map_err(StartupError::VolumeDirectory)?;
    let mirrors = mirror_directory(arguments);
    let prepared = prepared::take(stored());
    let xdp = !prepared.is_empty();
    lockdown::lock_in(&arguments.state_dir, &directories, mirrors.as_ref(), xdp)?;
    let host = Host {
        name: arguments.host.clone(),
        trust,
        vhost_dir: arguments.vhost_dir.clone(),
        directories,
        mirrors,
        prepared,
    };
    let floor = found.store.floor_epoch();
    let agent = Agent::new(host, found, Instant::now());
    let mut event_loop = EventLoop::new(rot, agent)?;
    event_loop.send_to_rot(&ToRot::Hello)?;
    tracing::info!(host = arguments.host, floor, "locked in and serving");
    event_loop.run()?;
    Ok(())
}
