//! What rot tells the agent: which peers are there, the operators' socket, its answers, and when to
//! end.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use bulkhead_protocol::admin::ProcessStatus;
use bulkhead_protocol::rot::{FromRot, Role};
use bulkhead_protocol::{Channel, ChannelError, Received};

use mio::Token;

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
            FromRot::Bound { request_id }
            | FromRot::Unbound { request_id }
            | FromRot::Upgraded { request_id } => (request_id, Answer::Done),
            FromRot::Upgrading { request_id } => (request_id, Answer::Upgrading),
            FromRot::Failed { request_id, reason } => (request_id, Answer::Refused(plain(&reason))),
            FromRot::Programs { mut programs } => {
                for program in &mut programs {
                    program.failed = program.failed.as_deref().map(plain);
                }
                self.event(Event::Programs(programs));
                return Ok(());
            }
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
        match role {
            Role::Keyd => self.connect(Peer::Keyd, KEYD, socket, generation)?,
            Role::Dataplane => self.connect(Peer::Dataplane, DATAPLANE, socket, generation)?,
            // What rot says of the agent itself is for the status alone.
            Role::Agent => drop(socket),
        }
        tracing::info!(%role, generation, pid, "peer is there");
        self.event(Event::Started(process));
        Ok(())
    }

    /// Takes the channel to a new generation of a peer in place of the old one.
    fn connect(
        &mut self,
        peer: Peer,
        token: Token,
        socket: OwnedFd,
        generation: u64,
    ) -> Result<(), ChannelError> {
        let old = self.link(peer).map_or(0, |link| link.generation);
        if old >= generation {
            return Err(ChannelError::Malformed(format!(
                "generation {generation} of {peer} is not above {old}, which is here"
            )));
        }
        let channel = Channel::from(socket);
        channel.set_nonblocking(true)?;
        self.drop_link(peer);
        self.watch(&channel, token)?;
        let link = Some(Link::new(channel, generation));
        match peer {
            Peer::Keyd => self.keyd = link,
            _ => self.dataplane = link,
        }
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
