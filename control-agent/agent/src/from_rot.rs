//! What rot tells the agent: which peers are there, the operators' socket, its answers, and when to
//! end.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use bulkhead_protocol::admin::ProcessStatus;
use bulkhead_protocol::rot::{FromRot, Role};
use bulkhead_protocol::{Channel, ChannelError, Received};

use crate::event_loop::{DATAPLANE, EventLoop, KEYD, LISTENER, LoopError};
use crate::link::{Link, Read};
use crate::message::{Answer, Event, Peer};
use crate::text::plain;

impl EventLoop {
    /// Takes one message; false when there is none for now.
    pub(crate) fn read_rot(&mut self) -> Result<bool, LoopError> {
        if self.stop {
            return Ok(false);
        }
        match self.rot.read(Peer::Rot) {
            Read::Message(received) => {
                if let Err(error) = self.take_from_rot(received)
                    && matches!(self.rot.refuse::<FromRot>(Peer::Rot, &error), Read::Broken)
                {
                    return Err(LoopError::RotGarbled);
                }
                Ok(true)
            }
            Read::Dropped => Ok(true),
            Read::Drained => Ok(false),
            Read::Broken if self.rot.is_garbled() => Err(LoopError::RotGarbled),
            Read::Broken => Err(LoopError::RotGone),
        }
    }

    fn take_from_rot(&mut self, mut received: Received<FromRot>) -> Result<(), ChannelError> {
        if let FromRot::Peer { .. } = &received.message {
            let [socket, _pidfd] = received.take_fds()?;
            return self.peer(received.message, socket);
        }
        if received.message == FromRot::AdminListener {
            let [listener] = received.take_fds()?;
            return self.listen(listener);
        }
        let [] = received.take_fds()?;
        let (request_id, answer) = match received.message {
            FromRot::Bound { request_id } | FromRot::Unbound { request_id } => {
                (request_id, Answer::Done)
            }
            FromRot::Failed { request_id, reason } => (request_id, Answer::Refused(plain(&reason))),
            FromRot::Stop => {
                self.stop = true;
                return Ok(());
            }
            other => {
                return Err(ChannelError::Malformed(format!(
                    "not for the agent: {other:?}"
                )));
            }
        };
        self.event(Event::Answered {
            peer: Peer::Rot,
            request_id,
            answer,
        });
        Ok(())
    }

    fn peer(&mut self, message: FromRot, socket: OwnedFd) -> Result<(), ChannelError> {
        let FromRot::Peer {
            role,
            generation,
            measurement,
            pid,
        } = message
        else {
            return Ok(());
        };
        let process = ProcessStatus {
            role,
            pid,
            generation,
            measurement,
        };
        let (held, token) = match role {
            Role::Keyd => (&mut self.keyd, KEYD),
            Role::Dataplane => (&mut self.dataplane, DATAPLANE),
            // rot tells us of ourselves, if it does, for the status alone.
            Role::Agent => {
                self.event(Event::Started(process));
                return Ok(());
            }
        };
        if held
            .as_ref()
            .is_some_and(|link| link.generation >= generation)
        {
            return Err(ChannelError::Malformed(format!(
                "generation {generation} of {role} is not above the one that is here"
            )));
        }
        let channel = Channel::from(socket);
        channel.set_nonblocking(true)?;
        if let Some(old) = held.take() {
            self.unwatch(&old.channel);
        }
        self.watch(&channel, token)?;
        let link = Link::new(channel, generation);
        match role {
            Role::Keyd => self.keyd = Some(link),
            _ => self.dataplane = Some(link),
        }
        tracing::info!(%role, generation, pid, "peer is there");
        self.event(Event::Started(process));
        Ok(())
    }

    fn listen(&mut self, listener: OwnedFd) -> Result<(), ChannelError> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        if let Some(old) = self.listener.take() {
            self.unwatch(&old);
        }
        self.watch(&listener, LISTENER)?;
        self.listener = Some(listener);
        Ok(())
    }
}
