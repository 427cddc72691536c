//! The volume behind a connection (the migration rule): taken when the first queue starts, let go of
//! when the last has stopped, after a flush. So an attached volume belongs to nobody, a source lets go of it
//! before the target starts, and after a cancelled migration the source takes it back.
//!
//! While somebody else has it, queues start but are not served; the server tries again. Nor are they served
//! before the rekeyer has found out what of a re-keyed volume is under which key, which it does each time
//! that the volume is taken: another host may have gone on with it.
//!
//! A network card has no volume, and is its own from its first queue on.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Instant;

use super::{Outbox, Pending, Session, Waiting};
use crate::blk::{BlkDevice, SECTOR_BYTES};
use crate::log_limit::LogLimit;
use crate::storage::FileSpec;
use crate::vhost_user::message::{Message, code};
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
    /// Ours, and its queues are served.
    Ours,
    /// Queues run, and somebody else has it, or it can't be served.
    Waits,
    /// Ours; the rekeyer finds out what of it is under which key.
    Preparing,
    /// It has, and queues are served as soon as the session waits for nothing else.
    Ready,
    /// Its last queue has stopped, and it is being flushed.
    Flushing,
    /// It is flushed, and the rekeyer lets go of it.
    Releasing,
}

impl Session {
    fn file(&self) -> Option<&FileSpec> {
        self.facts.device.file()
    }

    /// Whether the volume is ours.
    #[must_use]
    pub fn holds_volume(&self) -> bool {
        self.hold == Hold::Ours
    }

    /// Whether it is ours, or is being taken: not being let go of, at any rate.
    #[must_use]
    pub fn has_volume(&self) -> bool {
        matches!(
            self.hold,
            Hold::Ours | Hold::Preparing | Hold::Ready | Hold::Flushing
        )
    }

    /// Whether queues are not served because somebody else has the volume, or because it can't be served.
    #[must_use]
    pub fn waits_for_volume(&self) -> bool {
        matches!(self.hold, Hold::Waits | Hold::Ready)
    }

    /// Whether requests of queues that are not served may be done.
    pub(super) fn may_finish(&self) -> bool {
        matches!(self.hold, Hold::Ours | Hold::Ready)
    }

    /// Whether the volume is on its way to be nobody's.
    pub(super) fn is_letting_go(&self) -> bool {
        match self.hold {
            Hold::Flushing | Hold::Releasing => true,
            Hold::Preparing => !self.runs(),
            Hold::No | Hold::Ours | Hold::Waits | Hold::Ready => false,
        }
    }

    /// Whether requests of an earlier process may still be under way: until that ends, the volume waits
    /// ([`Session::retry_volume`] takes it), and so does what would stop a queue.
    pub fn set_fenced(&mut self, fenced: bool) {
        self.fenced = fenced;
    }

    /// Whether a message has to wait until no request of an earlier process is under way: it would tell the
    /// frontend that a queue has stopped, whose memory such a request may still write to.
    #[must_use]
    pub fn waits_for_fence(&self, message: &Message) -> bool {
        let stops = matches!(
            message.header.code,
            code::GET_VRING_BASE | code::RESET_OWNER | code::RESET_DEVICE | code::SET_STATUS
        );
        self.fenced && stops && self.runs()
    }

    fn runs(&self) -> bool {
        self.vrings.iter().any(super::Vring::is_started)
    }

    /// A queue starts.
    pub(super) fn take_volume(&mut self, out: &mut Outbox) {
        match self.hold {
            Hold::Ours | Hold::Waits | Hold::Preparing | Hold::Ready | Hold::Releasing => {}
            // It was not let go of yet, and is not now.
            Hold::Flushing => self.hold = Hold::Ours,
            Hold::No => {
                self.hold = Hold::Waits;
                self.try_hold(out);
            }
        }
    }

    fn try_hold(&mut self, out: &mut Outbox) {
        if self.fenced {
            return;
        }
        match self.file().map(FileSpec::try_hold) {
            None | Some(Ok(true)) => self.prepare(out),
            Some(Ok(false)) => self.refusal = None,
            Some(Err(error)) => warn("taken", &error),
        }
    }

    /// The volume is ours. Where it is re-keyed, or may have been, the rekeyer looks first.
    fn prepare(&mut self, out: &mut Outbox) {
        let may_have_record = |device: &Arc<BlkDevice>| {
            let Some(ciphers) = device.ciphers() else {
                return false;
            };
            let bytes = device.capacity_sectors() * SECTOR_BYTES;
            device.measure_storage();
            ciphers.volume.is_some() && (ciphers.rekey.is_some() || device.storage_bytes() > bytes)
        };
        if self.facts.device.blk().is_some_and(may_have_record) {
            self.hold = Hold::Preparing;
            self.asked_rekeyer = true;
            let device = self.facts.id;
            out.to_workers
                .push((self.queue(0), ToWorker::TakeVolume { device }));
        } else {
            self.refusal = None;
            self.hold = Hold::Ours;
        }
    }

    /// The rekeyer knows what is where, or why the volume can't be served.
    pub(super) fn on_volume_ready(&mut self, result: Result<(), String>, out: &mut Outbox) {
        if self.hold != Hold::Preparing {
            return;
        }
        match result {
            Ok(()) => {
                self.refusal = None;
                self.hold = Hold::Ready;
                if self.runs() {
                    self.serve_if_ready(out);
                } else {
                    self.release(out);
                }
            }
            Err(reason) => {
                static LIMIT: LogLimit = LogLimit::new();
                if self.refusal.as_ref() != Some(&reason) && LIMIT.allows() {
                    tracing::error!("the volume is not served: {reason}");
                }
                self.refusal = Some(reason);
                self.let_go();
                if self.runs() {
                    self.hold = Hold::Waits;
                }
            }
        }
    }

    /// Has the queues served, now that the volume is ready, unless the session waits for something: then it
    /// is asked again.
    pub(super) fn serve_if_ready(&mut self, out: &mut Outbox) {
        if self.hold != Hold::Ready {
            return;
        }
        self.stop_owing(out);
        if !self.is_pending() {
            self.hold = Hold::Ours;
            self.enable_all(out);
        }
    }

    /// Stops the queue that waits for the volume to do that.
    fn stop_owing(&mut self, out: &mut Outbox) {
        if let Some(&Pending::Owed { index, .. }) = self.waiting.as_ref().map(|w| &w.what) {
            let what = self.finish_and_stop(index, out);
            if let Some(waiting) = &mut self.waiting {
                waiting.what = what;
            }
        }
    }

    /// Tries again to take a volume that somebody else had; its queues are served from then on. Does
    /// nothing while the session waits for a worker.
    pub fn retry_volume(&mut self, out: &mut Outbox) {
        let owed_until = match self.waiting.as_ref().map(|waiting| &waiting.what) {
            Some(Pending::Owed { until, .. }) => Some(*until),
            Some(_) => return,
            None => None,
        };
        if self.hold == Hold::Waits {
            self.try_hold(out);
            if self.hold == Hold::Ours {
                self.hold = Hold::Ready;
            }
        }
        self.serve_if_ready(out);
        if owed_until.is_some_and(|until| Instant::now() >= until) {
            static LIMIT: LogLimit = LogLimit::new();
            if LIMIT.allows() {
                tracing::warn!(
                    "the volume does not come: a queue stops with requests in flight from before"
                );
            }
            self.stop_owing(out);
        }
    }

    fn enable_all(&mut self, out: &mut Outbox) {
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
        if self.runs() {
            return;
        }
        let ran = std::mem::take(&mut self.ran);
        match self.hold {
            // Only for what a queue may have written. Nobody waits for a start that failed: a frontend
            // whose starts all fail would have a worker flush as often as it asks.
            Hold::Ours | Hold::Ready if ran && self.file().is_some() => {
                let queue = self.queue(u32::from(index));
                self.hold = Hold::Flushing;
                self.flushes += 1;
                out.to_workers.push((queue, ToWorker::Flush { queue }));
            }
            Hold::Ours if self.flushes > 0 => self.hold = Hold::Flushing,
            Hold::Ours | Hold::Ready => self.release(out),
            Hold::Waits => self.hold = Hold::No,
            // The rekeyer's answer leads on.
            Hold::Preparing | Hold::Releasing | Hold::No | Hold::Flushing => {}
        }
    }

    /// A flush is through. The volume is let go of if that was the last, and no queue has started
    /// meanwhile.
    pub(super) fn let_go_of_volume(&mut self, out: &mut Outbox) {
        self.flushes = self.flushes.saturating_sub(1);
        if self.hold == Hold::Flushing && self.flushes == 0 {
            self.release(out);
        }
    }

    /// Lets go of the volume, the rekeyer first.
    fn release(&mut self, out: &mut Outbox) {
        let ciphers = self.facts.device.blk().and_then(|device| device.ciphers());
        let rekeyed = ciphers.is_some_and(|ciphers| ciphers.rekey.is_some());
        if !std::mem::take(&mut self.asked_rekeyer) && !rekeyed {
            return self.let_go();
        }
        self.hold = Hold::Releasing;
        let device = self.facts.id;
        out.to_workers
            .push((self.queue(0), ToWorker::LetGoOfVolume { device }));
    }

    /// The rekeyer has let go of it. A queue that has started meanwhile has it taken again.
    pub(super) fn on_volume_released(&mut self, out: &mut Outbox) {
        if self.hold != Hold::Releasing {
            return;
        }
        if self.runs() {
            self.prepare(out);
            if self.hold == Hold::Ours {
                self.hold = Hold::Ready;
                self.serve_if_ready(out);
            }
        } else {
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
