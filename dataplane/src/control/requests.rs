//! What the agent asks: each request goes to the table of what it is about, with its descriptors.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::control::{AgentToDataplane, DataplaneToAgent};
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{Received, ServedId};

use super::answer::{Agent, Answers};
use super::link::Read;
use super::volumes::Task;
use super::{AGENT, Control, TURN, nics, status};
use crate::server::Server;

impl Control {
    pub(super) fn read_agent(&mut self, server: &mut Server) {
        for _ in 0..TURN {
            let Some(link) = &mut self.agent.link else {
                return;
            };
            let generation = link.generation;
            match link.read::<AgentToDataplane>() {
                Read::Message(received) => {
                    self.read_rot(server);
                    self.on_agent(server, generation, received);
                }
                Read::Later => return,
                Read::Broken(reason) => {
                    return self.agent.lose(Role::Agent, &reason, &self.registry);
                }
            }
        }
        self.agent.look_again(&self.registry, AGENT);
    }

    fn on_agent(
        &mut self,
        server: &mut Server,
        generation: u64,
        mut received: Received<AgentToDataplane>,
    ) {
        let mut answers = Answers::default();
        let agent = Agent {
            generation,
            request_id: request_id(&received.message),
        };
        let taken = match received.message.clone() {
            AgentToDataplane::Attach { volume, socket, .. } => {
                received
                    .take_fds()
                    .map(|[file]| match self.nics.served_on(&socket) {
                        Some(nic) => {
                            let reason = format!("NIC {nic} is served on socket {socket}");
                            answers.refused(agent, reason);
                        }
                        None => {
                            let task = Task::Attach(agent, socket, file);
                            self.volumes.ask(server, volume, task, &mut answers);
                        }
                    })
            }
            AgentToDataplane::AttachNic {
                nic, socket, facts, ..
            } => {
                let fds = std::mem::take(&mut received.fds);
                let task = nics::Task::Attach(agent, socket, facts, fds);
                let world = (server, &self.volumes);
                self.nics.ask(world, nic, task, &mut answers);
                Ok(())
            }
            AgentToDataplane::AttachSwitch { switch, facts, .. } => {
                let given = nics::Parts::Given(facts, std::mem::take(&mut received.fds));
                match self.nics.attach_switch(&self.volumes, &switch, given) {
                    Ok(()) => answers.done(agent),
                    Err(reason) => answers.refused(agent, reason),
                }
                Ok(())
            }
            AgentToDataplane::Mirror { nic, .. } => {
                received
                    .take_fds()
                    .map(|[file]| match self.nics.mirror(server, nic, file) {
                        Ok(()) => answers.done(agent),
                        Err(reason) => answers.refused(agent, reason),
                    })
            }
            plain => received.take_fds().map(|[]| {
                self.on_plain_request(server, agent, &plain, &mut answers);
            }),
        };
        if let Err(error) = taken {
            answers.refused(agent, error.to_string());
        }
        self.send(answers);
    }

    /// A request without a descriptor.
    fn on_plain_request(
        &mut self,
        server: &mut Server,
        agent: Agent,
        request: &AgentToDataplane,
        answers: &mut Answers,
    ) {
        match *request {
            // These have descriptors.
            AgentToDataplane::Attach { .. }
            | AgentToDataplane::AttachNic { .. }
            | AgentToDataplane::AttachSwitch { .. }
            | AgentToDataplane::Mirror { .. } => {}
            AgentToDataplane::Detach { id, .. } => match id {
                ServedId::Volume(id) => {
                    self.volumes.ask(server, id, Task::Detach(agent), answers);
                }
                ServedId::Nic(id) => {
                    let task = nics::Task::Detach(agent);
                    self.nics.ask((server, &self.volumes), id, task, answers);
                }
            },
            AgentToDataplane::PrepareRemove { id, force, .. } => {
                let prepared = match id {
                    ServedId::Volume(id) => self.volumes.prepare_remove(server, id, force),
                    ServedId::Nic(id) => self.nics.prepare_remove(server, id, force),
                };
                match prepared {
                    Ok(()) => answers.done(agent),
                    Err(reason) => answers.refused(agent, reason),
                }
            }
            AgentToDataplane::CancelRemove { id, .. } => {
                match id {
                    ServedId::Volume(id) => self.volumes.cancel_remove(server, id),
                    ServedId::Nic(id) => self.nics.cancel_remove((server, &self.volumes), id),
                }
                answers.done(agent);
            }
            AgentToDataplane::Status { request_id } => {
                let message = DataplaneToAgent::Status {
                    request_id,
                    volumes: status::of(&self.volumes, server),
                    workers: self.staff.status(server),
                };
                answers.to_agent.push((agent, message));
            }
            AgentToDataplane::Networks { request_id } => {
                let networks = self.nics.networks();
                let message = DataplaneToAgent::Networks {
                    request_id,
                    networks,
                };
                answers.to_agent.push((agent, message));
                self.nics.tell_ended_mirrors(answers);
            }
            AgentToDataplane::Nics { request_id, after } => {
                let nics = self.nics.status(server, after);
                let message = DataplaneToAgent::Nics {
                    request_id,
                    nics,
                    switches: self.nics.switch_status(),
                };
                answers.to_agent.push((agent, message));
            }
        }
    }
}

fn request_id(request: &AgentToDataplane) -> u64 {
    match request {
        AgentToDataplane::Attach { request_id, .. }
        | AgentToDataplane::Detach { request_id, .. }
        | AgentToDataplane::PrepareRemove { request_id, .. }
        | AgentToDataplane::CancelRemove { request_id, .. }
        | AgentToDataplane::Status { request_id }
        | AgentToDataplane::AttachNic { request_id, .. }
        | AgentToDataplane::AttachSwitch { request_id, .. }
        | AgentToDataplane::Mirror { request_id, .. }
        | AgentToDataplane::Networks { request_id }
        | AgentToDataplane::Nics { request_id, .. } => *request_id,
    }
}
