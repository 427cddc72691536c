//! The point of no return: the bundle that keyd accepted becomes the bundle in force, and what its
//! grants came to is recorded.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_bundle::{HostBundle, key_scope};
use bulkhead_protocol::ServedId;
use bulkhead_protocol::keys::Undelivered;

use crate::agent::Agent;
use crate::networks;
use crate::plan::{Change, Plan};
use crate::store::{StoreError, Unfinished};
use crate::text::plain;

impl Agent {
    /// Makes the candidate the bundle in force: on disk first, then here. On an error it stays
    /// the candidate.
    pub(crate) fn commit(&mut self) -> Result<(), StoreError> {
        let Some(candidate) = self.known.candidate.take() else {
            return Ok(());
        };
        let old = self.known.accepted.as_ref().map(|stored| &*stored.bundle);
        let plan = Plan::between(old, &candidate.bundle);
        let unfinished = unfinished_with(self.store.unfinished(), &candidate.bundle, &plan);
        let (epoch, digest) = (candidate.bundle.epoch, candidate.bundle.digest());
        let written = self
            .store
            .set_unfinished(unfinished)
            .and_then(|()| self.store.commit(epoch, digest));
        if let Err(error) = written {
            self.known.candidate = Some(candidate);
            return Err(error);
        }
        for volume in plan
            .leaving
            .iter()
            .filter_map(|leaving| leaving.id.volume())
        {
            self.known.files.remove(&volume);
        }
        // Those of the new bundle are opened already, or when they are due.
        self.known.ports.clear();
        self.known
            .cancel
            .retain(|id| candidate.bundle.name_of(*id).is_some());
        self.known.granted = false;
        self.known.attached = None;
        self.known.networks = None;
        for warning in candidate
            .bundle
            .volumes
            .iter()
            .filter_map(key_scope::warning)
        {
            tracing::warn!("{warning}");
        }
        let old = self.known.accepted.as_ref().map(|stored| &*stored.bundle);
        let begun = (&mut self.known.mirror_files, &mut self.known.ended_mirrors);
        networks::tell_ended_mirrors(old, &candidate.bundle, begun);
        self.known.accepted = Some(candidate);
        Ok(())
    }

    /// keyd accepted the bundle in force, and the data plane answered its grants.
    pub(crate) fn take_grants(&mut self, undelivered: Vec<Undelivered>) -> Result<(), String> {
        // What was granted to a process that is gone has to be granted again.
        self.known.granted = self.asked_same_peers();
        // A grant that differs detached its volume or NIC.
        self.known.attached = None;
        self.known.networks = None;
        let pairs = undelivered.into_iter();
        self.known.undelivered = pairs.map(|u| (u.id, plain(&u.reason))).collect();
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let line = |(id, reason): (&ServedId, &String)| {
            let name = bundle.and_then(|b| b.name_of(*id).map(str::to_owned));
            format!("{}: {reason}", name.unwrap_or_else(|| id.to_string()))
        };
        if self.known.undelivered.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = self.known.undelivered.iter().map(line).collect();
        Err(format!("not taken by the data plane: {}", lines.join("; ")))
    }

    /// keyd had accepted the candidate, or does now.
    pub(crate) fn candidate_accepted(
        &mut self,
        epoch: u64,
        undelivered: Vec<Undelivered>,
    ) -> Result<(), String> {
        match &self.known.candidate {
            Some(candidate) if candidate.bundle.epoch == epoch => {}
            _ => return Err(format!("keyd says that it accepted epoch {epoch}")),
        }
        self.commit().map_err(|error| error.to_string())?;
        // What did not arrive is a matter of the next step, which is due because of it.
        let _ = self.take_grants(undelivered);
        Ok(())
    }

    /// keyd had refused the candidate, or does now: the bundle in force stays.
    pub(crate) fn candidate_refused(&mut self, reason: &str) -> Result<(), String> {
        self.store
            .drop_candidate()
            .map_err(|error| error.to_string())?;
        self.known.candidate = None;
        tracing::warn!("keyd refused the bundle whose fate was open: {reason}");
        Ok(())
    }
}

/// What is left to do once this bundle is in force.
fn unfinished_with(before: &Unfinished, bundle: &HostBundle, plan: &Plan) -> Unfinished {
    let mut unfinished = before.clone();
    let sockets = bundle.sockets();
    unfinished
        .listeners
        .extend(sockets.map(|(_, socket)| socket.name.clone()));
    for leaving in &plan.leaving {
        // What a NIC is connected to is a matter of its grant.
        let Some(volume) = leaving.id.volume() else {
            continue;
        };
        match leaving.change {
            Some(Change::File) => unfinished.detach.insert(volume),
            // The data plane detaches it: at a new grant, or because it has none any more.
            Some(Change::Grant) | None => unfinished.detach.remove(&volume),
        };
    }
    unfinished
}
