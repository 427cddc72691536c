//! The start: the process hides its memory, reads its key, its trust root and its state, locks
//! itself in, says hello to rot and serves.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;

use bulkhead_bundle::TrustRoot;
use bulkhead_bundle::validate::check_host_name;
use bulkhead_protocol::process::{self, StartError};

use crate::arguments::Arguments;
use crate::custody::Custody;
use crate::host_key::{self, HostKeyError};
use crate::lockdown;
use crate::releases::{Releases, ReleasesError};
use crate::service::{KeyService, ServiceError};
use crate::state::State;
use crate::state_file::{StateError, StateFile};
use crate::vault::Vault;

/// Why keyd can't start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// Not started by rot, or can't be locked in.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The name given is none.
    #[error("--host: {0}")]
    HostName(String),
    /// The host has no key.
    #[error(transparent)]
    Key(#[from] HostKeyError),
    /// The host's key is another's.
    #[error(
        "the secret key in the state directory is that of {key:?}, and this host is {host:?}: \
         give --host as `bulkhead host init` had it"
    )]
    OtherHost {
        /// Whose it is.
        key: String,
        /// Who we are.
        host: String,
    },
    /// The trust root can't be read.
    #[error("the trust root: {0}")]
    Trust(#[from] bulkhead_bundle::KeyError),
    /// What was kept can't be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was kept of the releases can't be used.
    #[error(transparent)]
    Releases(#[from] ReleasesError),
    /// The kernel gave no random bytes.
    #[error("the system has no randomness: {0}")]
    Randomness(getrandom::Error),
    /// The channel to rot can't be used.
    #[error("the channel to rot: {0}")]
    Channel(#[from] io::Error),
    /// The service.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Starts keyd and runs it until rot says stop.
///
/// # Errors
/// See [`StartupError`].
pub fn run(arguments: &Arguments) -> Result<(), StartupError> {
    let rot = process::inherited_channel()?;
    lockdown::hide_memory()?;
    check_host_name(&arguments.host).map_err(StartupError::HostName)?;
    let state = StateFile::open(&arguments.state_dir)?;
    let releases = Releases::read(state.directory())?;
    let trust = TrustRoot::load(&arguments.trust)?;
    let named = state.state().and_then(State::host_key);
    let (key, resealed) = host_key::load(state.directory(), named)?;
    if key.public().name != arguments.host {
        return Err(StartupError::OtherHost {
            key: key.public().name.clone(),
            host: arguments.host.clone(),
        });
    }
    // A static program finds no `getrandom` in its C library, and then reads /dev/urandom: that is
    // opened at the first draw and stays open, so that a new host key can be made behind the lock.
    getrandom::fill(&mut [0; 1]).map_err(StartupError::Randomness)?;
    lockdown::lock_in(&arguments.state_dir)?;
    let mut custody = Custody::new(arguments.host.clone(), trust, state, releases);
    let mut vault = Vault::new(key, resealed);
    custody.recover(&mut vault);
    KeyService::new(rot, custody, vault)?.run()?;
    Ok(())
}
