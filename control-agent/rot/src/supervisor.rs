//! The one loop: starts what is due, connects who has said `Hello`, carries out the agent's
//! requests, keeps what the children store, reaps what died, and ends all of it on a signal.
//!
//! `poll(2)` over at most eleven descriptors: level-triggered, nothing to register, nothing more to
//! trust. A turn takes one message of each child's (of its store's a few), so that no child keeps rot from the others.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod requests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::ChannelError;
use bulkhead_protocol::rot::{FromRot, Role};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::child::Child;
use crate::link::Link;
use crate::listeners::Listeners;
use crate::stores::Stores;
use crate::upstream::Upstream;

/// How long the children may take to end in good order.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// Messages of a child's store that one turn takes.
const STORED_A_TURN: usize = 16;
/// Messages that can wait in a child's socket when it ended, and more: one whose socket is in the
/// hands of another process does not keep rot for ever.
const LEFT_BEHIND: usize = 4096;
/// Starts with what is stored that may come to nothing, in a row (3 s), before it is dropped.
const VAIN_STARTS: u32 = 6;

/// The three children.
#[derive(Debug)]
pub struct Children {
    /// Key service.
    pub keyd: Child,
    /// Data plane.
    pub dataplane: Child,
    /// Control agent.
    pub agent: Child,
}

impl Children {
    fn get(&self, role: Role) -> &Child {
        match role {
            Role::Keyd => &self.keyd,
            Role::Dataplane => &self.dataplane,
            Role::Agent => &self.agent,
        }
    }

    fn get_mut(&mut self, role: Role) -> &mut Child {
        match role {
            Role::Keyd => &mut self.keyd,
            Role::Dataplane => &mut self.dataplane,
            Role::Agent => &mut self.agent,
        }
    }

    fn all(&self) -> impl Iterator<Item = &Child> {
        Role::ALL.into_iter().map(|role| self.get(role))
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Signal,
    Ended(Role),
    Channel(Role, PollFlags),
    Store(Role),
    Upstream,
}

/// The supervisor of one host.
#[derive(Debug)]
pub struct Supervisor {
    children: Children,
    listeners: Listeners,
    stores: Stores,
    admin: Rc<OwnedFd>,
    signals: SignalFd,
    /// When the children that still live are killed; set by the first signal.
    stop_by: Option<Instant>,
    ready: bool,
}

impl Supervisor {
    /// Nothing is started yet. `signals` are those that end rot.
    #[must_use]
    pub fn new(
        children: Children,
        listeners: Listeners,
        stores: Stores,
        admin: OwnedFd,
        signals: SignalFd,
    ) -> Self {
        Self {
            children,
            listeners,
            stores,
            admin: Rc::new(admin),
            signals,
            stop_by: None,
            ready: false,
        }
    }

    /// Runs until a signal has ended rot and every child is gone; its listeners are removed then.
    ///
    /// # Errors
    /// `poll` or `waitid` failed; the children end with rot.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.timers(Instant::now());
            if self.stop_by.is_some() && self.children.all().all(|c| c.running().is_none()) {
                self.listeners.remove_all();
                return Ok(());
            }
            for event in self.wait()? {
                let now = Instant::now();
                match event {
                    Event::Signal => self.on_signal(now)?,
                    Event::Ended(role) => self.on_end(role, now)?,
                    Event::Channel(role, flags) => self.on_channel(role, flags, now),
                    Event::Store(role) => self.on_store(role, STORED_A_TURN),
                    Event::Upstream => {}
                }
            }
            // Also what the events above caused.
            self.stores.flush();
            self.note_readiness();
        }
    }

    fn timers(&mut self, now: Instant) {
        for role in Role::ALL {
            let child = self.children.get_mut(role);
            match self.stop_by {
                None if child.is_due(now) => child.start(&self.stores.stored(role), now),
                None => {}
                Some(by) if by <= now => child.kill("it did not stop in time"),
                Some(_) => {}
            }
            child.kill_if_overdue(now);
        }
    }

    /// Says `ready` each time all three have come up.
    fn note_readiness(&mut self) {
        let ready = self.children.all().all(Child::is_up);
        if ready && !self.ready {
            tracing::info!("ready");
        }
        self.ready = ready;
    }

    fn timeout(&self) -> PollTimeout {
        let wakes = self.children.all().filter_map(|child| match self.stop_by {
            // A role that has ended is not started again.
            Some(_) if child.running().is_none() => None,
            _ => child.wake_at(),
        });
        // Past its time there is nothing to do but wait for the ends.
        let now = Instant::now();
        let stop = self.stop_by.filter(|&by| by > now);
        let Some(first) = wakes.chain(stop).min() else {
            return PollTimeout::NONE;
        };
        // Rounded up, so that the deadline has passed at the wake-up.
        let wait = first.saturating_duration_since(now) + Duration::from_millis(1);
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    }

    fn wait(&self) -> io::Result<Vec<Event>> {
        let mut of = vec![Event::Signal];
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        for child in self.children.all() {
            let Some(running) = child.running() else {
                continue;
            };
            of.push(Event::Ended(child.role()));
            fds.push(PollFd::new(running.pidfd.as_fd(), PollFlags::POLLIN));
            if let Some(link) = &running.link {
                let flags = self.interest(child.role(), link);
                of.push(Event::Channel(child.role(), flags));
                fds.push(PollFd::new(link.as_fd(), flags));
            }
            if let Some(keeper) = running.keeper.as_ref().filter(|_| self.stores.takes()) {
                of.push(Event::Store(child.role()));
                fds.push(PollFd::new(keeper.as_fd(), PollFlags::POLLIN));
            }
        }
        if let Some(upstream) = self.stores.upstream().filter(|up| Upstream::waits(up)) {
            of.push(Event::Upstream);
            fds.push(PollFd::new(upstream.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let happened = fds.iter().zip(of).filter_map(|(fd, event)| {
            let flags = fd.revents().filter(|flags| !flags.is_empty())?;
            Some(match event {
                Event::Channel(role, _) => Event::Channel(role, flags),
                event => event,
            })
        });
        Ok(happened.collect())
    }

    /// A child that doesn't read its answers is not read either, and the agent is not read while
    /// the data plane has not taken what the agent caused: so no queue grows without bound.
    fn interest(&self, role: Role, link: &Link) -> PollFlags {
        if link.blocked_since().is_some() {
            return PollFlags::POLLOUT;
        }
        let dataplane = self.children.dataplane.running();
        let dataplane = dataplane.and_then(|r| r.link.as_ref());
        if role == Role::Agent && dataplane.is_some_and(|l| l.blocked_since().is_some()) {
            return PollFlags::empty();
        }
        PollFlags::POLLIN
    }

    fn on_signal(&mut self, now: Instant) -> io::Result<()> {
        while let Some(signal) = self.signals.read_signal()? {
            if self.stop_by.is_some() {
                tracing::info!("signal {} again: not waiting any longer", signal.ssi_signo);
                self.stop_by = Some(now);
                continue;
            }
            tracing::info!("signal {}: stopping", signal.ssi_signo);
            self.stop_by = Some(now + STOP_WITHIN);
            for role in [Role::Agent, Role::Dataplane, Role::Keyd] {
                self.children
                    .get_mut(role)
                    .send(FromRot::Stop, Vec::new(), now);
            }
        }
        Ok(())
    }

    /// What it stored last is read before the next of its role can start.
    fn on_end(&mut self, role: Role, now: Instant) -> io::Result<()> {
        self.on_store(role, LEFT_BEHIND);
        let child = self.children.get_mut(role);
        child.reap(now, self.stop_by.is_some())?;
        if child.vain_starts() >= VAIN_STARTS {
            child.forgive_vain_starts();
            let dropped = self.stores.clear(role);
            if dropped > 0 {
                tracing::error!(
                    %role,
                    "{VAIN_STARTS} starts came to nothing: {dropped} stored descriptors are dropped, the next starts from nothing"
                );
            }
        }
        Ok(())
    }

    /// At most `most` messages of a child's store.
    fn on_store(&mut self, role: Role, most: usize) {
        let child = self.children.get_mut(role);
        for _ in 0..most {
            let Some(keeper) = child.running().and_then(|r| r.keeper.as_ref()) else {
                return;
            };
            match keeper.receive() {
                Ok(Some(received)) => {
                    if let Err(reason) = self.stores.handle(role, received) {
                        child.complain(&reason);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                end => {
                    if let Err(error) = end {
                        child.complain(&format!("its store is given up: {error}"));
                    }
                    if let Some(running) = child.running_mut() {
                        running.keeper = None;
                    }
                    return;
                }
            }
        }
    }

    fn on_channel(&mut self, role: Role, flags: PollFlags, now: Instant) {
        let child = self.children.get_mut(role);
        if flags.contains(PollFlags::POLLOUT) {
            child.flush(now);
        }
        if !flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        let Some(link) = child.running().and_then(|r| r.link.as_ref()) else {
            return;
        };
        match link.receive() {
            Ok(received) => {
                if !received.fds.is_empty() {
                    child.complain("it sent descriptors, which are closed: rot takes none");
                }
                self.on_message(role, &received.message, now);
            }
            Err(ChannelError::WouldBlock) => {}
            Err(error @ (ChannelError::Malformed(_) | ChannelError::TooLarge)) => {
                child.complain(&format!("refused what it sent: {error}"));
            }
            Err(error) => child.give_up_channel(&error, now),
        }
    }
}
