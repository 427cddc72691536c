//! The event loop: it owns every channel, waits on all of them at once, turns what arrives into
//! events for the [`Agent`] and sends what the agent wants sent. It never waits on one of them.
//!
//! Nothing a peer sends ends the agent: what does not decode is dropped and counted, and a peer
//! that goes on with it loses its channel.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use bulkhead_protocol::rot::ToRot;
use bulkhead_protocol::{Channel, ChannelError};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::agent::Agent;
use crate::clients::{Clients, FromClient};
use crate::link::{Link, MAX_GARBAGE, Read, note, send};
use crate::message::{Action, Answer, ClientId, Event, Peer, from_dataplane, from_keyd};

const ROT: Token = Token(0);
pub(crate) const KEYD: Token = Token(1);
pub(crate) const DATAPLANE: Token = Token(2);
pub(crate) const LISTENER: Token = Token(3);
/// The first operator's; the next ones follow.
const FIRST_CLIENT: usize = 16;
/// Messages taken from one source before the others have their turn.
const TURN: usize = 16;

/// Why the loop ended.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// rot is gone, and with it everything that runs here.
    #[error("rot closed its channel")]
    RotGone,
    /// rot sends what is no message.
    #[error("rot sent {MAX_GARBAGE} messages that make no sense: is it of another version?")]
    RotGarbled,
    /// The channel to rot.
    #[error("the channel to rot: {0}")]
    Rot(ChannelError),
    /// The kernel.
    #[error("the event loop: {0}")]
    Io(#[from] io::Error),
}

/// The loop and all it owns.
#[derive(Debug)]
pub struct EventLoop {
    poll: Poll,
    agent: Agent,
    pub(crate) rot: Link,
    pub(crate) keyd: Option<Link>,
    pub(crate) dataplane: Option<Link>,
    pub(crate) listener: Option<UnixListener>,
    clients: Clients,
    /// Sources that may have more to read.
    ready: BTreeSet<Token>,
    pub(crate) stop: bool,
}

impl EventLoop {
    /// A loop with rot's channel alone; rot sends the others.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new(rot: Channel, agent: Agent) -> Result<Self, LoopError> {
        rot.set_nonblocking(true)?;
        let event_loop = Self {
            poll: Poll::new()?,
            agent,
            rot: Link::new(rot, 0),
            keyd: None,
            dataplane: None,
            listener: None,
            clients: Clients::default(),
            ready: BTreeSet::new(),
            stop: false,
        };
        event_loop.watch(&event_loop.rot.channel, ROT)?;
        Ok(event_loop)
    }

    /// Sends a message to rot.
    ///
    /// # Errors
    /// rot is gone, or takes nothing more.
    pub fn send_to_rot(&self, message: &ToRot) -> Result<(), LoopError> {
        self.rot.channel.send(message, &[]).map_err(LoopError::Rot)
    }

    /// Runs until rot says stop.
    ///
    /// # Errors
    /// See [`LoopError`].
    pub fn run(&mut self) -> Result<(), LoopError> {
        let mut events = Events::with_capacity(64);
        while !self.stop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                polled => polled?,
            }
            self.ready
                .extend(events.iter().map(mio::event::Event::token));
            for token in self.ready.clone() {
                self.read(token)?;
                self.perform()?;
            }
            let now = Instant::now();
            for client in self.clients.drop_silent(now) {
                self.ready.remove(&token_of(client));
            }
            self.agent.tick(now);
            self.perform()?;
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let deadlines = [self.agent.next_deadline(), self.clients.next_deadline()];
        let next = deadlines.into_iter().flatten().min()?;
        // epoll counts whole milliseconds; one more, so that it never wakes just before.
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    pub(crate) fn watch(&self, source: &impl AsRawFd, token: Token) -> io::Result<()> {
        let raw = source.as_raw_fd();
        let interest = Interest::READABLE;
        self.poll
            .registry()
            .register(&mut SourceFd(&raw), token, interest)
    }

    /// Closing alone would not do: rot has the listener too, and its descriptor stays in the poll.
    pub(crate) fn unwatch(&self, source: &impl AsRawFd) {
        let raw = source.as_raw_fd();
        if let Err(error) = self.poll.registry().deregister(&mut SourceFd(&raw)) {
            tracing::debug!("descriptor {raw} was not watched: {error}");
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.agent.handle(Instant::now(), event);
    }

    /// Takes one turn's messages from a source.
    fn read(&mut self, token: Token) -> Result<(), LoopError> {
        for _ in 0..TURN {
            let more = match token {
                ROT => self.read_rot()?,
                KEYD => self.read_keyd(),
                DATAPLANE => self.read_dataplane(),
                LISTENER => self.accept(),
                Token(number) => self.read_client(number),
            };
            if !more {
                self.ready.remove(&token);
                break;
            }
        }
        Ok(())
    }

    fn read_keyd(&mut self) -> bool {
        let Some(link) = &mut self.keyd else {
            return false;
        };
        let read = link.read(Peer::Keyd);
        self.answered(Peer::Keyd, read, from_keyd)
    }

    fn read_dataplane(&mut self) -> bool {
        let Some(link) = &mut self.dataplane else {
            return false;
        };
        let read = link.read(Peer::Dataplane);
        self.answered(Peer::Dataplane, read, from_dataplane)
    }

    /// Takes an answer in; false when there is nothing more to read.
    fn answered<M>(
        &mut self,
        peer: Peer,
        read: Read<M>,
        decode: impl FnOnce(M) -> (u64, Answer),
    ) -> bool {
        let mut read = read;
        if let Read::Message(received) = &mut read
            && let Err(error) = received.take_fds::<0>()
            && let Some(link) = self.link(peer)
        {
            read = link.refuse(peer, &error);
        }
        match read {
            Read::Message(received) => {
                let (request_id, answer) = decode(received.message);
                self.event(Event::Answered {
                    peer,
                    request_id,
                    answer,
                });
                true
            }
            Read::Dropped => true,
            Read::Drained => false,
            Read::Broken => {
                self.unlink(peer);
                false
            }
        }
    }

    pub(crate) fn link(&mut self, peer: Peer) -> Option<&mut Link> {
        match peer {
            Peer::Rot => Some(&mut self.rot),
            Peer::Keyd => self.keyd.as_mut(),
            Peer::Dataplane => self.dataplane.as_mut(),
        }
    }

    /// The peer is gone, or is treated as if.
    fn unlink(&mut self, peer: Peer) {
        self.drop_link(peer);
        tracing::warn!("{peer} is gone");
        self.event(Event::Ended(peer));
    }

    /// Closes the channel to a peer, if there is one.
    pub(crate) fn drop_link(&mut self, peer: Peer) {
        let link = match peer {
            Peer::Rot => None,
            Peer::Keyd => self.keyd.take(),
            Peer::Dataplane => self.dataplane.take(),
        };
        if let Some(link) = link {
            self.unwatch(&link.channel);
        }
    }

    fn accept(&mut self) -> bool {
        let Some(listener) = &self.listener else {
            return false;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                tracing::warn!("an operator's connection can't be taken: {error}");
                return false;
            }
        };
        let channel = Channel::from(OwnedFd::from(stream));
        if channel.set_nonblocking(true).is_err() {
            return true;
        }
        let raw = channel.as_raw_fd();
        if let Some((id, _)) = self.clients.add(channel, Instant::now()) {
            let watched = self.poll.registry().register(
                &mut SourceFd(&raw),
                token_of(id),
                Interest::READABLE,
            );
            if watched.is_ok() {
                self.ready.insert(token_of(id));
            }
        }
        true
    }

    fn read_client(&mut self, number: usize) -> bool {
        let Some(client) = client_of(number) else {
            return false;
        };
        match self.clients.receive(client) {
            FromClient::Nothing => false,
            FromClient::Request(request, envelope) => {
                self.event(Event::Asked {
                    client,
                    request,
                    envelope,
                });
                true
            }
            FromClient::Gone => {
                self.event(Event::Gone(client));
                false
            }
        }
    }

    /// Sends what the agent wants sent.
    fn perform(&mut self) -> Result<(), LoopError> {
        for action in self.agent.take_actions() {
            match action {
                Action::Rot(message) => match self.rot.channel.send(&message, &[]) {
                    Err(ChannelError::Closed) => return Err(LoopError::RotGone),
                    sent => note(Peer::Rot, sent),
                },
                Action::Keyd(message, envelope) => {
                    send(self.keyd.as_ref(), Peer::Keyd, &message, &[envelope]);
                }
                Action::Dataplane(message, fds) => {
                    let link = self.dataplane.as_ref();
                    send(link, Peer::Dataplane, &message, &fds);
                }
                Action::Reply(client, reply) => {
                    self.clients.reply(client, reply);
                    self.ready.remove(&token_of(client));
                }
            }
        }
        Ok(())
    }
}

fn token_of(client: ClientId) -> Token {
    let number = usize::try_from(client.0).unwrap_or(usize::MAX - FIRST_CLIENT);
    Token(FIRST_CLIENT + number)
}

fn client_of(number: usize) -> Option<ClientId> {
    Some(ClientId(number.checked_sub(FIRST_CLIENT)? as u64))
}
