//! Before the process makes its threads and locks itself in: it asks keyd how many workers the bundle wants,
//! and on which CPUs. Threads can't be made later, and CPUs not be chosen.
//!
//! Saying hello to rot is how it asks: rot then sends the channel to keyd, on which keyd's first message says
//! what the bundle says. What else arrives meanwhile is kept for [`Control`]. Without an
//! answer in [`PATIENCE`] there is the default, and keyd's message, when it comes, leads to another start.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_protocol::channel::same_process;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{Channel, ChannelError, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Control;
use crate::server::Server;

/// How long keyd may take: rot starts it before the data plane, and it answers at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// Messages of rot's that are kept at most; a start has one for each listener and peer.
const MAX_KEPT: usize = 4096;

/// keyd, as it was met.
#[derive(Debug)]
struct Keyd {
    generation: u64,
    channel: Channel,
    /// Its pidfd.
    process: OwnedFd,
}

/// What is known before the process locks itself in.
#[derive(Debug)]
pub struct Start {
    pub(super) rot: Channel,
    pub(super) early: Early,
    pub(super) stopped: bool,
}

/// What happened before there was a [`Control`] to take it in.
#[derive(Debug, Default)]
pub(super) struct Early {
    said_hello: bool,
    keyd: Option<Keyd>,
    /// keyd said what the bundle says, and waits for the answer.
    heard: bool,
    /// What rot said besides, in its order.
    pub(super) from_rot: VecDeque<Received<FromRot>>,
}

/// What came of one message.
enum Heard {
    /// What the bundle says of workers.
    Workers(Option<Workers>),
    /// Something else.
    Other,
    /// The channel is closed.
    Closed,
}

impl Start {
    /// A start with nothing but rot's channel. Hello is said once the process has locked itself in, unless
    /// [`Start::ask_for_workers`] says it before.
    #[must_use]
    pub fn new(rot: Channel) -> Self {
        Self {
            rot,
            early: Early::default(),
            stopped: false,
        }
    }

    /// Whether rot says that the process is to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Says hello and waits for keyd to say which workers the bundle asks for; none if it asks for none, or
    /// nobody says.
    ///
    /// # Errors
    /// When rot is gone, or the system call fails.
    pub fn ask_for_workers(&mut self) -> Result<Option<Workers>, String> {
        self.ask_for(PATIENCE)
    }

    fn ask_for(&mut self, patience: Duration) -> Result<Option<Workers>, String> {
        let rot_is_gone = |e: ChannelError| format!("the channel to rot: {e}");
        self.rot.send(&ToRot::Hello, &[]).map_err(rot_is_gone)?;
        self.early.said_hello = true;
        let deadline = Instant::now() + patience;
        while !self.stopped {
            let Some((rot, keyd)) = self.wait(deadline)? else {
                tracing::warn!("keyd does not say which workers there are to be: there is one");
                return Ok(None);
            };
            if rot {
                self.hear_rot()?;
            } else if keyd {
                match self.hear_keyd() {
                    Heard::Workers(workers) => {
                        self.early.heard = true;
                        return Ok(workers);
                    }
                    Heard::Other => {}
                    // rot says when there is another.
                    Heard::Closed => self.early.keyd = None,
                }
            }
        }
        Ok(None)
    }

    /// Waits until rot or keyd says something: which of them; none if nobody did in time.
    fn wait(&self, deadline: Instant) -> Result<Option<(bool, bool)>, String> {
        loop {
            let mut fds = vec![PollFd::new(self.rot.as_fd(), PollFlags::POLLIN)];
            if let Some(keyd) = &self.early.keyd {
                fds.push(PollFd::new(keyd.channel.as_fd(), PollFlags::POLLIN));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the wait never ends just before the deadline.
            let left = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
            match poll(&mut fds, PollTimeout::from(left)) {
                Ok(0) if Instant::now() >= deadline => return Ok(None),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    let mut any = fds.iter().map(|fd| fd.any().unwrap_or(true));
                    let (rot, keyd) = (any.next(), any.next());
                    return Ok(Some((rot == Some(true), keyd == Some(true))));
                }
                Err(error) => return Err(format!("can't wait for rot and keyd: {error}")),
            }
        }
    }

    fn hear_rot(&mut self) -> Result<(), String> {
        let mut received = match self.rot.receive::<FromRot>() {
            Ok(received) => received,
            Err(ChannelError::WouldBlock) => return Ok(()),
            Err(error) => return Err(format!("the channel to rot: {error}")),
        };
        match received.message {
            FromRot::Stop => self.stopped = true,
            FromRot::Peer {
                role: Role::Keyd,
                generation,
                ..
            } => {
                let taken = received.take_fds().map_err(|e| e.to_string())?;
                let [socket, process]: [OwnedFd; 2] = taken;
                self.early.keyd = Some(Keyd {
                    generation,
                    channel: Channel::from(socket),
                    process,
                });
            }
            _ if self.early.from_rot.len() >= MAX_KEPT => {
                return Err(format!("rot sent {MAX_KEPT} messages, and no keyd"));
            }
            _ => self.early.from_rot.push_back(received),
        }
        Ok(())
    }

    /// One message of keyd's, if keyd itself sent it.
    fn hear_keyd(&mut self) -> Heard {
        let Some(keyd) = &self.early.keyd else {
            return Heard::Closed;
        };
        let received = match keyd.channel.receive::<KeydToDataplane>() {
            Ok(received) => received,
            Err(ChannelError::Closed | ChannelError::Io(_)) => return Heard::Closed,
            Err(error) => {
                tracing::warn!("a message from keyd is dropped: {error}");
                return Heard::Other;
            }
        };
        let sender = received.sender.as_ref();
        let is_keyd = sender.map(|sender| same_process(sender.as_fd(), keyd.process.as_fd()));
        match (received.message, is_keyd) {
            (KeydToDataplane::Workers { workers }, Some(Ok(true))) => Heard::Workers(workers),
            _ => {
                tracing::warn!("a message is dropped: keyd's first is about the workers");
                Heard::Other
            }
        }
    }
}

impl Control {
    /// Takes in what the start learnt: before anything else, and once.
    pub(super) fn begin(&mut self, server: &mut Server) {
        let Some(early) = self.early.take() else {
            return;
        };
        self.hello_due = !early.said_hello;
        self.say_hello();
        if let Some(keyd) = early.keyd {
            let socket = OwnedFd::from(keyd.channel);
            let met = self.meet(Role::Keyd, keyd.generation, socket, keyd.process);
            match (met, &mut self.keyd.link) {
                (Ok(()), Some(link)) if early.heard => {
                    link.send(DataplaneToKeyd::WorkersHeard {
                        restarts: false,
                        holds: self.volumes.with_keys(),
                    });
                }
                (Ok(()), _) => {}
                (Err(problem), _) => tracing::error!("keyd is lost: {problem}"),
            }
        }
        for received in early.from_rot {
            if let Err(problem) = self.on_rot(server, received) {
                tracing::warn!("a message from rot is dropped: {problem}");
            }
        }
    }
}

#[cfg(test)]
#[path = "start_tests.rs"]
mod tests;
