//! Which bundles keyd accepts: it copies the envelope, verifies it against its own trust root,
//! floor and clock, and keeps epoch and digest on disk before anyone learns of it.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::{HostBundle, Policy, TrustRoot, Verified, VerifyError, verify};
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::envelope::{EnvelopeError, read_capped};

use crate::state::{Accepted, State};
use crate::state_file::{StateError, StateFile};
use crate::unshared::{SharedKey, check_unshared};
use crate::vault::Vault;

/// Why an envelope was refused; nothing has changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// It can't be copied.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// It does not hold.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// It holds, and one of its keys serves two volumes, or nobody can say.
    #[error(transparent)]
    Keys(#[from] SharedKey),
    /// It holds, and can't be kept.
    #[error("the epoch floor can't be kept, so nothing is granted: {0}")]
    State(#[from] StateError),
}

/// The trust root and what was accepted under it.
#[derive(Debug)]
pub(crate) struct Custody {
    host: String,
    trust: TrustRoot,
    file: StateFile,
}

impl Custody {
    /// Custody of what a state file holds.
    pub(crate) fn new(host: String, trust: TrustRoot, file: StateFile) -> Self {
        Self { host, trust, file }
    }

    /// Epoch of the bundle accepted last, 0 if none.
    pub(crate) fn floor(&self) -> u64 {
        self.file.floor()
    }

    /// Every volume that the data plane may hold a grant of.
    pub(crate) fn held(&self) -> BTreeSet<VolumeId> {
        let state = self.file.state();
        state.map(|state| state.held.clone()).unwrap_or_default()
    }

    /// Accepts an envelope: its epoch is the floor, and its volumes may be granted, once this has
    /// returned; both are on disk. The envelope accepted last is accepted again, whatever the time and
    /// its keys: what holds for new bundles alone must not keep a host from starting again.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(crate) fn accept(
        &mut self,
        envelope: BorrowedFd<'_>,
        vault: &Vault,
    ) -> Result<Verified<HostBundle>, Refusal> {
        let bytes = read_capped(envelope)?;
        let last = self.file.state().map(|state| state.accepted);
        let now = unix_time();
        let policy = Policy {
            trust: &self.trust,
            host: &self.host,
            epoch_floor: self.floor(),
            last_digest: last.map(|accepted| accepted.digest),
            now,
        };
        let bundle = verify(&bytes, &policy)?;
        let accepted = Accepted {
            epoch: bundle.epoch,
            digest: bundle.digest(),
        };
        let again = last == Some(accepted);
        if !again {
            check_unshared(vault, &bundle)?;
        }
        let mut held = self.held();
        held.extend(bundle.volumes.iter().map(|volume| volume.id));
        self.file.replace(State { accepted, held })?;
        if again && now >= bundle.expires {
            tracing::info!(
                epoch = bundle.epoch,
                "granting the bundle accepted last again, after its expiry"
            );
        }
        let (epoch, volumes) = (bundle.epoch, bundle.volumes.len());
        let signers = bundle.signers().join(", ");
        tracing::info!(epoch, volumes, again, %signers, "bundle accepted");
        Ok(bundle)
    }

    /// The data plane holds no grant of these volumes any more.
    pub(crate) fn revoked(&mut self, volumes: &BTreeSet<VolumeId>) {
        self.keep_held(|volume| !volumes.contains(volume));
    }

    /// A data plane that was just started holds nothing.
    pub(crate) fn nothing_held(&mut self) {
        self.keep_held(|_| false);
    }

    /// If it can't be kept, more volumes are remembered than are held, and revoked once more.
    fn keep_held(&mut self, keep: impl Fn(&VolumeId) -> bool) {
        let Some(state) = self.file.state() else {
            return;
        };
        let replaced = self.file.replace(State {
            accepted: state.accepted,
            held: state.held.iter().copied().filter(keep).collect(),
        });
        if let Err(error) = replaced {
            tracing::warn!("what the data plane holds can't be kept: {error}");
        }
    }
}

/// Seconds since 1970; a clock before that is 1970, at which no bundle is valid yet.
fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
