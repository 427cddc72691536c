//! One role: its program, the process that runs it now, and what rot knows of that process.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::{Channel, ChannelError};
use bulkhead_protocol::fd_store::{FdName, Keeper};
use bulkhead_protocol::rot::{FromRot, Role};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::backoff::Backoff;
use crate::execute::{self, Start};
use crate::link::Link;
use crate::programs::Program;

/// How long a child may take to its `Hello`.
pub const HELLO_WITHIN: Duration = Duration::from_secs(15);
/// How long a child may leave what waits for it unread.
pub const READ_WITHIN: Duration = Duration::from_secs(5);
/// How long a child may live on after it closed its channel.
pub const END_WITHIN: Duration = Duration::from_secs(1);
/// Complaints about one process that are logged.
const LOGGED_COMPLAINTS: u32 = 20;

/// A process that was started and not reaped yet.
#[derive(Debug)]
pub struct Running {
    /// Its process id, for people to read.
    pub pid: u32,
    /// Readable once it has ended.
    pub pidfd: Rc<OwnedFd>,
    /// The channel; none once either side gave it up.
    pub link: Option<Link>,
    /// The end of its store; none once it closed its own.
    pub keeper: Option<Keeper>,
    /// It said so.
    pub hello: bool,
    started: Instant,
    /// When the channel was given up.
    closed: Option<Instant>,
    /// SIGKILL was sent.
    condemned: bool,
    complaints: u32,
}

#[derive(Debug)]
enum State {
    /// To be started then.
    Waiting(Instant),
    Running(Box<Running>),
}

/// A role and its process.
#[derive(Debug)]
pub struct Child {
    program: Program,
    generation: u64,
    backoff: Backoff,
    state: State,
    /// Starts in a row that came to nothing.
    vain_starts: u32,
}

impl Child {
    /// Due to be started at once.
    #[must_use]
    pub fn new(program: Program, now: Instant) -> Self {
        Self {
            program,
            generation: 0,
            backoff: Backoff::default(),
            state: State::Waiting(now),
            vain_starts: 0,
        }
    }

    /// Which.
    #[must_use]
    pub fn role(&self) -> Role {
        self.program.role
    }

    /// Its process, if there is one.
    #[must_use]
    pub fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            State::Waiting(_) => None,
        }
    }

    /// As [`Self::running`], to change it.
    pub fn running_mut(&mut self) -> Option<&mut Running> {
        match &mut self.state {
            State::Running(running) => Some(running),
            State::Waiting(_) => None,
        }
    }

    /// It said `Hello` and has its channel.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.running().is_some_and(|r| r.hello && r.link.is_some())
    }

    /// How peers hear of this process, and its pidfd; none if there is no process.
    #[must_use]
    pub fn introduction(&self) -> Option<(FromRot, Rc<OwnedFd>)> {
        let running = self.running()?;
        let peer = FromRot::Peer {
            role: self.role(),
            generation: self.generation,
            measurement: self.program.binary.measurement(),
            pid: running.pid,
        };
        Some((peer, Rc::clone(&running.pidfd)))
    }

    /// How many processes in a row ended before their `Hello`, or could not be started.
    #[must_use]
    pub fn vain_starts(&self) -> u32 {
        self.vain_starts
    }

    /// Counts them from nothing again.
    pub fn forgive_vain_starts(&mut self) {
        self.vain_starts = 0;
    }

    /// Is there no process, and the time for one?
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        matches!(self.state, State::Waiting(due) if due <= now)
    }

    /// Starts the process with what is stored of its role; a failure counts as a death.
    pub fn start(&mut self, stored: &[(FdName, BorrowedFd<'_>)], now: Instant) {
        match self.execute(stored, now) {
            Ok(running) => {
                self.generation += 1;
                tracing::info!(
                    role = %self.program.role,
                    pid = running.pid,
                    generation = self.generation,
                    stored = stored.len(),
                    "started"
                );
                self.state = State::Running(Box::new(running));
            }
            Err(error) => {
                self.vain_starts = self.vain_starts.saturating_add(1);
                let wait = self.backoff.after(Duration::ZERO, false);
                let wait = wait.max(Duration::from_millis(100));
                tracing::error!(role = %self.program.role, "can't start: {error}; again in {wait:?}");
                self.state = State::Waiting(now + wait);
            }
        }
    }

    fn execute(&self, stored: &[(FdName, BorrowedFd<'_>)], now: Instant) -> io::Result<Running> {
        let (ours, theirs) = Channel::pair()?;
        let link = Link::new(ours)?;
        let (keeper, store) = Keeper::pair()?;
        keeper.hand_over(stored).map_err(|error| {
            let what = format!("hand over {} stored descriptors: {error}", stored.len());
            io::Error::new(error.kind(), what)
        })?;
        let child = execute::start(&Start {
            binary: self.program.binary.as_fd(),
            channel: theirs.as_fd(),
            store: store.as_fd(),
            arguments: &self.program.arguments,
            environment: &self.program.environment,
            uid: self.program.uid,
            keeps_ipc_lock: self.program.keeps_ipc_lock,
        })?;
        Ok(Running {
            pid: child.pid.unsigned_abs(),
            pidfd: Rc::new(child.pidfd),
            link: Some(link),
            keeper: Some(keeper),
            hello: false,
            started: now,
            closed: None,
            condemned: false,
            complaints: 0,
        })
    }

    /// Reaps the process, which has ended, and sets when the next one is due.
    ///
    /// # Errors
    /// What `waitid` fails with.
    pub fn reap(&mut self, now: Instant, stopping: bool) -> io::Result<()> {
        let State::Running(running) = &self.state else {
            return Ok(());
        };
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        let how = match waitid(Id::PIDFd(running.pidfd.as_fd()), flags)? {
            WaitStatus::StillAlive => return Ok(()),
            how => describe(how),
        };
        let (role, pid, generation) = (self.program.role, running.pid, self.generation);
        if stopping {
            tracing::info!(%role, pid, generation, "ended: {how}");
            self.state = State::Waiting(now);
            return Ok(());
        }
        let hello = running.hello;
        self.vain_starts = match hello {
            true => 0,
            false => self.vain_starts.saturating_add(1),
        };
        let wait = self.backoff.after(now - running.started, hello);
        tracing::warn!(%role, pid, generation, "ended: {how}; next start in {wait:?}");
        self.state = State::Waiting(now + wait);
        Ok(())
    }

    /// Sends a message, if there is a channel. A channel that fails is given up.
    pub fn send(&mut self, message: FromRot, fds: Vec<Rc<OwnedFd>>, now: Instant) {
        let Some(running) = self.running_mut() else {
            return;
        };
        if let Some(link) = &mut running.link
            && let Err(error) = link.send(message, fds, now)
        {
            self.give_up_channel(&error, now);
        }
    }

    /// Sends what waits, if there is a channel.
    pub fn flush(&mut self, now: Instant) {
        if let Some(link) = self.running_mut().and_then(|r| r.link.as_mut())
            && let Err(error) = link.flush(now)
        {
            self.give_up_channel(&error, now);
        }
    }

    /// Drops the channel; the process must end soon.
    pub fn give_up_channel(&mut self, why: &ChannelError, now: Instant) {
        if !matches!(why, ChannelError::Closed) {
            self.complain(&format!("its channel is given up: {why}"));
        }
        if let Some(running) = self.running_mut() {
            running.link = None;
            running.closed = Some(now);
        }
    }

    /// Logs something the process did that it may not.
    pub fn complain(&mut self, what: &str) {
        let (role, generation) = (self.program.role, self.generation);
        let Some(running) = self.running_mut() else {
            return;
        };
        running.complaints = running.complaints.saturating_add(1);
        if running.complaints <= LOGGED_COMPLAINTS {
            tracing::warn!(%role, pid = running.pid, generation, "{what}");
        }
        if running.complaints == LOGGED_COMPLAINTS {
            tracing::warn!(%role, pid = running.pid, generation, "further complaints about it are not logged");
        }
    }

    /// Kills the process for a reason; it is reaped when its pidfd says so.
    pub fn kill(&mut self, reason: &str) {
        let role = self.program.role;
        let Some(running) = self.running_mut().filter(|r| !r.condemned) else {
            return;
        };
        tracing::warn!(%role, pid = running.pid, "killing it: {reason}");
        running.condemned = true;
        if let Err(error) = execute::send_signal(running.pidfd.as_fd(), libc::SIGKILL) {
            tracing::error!(%role, pid = running.pid, "can't kill it: {error}");
        }
    }

    /// Kills the process if it keeps rot waiting for too long.
    pub fn kill_if_overdue(&mut self, now: Instant) {
        if let Some((deadline, reason)) = self.running().and_then(Running::deadline)
            && deadline <= now
        {
            self.kill(reason);
        }
    }

    /// When rot must look at this role again without an event.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        match &self.state {
            State::Waiting(due) => Some(*due),
            State::Running(running) => running.deadline().map(|(at, _)| at),
        }
    }
}

impl Running {
    /// The first moment at which it is killed if nothing changes, and why.
    fn deadline(&self) -> Option<(Instant, &'static str)> {
        if self.condemned {
            return None;
        }
        let hello = (!self.hello).then(|| (self.started + HELLO_WITHIN, "it said no Hello"));
        let closed = self
            .closed
            .map(|at| (at + END_WITHIN, "it closed its channel"));
        let unread = self.link.as_ref().and_then(Link::blocked_since);
        let unread = unread.map(|at| (at + READ_WITHIN, "it does not read what rot sends"));
        [hello, closed, unread]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}

fn describe(how: WaitStatus) -> String {
    match how {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(started: Instant) -> (Running, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        let running = Running {
            pid: 1,
            pidfd: Rc::new(std::fs::File::open("/dev/null").unwrap().into()),
            link: Some(Link::new(ours).unwrap()),
            keeper: None,
            hello: false,
            started,
            closed: None,
            condemned: false,
            complaints: 0,
        };
        (running, theirs)
    }

    #[test]
    fn the_first_deadline_counts_and_each_says_why() {
        let t = Instant::now();
        let (mut r, _theirs) = running(t);
        assert_eq!(r.deadline(), Some((t + HELLO_WITHIN, "it said no Hello")));
        r.hello = true;
        assert_eq!(r.deadline(), None);
        let link = r.link.as_mut().unwrap();
        while link.blocked_since().is_none() {
            link.send(FromRot::Stop, Vec::new(), t).unwrap();
        }
        let unread = "it does not read what rot sends";
        assert_eq!(r.deadline(), Some((t + READ_WITHIN, unread)));
        r.closed = Some(t);
        assert_eq!(
            r.deadline(),
            Some((t + END_WITHIN, "it closed its channel"))
        );
        r.condemned = true;
        assert_eq!(r.deadline(), None);
    }
}
