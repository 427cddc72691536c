//! The one loop: starts what is due, connects who has said `Hello`, carries out the agent's
//! requests, reaps what died, and ends all of it on a signal.
//!
//! `poll(2)` over at most seven descriptors: level-triggered, nothing to register, nothing more to
//! trust. A turn takes one message of each child, so that no child keeps rot from the others.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::{Channel, ChannelError};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use crate::child::Child;
use crate::link::Link;
use crate::listeners::Listeners;
use crate::socket_file::Access;

/// How long the children may take to end in good order.
const STOP_WITHIN: Duration = Duration::from_secs(5);

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
}

/// The supervisor of one host.
#[derive(Debug)]
pub struct Supervisor {
    children: Children,
    listeners: Listeners,
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
        admin: OwnedFd,
        signals: SignalFd,
    ) -> Self {
        Self {
            children,
            listeners,
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
                    Event::Ended(role) => {
                        let stopping = self.stop_by.is_some();
                        self.children.get_mut(role).reap(now, stopping)?;
                    }
                    Event::Channel(role, flags) => self.on_channel(role, flags, now),
                }
            }
            self.note_readiness();
        }
    }

    fn timers(&mut self, now: Instant) {
        for role in Role::ALL {
            let child = self.children.get_mut(role);
            match self.stop_by {
                None => child.start_if_due(now),
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

    fn on_message(&mut self, role: Role, message: &ToRot, now: Instant) {
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
        let child = self.children.get_mut(role);
        match role {
            Role::Keyd => {}
            Role::Agent => {
                child.send(FromRot::AdminListener, vec![Rc::clone(&self.admin)], now);
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
            ToRot::Hello => Err("Hello is no request".to_owned()),
        }
    }

    /// Before its `Hello` it needs no news: it gets all listeners then.
    fn tell_dataplane(&mut self, message: FromRot, fds: Vec<Rc<OwnedFd>>, now: Instant) {
        if self.children.dataplane.is_up() {
            self.children.dataplane.send(message, fds, now);
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
