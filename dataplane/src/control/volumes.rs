//! The table of granted volumes: what keyd granted, with its key, and what is served of it.
//!
//! A volume is served only where three agree: keyd's grant, the listener of that name from rot, and
//! the file from the agent. (The frontend's uid is checked when it connects.)
//!
//! Attaching and detaching take workers' answers. What is asked of a volume meanwhile waits its turn, so
//! that every request finds the volume either served or not.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::{SocketName, VolumeId};

use super::answer::{Agent, Answers, Keyd};
use super::attach::Begun;
use super::grant::{GrantedKeys, is_same, only_grew, only_rekeys};
use super::left::Left;
use super::limits::Groups;
use crate::blk::{BlkDevice, Cipher, Ciphers};
use crate::server::{Event, Server};
use crate::storage::FileSpec;
use crate::stored::{Fd, Keeper};
use crate::worker::message::DeviceId;

/// Volumes that can be granted at a time.
pub const MAX_VOLUMES: usize = 256;
/// What can be asked of one volume while it is being attached or detached.
const MAX_WAITING: usize = 16;

/// Something asked of one volume.
#[derive(Debug)]
pub(super) enum Task {
    /// keyd grants it.
    Grant(Keyd, Box<Held>),
    /// keyd grants it with the keys that are held.
    Confirm(Keyd, Box<VolumeGrant>),
    /// keyd takes the grant back.
    Revoke(Keyd),
    /// The agent gives it its file.
    Attach(Agent, SocketName, OwnedFd),
    /// The agent has it served no more.
    Detach(Agent),
}

/// A grant that is held.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) grant: VolumeGrant,
    /// The expanded keys, while no device has them; none also after they were wiped.
    pub(super) keys: GrantedKeys,
}

/// What happens once nothing is left of a device.
#[derive(Debug)]
pub(super) enum Then {
    /// Its key is wiped.
    Wipe(Agent),
    /// The volume is forgotten.
    Forget(Keyd),
    /// Another grant takes the place of the one it had.
    Replace(Keyd, Box<Held>),
    /// Workers could not serve it: all is as before the attach.
    Restore(Agent, String),
    /// Workers could not go on with what a predecessor served: its key is wiped.
    GiveUp(String),
}

#[derive(Debug)]
pub(super) enum Serving {
    No,
    Attaching(DeviceId, Arc<BlkDevice>, Agent),
    /// A predecessor served it; the agent did not ask.
    Resuming(DeviceId, Arc<BlkDevice>),
    Yes(DeviceId, Arc<BlkDevice>),
    Detaching(DeviceId, Arc<BlkDevice>, Then),
}

impl Serving {
    pub(super) fn device(&self) -> Option<(DeviceId, &Arc<BlkDevice>)> {
        match self {
            Self::No => None,
            Self::Attaching(id, device, _)
            | Self::Resuming(id, device)
            | Self::Yes(id, device)
            | Self::Detaching(id, device, _) => Some((*id, device)),
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self, Self::No | Self::Yes(..))
    }
}

/// A volume.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) held: Held,
    pub(super) serving: Serving,
    /// Its removal is prepared: no new frontend.
    pub(super) removing: bool,
    pub(super) waiting: VecDeque<Task>,
}

impl Volume {
    pub(super) fn new(held: Held) -> Self {
        Self {
            held,
            serving: Serving::No,
            removing: false,
            waiting: VecDeque::new(),
        }
    }

    /// Its device, if it is attached and stays so.
    pub(super) fn served(&self) -> Option<(DeviceId, &BlkDevice)> {
        match &self.serving {
            Serving::Yes(id, device) => Some((*id, device)),
            _ => None,
        }
    }

    /// Whether its key is in memory, expanded.
    pub(super) fn has_key(&self) -> bool {
        let device = self.serving.device();
        self.held.keys.key.is_some() || device.is_some_and(|(_, device)| device.is_encrypted())
    }

    pub(super) fn file(&self) -> Option<&FileSpec> {
        self.serving.device()?.1.storage.file()
    }
}

/// All volumes, the groups they are in, and the listeners from rot.
#[derive(Debug)]
pub(super) struct Volumes {
    pub(super) table: BTreeMap<VolumeId, Volume>,
    pub(super) listeners: BTreeMap<SocketName, Fd>,
    /// Devices that were taken away and not waited for.
    pub(super) left: Vec<Left>,
    pub(super) groups: Groups,
    /// What is to outlive this process.
    pub(super) keeper: Keeper,
}

impl Volumes {
    /// No volumes yet.
    pub(super) fn kept_by(keeper: Keeper) -> Self {
        Self {
            table: BTreeMap::new(),
            listeners: BTreeMap::new(),
            left: Vec::new(),
            groups: Groups::default(),
            keeper,
        }
    }

    /// Does what is asked of a volume, or lets it wait until the volume is settled.
    pub(super) fn ask(
        &mut self,
        server: &mut Server,
        id: VolumeId,
        task: Task,
        answers: &mut Answers,
    ) {
        let Some(volume) = self.table.get_mut(&id).filter(|v| !v.serving.is_settled()) else {
            return self.perform(server, id, task, answers);
        };
        let busy = || format!("volume {id} is busy: ask again later");
        match task {
            Task::Attach(agent, ..) | Task::Detach(agent)
                if volume.waiting.len() >= MAX_WAITING =>
            {
                answers.refused(agent, busy());
            }
            Task::Grant(keyd, _) | Task::Confirm(keyd, _)
                if volume.waiting.len() >= MAX_WAITING =>
            {
                answers.grant_refused(keyd, id.into(), busy());
            }
            // A key is to go: that is never refused.
            task => volume.waiting.push_back(task),
        }
    }

    fn perform(&mut self, server: &mut Server, id: VolumeId, task: Task, answers: &mut Answers) {
        match task {
            Task::Grant(keyd, new) => self.grant(server, keyd, new, answers),
            Task::Confirm(keyd, grant) => self.confirm(server, keyd, *grant, answers),
            Task::Revoke(keyd) => {
                if let Some(Then::Forget(keyd)) = self.detach(server, id, Then::Forget(keyd)) {
                    self.forget(keyd, id, answers);
                }
            }
            Task::Attach(agent, socket, file) => {
                match self.attach(server, id, agent, &socket, file) {
                    Ok(Begun::Already) => answers.done(agent),
                    Ok(Begun::Now) => {}
                    Err(reason) => answers.refused(agent, reason),
                }
            }
            Task::Detach(agent) => {
                // Nothing to stop: what was asked for is so.
                if let Some(Then::Wipe(agent)) = self.detach(server, id, Then::Wipe(agent)) {
                    answers.done(agent);
                }
            }
        }
    }

    /// Encrypted volumes whose keys are held, those that are served on with a predecessor's among them.
    pub(super) fn with_keys(&self) -> Vec<VolumeId> {
        let is_held = |(_, volume): &(&VolumeId, &Volume)| volume.has_key();
        let held = self.table.iter().filter(is_held);
        held.map(|(id, _)| *id).collect()
    }

    /// A grant without the keys that it needs: it is one that is held, keys and all, or none.
    fn confirm(
        &mut self,
        server: &mut Server,
        keyd: Keyd,
        grant: VolumeGrant,
        answers: &mut Answers,
    ) {
        let id = grant.volume;
        let held = |volume: &&mut Volume| volume.has_key() && is_same(&volume.held.grant, &grant);
        let Some(volume) = self.table.get_mut(&id).filter(held) else {
            let reason = "it came without keys, and is not one whose keys are held".to_owned();
            return answers.grant_refused(keyd, id.into(), reason);
        };
        volume.held.grant = grant;
        volume.remember_grant(server);
        self.taken_in(keyd, id, Ok(()), answers);
    }

    fn grant(&mut self, server: &mut Server, keyd: Keyd, new: Box<Held>, answers: &mut Answers) {
        let id = new.grant.volume;
        let count = self.table.len();
        let Some(volume) = self.table.get_mut(&id) else {
            if count >= MAX_VOLUMES {
                let reason = format!("{MAX_VOLUMES} volumes are granted, no more fit");
                return answers.grant_refused(keyd, id.into(), reason);
            }
            self.table.insert(id, Volume::new(*new));
            return answers.granted(keyd, id.into());
        };
        if is_same(&volume.held.grant, &new.grant) {
            volume.held.grant = new.grant;
            volume.remember_grant(server);
            if !volume.has_key() {
                // It was wiped by a detach. (A key that is held already is wiped here.)
                volume.held.keys = new.keys;
            }
            return self.taken_in(keyd, id, Ok(()), answers);
        }
        if only_grew(&volume.held.grant, &new.grant) && volume.served().is_some() {
            let grown = volume.grow(server, &new);
            return self.taken_in(keyd, id, grown, answers);
        }
        if let Err(reason) = volume.may_drop_previous(server, &new.grant) {
            return answers.grant_refused(keyd, id.into(), reason);
        }
        if only_rekeys(&volume.held.grant, &new.grant) && volume.served().is_some() {
            let rekeyed = volume.rekey(server, *new);
            return self.taken_in(keyd, id, rekeyed, answers);
        }
        tracing::info!(volume = %id, "another grant replaces the one held");
        if let Some(Then::Replace(keyd, new)) = self.detach(server, id, Then::Replace(keyd, new)) {
            self.replace(keyd, *new, answers);
        }
    }

    /// A grant was taken into the volume as it is, or not.
    fn taken_in(
        &mut self,
        keyd: Keyd,
        id: VolumeId,
        result: Result<(), String>,
        answers: &mut Answers,
    ) {
        match result {
            Ok(()) => {
                self.limit(id);
                answers.granted(keyd, id.into());
            }
            Err(reason) => answers.grant_refused(keyd, id.into(), reason),
        }
    }

    /// Puts a grant in the place of one that is not served.
    pub(super) fn replace(&mut self, keyd: Keyd, new: Held, answers: &mut Answers) {
        let id = new.grant.volume;
        self.table.insert(id, Volume::new(new));
        self.forget_groups();
        answers.granted(keyd, id.into());
    }

    pub(super) fn forget(&mut self, keyd: Keyd, id: VolumeId, answers: &mut Answers) {
        self.table.remove(&id);
        self.forget_groups();
        answers.revoked(keyd, id.into());
    }

    /// Begins to take a served volume away; gives `then` back if it is not served.
    fn detach(&mut self, server: &mut Server, id: VolumeId, then: Then) -> Option<Then> {
        let Some(volume) = self.table.get_mut(&id) else {
            return Some(then);
        };
        match std::mem::replace(&mut volume.serving, Serving::No) {
            Serving::Yes(device_id, device) => {
                volume.serving = Serving::Detaching(device_id, device, then);
                server.detach(device_id);
                None
            }
            other => {
                volume.serving = other;
                Some(then)
            }
        }
    }

    /// Whether no volume is attached, or being attached or detached.
    pub(super) fn serves_nothing(&self) -> bool {
        let mut volumes = self.table.values();
        volumes.all(|volume| volume.serving.device().is_none())
    }

    /// Something became of a device. What waited for it has its turn then.
    pub(super) fn event(&mut self, server: &mut Server, event: Event, answers: &mut Answers) {
        let (device, result) = match event {
            Event::Attached { id, result } => (id, Some(result)),
            Event::Detached { id } if self.ended(id, answers) => return,
            Event::Detached { id } => (id, None),
            Event::GivenUp { id, requests } => return self.given_up(server, id, requests, answers),
            Event::Connected { .. }
            | Event::Disconnected { .. }
            | Event::FenceGone { .. }
            | Event::Frozen
            | Event::Thawed
            | Event::Resumed { .. }
            | Event::Health { .. } => return,
        };
        let has = |v: &Volume| v.serving.device().is_some_and(|(id, _)| id == device);
        let Some((id, volume)) = self.table.iter_mut().find(|(_, volume)| has(volume)) else {
            return;
        };
        let id = *id;
        let waiting = std::mem::take(&mut volume.waiting);
        let serving = std::mem::replace(&mut volume.serving, Serving::No);
        match (serving, result) {
            (Serving::Attaching(device, served, agent), Some(Ok(()))) => {
                volume.serving = Serving::Yes(device, served);
                tracing::info!(volume = %id, socket = %volume.held.grant.socket, "volume attached");
                answers.done(agent);
            }
            (Serving::Resuming(device, served), Some(Ok(()))) => {
                volume.serving = Serving::Yes(device, served);
                tracing::info!(volume = %id, socket = %volume.held.grant.socket, "volume taken over");
            }
            // The server takes it away again, and says so.
            (Serving::Resuming(device, served), Some(Err(reason))) => {
                volume.serving = Serving::Detaching(device, served, Then::GiveUp(reason));
            }
            (Serving::Attaching(device, served, agent), Some(Err(reason))) => {
                volume.serving = Serving::Detaching(device, served, Then::Restore(agent, reason));
            }
            (Serving::Detaching(_, device, then), None) => {
                tracing::info!(volume = %id, "volume detached");
                self.detached(id, device, then, answers);
            }
            (other, _) => volume.serving = other,
        }
        for task in waiting {
            self.ask(server, id, task, answers);
        }
    }

    /// The volume stays granted, without a key.
    pub(super) fn wipe(&mut self, id: VolumeId) {
        if let Some(volume) = self.table.get_mut(&id) {
            volume.held.keys = GrantedKeys::default();
        }
    }

    /// Nothing of a device is left but what this thread has of it.
    fn detached(
        &mut self,
        id: VolumeId,
        device: Arc<BlkDevice>,
        then: Then,
        answers: &mut Answers,
    ) {
        match then {
            Then::Wipe(agent) => {
                drop(device);
                self.wipe(id);
                answers.done(agent);
            }
            Then::Forget(keyd) => {
                drop(device);
                self.forget(keyd, id, answers);
            }
            Then::Replace(keyd, new) => {
                drop(device);
                self.replace(keyd, *new, answers);
            }
            Then::Restore(agent, reason) => {
                if let Some(volume) = self.table.get_mut(&id) {
                    volume.held.keys.take_back(device);
                }
                answers.refused(agent, reason);
            }
            Then::GiveUp(reason) => {
                drop(device);
                self.wipe(id);
                tracing::error!(volume = %id, "it can't be served on: {reason}");
            }
        }
    }
}

impl GrantedKeys {
    /// Takes the keys of a device back that nobody else has any more.
    pub(super) fn take_back(&mut self, device: Arc<BlkDevice>) {
        let ciphers = Arc::into_inner(device).and_then(BlkDevice::into_ciphers);
        let Some(Ciphers { cipher, rekey, .. }) = ciphers else {
            return;
        };
        let key = |cipher| Arc::into_inner(cipher).map(|cipher: Cipher| cipher.key);
        self.key = key(cipher);
        self.previous = rekey.and_then(|rekey| key(rekey.previous));
    }
}
