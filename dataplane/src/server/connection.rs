//! One frontend's connection: its stream and its session, driven together.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::vhost_user::{Facts, Framing, Incoming, Message, Outbox, ProtocolError, Session};
use crate::worker::message::{FromWorker, QueueId, ToWorker};

/// Whether the frontend is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is.
    Open,
    /// It is gone, or was sent away: its queues are being stopped.
    Closing,
    /// Nothing of it is left.
    Closed,
}

/// Messages taken from one frontend before others have their turn.
const MESSAGES_PER_TURN: usize = 32;

/// Where driving a connection has led.
#[derive(Debug)]
#[must_use]
pub(super) enum Driven {
    /// It waits: for the frontend, or for a worker.
    Waits,
    /// It has had its turn, and there may be more to read.
    HadItsTurn,
    /// It ends; by an error, or because the frontend is gone.
    Ended(Option<ProtocolError>),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// None once it was hung up.
    framing: Option<Framing>,
    pub(super) session: Session,
    stage: Stage,
    /// What it said last, if that waits for the fence.
    held: Option<Message>,
    /// The volume is to be taken as soon as the session waits for nothing else.
    retry_due: bool,
    /// The frontend has closed its end, whatever of what it said was not read yet.
    peer_gone: bool,
}

/// Messages that a step makes for workers.
pub(super) type ToWorkers = Vec<(QueueId, ToWorker)>;

impl Connection {
    pub(super) fn new(stream: UnixStream, facts: Facts) -> io::Result<Self> {
        Ok(Self {
            framing: Some(Framing::new(stream)?),
            session: Session::new(facts),
            stage: Stage::Open,
            held: None,
            retry_due: false,
            peer_gone: false,
        })
    }

    /// Its socket, unless it was hung up.
    pub(super) fn fd(&self) -> Option<RawFd> {
        let framing = self.framing.as_ref();
        framing.map(|framing| framing.as_fd().as_raw_fd())
    }

    /// Whether it waits for its queues to stop.
    pub(super) fn is_closing(&self) -> bool {
        self.stage == Stage::Closing
    }

    /// Closes the socket of a connection that is being closed anyway, before its queues have stopped.
    pub(super) fn hang_up(&mut self) {
        self.framing = None;
    }

    /// The frontend has closed its end. What it said before is handled, unless a worker has to answer first: nobody
    /// waits for that any more.
    pub(super) fn peer_is_gone(&mut self) {
        self.peer_gone = true;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Reads and handles what there is, for one turn.
    pub(super) fn drive(&mut self, out: &mut ToWorkers) -> Driven {
        let driven = self
            .exchange(out)
            .unwrap_or_else(|e| Driven::Ended(Some(e)));
        if matches!(driven, Driven::Ended(_)) {
            self.close(out);
        }
        driven
    }

    fn exchange(&mut self, out: &mut ToWorkers) -> Result<Driven, ProtocolError> {
        if self.stage != Stage::Open {
            return Ok(Driven::Waits);
        }
        let Some(framing) = &mut self.framing else {
            return Ok(Driven::Waits);
        };
        framing.flush()?;
        for _ in 0..MESSAGES_PER_TURN {
            if self.session.is_pending() || framing.has_unsent() {
                return Ok(if self.peer_gone {
                    Driven::Ended(None)
                } else {
                    Driven::Waits
                });
            }
            let held = self.held.take().map(Incoming::Message);
            match held.map_or_else(|| framing.receive(), Ok)? {
                Incoming::Message(message) if self.session.waits_for_fence(&message) => {
                    self.held = Some(message);
                    return Ok(if self.peer_gone {
                        Driven::Ended(None)
                    } else {
                        Driven::Waits
                    });
                }
                Incoming::Message(message) => {
                    let mut outbox = Outbox::default();
                    let handled = self.session.handle(message, &mut outbox);
                    out.append(&mut outbox.to_workers);
                    handled?;
                    framing.send(&outbox.replies, outbox.reply_fd)?;
                }
                Incoming::Later => return Ok(Driven::Waits),
                Incoming::End => return Ok(Driven::Ended(None)),
            }
        }
        Ok(Driven::HadItsTurn)
    }

    /// Passes on what a worker says, and goes on with what waited for it.
    pub(super) fn on_worker(&mut self, message: FromWorker, out: &mut ToWorkers) -> Driven {
        let mut outbox = Outbox::default();
        let result = self.session.on_worker(message, &mut outbox);
        out.append(&mut outbox.to_workers);
        let sent = match result {
            Ok(true) => {
                self.stage = Stage::Closed;
                return Driven::Waits;
            }
            Ok(false) if self.stage != Stage::Open => return Driven::Waits,
            Ok(false) => {
                if self.retry_due && !self.session.is_pending() {
                    self.retry(out);
                }
                match &mut self.framing {
                    Some(framing) => framing.send(&outbox.replies, outbox.reply_fd),
                    None => Ok(()),
                }
            }
            Err(error) => Err(error),
        };
        match sent {
            Ok(()) => self.drive(out),
            Err(error) => {
                self.close(out);
                Driven::Ended(Some(error))
            }
        }
    }

    /// Tries again what nothing announces.
    pub(super) fn retry(&mut self, out: &mut ToWorkers) {
        self.retry_due = self.session.is_pending();
        let mut outbox = Outbox::default();
        self.session.retry_volume(&mut outbox);
        self.session.retry_backend();
        out.append(&mut outbox.to_workers);
    }

    /// No request of an earlier process is under way any more: the volume is taken, and what waited goes on.
    pub(super) fn fence_is_gone(&mut self, out: &mut ToWorkers) -> Driven {
        self.session.set_fenced(false);
        self.retry(out);
        self.drive(out)
    }

    /// Sends the frontend away; its queues stop, and when they have, it is closed.
    pub(super) fn close(&mut self, out: &mut ToWorkers) {
        if self.stage != Stage::Open {
            return;
        }
        let mut outbox = Outbox::default();
        let waits = self.session.close(&mut outbox);
        out.append(&mut outbox.to_workers);
        self.stage = if waits { Stage::Closing } else { Stage::Closed };
    }
}
