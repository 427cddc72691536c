//! One accepted bundle on its way to the data plane: first its workers, then the revocations, then the
//! grants, a few at a time, each answered or given up at the deadline.
//!
//! A data plane that serves nothing and is to have other workers ends when it hears of them. The rest of
//! the delivery goes to the one that rot starts in its place.
//!
//! A data plane that took volumes over from the one before it has their keys. If the bundle is still the one
//! that they were granted by, it is granted them without: to open each sealed key again would take a fraction of
//! a millisecond of the time in which its guests wait for their disks.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_bundle::{HostBundle, Verified, Volume};
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane, Undelivered};
use bulkhead_protocol::{ChannelError, ServedId, VolumeId};

use crate::grants::{grant_of, nic_grant_of};
use crate::link::plain;
use crate::peers::{Asked, Dataplane};
use crate::vault::{NoKey, Vault};

/// How long a delivery may take; the agent waits longer.
const TIME: Duration = Duration::from_secs(10);
/// Why a grant was not delivered, if the data plane does not answer.
const SILENT: &str = "the data plane did not answer in 10 s";
/// The same, if there is none.
pub(crate) const ABSENT: &str = "no data plane is connected";
/// The same, if it ended.
pub(crate) const GONE: &str = "the data plane ended before it answered";

/// What came of sending a step.
enum Sent {
    Yes,
    /// The channel is full for now.
    Blocked,
    Failed(String),
    /// The channel is closed.
    Gone,
}

/// A delivery. It is over when [`Delivery::is_over`] says so.
#[derive(Debug)]
pub(crate) struct Delivery {
    /// Of the agent's request.
    pub(crate) request_id: u64,
    /// Of the agent that asked.
    pub(crate) agent_generation: u64,
    /// When it is given up.
    pub(crate) deadline: Instant,
    bundle: Verified<HostBundle>,
    /// It is the bundle accepted last, again: what the data plane holds came of it.
    again: bool,
    steps: VecDeque<Asked>,
    /// Grants that are under way without keys.
    without_keys: BTreeSet<VolumeId>,
    undelivered: Vec<Undelivered>,
    revoked: BTreeSet<ServedId>,
    blocked: bool,
    /// The data plane ends, for the sake of its workers; the next one gets what is left.
    restarting: bool,
}

impl Delivery {
    /// Of a bundle, which may be the one accepted last, `again`, to a data plane that may hold grants of these.
    pub(crate) fn new(
        request_id: u64,
        agent_generation: u64,
        (bundle, again): (Verified<HostBundle>, bool),
        held: &BTreeSet<ServedId>,
        now: Instant,
    ) -> Self {
        let gone = held.iter().copied();
        let gone = gone.filter(|id| bundle.name_of(*id).is_none());
        let here = bundle.sockets().map(|(id, _)| id);
        // Revocations first: a listener's name may have a new owner.
        let steps = gone
            .map(Asked::Revoke)
            .chain(here.map(Asked::Grant))
            .collect();
        Self {
            request_id,
            agent_generation,
            deadline: now + TIME,
            steps,
            bundle,
            again,
            without_keys: BTreeSet::new(),
            undelivered: Vec::new(),
            revoked: BTreeSet::new(),
            blocked: false,
            restarting: false,
        }
    }

    /// Epoch of the bundle.
    pub(crate) fn epoch(&self) -> u64 {
        self.bundle.epoch
    }

    /// Whether it goes on when the data plane's channel has room again.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether nothing is left to send or to wait for.
    pub(crate) fn is_over(&self, dataplane: Option<&Dataplane>) -> bool {
        self.steps.is_empty() && !dataplane.is_some_and(Dataplane::is_asked)
    }

    /// What was not delivered, and what is revoked for certain.
    pub(crate) fn into_outcome(self) -> (Vec<Undelivered>, BTreeSet<ServedId>) {
        (self.undelivered, self.revoked)
    }

    /// Sends what the data plane has room for. False if its channel is closed.
    pub(crate) fn advance(&mut self, dataplane: &mut Dataplane, vault: &Vault) -> bool {
        self.blocked = false;
        match dataplane.tell_workers(self.bundle.workers.as_ref()) {
            Ok(()) => {}
            Err(ChannelError::WouldBlock) => {
                self.blocked = true;
                return true;
            }
            Err(_) => return false,
        }
        if dataplane.owes_workers() || self.restarting {
            return true;
        }
        while dataplane.has_room()
            && let Some(step) = self.steps.front().copied()
        {
            match self.send(step, dataplane, vault) {
                Sent::Yes => {}
                Sent::Blocked => {
                    self.blocked = true;
                    return true;
                }
                Sent::Failed(reason) => self.step_failed(step, &reason),
                Sent::Gone => return false,
            }
            self.steps.pop_front();
        }
        true
    }

    fn send(&mut self, step: Asked, dataplane: &mut Dataplane, vault: &Vault) -> Sent {
        let channel = &dataplane.link.channel;
        let sent = match step {
            Asked::Workers => return Sent::Yes,
            Asked::Revoke(id) => channel.send(&KeydToDataplane::Revoke { id }, &[]),
            Asked::Grant(ServedId::Nic(id)) => match self.bundle.nic(id) {
                Some(nic) => {
                    let grant = nic_grant_of(&self.bundle, nic);
                    channel.send(&KeydToDataplane::GrantNic { grant }, &[])
                }
                None => return Sent::Failed("it is not in the bundle".to_owned()),
            },
            Asked::Grant(ServedId::Volume(id)) => match self.bundle.volume(id) {
                Some(volume) => {
                    let has_keys = dataplane.has_keys_of(id) && self.again;
                    match self.send_grant(volume, dataplane, (!has_keys).then_some(vault)) {
                        Ok(sent) => {
                            if has_keys && sent.is_ok() {
                                self.without_keys.insert(id);
                            }
                            sent
                        }
                        Err(error) => return Sent::Failed(error.to_string()),
                    }
                }
                None => return Sent::Failed("it is not in the bundle".to_owned()),
            },
        };
        match sent {
            Ok(()) => {
                dataplane.asked(step);
                Sent::Yes
            }
            Err(ChannelError::WouldBlock) => Sent::Blocked,
            Err(ChannelError::Closed) => Sent::Gone,
            Err(error) => Sent::Failed(format!("it can't be sent to the data plane: {error}")),
        }
    }

    /// Sends a grant, with the keys that a vault has for it.
    fn send_grant(
        &self,
        volume: &Volume,
        dataplane: &Dataplane,
        vault: Option<&Vault>,
    ) -> Result<Result<(), ChannelError>, NoKey> {
        let grant = grant_of(&self.bundle, volume);
        let message = KeydToDataplane::Grant { grant };
        let pages = vault.map(|vault| vault.unseal(volume)).transpose()?;
        let pages = pages.unwrap_or_default();
        let fds: Vec<_> = pages.iter().map(AsFd::as_fd).collect();
        let sent = dataplane.link.channel.send(&message, &fds);
        if sent.is_ok() {
            // The pages are the data plane's now: closed here, unwiped. Not sent, they are wiped.
            pages.into_iter().for_each(|page| drop(page.into_fd()));
        }
        Ok(sent)
    }

    /// Takes an answer that is waited for.
    pub(crate) fn answered(&mut self, answer: DataplaneToKeyd) {
        match answer {
            DataplaneToKeyd::Granted { id } => {
                self.was_without_keys(id);
            }
            // It has them no more, or what it holds is something else.
            DataplaneToKeyd::GrantRefused { id, .. } if self.was_without_keys(id) => {
                self.steps.push_back(Asked::Grant(id));
            }
            DataplaneToKeyd::GrantRefused { id, reason } => {
                self.failed(id, &format!("the data plane refused it: {reason}"));
            }
            DataplaneToKeyd::Revoked { id } => {
                self.revoked.insert(id);
            }
            DataplaneToKeyd::WorkersHeard { restarts, .. } => self.restarting = restarts,
        }
    }

    /// A grant is answered: whether it came without keys.
    fn was_without_keys(&mut self, id: ServedId) -> bool {
        match id {
            ServedId::Volume(id) => self.without_keys.remove(&id),
            ServedId::Nic(_) => false,
        }
    }

    /// Another data plane is there.
    pub(crate) fn dataplane_is_back(&mut self) {
        self.restarting = false;
        self.without_keys.clear();
    }

    /// Gives up at the deadline.
    pub(crate) fn give_up(&mut self, dataplane: Option<&mut Dataplane>) {
        let asked = dataplane.map(Dataplane::abandon).unwrap_or_default();
        for id in asked {
            self.failed(id, SILENT);
        }
        for step in std::mem::take(&mut self.steps) {
            self.step_failed(step, SILENT);
        }
    }

    /// There is no data plane (any more): what it had taken went with it, and nobody holds any of
    /// the grants. One that said that it would be started again is waited for.
    pub(crate) fn dataplane_gone(&mut self, reason: &str) {
        if self.restarting {
            return;
        }
        self.steps.clear();
        let failed: BTreeSet<ServedId> = self.undelivered.iter().map(|u| u.id).collect();
        let all: Vec<ServedId> = self.bundle.sockets().map(|(id, _)| id).collect();
        for id in all.into_iter().filter(|id| !failed.contains(id)) {
            self.failed(id, reason);
        }
    }

    fn step_failed(&mut self, step: Asked, reason: &str) {
        if let Some(id) = step.served() {
            self.failed(id, reason);
        }
    }

    fn failed(&mut self, id: ServedId, reason: &str) {
        let reason = plain(reason);
        tracing::warn!("{id}: undelivered: {reason}");
        self.undelivered.push(Undelivered { id, reason });
    }
}
