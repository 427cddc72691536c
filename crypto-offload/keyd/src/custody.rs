//! Which bundles keyd accepts: it copies the envelope, verifies it against its own trust root,
//! floor and clock, and keeps epoch and digest on disk before anyone learns of it. A bundle that
//! shreds volumes takes the host's key along (`docs/adr/0019-shred-rotates-the-host-key.md`).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::text::to_hex;
use bulkhead_bundle::{
    HostBundle, Policy, TrustRoot, Verified, VerifyError, verify, verify_release,
};
use bulkhead_protocol::envelope::{EnvelopeError, read_capped};
use bulkhead_protocol::keys::{HostKeys, MAX_SHREDS, Shred, ShredState};
use bulkhead_protocol::release::Release;
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{ServedId, VolumeId};
use bulkhead_sealing::RecipientKey;

use crate::host_key;
use crate::link::plain;
use crate::releases::Releases;
use crate::resealed::Resealed;
use crate::state::{Accepted, Rotation, State};
use crate::state_file::{StateError, StateFile};
use crate::unshared::{SharedKey, check_unshared};
use crate::vault::{NoSuccessor, Vault};

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
    /// It names a volume that was shredded.
    #[error(
        "volume {name:?} ({id}) was shredded by epoch {epoch}: its key is destroyed, and the host \
         never takes its id again; make a new volume, with an id of its own"
    )]
    Shredded {
        /// Name of the volume.
        name: String,
        /// Its id.
        id: VolumeId,
        /// Of the bundle that shredded it.
        epoch: u64,
    },
    /// What remains can't go over to another key of the host.
    #[error("nothing was shredded and nothing changed: {0}")]
    Successor(#[from] NoSuccessor),
    /// The files of the next key can't be written.
    #[error("nothing was shredded and nothing changed: the host's next key can't be kept: {0}")]
    Prepare(String),
    /// An earlier key of the host may still be on the disk.
    #[error(
        "nothing was shredded and nothing changed: the files of the host's key are not in order \
         ({0}); mend that and apply the bundle again"
    )]
    Unfinished(String),
}

/// The next key of the host, and what is sealed to it.
type Successor = (RecipientKey, Resealed);

/// The trust root and what was accepted under it.
#[derive(Debug)]
pub(crate) struct Custody {
    host: String,
    trust: TrustRoot,
    file: StateFile,
    releases: Releases,
    /// Why the files of the host's key may not be in order: the key before it may be there.
    unfinished: Option<String>,
}

impl Custody {
    /// Custody of what a state file holds.
    pub(crate) fn new(host: String, trust: TrustRoot, file: StateFile, releases: Releases) -> Self {
        Self {
            host,
            trust,
            file,
            releases,
            unfinished: None,
        }
    }

    /// Epoch of the bundle accepted last, 0 if none.
    pub(crate) fn floor(&self) -> u64 {
        self.file.floor()
    }

    /// Verifies a release statement against the trust root and the releases that ran before.
    ///
    /// # Errors
    /// Why it is refused, for the operator.
    pub(crate) fn check_release(&self, statement: BorrowedFd<'_>) -> Result<Release, String> {
        let bytes = read_capped(statement).map_err(|error| error.to_string())?;
        let verified = verify_release(&bytes, &self.trust).map_err(|error| error.to_string())?;
        let release = verified.release().ok_or("it names no program")?;
        self.releases.check(&release)?;
        let (component, version) = (release.component, release.version);
        let (name, signers) = (&verified.name, verified.signers().join(", "));
        tracing::info!(%component, version, name, %signers, "release verified");
        Ok(release)
    }

    /// rot runs a release: nothing older of that program is approved any more.
    pub(crate) fn release_runs(&mut self, release: Release) {
        if let Err(error) = self.releases.keep(self.file.directory(), release) {
            let (component, version) = (release.component, release.version);
            tracing::error!(%component, version, "which release runs can't be kept, an older one might be approved: {error}");
        }
    }

    /// The workers of the bundle accepted last.
    pub(crate) fn workers(&self) -> Option<Workers> {
        self.file.state().and_then(|state| state.workers.clone())
    }

    /// Every volume and NIC that the data plane may hold a grant of.
    pub(crate) fn held(&self) -> BTreeSet<ServedId> {
        let state = self.file.state();
        state.map(|state| state.held.clone()).unwrap_or_default()
    }

    /// Accepts an envelope: its epoch is the floor, and its volumes may be granted, once this has
    /// returned; both are on disk. What it shreds is remembered as shredded, and the vault has
    /// another key then. The envelope accepted last is accepted again, whatever the time and its
    /// keys: what holds for new bundles alone must not keep a host from starting again.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(crate) fn accept(
        &mut self,
        envelope: BorrowedFd<'_>,
        vault: &mut Vault,
    ) -> Result<(Verified<HostBundle>, bool), Refusal> {
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
        self.refuse_shredded(&bundle)?;
        if !again {
            check_unshared(vault, &bundle)?;
        }
        self.finish(vault);
        let mut state = self.next_state(accepted, &bundle);
        let orders = self.new_orders(&bundle);
        if orders.is_empty() {
            self.file.replace(state)?;
        } else {
            let successor = self.prepare(&bundle, vault)?;
            rotate(&mut state, &orders, &successor, vault, now);
            self.commit(state, &orders, successor, vault)?;
        }
        if again && now >= bundle.expires {
            tracing::info!(
                epoch = bundle.epoch,
                "granting the bundle accepted last again, after its expiry"
            );
        }
        let (epoch, volumes) = (bundle.epoch, bundle.volumes.len());
        let (nics, signers) = (bundle.nics.len(), bundle.signers().join(", "));
        tracing::info!(epoch, volumes, nics, again, %signers, "bundle accepted");
        Ok((bundle, again))
    }

    /// A volume whose key was destroyed never comes back.
    fn refuse_shredded(&self, bundle: &HostBundle) -> Result<(), Refusal> {
        let Some(state) = self.file.state() else {
            return Ok(());
        };
        for volume in &bundle.volumes {
            if let Some(epoch) = state.shredded.get(&volume.id) {
                return Err(Refusal::Shredded {
                    name: volume.name.clone(),
                    id: volume.id,
                    epoch: *epoch,
                });
            }
        }
        Ok(())
    }

    /// The state that a bundle leads to, less what it shreds.
    fn next_state(&self, accepted: Accepted, bundle: &HostBundle) -> State {
        let mut state = self.file.state().cloned().unwrap_or(State {
            accepted,
            held: BTreeSet::new(),
            rotations: Vec::new(),
            shredded: BTreeMap::new(),
            workers: None,
        });
        state.accepted = accepted;
        state.workers.clone_from(&bundle.workers);
        state.held.extend(bundle.sockets().map(|(id, _)| id));
        state
    }

    /// What a bundle shreds that was not shredded before.
    fn new_orders(&self, bundle: &HostBundle) -> Vec<VolumeId> {
        let known = self.file.state().map(|state| &state.shredded);
        let is_new = |id: &&VolumeId| known.is_none_or(|known| !known.contains_key(*id));
        bundle.shred.iter().filter(is_new).copied().collect()
    }

    /// The host's next key, with all that the present one opens for a bundle, beside the present one
    /// on the disk.
    fn prepare(&self, bundle: &HostBundle, vault: &Vault) -> Result<Successor, Refusal> {
        if let Some(reason) = &self.unfinished {
            return Err(Refusal::Unfinished(reason.clone()));
        }
        let successor = vault.successor(bundle)?;
        let directory = self.file.directory();
        host_key::prepare(directory, &successor.0, &successor.1).map_err(|reason| {
            // What can't be removed now is removed at the next start.
            let _ = host_key::discard(directory);
            Refusal::Prepare(reason)
        })?;
        Ok(successor)
    }

    /// The point of no return, and what follows from it. Where it is not certain that the state is
    /// on the disk, the old key stays there until it is.
    fn commit(
        &mut self,
        state: State,
        orders: &[VolumeId],
        (key, resealed): Successor,
        vault: &mut Vault,
    ) -> Result<(), Refusal> {
        let named = state.host_key();
        let replaced = self.file.replace(state);
        let rotations = match self.file.state() {
            Some(state) if state.host_key() == named => &state.rotations,
            _ => {
                let _ = host_key::discard(self.file.directory());
                return replaced.map_err(Refusal::State);
            }
        };
        vault.remember(rotations);
        let remaining = resealed.len();
        vault.adopt(key, resealed);
        self.unfinished = Some("the state is not on the disk yet".to_owned());
        replaced?;
        self.finish(vault);
        let host_key = to_hex(&vault.key().public().fingerprint());
        tracing::info!(remaining, %host_key, "the host's key was replaced to shred volumes");
        if self.unfinished.is_none() {
            for volume in orders {
                tracing::info!(%volume, "shredded: no key of this host opens it any more");
            }
        }
        Ok(())
    }

    /// At the start: completes what an earlier keyd began.
    pub(crate) fn recover(&mut self, vault: &mut Vault) {
        if let Some(state) = self.file.state() {
            vault.remember(&state.rotations);
        }
        self.unfinished = Some("it was not tried yet".to_owned());
        self.finish(vault);
    }

    /// Destroys the key that the host had before, if that is not done.
    fn finish(&mut self, vault: &Vault) {
        if self.unfinished.is_none() {
            return;
        }
        let rotated = self.file.state().is_some_and(|s| !s.rotations.is_empty());
        let finished = host_key::finish(self.file.directory(), vault.key(), rotated);
        if let Err(reason) = &finished {
            tracing::error!("the files of the host's key are not in order: {reason}");
        }
        self.unfinished = finished.err();
    }

    /// What can be told of the host's key and of what was shredded.
    pub(crate) fn keys(&self, vault: &Vault) -> HostKeys {
        let fingerprint = vault.key().public().fingerprint().into();
        let unfinished = self.unfinished.as_deref().map(plain);
        let Some(state) = self.file.state() else {
            return HostKeys {
                fingerprint,
                shreds: Vec::new(),
                shreds_total: 0,
                unfinished,
            };
        };
        let mut shreds = Vec::new();
        for rotation in state.rotations.iter().rev() {
            let of_this = state.shredded.iter().filter(|s| *s.1 == rotation.epoch);
            shreds.extend(of_this.map(|(volume, _)| self.shred(state, *volume, rotation)));
            if shreds.len() >= MAX_SHREDS {
                break;
            }
        }
        shreds.truncate(MAX_SHREDS);
        HostKeys {
            fingerprint,
            shreds,
            shreds_total: state.shredded.len() as u64,
            unfinished,
        }
    }

    fn shred(&self, state: &State, volume: VolumeId, rotation: &Rotation) -> Shred {
        let is_last = state.rotations.last() == Some(rotation);
        let shred_state = match &self.unfinished {
            Some(_) if is_last => ShredState::KeyOnDisk,
            _ if state.held.contains(&volume.into()) => ShredState::HeldByDataplane,
            _ => ShredState::Done,
        };
        Shred {
            volume,
            epoch: rotation.epoch,
            time_s: rotation.time_s,
            destroyed_key: rotation.old.into(),
            new_key: rotation.new.into(),
            state: shred_state,
        }
    }

    /// The data plane holds no grant of these any more.
    pub(crate) fn revoked(&mut self, gone: &BTreeSet<ServedId>) {
        self.keep_held(|id| !gone.contains(id));
        let shredded = self.file.state().map(|state| &state.shredded);
        for volume in gone.iter().filter_map(|id| id.volume()) {
            if shredded.is_some_and(|shredded| shredded.contains_key(&volume)) {
                tracing::info!(%volume, "shredded: the data plane has dropped its key");
            }
        }
    }

    /// If it can't be kept, more is remembered than is held, and revoked once more.
    fn keep_held(&mut self, keep: impl Fn(&ServedId) -> bool) {
        let Some(state) = self.file.state() else {
            return;
        };
        let mut state = state.clone();
        state.held.retain(keep);
        let replaced = self.file.replace(state);
        if let Err(error) = replaced {
            tracing::warn!("what the data plane holds can't be kept: {error}");
        }
    }
}

/// Writes into a state what a bundle shreds: the volumes, and the host's next key.
fn rotate(state: &mut State, orders: &[VolumeId], (key, _): &Successor, vault: &Vault, now: u64) {
    let epoch = state.accepted.epoch;
    state.shredded.extend(orders.iter().map(|id| (*id, epoch)));
    state.rotations.push(Rotation {
        epoch,
        time_s: now,
        old: vault.key().public().fingerprint(),
        new: key.public().fingerprint(),
    });
}

/// Seconds since 1970; a clock before that is 1970, at which no bundle is valid yet.
fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[path = "custody_tests.rs"]
mod tests;
