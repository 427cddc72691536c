//! One role: its program, the process that runs it now, and what rot knows of that process.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod left;
mod running;

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::{Channel, ChannelError};
use bulkhead_protocol::fd_store::{FdName, Keeper};
use bulkhead_protocol::process::CANDIDATE_ENV;
use bulkhead_protocol::rot::{FromRot, Role};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::backoff::Backoff;
use crate::execute::{self, Start};
use crate::link::Link;
use crate::programs::Program;
pub use running::{END_WITHIN, HELLO_WITHIN, READ_WITHIN, READY_WITHIN, Running, TAKE_OVER_WITHIN};

/// Complaints about one process that are logged.
const LOGGED_COMPLAINTS: u32 = 20;

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

    /// A child of the same role with another program, to be started beside this one.
    #[must_use]
    pub fn candidate(&self, program: Program, now: Instant) -> Self {
        Self {
            generation: self.generation,
            ..Self::new(program, now)
        }
    }

    /// Which.
    #[must_use]
    pub fn role(&self) -> Role {
        self.program.role
    }

    /// How many times it was started.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What its processes execute.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// From its next start on it executes another program; gives back the one until now.
    pub fn replace_program(&mut self, program: Program) -> Program {
        mem::replace(&mut self.program, program)
    }

    /// The candidate is ready, and waits for what others do.
    pub fn is_ready(&mut self, now: Instant) {
        if let Some(running) = self.running_mut() {
            running.due.0 = now + READY_WITHIN;
        }
    }

    /// The candidate was told to go: its `Hello` is due soon.
    pub fn takes_over(&mut self, now: Instant) {
        if let Some(running) = self.running_mut() {
            running.due = (now + TAKE_OVER_WITHIN, "it took over and said no Hello");
        }
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

    /// The process id; none if there is no process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running().map(|running| running.pid)
    }

    /// Has its process ended, or is there none?
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let running = self.running();
        running.is_none_or(|running| happens_within(running.pidfd.as_fd(), Duration::ZERO))
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
        let due = (now + HELLO_WITHIN, "it said no Hello");
        match self.execute(stored, &self.program.environment, due, now) {
            Ok(running) => self.is_running(running, stored.len(), "started"),
            Err(error) => {
                self.vain_starts = self.vain_starts.saturating_add(1);
                let wait = self.backoff.after(Duration::ZERO, false);
                let wait = wait.max(Duration::from_millis(100));
                tracing::error!(role = %self.program.role, "can't start: {error}; again in {wait:?}");
                self.state = State::Waiting(now + wait);
            }
        }
    }

    /// Starts the process as a candidate, with a duplicate of what the process that serves stored.
    ///
    /// # Errors
    /// What the start fails with; nothing runs then.
    pub fn start_as_candidate(
        &mut self,
        stored: &[(FdName, BorrowedFd<'_>)],
        now: Instant,
    ) -> io::Result<()> {
        let mut environment = self.program.environment.clone();
        environment.push(CString::new(format!("{CANDIDATE_ENV}=1"))?);
        let due = (now + READY_WITHIN, "it was not ready in time");
        let running = self.execute(stored, &environment, due, now)?;
        self.is_running(running, stored.len(), "started beside the one that serves");
        Ok(())
    }

    fn is_running(&mut self, running: Running, stored: usize, how: &str) {
        self.generation += 1;
        let (role, pid, generation) = (self.program.role, running.pid, self.generation);
        tracing::info!(%role, pid, generation, stored, "{how}");
        self.state = State::Running(Box::new(running));
    }

    fn execute(
        &self,
        stored: &[(FdName, BorrowedFd<'_>)],
        environment: &[CString],
        due: (Instant, &'static str),
        now: Instant,
    ) -> io::Result<Running> {
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
            environment,
            uid: self.program.uid,
            keeps: self.program.keeps,
        })?;
        Ok(Running {
            pid: child.pid.unsigned_abs(),
            pidfd: Rc::new(child.pidfd),
            link: Some(link),
            keeper: Some(keeper),
            hello: false,
            started: now,
            due,
            closed: None,
            condemned: false,
            complaints: 0,
        })
    }

    /// Reaps the process, which has ended, and sets when the next one is due, unless there is
    /// none to be (`last`). Says how it ended; none if it has not.
    ///
    /// # Errors
    /// What `waitid` fails with.
    pub fn reap(&mut self, now: Instant, last: bool) -> io::Result<Option<String>> {
        let State::Running(running) = &self.state else {
            return Ok(None);
        };
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        let how = match waitid(Id::PIDFd(running.pidfd.as_fd()), flags)? {
            WaitStatus::StillAlive => return Ok(None),
            how => describe(how),
        };
        let (role, pid, generation) = (self.program.role, running.pid, self.generation);
        if last {
            tracing::info!(%role, pid, generation, "ended: {how}");
            self.state = State::Waiting(now);
            return Ok(Some(how));
        }
        let hello = running.hello;
        self.vain_starts = match hello {
            true => 0,
            false => self.vain_starts.saturating_add(1),
        };
        let wait = self.backoff.after(now - running.started, hello);
        tracing::warn!(%role, pid, generation, "ended: {how}; next start in {wait:?}");
        self.state = State::Waiting(now + wait);
        Ok(Some(how))
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

/// Does a descriptor become readable within that time?
#[must_use]
pub fn happens_within(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let within = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, within).is_ok_and(|ready| ready > 0)
}

fn describe(how: WaitStatus) -> String {
    match how {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    }
}
