//! Who is connected to a device: its listener in the event loop, frontends that are let in, hung up on, or gone on with
//! after a predecessor.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::State;
use crate::server::Event;
use crate::server::connection::{Connection, ToWorkers};
use crate::worker::message::DeviceId;
/// What a connection is watched for.
const CONNECTION: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// A listener and a connection have a token each.
fn tokens(id: DeviceId) -> (Token, Token) {
    let base = usize::try_from(id.0).unwrap_or(usize::MAX / 4) * 2;
    (Token(base), Token(base + 1))
}

/// Whether a token is that of a connection.
pub(in crate::server) fn is_connection(token: Token) -> bool {
    !token.0.is_multiple_of(2)
}

/// The device that a token belongs to.
pub(in crate::server) fn id_of(token: Token) -> DeviceId {
    DeviceId((token.0 / 2) as u64)
}

impl State {
    pub(in crate::server) fn register(&self, registry: &Registry) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let (listener, _) = tokens(self.facts.id);
        let fd = self.listener.as_raw_fd();
        registry.register(&mut SourceFd(&fd), listener, Interest::READABLE)
    }

    pub(in crate::server) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Takes another listener.
    pub(in crate::server) fn set_listener(
        &mut self,
        listener: UnixListener,
        registry: &Registry,
    ) -> io::Result<()> {
        let before = std::mem::replace(&mut self.listener, listener);
        let _ = registry.deregister(&mut SourceFd(&before.as_raw_fd()));
        self.register(registry).or_else(|error| {
            self.listener = before;
            self.register(registry).and(Err(error))
        })
    }

    /// Hangs up on a frontend whose connection no successor knows of, for want of room in the store or since its card's port can't outlive
    /// this process. Its queues are put aside
    /// like all others, and stop if this process goes on.
    pub(in crate::server) fn cut_off(&mut self, registry: &Registry) {
        if self.connection.is_some() && self.place.connection().is_none() {
            self.warn("its frontend has to connect again: its connection is not stored with rot");
            self.hang_up(registry);
        }
    }

    /// Has the loop look at its listener and its connection, whatever happened to them meanwhile.
    pub(in crate::server) fn look_at_everything(
        &mut self,
        registry: &Registry,
        out: &mut ToWorkers,
    ) {
        // It was hung up on for a successor that did not come.
        if let Some(connection) = self.connection.as_mut().filter(|c| c.fd().is_none()) {
            connection.close(out);
        }
        self.look_again = true;
        self.come_back(registry);
        self.come_back_to_listener(registry);
    }

    pub(super) fn hang_up(&mut self, registry: &Registry) {
        if let Some(connection) = &mut self.connection {
            if let Some(fd) = connection.fd() {
                let _ = registry.deregister(&mut SourceFd(&fd));
            }
            connection.hang_up(&mut self.place);
        }
    }

    /// Takes the next frontend off the backlog; true if one was there.
    pub(super) fn accept(
        &mut self,
        registry: &Registry,
        out: &mut ToWorkers,
        events: &mut Vec<Event>,
    ) -> bool {
        self.accept_failed = false;
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                self.accept_failed = true;
                self.warn(&format!("a frontend can't be accepted: {error}"));
                return false;
            }
        };
        if !self.may_connect(&stream) {
            return true;
        }
        match self.connect(stream, registry) {
            Ok(connection) => {
                let connection = self.connection.insert(connection);
                if self.comings.allows() {
                    tracing::info!("frontend connected to {}", self.label);
                }
                events.push(Event::Connected { id: self.facts.id });
                let driven = connection.drive(&mut self.place, out);
                self.note(driven);
            }
            Err(error) => {
                self.forget_connection();
                self.warn(&format!("a frontend can't be served: {error}"));
            }
        }
        true
    }

    fn connect(&mut self, stream: UnixStream, registry: &Registry) -> io::Result<Connection> {
        let mut connection = Connection::new(stream, self.facts.clone(), &mut self.place)?;
        connection.session.set_fenced(self.fenced);
        let (_, token) = tokens(self.facts.id);
        if let Some(fd) = connection.fd() {
            registry.register(&mut SourceFd(&fd), token, CONNECTION)?;
        }
        Ok(connection)
    }

    /// Goes on with the connection that a predecessor left, if it left one.
    pub(super) fn go_on(
        &mut self,
        registry: &Registry,
        out: &mut ToWorkers,
        events: &mut Vec<Event>,
    ) {
        if self.aside.is_some() {
            return self.forget_connection();
        }
        let resumed = Connection::resumed(&mut self.place, self.facts.clone());
        let resumed = resumed.map_err(|error| error.to_string());
        let watched = resumed.and_then(|connection| {
            let (_, token) = tokens(self.facts.id);
            if let Some(fd) = connection.as_ref().and_then(Connection::fd) {
                let watched = registry.register(&mut SourceFd(&fd), token, CONNECTION);
                watched.map_err(|error| error.to_string())?;
            }
            Ok(connection)
        });
        match watched {
            Ok(None) => {}
            Ok(Some(connection)) => {
                let connection = self.connection.insert(connection);
                connection.session.set_fenced(self.fenced);
                events.push(Event::Connected { id: self.facts.id });
                let driven = connection.start_again(&mut self.place, out);
                self.note(driven);
            }
            Err(reason) => {
                self.forget_connection();
                self.warn(&format!("its frontend has to connect again: {reason}"));
            }
        }
    }

    /// A successor is to know of no connection.
    fn forget_connection(&mut self) {
        let cache = self.facts.device.cache_mode();
        self.place.put_connection(cache, None);
    }

    /// The uid of the process that connected, against the one that may.
    fn may_connect(&self, stream: &UnixStream) -> bool {
        let Some(allowed) = self.access.allowed_uid else {
            return true;
        };
        match getsockopt(stream, PeerCredentials) {
            Ok(peer) if peer.uid() == allowed => true,
            Ok(peer) => {
                self.warn(&format!(
                    "a frontend of uid {} (pid {}) is refused: only uid {allowed} may connect",
                    peer.uid(),
                    peer.pid()
                ));
                false
            }
            Err(error) => {
                self.warn(&format!("a frontend's uid can't be told: {error}"));
                false
            }
        }
    }

    pub(super) fn drop_connection(&mut self, registry: &Registry) {
        self.hang_up(registry);
        if self.connection.take().is_some() {
            self.look_again = false;
            if self.comings.allows() {
                tracing::info!("frontend disconnected from {}", self.label);
            }
        }
    }

    /// Has the loop come back to a connection that has had its turn.
    pub(in crate::server) fn come_back(&mut self, registry: &Registry) {
        if std::mem::take(&mut self.look_again)
            && let Some(fd) = self.connection.as_ref().and_then(Connection::fd)
        {
            let (_, token) = tokens(self.facts.id);
            let again = registry.reregister(&mut SourceFd(&fd), token, CONNECTION);
            self.report_unwatched(again);
        }
    }

    /// Has the loop come back to a listener with more frontends than one turn takes.
    pub(in crate::server) fn come_back_to_listener(&self, registry: &Registry) {
        let (token, _) = tokens(self.facts.id);
        let fd = self.listener.as_raw_fd();
        let again = registry.reregister(&mut SourceFd(&fd), token, Interest::READABLE);
        self.report_unwatched(again);
    }

    fn report_unwatched(&self, watched: io::Result<()>) {
        if let Err(error) = watched {
            self.warn(&format!("the event loop does not take its socket: {error}"));
        }
    }
}
