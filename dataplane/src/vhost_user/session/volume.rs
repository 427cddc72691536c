//! The volume behind a connection (the migration rule): taken when the first queue starts, let go of
//! when the last has stopped, after a flush. So an attached volume belongs to nobody, a source lets go of it
//! before the target starts, and after a cancelled migration the source takes it back.
//!
//! While somebody else has it, queues start but are not served; the server tries again.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{Outbox, Pending, Session, Waiting};
use crate::log_limit::LogLimit;
use crate::storage::FileSpec;
use crate::worker::message::ToWorker;

/// A line that a frontend can cause again and again; at most a few a second.
fn warn(what: &str, error: &std::io::Error) {
    static LIMIT: LogLimit = LogLimit::new();
    if LIMIT.allows() {
        tracing::warn!("the volume's lock can't be {what}: {error}");
    }
}

/// Whose the volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Hold {
    /// No queue runs.
    #[default]
    No,
    /// Ours.
    Ours,
    /// Queues run, and somebody else has it.
    Waits,
    /// Its last queue has stopped, and it is being flushed.
    Flushing,
}

impl Session {
    fn file(&self) -> Option<&FileSpec> {
        self.facts.device.storage.file()
    }

    /// Whether the volume is ours.
    #[must_use]
    pub fn holds_volume(&self) -> bool {
        self.hold == Hold::Ours
    }

    /// Whether queues are not served because somebody else has the volume.
    #[must_use]
    pub fn waits_for_volume(&self) -> bool {
        self.hold == Hold::Waits
    }

    /// A queue starts.
    pub(super) fn take_volume(&mut self) {
        match self.hold {
            Hold::Ours | Hold::Waits => {}
            // It was not let go of yet, and is not now.
            Hold::Flushing => self.hold = Hold::Ours,
            Hold::No => {
                self.hold = Hold::Waits;
                self.try_hold();
            }
        }
    }

    fn try_hold(&mut self) -> bool {
        let held = match self.file().map(FileSpec::try_hold) {
            None | Some(Ok(true)) => true,
            Some(Ok(false)) => false,
            Some(Err(error)) => {
                warn("taken", &error);
                false
            }
        };
        if held {
            self.hold = Hold::Ours;
        }
        held
    }

    /// Tries again to take a volume that somebody else had; its queues are served from then on. Does
    /// nothing while the session waits for a worker.
    pub fn retry_volume(&mut self, out: &mut Outbox) {
        if self.hold != Hold::Waits || self.is_pending() || !self.try_hold() {
            return;
        }
        let mut left = 0;
        for queue in self.started() {
            let enabled = self.serves(queue.index);
            out.to_workers
                .push((queue, ToWorker::SetEnabled { queue, enabled }));
            left += 1;
        }
        if left > 0 {
            self.waiting = Some(Waiting {
                what: Pending::Changes { left },
                code: 0,
                acknowledge: false,
            });
        }
    }

    /// A queue has stopped, or did not start: if it was the last, the volume is flushed before it is let
    /// go of.
    pub(super) fn flush_volume(&mut self, index: u16, out: &mut Outbox) {
        let running = self.vrings.iter().any(super::Vring::is_started);
        if running {
            return;
        }
        let ran = std::mem::take(&mut self.ran);
        match self.hold {
            // Only for what a queue may have written. Nobody waits for a start that failed: a frontend
            // whose starts all fail would have a worker flush as often as it asks.
            Hold::Ours if ran && self.file().is_some() => {
                let queue = self.queue(u32::from(index));
                self.hold = Hold::Flushing;
                self.flushes += 1;
                out.to_workers.push((queue, ToWorker::Flush { queue }));
            }
            Hold::Ours if self.flushes > 0 => self.hold = Hold::Flushing,
            Hold::Ours => self.let_go(),
            Hold::Waits => self.hold = Hold::No,
            Hold::No | Hold::Flushing => {}
        }
    }

    /// A flush is through. The volume is let go of if that was the last, and no queue has started
    /// meanwhile.
    pub(super) fn let_go_of_volume(&mut self) {
        self.flushes = self.flushes.saturating_sub(1);
        if self.hold == Hold::Flushing && self.flushes == 0 {
            self.let_go();
        }
    }

    fn let_go(&mut self) {
        self.hold = Hold::No;
        if let Some(Err(error)) = self.file().map(FileSpec::let_go) {
            warn("given up", &error);
        }
    }
}
