//! The production [`Manager`]: what rot, keyd and the agent say becomes what is served.
//!
//! | from | what | handled in |
//! | --- | --- | --- |
//! | rot | who the others are, listeners, the end | here |
//! | a predecessor | what it served, by rot's descriptor store | [`resume`] |
//! | keyd | which workers: at the start, and others later | [`start`], [`workers`] |
//! | keyd | grants with their keys and limits, revocations | [`grant`], [`volumes`], [`limits`] |
//! | rot | the end for another process's sake, and a beginning | [`upgrade`] |
//! | keyd | grants of NICs | [`nics`] |
//! | agent | which file, which interface, what is it doing, may it go | [`requests`], [`attach`], [`volumes`], [`nics`], [`status`] |
//!
//! Every request is answered by exactly one message, once what it asks for is so. Nothing the agent says
//! widens what keyd granted. A process that is restarted gets a new channel; what is served stays served
//! meanwhile.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod answer;
mod attach;
mod grant;
mod grow;
mod left;
mod limits;
mod link;
mod nics;
mod page;
mod peer;
mod rekey;
mod remove;
mod requests;
mod resume;
mod spare;
mod start;
mod status;
mod upgrade;
mod volumes;
mod workers;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use bulkhead_crypto::SecretArena;
use bulkhead_protocol::control::DataplaneToAgent;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_protocol::{Received, ServedId};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::server::{Event, MANAGER_TOKENS, Manager, Server};
use crate::stored::Keeper;
use crate::worker::message::DeviceId;
use answer::{Answers, Keyd};
use link::{Link, Read};
use nics::Nics;
use peer::Peer;
use start::Early;
use volumes::{Held, Task, Volumes};

pub use start::Start;
pub use volumes::MAX_VOLUMES;
pub use workers::Staff;

const ROT: Token = Token(MANAGER_TOKENS);
const KEYD: Token = Token(MANAGER_TOKENS + 1);
const AGENT: Token = Token(MANAGER_TOKENS + 2);
/// A NIC's mirror has ended by itself.
const MIRRORS: Token = Token(MANAGER_TOKENS + 3);

/// Messages taken from one channel before frontends have their turn.
const TURN: usize = 64;

/// Slots for keys: two of each volume, one of them that of a re-key, and those that are to replace them.
pub const KEY_SLOTS: usize = 4 * MAX_VOLUMES;

/// The manager. Made before the process locks itself in.
#[derive(Debug)]
pub struct Control {
    arena: Arc<SecretArena>,
    registry: Registry,
    rot: Link<ToRot>,
    keyd: Peer<DataplaneToKeyd>,
    agent: Peer<DataplaneToAgent>,
    volumes: Volumes,
    nics: Nics,
    staff: Staff,
    /// What was learnt at the start and is not taken in yet.
    early: Option<Early>,
    /// Devices whose predecessor's connections are not served yet: hello is said after them.
    resuming: BTreeSet<DeviceId>,
    hello_due: bool,
    /// The number of this process's fence in the store.
    fence: u64,
    /// The server has stopped for a candidate, or is about to: nobody else is heard.
    frozen: bool,
    /// Which of rot's attempts that is.
    attempt: Option<u64>,
    /// What rot said meanwhile.
    from_rot: Vec<Received<FromRot>>,
    /// Nothing more is taken from anybody.
    ended: bool,
    failure: Option<String>,
}

impl Control {
    /// A manager that knows whom the start met, and says hello to rot when the loop runs, if it was not
    /// said before. `arena` has [`KEY_SLOTS`] slots; `staff` are the server's workers; what is to outlive the
    /// process is kept by `keeper`, where its fence has this number.
    ///
    /// # Errors
    /// When rot's channel can't be watched.
    pub fn new(
        start: Start,
        arena: Arc<SecretArena>,
        server: &Server,
        staff: Staff,
        (keeper, fence): (Keeper, u64),
    ) -> io::Result<Self> {
        let registry = server.registry()?;
        let rot = Link::new(start.rot, None, "rot", 0, (&registry, ROT))?;
        let mirrors_end = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        registry.register(
            &mut SourceFd(&mirrors_end.as_fd().as_raw_fd()),
            MIRRORS,
            Interest::READABLE,
        )?;
        Ok(Self {
            arena,
            registry,
            rot,
            keyd: Peer::default(),
            agent: Peer::default(),
            volumes: Volumes::kept_by(keeper),
            nics: Nics::telling(Arc::new(mirrors_end)),
            staff,
            early: Some(start.early),
            resuming: BTreeSet::new(),
            hello_due: false,
            fence,
            frozen: false,
            attempt: None,
            from_rot: Vec::new(),
            ended: false,
            failure: None,
        })
    }

    /// Why the server was stopped, if not because rot said so.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Takes everything that rot has said. Also done before a message of keyd's or the agent's is
    /// handled, which may follow from what rot told both of us.
    fn read_rot(&mut self, server: &mut Server) {
        while !self.ended {
            match self.rot.read::<FromRot>() {
                Read::Message(received) if self.frozen => self.hear_frozen(server, received),
                Read::Message(received) => {
                    if let Err(problem) = self.on_rot(server, received)
                        && !self.rot.tolerate(&problem)
                    {
                        self.stop(server, "rot sends what makes no sense".to_owned());
                    }
                }
                Read::Later => return,
                Read::Broken(reason) => self.stop(server, format!("the channel to rot: {reason}")),
            }
        }
    }

    fn stop(&mut self, server: &Server, reason: String) {
        self.ended = true;
        self.failure = Some(reason);
        server.stop();
    }

    fn on_rot(
        &mut self,
        server: &mut Server,
        mut received: Received<FromRot>,
    ) -> Result<(), String> {
        match &received.message {
            FromRot::Peer {
                role, generation, ..
            } => {
                let (role, generation) = (*role, *generation);
                let [socket, process] = received.take_fds().map_err(|e| e.to_string())?;
                self.meet(role, generation, socket, process)
            }
            FromRot::Listener { name } => {
                let name = name.clone();
                let [socket] = received.take_fds().map_err(|e| e.to_string())?;
                let socket = Arc::new(socket);
                self.nics.new_listener(server, &name, &socket);
                self.volumes.new_listener(server, name, socket);
                Ok(())
            }
            FromRot::ListenerGone { name } => {
                self.volumes.listener_gone(server, name);
                self.nics.listener_gone(server, name);
                Ok(())
            }
            FromRot::Stop => {
                tracing::info!("rot says stop");
                self.ended = true;
                server.stop();
                Ok(())
            }
            FromRot::Freeze { attempt } => {
                self.freeze(server, *attempt);
                Ok(())
            }
            _ => Err("it is not for the data plane".to_owned()),
        }
    }

    /// Takes a peer's channel, in the place of the one to its predecessor.
    fn meet(
        &mut self,
        role: Role,
        generation: u64,
        socket: OwnedFd,
        process: OwnedFd,
    ) -> Result<(), String> {
        let registry = &self.registry;
        let met = match role {
            Role::Keyd => {
                self.keyd
                    .meet(generation, socket, process, role.name(), (registry, KEYD))
            }
            Role::Agent => {
                self.agent
                    .meet(generation, socket, process, role.name(), (registry, AGENT))
            }
            Role::Dataplane => Err("it names the data plane itself as a peer".to_owned()),
        };
        met.inspect(|()| tracing::info!(generation, "{role} is there"))
    }

    fn read_keyd(&mut self, server: &mut Server) {
        for _ in 0..TURN {
            let Some(link) = &mut self.keyd.link else {
                return;
            };
            let keyd = Keyd(link.generation);
            match link.read::<KeydToDataplane>() {
                Read::Message(received) => {
                    self.read_rot(server);
                    self.on_keyd(server, keyd, received);
                }
                Read::Later => return,
                Read::Broken(reason) => return self.keyd.lose(Role::Keyd, &reason, &self.registry),
            }
        }
        self.keyd.look_again(&self.registry, KEYD);
    }

    fn on_keyd(
        &mut self,
        server: &mut Server,
        keyd: Keyd,
        mut received: Received<KeydToDataplane>,
    ) {
        let mut answers = Answers::default();
        match received.message.clone() {
            KeydToDataplane::Grant { grant }
                if grant.data_unit_bytes.is_some() && received.fds.is_empty() =>
            {
                let volume = grant.volume;
                match grant::check(&grant) {
                    Ok(()) => {
                        let task = Task::Confirm(keyd, Box::new(grant));
                        self.volumes.ask(server, volume, task, &mut answers);
                    }
                    Err(reason) => answers.grant_refused(keyd, volume.into(), reason),
                }
            }
            KeydToDataplane::Grant { grant } => {
                let volume = grant.volume;
                let keys = grant::take_keys(
                    (&self.arena, self.volumes.keeper.keeps()),
                    &grant,
                    &mut received,
                );
                match grant::check(&grant).and(keys) {
                    Ok(keys) => {
                        let task = Task::Grant(keyd, Box::new(Held { grant, keys }));
                        self.volumes.ask(server, volume, task, &mut answers);
                    }
                    Err(reason) => answers.grant_refused(keyd, volume.into(), reason),
                }
            }
            KeydToDataplane::GrantNic { grant } => {
                let nic = grant.nic;
                let plain = received.take_fds::<0>().map_err(|e| e.to_string());
                match grant.check().and(plain) {
                    Ok([]) => {
                        let task = nics::Task::Grant(keyd, Box::new(grant));
                        let world = (server, &self.volumes);
                        self.nics.ask(world, nic, task, &mut answers);
                    }
                    Err(reason) => answers.grant_refused(keyd, nic.into(), reason),
                }
            }
            KeydToDataplane::Revoke {
                id: ServedId::Volume(id),
            } => {
                self.volumes
                    .ask(server, id, Task::Revoke(keyd), &mut answers);
            }
            KeydToDataplane::Revoke {
                id: ServedId::Nic(id),
            } => {
                let task = nics::Task::Revoke(keyd);
                let world = (server, &self.volumes);
                self.nics.ask(world, id, task, &mut answers);
            }
            KeydToDataplane::Workers { workers } => self.hear_workers(server, keyd, workers),
        }
        self.send(answers);
    }

    /// Whatever keyd and the agent have said while nobody heard it.
    fn look_at_peers(&self) {
        self.keyd.look_again(&self.registry, KEYD);
        self.agent.look_again(&self.registry, AGENT);
    }

    /// The agent hears of a storage that does worse than before, or better; if it is not there, it asks later.
    fn tell_of_storage(&mut self, device: DeviceId) {
        let Some((volume, status)) = self.volumes.storage_of(device) else {
            return;
        };
        let mut answers = Answers::default();
        answers.storage(volume, status);
        self.send(answers);
    }

    /// The agent hears of mirrors that have ended; if it is not there, as soon as it asks what is mirrored.
    fn tell_of_mirrors(&mut self) {
        if let Some(event) = &self.nics.mirrors_end {
            // Nothing else reads it; how often it was written to says nothing.
            let _ = event.read();
        }
        if self.agent.link.is_some() {
            let mut answers = Answers::default();
            self.nics.tell_ended_mirrors(&mut answers);
            self.send(answers);
        }
    }

    /// Sends answers to those who asked, if they are still there.
    fn send(&mut self, answers: Answers) {
        for (keyd, message) in answers.to_keyd {
            if let Some(link) = self.keyd.link_of(keyd.0) {
                link.send(message);
            }
        }
        for message in answers.unasked {
            if let Some(link) = &mut self.agent.link {
                link.send(message);
            }
        }
        for (agent, message) in answers.to_agent {
            if let Some(link) = self.agent.link_of(agent.generation) {
                link.send(message);
            }
        }
    }
}

impl Manager for Control {
    fn register(&mut self, _: &Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, server: &mut Server, token: Token) {
        // rot's channel can be written to: that is the first event.
        self.begin(server);
        match token {
            _ if self.ended => {}
            KEYD | AGENT if self.frozen => {}
            ROT => self.read_rot(server),
            KEYD => self.read_keyd(server),
            AGENT => self.read_agent(server),
            MIRRORS => self.tell_of_mirrors(),
            _ => tracing::error!("the event loop names a descriptor that nobody has: {token:?}"),
        }
    }

    fn event(&mut self, server: &mut Server, event: Event) {
        let mut answers = Answers::default();
        match event {
            Event::Health { id, .. } => return self.tell_of_storage(id),
            Event::Frozen => return self.is_stopped(),
            Event::Thawed => return self.serves_again(server),
            Event::FenceGone { number } => return self.fence_is_gone(number),
            Event::Resumed { id } | Event::Detached { id } => self.has_resumed(id),
            _ => {}
        }
        let world = (&mut *server, &self.volumes);
        self.nics.event(world, &event, &mut answers);
        self.volumes.event(server, event, &mut answers);
        self.send(answers);
    }
}
