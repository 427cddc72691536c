//! A device on the control thread: its listener, who is connected, and where it is between attach
//! and detach.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::alarm::{Alarm, InWords};
use super::balance;
use super::connection::{Connection, Driven, ToWorkers};
use super::patience::{Due, Waiting};
use super::placement::Together;
use super::{Access, DeviceStatus, Event, Offer};
use crate::blk::{BlkDevice, Level};
use crate::device::Device;
use crate::hand::Hand;
use crate::log_limit::LogLimit;
use crate::net::part_of;
use crate::port::PortSpec;
use crate::stored::Place;
use crate::vhost_user::Facts;
use crate::worker::message::{DeviceId, FromWorker};

/// What a connection is watched for.
const CONNECTION: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// Where a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// So many workers have not said yet that they can serve it.
    Attaching(usize),
    /// It is offered.
    Attached,
    /// It goes, once its connection is closed.
    Leaving,
    /// So many workers still hold it.
    Detaching(usize),
    /// Nothing of it is left.
    Gone,
}

/// A device.
#[derive(Debug)]
pub(super) struct State {
    facts: Facts,
    listener: UnixListener,
    access: Access,
    label: String,
    /// Where it is remembered for a successor.
    pub(super) place: Place,
    stage: Stage,
    workers: usize,
    /// Why a worker can't serve it.
    failure: Option<String>,
    connection: Option<Connection>,
    pub(super) refuse_new: bool,
    /// Why nothing of it is served although it is offered, if so: it stays like that until it is detached.
    aside: Option<String>,
    /// Requests of an earlier process may still be under way.
    pub(super) fenced: bool,
    /// A predecessor's connection is to go on, or its queues are starting.
    resumes: bool,
    /// The detach is to be sent to the workers.
    detach_due: bool,
    /// The connection has had its turn, and there may be more to read.
    look_again: bool,
    /// The last frontend could not be accepted: to be tried again soon, since nothing will say when.
    accept_failed: bool,
    /// What people were told of its storage.
    alarm: Alarm,
    /// How long it has waited for what is under way.
    waiting: Waiting,
    /// Workers are to give up what is under way: with the keys?
    give_up_due: Option<bool>,
    /// Lines about frontends that come and go, and about what they did wrong.
    comings: LogLimit,
    warnings: LogLimit,
}

/// A listener and a connection have a token each.
fn tokens(id: DeviceId) -> (Token, Token) {
    let base = usize::try_from(id.0).unwrap_or(usize::MAX / 4) * 2;
    (Token(base), Token(base + 1))
}

/// Whether a token is that of a connection.
pub(super) fn is_connection(token: Token) -> bool {
    !token.0.is_multiple_of(2)
}

/// The device that a token belongs to.
pub(super) fn id_of(token: Token) -> DeviceId {
    DeviceId((token.0 / 2) as u64)
}

impl State {
    pub(super) fn new(offer: Offer, id: DeviceId, workers: usize) -> Self {
        let facts = Facts::of(id, offer.device);
        let resumes = offer.place.connection().is_some();
        Self {
            facts,
            listener: offer.listener,
            access: offer.access,
            label: offer.label,
            place: offer.place,
            stage: Stage::Attaching(workers),
            workers,
            failure: None,
            connection: None,
            refuse_new: false,
            aside: offer.aside,
            fenced: false,
            resumes,
            detach_due: false,
            look_again: false,
            accept_failed: false,
            alarm: Alarm::default(),
            waiting: Waiting::default(),
            give_up_due: None,
            comings: LogLimit::new(),
            warnings: LogLimit::new(),
        }
    }

    pub(super) fn register(&self, registry: &Registry) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let (listener, _) = tokens(self.facts.id);
        let fd = self.listener.as_raw_fd();
        registry.register(&mut SourceFd(&fd), listener, Interest::READABLE)
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Takes another listener.
    pub(super) fn set_listener(
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

    /// Whether a successor knows of it, or nobody is connected.
    pub(super) fn can_be_handed_over(&self) -> bool {
        let is_card = self.facts.device.net().is_some();
        self.connection.is_none() || self.place.keeps() || is_card
    }

    /// Hangs up on a frontend whose connection no successor knows of, for want of room in the store or since its card's port can't outlive
    /// this process. Its queues are put aside
    /// like all others, and stop if this process goes on.
    pub(super) fn cut_off(&mut self, registry: &Registry) {
        if self.connection.is_some() && self.place.connection().is_none() {
            self.warn("its frontend has to connect again: its connection is not stored with rot");
            self.hang_up(registry);
        }
    }

    /// Its name in log lines.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// What a thread that works for it has in hand.
    pub(super) fn hand(&self) -> Hand {
        self.facts.device.hand().get()
    }

    /// Whether a queue's driver broke it.
    pub(super) fn is_retired(&self, index: u16) -> bool {
        let session = self.connection.as_ref().map(|c| &c.session);
        session.is_some_and(|session| session.is_retired(index))
    }

    /// Has the loop look at its listener and its connection, whatever happened to them meanwhile.
    pub(super) fn look_at_everything(&mut self, registry: &Registry, out: &mut ToWorkers) {
        // It was hung up on for a successor that did not come.
        if let Some(connection) = self.connection.as_mut().filter(|c| c.fd().is_none()) {
            connection.close(out);
        }
        self.look_again = true;
        self.come_back(registry);
        self.come_back_to_listener(registry);
    }

    /// No successor is to know of it any more.
    pub(super) fn forget(&mut self) {
        std::mem::replace(&mut self.place, Place::none()).remove();
    }

    /// Whether the volume is this host's, or is being taken.
    pub(super) fn has_volume(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|c| c.session.has_volume())
    }

    /// The device as workers have it.
    pub(super) fn shared(&self) -> &Device {
        &self.facts.device
    }

    /// The disk, if it is one.
    pub(super) fn disk(&self) -> Option<Arc<BlkDevice>> {
        self.facts.device.blk().cloned()
    }

    /// What one of its queues has cost the workers so far.
    pub(super) fn work(&self, queue: u16) -> u64 {
        balance::work(&self.facts.device, queue)
    }

    /// With which others a queue is served.
    pub(super) fn together(&self, queue: u16) -> Option<Together> {
        let card = self.facts.device.net()?;
        Some(match &card.port {
            PortSpec::Switch(switch) => Together::Switch(switch.number()),
            PortSpec::Null | PortSpec::Source(_) | PortSpec::Outside(_) => {
                Together::Pair(self.facts.id, part_of(queue).1)
            }
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.as_ref().is_some_and(|c| c.fd().is_some())
    }

    pub(super) fn is_gone(&self) -> bool {
        self.stage == Stage::Gone
    }

    /// Whether the workers are to be told to let go of it; says so once.
    pub(super) fn wants_detach(&mut self) -> bool {
        std::mem::take(&mut self.detach_due)
    }

    /// Whether the workers are to give up what is under way, and with the keys; says so once.
    pub(super) fn wants_give_up(&mut self) -> Option<bool> {
        self.give_up_due.take()
    }

    /// Whether something is to be tried again soon: a frontend waits that could not be accepted, the
    /// volume is somebody else's, or a frontend has not been told of a change.
    pub(super) fn wants_retry(&self) -> bool {
        let session = self.connection.as_ref().map(|c| &c.session);
        self.accept_failed
            || self.alarm.is_raised()
            || self.waiting.goes_on()
            || session.is_some_and(|s| s.waits_for_volume() || s.backend_is_due())
    }

    /// Tries again.
    pub(super) fn retry(&mut self, out: &mut ToWorkers) {
        if let Some(connection) = &mut self.connection {
            connection.retry(&mut self.place, out);
        }
    }

    /// No request of an earlier process is under way any more.
    pub(super) fn fence_is_gone(&mut self, out: &mut ToWorkers) {
        self.fenced = false;
        if let Some(connection) = &mut self.connection {
            let driven = connection.fence_is_gone(&mut self.place, out);
            self.note(driven);
        }
    }

    /// Gives the device another capacity, and tells the frontend.
    pub(super) fn resize(&mut self, capacity_sectors: u64) -> Result<(), String> {
        let disk = self.facts.device.blk();
        let disk = disk.ok_or("it is a network card, and has no capacity")?;
        disk.resize(capacity_sectors).map_err(|e| e.to_string())?;
        self.config_changed();
        Ok(())
    }

    /// Its configuration space changed: the frontend is told, and a successor.
    pub(super) fn config_changed(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.session.config_changed();
            connection.remember(&mut self.place);
        }
    }

    pub(super) fn status(&self) -> DeviceStatus {
        let Some(connection) = &self.connection else {
            return DeviceStatus {
                fault: self.aside.clone(),
                ..DeviceStatus::default()
            };
        };
        let (running_queues, retired_queues) = connection.session.queues();
        DeviceStatus {
            connected: connection.fd().is_some(),
            running_queues,
            retired_queues,
            fault: connection.session.trouble().map(str::to_owned),
            holds_volume: connection.session.holds_volume(),
            waits_for_volume: connection.session.waits_for_volume(),
        }
    }

    /// Its listener or its connection is ready; both are looked at.
    pub(super) fn ready(&mut self, frontend_gone: bool, out: &mut ToWorkers) {
        if let Some(connection) = &mut self.connection {
            if frontend_gone {
                connection.peer_is_gone();
            }
            let driven = connection.drive(&mut self.place, out);
            self.note(driven);
        }
    }

    /// A worker says something about it.
    pub(super) fn on_worker(&mut self, message: FromWorker, out: &mut ToWorkers) {
        match message {
            FromWorker::Attached { result, .. } => {
                if let Err(reason) = result {
                    self.failure.get_or_insert(reason);
                }
                if let Stage::Attaching(left) = &mut self.stage {
                    *left = left.saturating_sub(1);
                }
            }
            FromWorker::Detached { .. } => {
                if let Stage::Detaching(left) = &mut self.stage {
                    *left = left.saturating_sub(1);
                }
            }
            message => {
                if let FromWorker::Retired { queue, reason } = &message {
                    self.report_retired(queue.index, reason);
                }
                if let Some(connection) = &mut self.connection {
                    let driven = connection.on_worker(message, &mut self.place, out);
                    self.note(driven);
                }
            }
        }
    }

    pub(super) fn detach(&mut self, out: &mut ToWorkers) {
        if matches!(self.stage, Stage::Attaching(_) | Stage::Attached) {
            // Workers that still answer the attach do so before they answer the detach.
            self.stage = Stage::Leaving;
            if let Some(connection) = &mut self.connection {
                connection.close(out);
            }
        }
    }

    /// Takes one step that has become possible; true if another may follow.
    pub(super) fn advance(
        &mut self,
        registry: &Registry,
        out: &mut ToWorkers,
        events: &mut Vec<Event>,
    ) -> bool {
        let id = self.facts.id;
        self.look_at_health(events);
        self.look_at_patience(registry, events);
        if self.connection.as_ref().is_some_and(Connection::is_closed) {
            self.drop_connection(registry);
            events.push(Event::Disconnected { id });
            return true;
        }
        let starts = self
            .connection
            .as_ref()
            .is_some_and(|c| c.session.is_resuming());
        if self.resumes && self.stage == Stage::Attached && !starts {
            self.resumes = false;
            events.push(Event::Resumed { id });
        }
        match self.stage {
            Stage::Attaching(0) => {
                let result = self.failure.take().map_or(Ok(()), Err);
                self.stage = match &result {
                    Ok(()) => Stage::Attached,
                    Err(_) => Stage::Leaving,
                };
                let attached = result.is_ok();
                events.push(Event::Attached { id, result });
                if attached {
                    self.go_on(registry, out, events);
                }
                true
            }
            Stage::Attached
                if self.connection.is_none() && !self.refuse_new && self.aside.is_none() =>
            {
                self.accept(registry, out, events)
            }
            Stage::Leaving if self.connection.is_none() && !self.fenced => {
                let _ = registry.deregister(&mut SourceFd(&self.listener.as_raw_fd()));
                // The rekeyer is one more.
                self.stage = Stage::Detaching(self.workers + 1);
                self.detach_due = true;
                false
            }
            Stage::Detaching(0) => {
                self.forget();
                self.stage = Stage::Gone;
                events.push(Event::Detached { id });
                false
            }
            _ => false,
        }
    }

    /// Gives up what has been waited for too long.
    fn look_at_patience(&mut self, registry: &Registry, events: &mut Vec<Event>) {
        let connection = self.connection.as_ref();
        let closing = connection.is_some_and(Connection::is_closing);
        let leaving = matches!(self.stage, Stage::Leaving | Stage::Detaching(_));
        let give_up = self.facts.device.give_up_after();
        let now = Instant::now();
        match self.waiting.look(now, (closing, leaving), give_up) {
            None => {}
            Some(Due::GiveUp { wipe }) => {
                self.warn("what is under way has not ended, and is given up");
                self.give_up_due = Some(wipe);
                self.hang_up(registry);
            }
            Some(Due::Tell) => {
                self.forget();
                let health = self.facts.device.health();
                events.push(Event::GivenUp {
                    id: self.facts.id,
                    requests: health.map_or(0, |health| health.summary().old),
                });
            }
        }
    }

    fn hang_up(&mut self, registry: &Registry) {
        if let Some(connection) = &mut self.connection {
            if let Some(fd) = connection.fd() {
                let _ = registry.deregister(&mut SourceFd(&fd));
            }
            connection.hang_up(&mut self.place);
        }
    }

    /// Tells people, and the manager, where the storage does worse than before, or better for a while.
    fn look_at_health(&mut self, events: &mut Vec<Event>) {
        let Some(health) = self.facts.device.health() else {
            return;
        };
        let summary = health.summary();
        if !self.alarm.take(Instant::now(), summary.level) {
            return;
        }
        let (id, level) = (self.facts.id, self.alarm.level());
        let words = InWords {
            level,
            summary,
            patience: health.patience(),
        };
        if level == Level::Fine {
            tracing::info!("{}: {words}", self.label);
        } else {
            tracing::warn!("{}: {words}", self.label);
        }
        events.push(Event::Health { id, level, summary });
    }

    /// Takes the next frontend off the backlog; true if one was there.
    fn accept(
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
    fn go_on(&mut self, registry: &Registry, out: &mut ToWorkers, events: &mut Vec<Event>) {
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

    fn drop_connection(&mut self, registry: &Registry) {
        self.hang_up(registry);
        if self.connection.take().is_some() {
            self.look_again = false;
            if self.comings.allows() {
                tracing::info!("frontend disconnected from {}", self.label);
            }
        }
    }

    fn note(&mut self, driven: Driven) {
        match driven {
            Driven::Waits | Driven::Ended(None) => {}
            Driven::HadItsTurn => self.look_again = true,
            Driven::Ended(Some(error)) => {
                self.warn(&format!("the connection is closed: {error}"));
            }
        }
    }

    /// Has the loop come back to a connection that has had its turn.
    pub(super) fn come_back(&mut self, registry: &Registry) {
        if std::mem::take(&mut self.look_again)
            && let Some(fd) = self.connection.as_ref().and_then(Connection::fd)
        {
            let (_, token) = tokens(self.facts.id);
            let again = registry.reregister(&mut SourceFd(&fd), token, CONNECTION);
            self.report_unwatched(again);
        }
    }

    /// Has the loop come back to a listener with more frontends than one turn takes.
    pub(super) fn come_back_to_listener(&self, registry: &Registry) {
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

    fn report_retired(&self, index: u16, reason: &str) {
        self.warn(&format!("queue {index} is retired: {reason}"));
    }

    /// A line that a frontend or guest can cause; at most a few a second of each device.
    fn warn(&self, text: &str) {
        if self.warnings.allows() {
            tracing::warn!("{}: {text}", self.label);
        }
    }
}
