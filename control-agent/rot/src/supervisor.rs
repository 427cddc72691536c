//! The one loop: starts what is due, connects who has said `Hello`, carries out the agent's
//! requests, keeps what the children store, reaps what died, and ends all of it on a signal.
//!
//! `poll(2)` over at most sixteen descriptors: level-triggered, nothing to register, nothing more to
//! trust. A turn takes one message of each child's (of its store's a few), so that no child keeps rot from the others.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod replacing;
mod requests;
mod upgrade;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::ChannelError;
use bulkhead_protocol::fd_store::keeper;
use bulkhead_protocol::rot::{FromRot, Role};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::child::Child;
use crate::children::{Children, Seat};
use crate::link::Link;
use crate::listeners::Listeners;
use crate::programs::Loader;
use crate::stores::Stores;
use crate::upstream::Upstream;
use upgrade::Upgrades;

/// How long the children may take to end in good order.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// Messages of a child's store that one turn takes.
const STORED_A_TURN: usize = 16;
/// Messages that can wait in a child's socket when it ended, and more: one whose socket is in the
/// hands of another process does not keep rot for ever.
const LEFT_BEHIND: usize = 4096;
/// Starts with what is stored that may come to nothing, in a row (3 s), before it is dropped.
const VAIN_STARTS: u32 = 6;

#[derive(Debug, Clone, Copy)]
enum Event {
    Signal,
    Ended(Seat),
    Channel(Seat, PollFlags),
    Store(Seat),
    Upstream,
}

/// What is rot's own.
#[derive(Debug)]
pub struct Own {
    /// The lock of its run directory, held as long as this is open.
    pub lock: OwnedFd,
    /// The operators' socket, for the agent.
    pub admin: Rc<OwnedFd>,
    /// The signals that end rot.
    pub signals: SignalFd,
}

/// The supervisor of one host.
#[derive(Debug)]
pub struct Supervisor {
    children: Children,
    upgrades: Upgrades,
    listeners: Listeners,
    stores: Stores,
    own: Own,
    /// When the children that still live are killed; set by the first signal.
    stop_by: Option<Instant>,
    ready: bool,
}

impl Supervisor {
    /// Nothing is started yet, unless the children were resumed.
    #[must_use]
    pub fn new(
        children: Children,
        loader: Loader,
        listeners: Listeners,
        stores: Stores,
        own: Own,
    ) -> Self {
        Self {
            children,
            upgrades: Upgrades::new(loader),
            listeners,
            stores,
            own,
            stop_by: None,
            ready: false,
        }
    }

    /// Runs until a signal has ended rot and every child is gone; its listeners are removed then.
    ///
    /// # Errors
    /// `poll` or `waitid` failed; the children end with rot.
    pub fn run(&mut self) -> io::Result<()> {
        self.tell_of_replacement(Instant::now());
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
                    Event::Ended(seat) => self.on_end(seat, now)?,
                    Event::Channel(seat, flags) => self.on_channel(seat, flags, now),
                    Event::Store(seat) => self.on_store(seat, STORED_A_TURN, now),
                    Event::Upstream => {}
                }
            }
            // Also what the events above caused.
            self.stores.flush();
            self.note_readiness();
        }
    }

    fn timers(&mut self, now: Instant) {
        self.upgrade_overdue(now);
        for seat in self.children.seats() {
            let Some(child) = self.children.at_mut(seat) else {
                continue;
            };
            match (self.stop_by, seat) {
                (None, Seat::Of(role)) if child.is_due(now) => {
                    child.start(&self.stores.stored(role), now);
                }
                (None, _) => {}
                (Some(by), _) if by <= now => child.kill("it did not stop in time"),
                (Some(_), _) => {}
            }
            child.kill_if_overdue(now);
        }
    }

    /// Says `ready` each time all three have come up.
    fn note_readiness(&mut self) {
        let ready = self.children.of_roles().all(Child::is_up);
        if ready && !self.ready {
            tracing::info!("ready");
        }
        self.ready = ready;
    }

    fn timeout(&self) -> PollTimeout {
        let wakes = self.children.all().filter_map(|child| match self.stop_by {
            // Who has ended is not started again.
            Some(_) if child.running().is_none() => None,
            _ => child.wake_at(),
        });
        // Past its time there is nothing to do but wait for the ends.
        let now = Instant::now();
        let stop = self.stop_by.filter(|&by| by > now);
        let Some(first) = wakes.chain(stop).chain(self.upgrades.wake_at()).min() else {
            return PollTimeout::NONE;
        };
        // Rounded up, so that the deadline has passed at the wake-up.
        let wait = first.saturating_duration_since(now) + Duration::from_millis(1);
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    }

    fn wait(&self) -> io::Result<Vec<Event>> {
        let mut of = vec![Event::Signal];
        let mut fds = vec![PollFd::new(self.own.signals.as_fd(), PollFlags::POLLIN)];
        for seat in self.children.seats() {
            let Some(running) = self.children.at(seat).and_then(Child::running) else {
                continue;
            };
            of.push(Event::Ended(seat));
            fds.push(PollFd::new(running.pidfd.as_fd(), PollFlags::POLLIN));
            // What it says counts no more.
            if matches!(seat, Seat::Retired(_)) {
                continue;
            }
            if let Some(link) = &running.link {
                let flags = self.interest(seat, link);
                of.push(Event::Channel(seat, flags));
                fds.push(PollFd::new(link.as_fd(), flags));
            }
            if let Some(keeper) = running.keeper.as_ref().filter(|_| self.stores.takes()) {
                of.push(Event::Store(seat));
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
                Event::Channel(seat, _) => Event::Channel(seat, flags),
                event => event,
            })
        });
        Ok(happened.collect())
    }

    /// A child that doesn't read its answers is not read either, and the agent is not read while
    /// the data plane has not taken what the agent caused: so no queue grows without bound.
    fn interest(&self, seat: Seat, link: &Link) -> PollFlags {
        if link.blocked_since().is_some() {
            return PollFlags::POLLOUT;
        }
        let dataplane = self.children.get(Role::Dataplane).running();
        let dataplane = dataplane.and_then(|r| r.link.as_ref());
        if seat == Seat::Of(Role::Agent) && dataplane.is_some_and(|l| l.blocked_since().is_some()) {
            return PollFlags::empty();
        }
        PollFlags::POLLIN
    }

    fn on_signal(&mut self, now: Instant) -> io::Result<()> {
        while let Some(signal) = self.own.signals.read_signal()? {
            if self.stop_by.is_some() {
                tracing::info!("signal {} again: not waiting any longer", signal.ssi_signo);
                self.stop_by = Some(now);
                continue;
            }
            tracing::info!("signal {}: stopping", signal.ssi_signo);
            self.stop_by = Some(now + STOP_WITHIN);
            self.abort_upgrade("rot stops", now);
            for role in [Role::Agent, Role::Dataplane, Role::Keyd] {
                self.children
                    .get_mut(role)
                    .send(FromRot::Stop, Vec::new(), now);
            }
        }
        Ok(())
    }

    /// What it stored last is read before the next of its role can start.
    fn on_end(&mut self, seat: Seat, now: Instant) -> io::Result<()> {
        let Seat::Of(role) = seat else {
            return self.on_end_beside(seat, now);
        };
        self.on_store(seat, LEFT_BEHIND, now);
        // One that said Hello and died before anybody looked was up all the same.
        if self.children.get(role).running().is_some_and(|r| !r.hello) {
            self.on_channel(seat, PollFlags::POLLIN, now);
        }
        let child = self.children.get_mut(role);
        let Some(how) = child.reap(now, self.stop_by.is_some())? else {
            return Ok(());
        };
        self.ended_in_upgrade(role, &how, now);
        let child = self.children.get_mut(role);
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

    /// The end of a candidate, or of one that was taken over from.
    fn on_end_beside(&mut self, seat: Seat, now: Instant) -> io::Result<()> {
        let Some(child) = self.children.at_mut(seat) else {
            return Ok(());
        };
        let Some(how) = child.reap(now, true)? else {
            return Ok(());
        };
        self.children.drop_ended();
        if seat == Seat::Candidate {
            self.abort_upgrade(
                &format!("the new one ended before it took over: {how}"),
                now,
            );
        }
        Ok(())
    }

    /// At most `most` messages of a child's store.
    fn on_store(&mut self, seat: Seat, most: usize, now: Instant) {
        for _ in 0..most {
            let child = self.children.at_mut(seat);
            let Some(keeper) = child.and_then(|c| c.running()?.keeper.as_ref()) else {
                return;
            };
            let received = keeper.receive();
            match (received, seat) {
                (Ok(Some(received)), Seat::Of(role)) => self.store(role, received, now),
                (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => return,
                (Ok(Some(_)), _) => {
                    let reason = "the new one stored something before it was told to go";
                    return self.abort_upgrade(reason, now);
                }
                (end, _) => return self.give_up_store(seat, end.err()),
            }
        }
    }

    fn store(&mut self, role: Role, received: keeper::Received, now: Instant) {
        match self.stores.handle(role, received) {
            Ok(change) if role == Role::Dataplane => self.follow(&change, now),
            Ok(_) => {}
            Err(reason) => self.children.get_mut(role).complain(&reason),
        }
    }

    fn give_up_store(&mut self, seat: Seat, error: Option<io::Error>) {
        let Some(child) = self.children.at_mut(seat) else {
            return;
        };
        if let Some(error) = error {
            child.complain(&format!("its store is given up: {error}"));
        }
        if let Some(running) = child.running_mut() {
            running.keeper = None;
        }
    }

    fn on_channel(&mut self, seat: Seat, flags: PollFlags, now: Instant) {
        let Some(child) = self.children.at_mut(seat) else {
            return;
        };
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
                match seat {
                    Seat::Of(role) => self.on_message(role, &received.message, now),
                    _ => self.on_candidate(&received.message, now),
                }
            }
            Err(ChannelError::WouldBlock) => {}
            Err(error @ (ChannelError::Malformed(_) | ChannelError::TooLarge)) => {
                child.complain(&format!("refused what it sent: {error}"));
            }
            Err(error) => child.give_up_channel(&error, now),
        }
    }
}
