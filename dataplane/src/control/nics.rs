//! The table of granted NICs: what keyd granted, and what is served of it.
//!
//! A NIC is served only where three agree: keyd's grant, the listener of that name from rot, and the port from
//! the agent: descriptors of its own ([`attach`]), or a switch that is attached ([`switches`]). As with volumes, what is
//! asked of a NIC while workers take it up or put it down waits its turn.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod attach;
mod grant;
mod mirror;
mod ports;
mod remove;
mod resume;
mod status;
mod switches;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_protocol::control::PortFacts;
use bulkhead_protocol::net::{MAX_NICS, NicGrant};
use bulkhead_protocol::{NicId, SocketName, SwitchName};
use nix::sys::eventfd::EventFd;

use super::answer::{Agent, Answers, Keyd};
use super::volumes::Volumes;
use crate::net::NetDevice;
use crate::server::{Event, Server};
use crate::worker::message::DeviceId;
use attach::Begun;
pub(super) use ports::Parts;
use switches::Switch;

/// What can be asked of one NIC while it is being attached or detached.
const MAX_WAITING: usize = 16;

/// Something asked of one NIC.
#[derive(Debug)]
pub(super) enum Task {
    /// keyd grants it.
    Grant(Keyd, Box<NicGrant>),
    /// keyd takes the grant back.
    Revoke(Keyd),
    /// The agent gives it its port.
    Attach(Agent, SocketName, PortFacts, Vec<OwnedFd>),
    /// The agent has it served no more.
    Detach(Agent),
}

/// What happens once nothing is left of a device.
#[derive(Debug)]
enum Then {
    /// The agent is told so.
    Done(Agent),
    /// The NIC is forgotten.
    Forget(Keyd),
    /// Another grant takes the place of the one it had.
    Replace(Keyd, Box<NicGrant>),
    /// Workers could not serve it.
    Refuse(Agent, String),
    /// Workers could not go on with what a predecessor served.
    GiveUp(String),
}

#[derive(Debug)]
enum Serving {
    No,
    Attaching(DeviceId, Arc<NetDevice>, Agent),
    /// A predecessor served it; the agent did not ask.
    Resuming(DeviceId, Arc<NetDevice>),
    Yes(DeviceId, Arc<NetDevice>),
    Detaching(DeviceId, Then),
}

impl Serving {
    fn device(&self) -> Option<DeviceId> {
        match self {
            Self::No => None,
            Self::Attaching(id, ..)
            | Self::Resuming(id, _)
            | Self::Yes(id, _)
            | Self::Detaching(id, _) => Some(*id),
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self, Self::No | Self::Yes(..))
    }
}

/// A NIC.
#[derive(Debug)]
struct Nic {
    grant: NicGrant,
    serving: Serving,
    /// Its removal is prepared: no new frontend.
    removing: bool,
    waiting: VecDeque<Task>,
}

impl Nic {
    fn new(grant: NicGrant) -> Self {
        Self {
            grant,
            serving: Serving::No,
            removing: false,
            waiting: VecDeque::new(),
        }
    }

    /// Its device, if it is attached and stays so.
    fn served(&self) -> Option<(DeviceId, &Arc<NetDevice>)> {
        match &self.serving {
            Serving::Yes(id, device) => Some((*id, device)),
            _ => None,
        }
    }
}

/// All NICs, and the switches that they are on.
#[derive(Debug, Default)]
pub(super) struct Nics {
    table: BTreeMap<NicId, Nic>,
    switches: BTreeMap<SwitchName, Switch>,
    /// Written to when a mirror ends by itself.
    pub(super) mirrors_end: Option<Arc<EventFd>>,
}

impl Nics {
    /// None yet; the end of their mirrors is written to this event.
    pub(super) fn telling(mirrors_end: Arc<EventFd>) -> Self {
        Self {
            mirrors_end: Some(mirrors_end),
            ..Self::default()
        }
    }

    /// Does what is asked of a NIC, or lets it wait until the NIC is settled.
    pub(super) fn ask(
        &mut self,
        (server, volumes): (&mut Server, &Volumes),
        id: NicId,
        task: Task,
        answers: &mut Answers,
    ) {
        let Some(nic) = self.table.get_mut(&id).filter(|n| !n.serving.is_settled()) else {
            return self.perform((server, volumes), id, task, answers);
        };
        let busy = || format!("NIC {id} is busy: ask again later");
        match task {
            Task::Attach(agent, ..) | Task::Detach(agent) if nic.waiting.len() >= MAX_WAITING => {
                answers.refused(agent, busy());
            }
            Task::Grant(keyd, _) if nic.waiting.len() >= MAX_WAITING => {
                answers.grant_refused(keyd, id.into(), busy());
            }
            // A grant is to go: that is never refused.
            task => nic.waiting.push_back(task),
        }
    }

    fn perform(
        &mut self,
        (server, volumes): (&mut Server, &Volumes),
        id: NicId,
        task: Task,
        answers: &mut Answers,
    ) {
        match task {
            Task::Grant(keyd, new) => self.grant(server, keyd, new, answers),
            Task::Revoke(keyd) => {
                if let Some(Then::Forget(keyd)) = self.detach(server, id, Then::Forget(keyd)) {
                    self.forget(keyd, id, answers);
                }
            }
            Task::Attach(agent, socket, facts, fds) => {
                let port = Parts::Given(facts, fds);
                match self.attach((server, volumes), id, agent, &socket, port) {
                    Ok(Begun::Already) => answers.done(agent),
                    Ok(Begun::Now) => {}
                    Err(reason) => answers.refused(agent, reason),
                }
            }
            Task::Detach(agent) => {
                // Nothing to stop: what was asked for is so.
                if let Some(Then::Done(agent)) = self.detach(server, id, Then::Done(agent)) {
                    answers.done(agent);
                }
            }
        }
    }

    fn grant(
        &mut self,
        server: &mut Server,
        keyd: Keyd,
        new: Box<NicGrant>,
        answers: &mut Answers,
    ) {
        let id = new.nic;
        let count = self.table.len();
        let Some(nic) = self.table.get_mut(&id) else {
            if count >= MAX_NICS {
                let reason = format!("{MAX_NICS} NICs are granted, no more fit");
                return answers.grant_refused(keyd, id.into(), reason);
            }
            self.table.insert(id, Nic::new(*new));
            return answers.granted(keyd, id.into());
        };
        if grant::is_same(&nic.grant, &new) {
            if nic.grant.mirror != new.mirror {
                nic.end_mirror(server);
            }
            if let Some((_, device)) = nic.served() {
                grant::apply(device, &new);
            }
            nic.grant = *new;
            nic.remember_grant(server);
            return answers.granted(keyd, id.into());
        }
        tracing::info!(nic = %id, "another grant replaces the one held");
        if let Some(Then::Replace(keyd, new)) = self.detach(server, id, Then::Replace(keyd, new)) {
            self.replace(keyd, *new, answers);
        }
    }

    /// Puts a grant in the place of one that is not served.
    fn replace(&mut self, keyd: Keyd, new: NicGrant, answers: &mut Answers) {
        let id = new.nic;
        self.table.insert(id, Nic::new(new));
        self.forget_switches();
        answers.granted(keyd, id.into());
    }

    fn forget(&mut self, keyd: Keyd, id: NicId, answers: &mut Answers) {
        self.table.remove(&id);
        self.forget_switches();
        answers.revoked(keyd, id.into());
    }

    /// Begins to take a served NIC away; gives `then` back if it is not served.
    fn detach(&mut self, server: &mut Server, id: NicId, then: Then) -> Option<Then> {
        let Some(nic) = self.table.get_mut(&id) else {
            return Some(then);
        };
        match std::mem::replace(&mut nic.serving, Serving::No) {
            Serving::Yes(device_id, _) => {
                nic.serving = Serving::Detaching(device_id, then);
                server.detach(device_id);
                None
            }
            other => {
                nic.serving = other;
                Some(then)
            }
        }
    }

    /// Whether no NIC is attached, or being attached or detached.
    pub(super) fn serves_nothing(&self) -> bool {
        let mut nics = self.table.values();
        nics.all(|nic| nic.serving.device().is_none())
    }

    /// Something became of a device. What waited for it has its turn then.
    pub(super) fn event(
        &mut self,
        (server, volumes): (&mut Server, &Volumes),
        event: &Event,
        answers: &mut Answers,
    ) {
        let (device, result) = match event {
            Event::Attached { id, result } => (*id, Some(result.clone())),
            // What workers still have of it is buffers of a guest that is gone.
            Event::Detached { id } | Event::GivenUp { id, .. } => (*id, None),
            _ => return,
        };
        let is_it = |nic: &Nic| nic.serving.device() == Some(device);
        let Some((id, nic)) = self.table.iter_mut().find(|(_, nic)| is_it(nic)) else {
            return;
        };
        let id = *id;
        let waiting = std::mem::take(&mut nic.waiting);
        match (std::mem::replace(&mut nic.serving, Serving::No), result) {
            (Serving::Attaching(device, served, agent), Some(Ok(()))) => {
                nic.serving = Serving::Yes(device, served);
                let port = &nic.grant.port;
                tracing::info!(nic = %id, socket = %nic.grant.socket, %port, "NIC attached");
                answers.done(agent);
            }
            (Serving::Resuming(device, served), Some(Ok(()))) => {
                nic.serving = Serving::Yes(device, served);
                tracing::info!(nic = %id, socket = %nic.grant.socket, "NIC taken over");
            }
            (Serving::Resuming(device, _), Some(Err(reason))) => {
                nic.serving = Serving::Detaching(device, Then::GiveUp(reason));
            }
            // The server takes it away again, and says so.
            (Serving::Attaching(device, _, agent), Some(Err(reason))) => {
                nic.serving = Serving::Detaching(device, Then::Refuse(agent, reason));
            }
            (Serving::Detaching(_, then), None) => {
                tracing::info!(nic = %id, "NIC detached");
                self.detached(id, then, answers);
            }
            (other, _) => nic.serving = other,
        }
        for task in waiting {
            self.ask((&mut *server, volumes), id, task, answers);
        }
    }

    /// Nothing of a device is left.
    fn detached(&mut self, id: NicId, then: Then, answers: &mut Answers) {
        match then {
            Then::Done(agent) => answers.done(agent),
            Then::Forget(keyd) => self.forget(keyd, id, answers),
            Then::Replace(keyd, new) => self.replace(keyd, *new, answers),
            Then::Refuse(agent, reason) => answers.refused(agent, reason),
            Then::GiveUp(reason) => tracing::error!(nic = %id, "it can't be served on: {reason}"),
        }
    }
}
