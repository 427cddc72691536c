//! One frontend's connection: its stream and its session, driven together.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crate::vhost_user::{Facts, Framing, Incoming, Outbox, ProtocolError, Session};
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

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    framing: Framing,
    pub(super) session: Session,
    stage: Stage,
}

/// Messages that a step makes for workers.
pub(super) type ToWorkers = Vec<(QueueId, ToWorker)>;

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.framing.as_fd()
    }
}

impl Connection {
    pub(super) fn new(stream: UnixStream, facts: Facts) -> io::Result<Self> {
        Ok(Self {
            framing: Framing::new(stream)?,
            session: Session::new(facts),
            stage: Stage::Open,
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Reads and handles what there is; why the connection ends, if it does by an error.
    pub(super) fn drive(&mut self, out: &mut ToWorkers) -> Option<ProtocolError> {
        let end = match self.exchange(out) {
            Ok(false) => return None,
            Ok(true) => None,
            Err(error) => Some(error),
        };
        self.close(out);
        end
    }

    /// True: the frontend is gone.
    fn exchange(&mut self, out: &mut ToWorkers) -> Result<bool, ProtocolError> {
        if self.stage != Stage::Open {
            return Ok(false);
        }
        self.framing.flush()?;
        while !self.session.is_pending() && !self.framing.has_unsent() {
            match self.framing.receive()? {
                Incoming::Message(message) => {
                    let mut outbox = Outbox::default();
                    let handled = self.session.handle(message, &mut outbox);
                    out.append(&mut outbox.to_workers);
                    handled?;
                    self.framing.send(&outbox.replies)?;
                }
                Incoming::Later => return Ok(false),
                Incoming::End => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Passes on what a worker says, and goes on with what waited for it.
    pub(super) fn on_worker(
        &mut self,
        message: FromWorker,
        out: &mut ToWorkers,
    ) -> Option<ProtocolError> {
        let mut outbox = Outbox::default();
        let result = self.session.on_worker(message, &mut outbox);
        out.append(&mut outbox.to_workers);
        match result {
            Ok(true) => {
                self.stage = Stage::Closed;
                None
            }
            Ok(false) if self.stage == Stage::Open => match self.framing.send(&outbox.replies) {
                Ok(()) => self.drive(out),
                Err(error) => {
                    self.close(out);
                    Some(error)
                }
            },
            Ok(false) => None,
            Err(error) => {
                self.close(out);
                Some(error)
            }
        }
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
