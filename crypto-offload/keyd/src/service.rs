//! The service: one loop that waits on rot, the agent and the data plane at once and takes one
//! message at a time from each.
//!
//! While a bundle is being delivered the agent's next request waits in its socket; rot and the data
//! plane are heard all the time. Nothing that the agent or the data plane sends ends the service.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_protocol::keys::{AgentToKeyd, DataplaneToKeyd, KeydToAgent};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_protocol::{Channel, ChannelError, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::custody::Custody;
use crate::delivery::{ABSENT, Delivery, GONE};
use crate::link::{Link, MAX_GARBAGE, Read, plain};
use crate::peers::{Agent, Dataplane};
use crate::reply;
use crate::vault::Vault;

/// Why the service ended, if not because rot said so.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// rot sends what is no message.
    #[error("rot sent {MAX_GARBAGE} messages that make no sense: is it of another version?")]
    RotGarbled,
    /// The channel to rot.
    #[error("the channel to rot: {0}")]
    Rot(#[from] ChannelError),
    /// The kernel.
    #[error("the event loop: {0}")]
    Io(#[from] io::Error),
}

/// Which channels have something to read.
#[derive(Debug, Default)]
struct Ready {
    rot: bool,
    agent: bool,
    dataplane: bool,
}

/// The service and all it owns.
#[derive(Debug)]
pub struct KeyService {
    rot: Link,
    agent: Option<Agent>,
    dataplane: Option<Dataplane>,
    /// Generation of the last data plane that rot told of, 0 before the first.
    dataplane_generation: u64,
    delivery: Option<Delivery>,
    custody: Custody,
    vault: Vault,
    stop: bool,
}

impl KeyService {
    /// A service with rot's channel alone; rot sends the others.
    ///
    /// # Errors
    /// What making the channel non-blocking fails with.
    pub(crate) fn new(rot: Channel, custody: Custody, vault: Vault) -> io::Result<Self> {
        Ok(Self {
            rot: Link::to_rot(rot)?,
            agent: None,
            dataplane: None,
            dataplane_generation: 0,
            delivery: None,
            custody,
            vault,
            stop: false,
        })
    }

    /// Says hello and serves until rot says stop, or is gone.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn run(&mut self) -> Result<(), ServiceError> {
        self.rot.channel.send(&ToRot::Hello, &[])?;
        let floor = self.custody.floor();
        tracing::info!(host = self.vault.host(), floor, "serving");
        while !self.stop {
            let ready = self.wait()?;
            if ready.rot {
                // Alone, until there is no more: the peer that a request is about may just arrive.
                self.read_rot()?;
            } else {
                if ready.dataplane {
                    self.read_dataplane();
                }
                if ready.agent {
                    self.read_agent();
                }
            }
            self.deliver(Instant::now());
        }
        tracing::info!("stopped");
        Ok(())
    }

    fn wait(&self) -> io::Result<Ready> {
        let delivery = self.delivery.as_ref();
        let mut wanted = PollFlags::POLLIN;
        wanted.set(
            PollFlags::POLLOUT,
            delivery.is_some_and(Delivery::is_blocked),
        );
        let mut fds = vec![PollFd::new(self.rot.channel.as_fd(), PollFlags::POLLIN)];
        if let Some(dataplane) = &self.dataplane {
            fds.push(PollFd::new(dataplane.link.channel.as_fd(), wanted));
        }
        let agent = self.agent.as_ref().filter(|_| delivery.is_none());
        if let Some(agent) = agent {
            let channel = agent.link.channel.as_fd();
            fds.push(PollFd::new(channel, PollFlags::POLLIN));
        }
        let timeout = delivery.map(|d| d.deadline.saturating_duration_since(Instant::now()));
        match poll(&mut fds, whole_ms(timeout)) {
            Err(Errno::EINTR) => return Ok(Ready::default()),
            polled => polled?,
        };
        let mut any = fds.iter().map(|fd| fd.any().unwrap_or(true));
        Ok(Ready {
            rot: any.next().unwrap_or_default(),
            dataplane: self.dataplane.is_some() && any.next().unwrap_or_default(),
            agent: agent.is_some() && any.next().unwrap_or_default(),
        })
    }

    fn read_rot(&mut self) -> Result<(), ServiceError> {
        match self.rot.read() {
            Read::Message(received) => {
                if let Err(error) = self.take_from_rot(received) {
                    self.rot.complain(&error.to_string());
                }
            }
            Read::Nothing => {}
            Read::Broken if self.rot.is_garbled() => {}
            Read::Broken => {
                tracing::info!("rot is gone");
                self.stop = true;
            }
        }
        if self.rot.is_garbled() {
            return Err(ServiceError::RotGarbled);
        }
        Ok(())
    }

    fn take_from_rot(&mut self, mut received: Received<FromRot>) -> Result<(), ChannelError> {
        match received.message {
            FromRot::Peer {
                role,
                generation,
                pid,
                ..
            } => {
                let [socket, pidfd] = received.take_fds()?;
                let link = Link::to_peer(Channel::from(socket), role, generation)?;
                match role {
                    Role::Agent => self.new_agent(Agent::new(link, pidfd)?)?,
                    Role::Dataplane => self.new_dataplane(Dataplane::new(link))?,
                    Role::Keyd => return Err(misplaced("keyd is no peer of keyd")),
                }
                tracing::info!(%role, generation, pid, "peer is there");
                Ok(())
            }
            FromRot::Runs { release } => {
                let [] = received.take_fds()?;
                self.custody.release_runs(release);
                Ok(())
            }
            FromRot::Stop => {
                let [] = received.take_fds()?;
                self.stop = true;
                Ok(())
            }
            _ => Err(misplaced("it is not for keyd")),
        }
    }

    fn new_agent(&mut self, agent: Agent) -> Result<(), ChannelError> {
        let held = self.agent.as_ref().map_or(0, |a| a.link.generation);
        newer(agent.link.generation, held)?;
        self.agent = Some(agent);
        Ok(())
    }

    fn new_dataplane(&mut self, dataplane: Dataplane) -> Result<(), ChannelError> {
        newer(dataplane.link.generation, self.dataplane_generation)?;
        // It may hold what its predecessor was granted: that is revoked once more where it has to be.
        self.drop_dataplane();
        if let Some(delivery) = &mut self.delivery {
            delivery.dataplane_is_back();
        }
        self.dataplane_generation = dataplane.link.generation;
        let dataplane = self.dataplane.insert(dataplane);
        // It makes its workers now.
        match dataplane.tell_workers(self.custody.workers().as_ref()) {
            // Then the next delivery tells it.
            Err(ChannelError::WouldBlock) => Ok(()),
            told => told,
        }
    }

    fn drop_dataplane(&mut self) {
        self.dataplane = None;
        if let Some(delivery) = &mut self.delivery {
            delivery.dataplane_gone(GONE);
        }
    }

    fn read_dataplane(&mut self) {
        let Some(dataplane) = &mut self.dataplane else {
            return;
        };
        match dataplane.link.read::<DataplaneToKeyd>() {
            Read::Nothing => {}
            Read::Broken => {
                tracing::warn!("the data plane is gone");
                self.drop_dataplane();
            }
            Read::Message(received) => {
                if let Err(problem) = self.take_answer(received) {
                    self.complain_of_dataplane(&problem);
                }
            }
        }
    }

    fn take_answer(&mut self, mut received: Received<DataplaneToKeyd>) -> Result<(), String> {
        let [] = received.take_fds().map_err(|e| e.to_string())?;
        let answer = received.message;
        let asked = self.dataplane.as_mut().and_then(|d| d.answered(&answer));
        match (asked, &mut self.delivery) {
            (None, _) => return Err("it answers what was not asked".to_owned()),
            (Some(true), Some(delivery)) => delivery.answered(answer),
            _ => tracing::debug!("an answer that came too late"),
        }
        Ok(())
    }

    fn complain_of_dataplane(&mut self, problem: &str) {
        let Some(dataplane) = &mut self.dataplane else {
            return;
        };
        dataplane.link.complain(problem);
        if dataplane.link.is_garbled() {
            tracing::warn!("the data plane has lost its channel, until rot gives it another");
            self.drop_dataplane();
        }
    }

    fn read_agent(&mut self) {
        let Some(agent) = &mut self.agent else {
            return;
        };
        match agent.link.read::<AgentToKeyd>() {
            Read::Nothing => {}
            Read::Broken => {
                tracing::warn!("the agent is gone");
                self.agent = None;
            }
            Read::Message(received) => {
                let (request_id, taken) = match received.message {
                    AgentToKeyd::Accept { request_id } => {
                        (request_id, self.asked(request_id, received))
                    }
                    AgentToKeyd::CheckRelease { request_id } => {
                        (request_id, self.check_release(request_id, received))
                    }
                };
                if let Err(reason) = taken {
                    let reason = plain(&reason);
                    tracing::warn!(request_id, "refused: {reason}");
                    let refused = KeydToAgent::Refused { request_id, reason };
                    self.answer_agent(&refused);
                }
            }
        }
    }

    /// A release statement: if it holds, rot hears of it, and then the agent.
    fn check_release(
        &mut self,
        request_id: u64,
        mut received: Received<AgentToKeyd>,
    ) -> Result<(), String> {
        let agent = self.agent.as_ref().ok_or("no agent is known")?;
        agent.check_sender(received.sender.as_ref())?;
        let [statement] = received.take_fds().map_err(|e| e.to_string())?;
        let release = self.custody.check_release(statement.as_fd())?;
        let told = self.rot.channel.send(&ToRot::Approve { release }, &[]);
        told.map_err(|error| format!("rot can't be told: {error}"))?;
        self.answer_agent(&KeydToAgent::ReleaseApproved {
            request_id,
            release,
        });
        Ok(())
    }

    /// Takes a request in; the error is the reason of the refusal.
    fn asked(
        &mut self,
        request_id: u64,
        mut received: Received<AgentToKeyd>,
    ) -> Result<(), String> {
        let agent = self.agent.as_ref().ok_or("no agent is known")?;
        let agent_generation = agent.link.generation;
        agent.check_sender(received.sender.as_ref())?;
        let [envelope] = received.take_fds().map_err(|e| e.to_string())?;
        let accepted = self.custody.accept(envelope.as_fd(), &mut self.vault);
        let accepted = accepted.map_err(|e| e.to_string())?;
        let held = self.custody.held();
        let now = Instant::now();
        let mut delivery = Delivery::new(request_id, agent_generation, accepted, &held, now);
        if self.dataplane.is_none() {
            delivery.dataplane_gone(ABSENT);
        }
        self.delivery = Some(delivery);
        Ok(())
    }

    /// Takes the delivery a step further, and answers the agent when it is over.
    fn deliver(&mut self, now: Instant) {
        let Some(delivery) = &mut self.delivery else {
            return;
        };
        if now >= delivery.deadline {
            delivery.give_up(self.dataplane.as_mut());
        } else if let Some(dataplane) = &mut self.dataplane
            && !delivery.advance(dataplane, &self.vault)
        {
            tracing::warn!("the data plane is gone");
            self.drop_dataplane();
        }
        let dataplane = self.dataplane.as_ref();
        if let Some(delivery) = self.delivery.take_if(|d| d.is_over(dataplane)) {
            self.finish(delivery);
        }
    }

    fn finish(&mut self, delivery: Delivery) {
        let (request_id, epoch) = (delivery.request_id, delivery.epoch());
        let generation = delivery.agent_generation;
        let (undelivered, revoked) = delivery.into_outcome();
        self.custody.revoked(&revoked);
        tracing::info!(epoch, undelivered = undelivered.len(), "grants answered");
        // A restarted agent did not ask, and its numbers start anew.
        if self.agent.as_ref().map(|a| a.link.generation) == Some(generation) {
            let keys = self.custody.keys(&self.vault);
            self.answer_agent(&reply::accepted(request_id, epoch, undelivered, keys));
        }
    }

    /// An agent that takes no answers gets none.
    fn answer_agent(&self, answer: &KeydToAgent) {
        let Some(agent) = &self.agent else { return };
        if let Err(error) = agent.link.channel.send(answer, &[]) {
            tracing::warn!("an answer to the agent could not be sent: {error}");
        }
    }
}

fn misplaced(problem: &str) -> ChannelError {
    ChannelError::Malformed(problem.to_owned())
}

fn newer(generation: u64, held: u64) -> Result<(), ChannelError> {
    if generation > held {
        return Ok(());
    }
    Err(ChannelError::Malformed(format!(
        "its generation {generation} is not above the {held} that is here"
    )))
}

/// Rounded up, so that the wait never ends just before the deadline.
fn whole_ms(timeout: Option<Duration>) -> PollTimeout {
    let Some(timeout) = timeout else {
        return PollTimeout::NONE;
    };
    let ms = timeout.as_millis().saturating_add(1);
    u16::try_from(ms).map_or(PollTimeout::from(u16::MAX), PollTimeout::from)
}
