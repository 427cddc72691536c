//! What the children ask for: to be connected, and the agent's listeners.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_protocol::channel::Channel;
use bulkhead_protocol::rot::{FromRot, Role, ToRot};

use super::Supervisor;
use crate::socket_file::Access;

impl Supervisor {
    /// A message of a child's.
    pub(super) fn on_message(&mut self, role: Role, message: &ToRot, now: Instant) {
        let hello = self.children.get(role).running().is_some_and(|r| r.hello);
        let (request_id, outcome) = match message {
            ToRot::Hello if hello => {
                self.children.get_mut(role).complain("it said Hello again");
                return;
            }
            ToRot::Hello => return self.on_hello(role, now),
            ToRot::Bind { request_id, .. } | ToRot::Unbind { request_id, .. } => {
                let outcome = if role != Role::Agent {
                    Err("only the agent may bind and unbind listeners".to_owned())
                } else if !hello {
                    Err("say Hello first".to_owned())
                } else if self.stop_by.is_some() {
                    Err("rot is stopping".to_owned())
                } else {
                    self.carry_out(message, now)
                };
                (*request_id, outcome)
            }
            ToRot::Upgrade {
                request_id,
                component,
            } => {
                let outcome = match (role, hello) {
                    (Role::Agent, true) => self.begin_upgrade(*component, *request_id, now),
                    (Role::Agent, false) => Err("say Hello first".to_owned()),
                    _ => Err("only the agent may ask for upgrades".to_owned()),
                };
                match outcome {
                    Ok(()) => return,
                    Err(reason) => (*request_id, Err(reason)),
                }
            }
            ToRot::Approve { release } if role == Role::Keyd && hello => {
                return self.approve(*release);
            }
            ToRot::Frozen { attempt } if role == Role::Dataplane => {
                return self.on_frozen(*attempt, now);
            }
            ToRot::CantFreeze { reason, attempt } if role == Role::Dataplane => {
                return self.on_cant_freeze(reason, *attempt, now);
            }
            ToRot::Ready
            | ToRot::Frozen { .. }
            | ToRot::CantFreeze { .. }
            | ToRot::Approve { .. } => {
                let child = self.children.get_mut(role);
                return child.complain("it says what is not its to say");
            }
        };
        let reply = outcome.unwrap_or_else(|reason| {
            let child = self.children.get_mut(role);
            child.complain(&format!("request refused: {reason}"));
            FromRot::Failed { request_id, reason }
        });
        self.children.get_mut(role).send(reply, Vec::new(), now);
    }

    /// Connects a child to each peer that is up, then gives it what is its own.
    fn on_hello(&mut self, role: Role, now: Instant) {
        if self.stop_by.is_some() {
            return;
        }
        if let Some(running) = self.children.get_mut(role).running_mut() {
            running.hello = true;
        }
        for peer in Role::ALL {
            if peer != role && self.children.get(peer).is_up() {
                self.connect(role, peer, now);
            }
        }
        self.up_in_upgrade(role, now);
        let child = self.children.get_mut(role);
        match role {
            Role::Keyd => self.tell_keyd_what_runs(now),
            Role::Agent => {
                child.send(
                    FromRot::AdminListener,
                    vec![Rc::clone(&self.own.admin)],
                    now,
                );
                self.tell_programs(now);
            }
            Role::Dataplane => {
                for (name, socket) in self.listeners.iter() {
                    let name = name.clone();
                    child.send(FromRot::Listener { name }, vec![socket], now);
                }
            }
        }
    }

    /// Makes the pair's channel and introduces each to the other.
    fn connect(&mut self, a: Role, b: Role, now: Instant) {
        let introductions = (
            self.children.get(a).introduction(),
            self.children.get(b).introduction(),
        );
        let (Some((a_is, a_pidfd)), Some((b_is, b_pidfd))) = introductions else {
            return;
        };
        match pair() {
            Ok((a_end, b_end)) => {
                self.children
                    .get_mut(a)
                    .send(b_is, vec![a_end, b_pidfd], now);
                self.children
                    .get_mut(b)
                    .send(a_is, vec![b_end, a_pidfd], now);
            }
            // Out of descriptors, say. The child is started again and so asks again.
            Err(error) => {
                let reason = format!("can't connect it to {b}: {error}");
                self.children.get_mut(a).kill(&reason);
            }
        }
    }

    /// A request of the agent's.
    fn carry_out(&mut self, request: &ToRot, now: Instant) -> Result<FromRot, String> {
        match request {
            ToRot::Bind {
                request_id,
                name,
                uid,
                gid,
                mode,
            } => {
                let access = Access {
                    uid: *uid,
                    gid: *gid,
                    mode: *mode,
                };
                let bound = self.listeners.bind(name, access);
                if let Some(socket) = bound.map_err(|e| e.to_string())? {
                    tracing::info!(%name, uid, gid, "listener bound, mode {mode:o}");
                    let name = name.clone();
                    self.tell_dataplane(FromRot::Listener { name }, vec![socket], now);
                }
                Ok(FromRot::Bound {
                    request_id: *request_id,
                })
            }
            ToRot::Unbind { request_id, name } => {
                if self.listeners.unbind(name).map_err(|e| e.to_string())? {
                    tracing::info!(%name, "listener removed");
                    let name = name.clone();
                    self.tell_dataplane(FromRot::ListenerGone { name }, Vec::new(), now);
                }
                Ok(FromRot::Unbound {
                    request_id: *request_id,
                })
            }
            _ => Err("it is no request".to_owned()),
        }
    }

    /// Before its `Hello` it needs no news: it gets all listeners then.
    fn tell_dataplane(&mut self, message: FromRot, fds: Vec<Rc<OwnedFd>>, now: Instant) {
        let dataplane = self.children.get_mut(Role::Dataplane);
        if dataplane.is_up() {
            dataplane.send(message, fds, now);
        }
    }
}

/// A channel between two peers. Each end names the sender of each message, from the first on:
/// a receiver that asked only once it has its end would miss what was sent before.
fn pair() -> io::Result<(Rc<OwnedFd>, Rc<OwnedFd>)> {
    let (a, b) = Channel::pair()?;
    a.ask_for_sender()?;
    b.ask_for_sender()?;
    Ok((Rc::new(a.into()), Rc::new(b.into())))
}
