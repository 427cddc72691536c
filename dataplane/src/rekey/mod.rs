//! Another key for a volume while guests use it (ADR 0018): one thread, the *rekeyer*, moves the frontier of
//! each volume that is being re-keyed, zone by zone. What lies below it is under the key, what lies from it on
//! under the previous key; workers know it and use both.
//!
//! For each zone: workers keep requests off it ([`ZoneChange::Lock`]), and say by a dropped [`Ticket`] that none
//! is left in it; it is read, re-encrypted, written to the journal together with the record, flushed, written to
//! its place, flushed; the record without a zone is written and flushed; then the workers go on with the
//! new frontier. `docs/formats/rekey.md` has the record and why a crash anywhere loses nothing.
//!
//! The rekeyer works on a volume only while this host holds it: from [`ToRekeyer::Take`], which finds out what
//! lies where, to [`ToRekeyer::LetGo`], which comes between two zones at the latest. A storage that hangs holds up
//! the others that are re-keyed or taken meanwhile for some seconds, and nobody else: then what is under way is
//! left behind, and nothing more is done with that volume before it has ended.
//!
//! | module | owns |
//! | --- | --- |
//! | [`io`] | transfers and flushes that are waited for |
//! | [`left`] | those that did not end in time |
//! | [`record`] | the record: found, judged, written |
//! | [`zone`] | one zone |
//! | [`thread`] | which volume comes next, and what the control thread asks |
#![forbid(unsafe_code)]

mod io;
mod left;
mod record;
mod thread;
mod zone;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::Sender;

use crate::blk::BlkDevice;
use crate::fence::Fence;
use crate::worker::message::DeviceId;
#[cfg(doc)]
use crate::worker::message::ZoneChange;
use crate::worker::{Mailbox, ReplySender};

/// Held for as long as a request is in flight in a zone that is to be locked.
#[derive(Debug)]
pub struct Ticket {
    /// Nothing is ever sent: the receiver sees that the last one is gone.
    _held: Sender<()>,
}

impl Ticket {
    /// One that its owner's receiver sees the end of.
    pub(crate) fn new(held: Sender<()>) -> Self {
        Self { _held: held }
    }
}

/// From the control thread to the rekeyer.
#[derive(Debug)]
pub enum ToRekeyer {
    /// This host holds the volume: find out what is under which key, bring an interrupted zone to its end, and go
    /// on with the re-key, if there is one. Answered by
    /// [`FromWorker::VolumeReady`](crate::worker::message::FromWorker::VolumeReady).
    Take {
        /// The device's number.
        id: DeviceId,
        /// The device.
        device: Arc<BlkDevice>,
    },
    /// The volume is to be let go of. Answered by
    /// [`FromWorker::VolumeReleased`](crate::worker::message::FromWorker::VolumeReleased).
    LetGo {
        /// The device's number.
        id: DeviceId,
    },
    /// The device, whose volume this host holds, has got a re-key: begin it.
    Begin {
        /// The device's number.
        id: DeviceId,
        /// The device.
        device: Arc<BlkDevice>,
    },
    /// Nobody holds the volume: see how far its re-key is, for the status.
    Look {
        /// The device's number.
        id: DeviceId,
        /// The device.
        device: Arc<BlkDevice>,
    },
    /// The re-key is done and over: close its record.
    Close {
        /// The device's number.
        id: DeviceId,
        /// The device.
        device: Arc<BlkDevice>,
    },
    /// The device goes. Answered by
    /// [`FromWorker::Detached`](crate::worker::message::FromWorker::Detached).
    Forget {
        /// The device's number.
        id: DeviceId,
    },
    /// Stop between two zones at the latest, and let go of the fence; nothing else is asked before
    /// [`ToRekeyer::Thaw`]. Answered by [`FromWorker::Frozen`](crate::worker::message::FromWorker::Frozen), once nothing that
    /// was left behind is under way.
    Freeze,
    /// Go on, with this fence and no other. Answered by
    /// [`FromWorker::Thawed`](crate::worker::message::FromWorker::Thawed).
    Thaw {
        /// None where there is none.
        fence: Option<Fence>,
    },
    /// End, between two zones at the latest.
    End,
}

/// The control thread's end of the rekeyer.
#[derive(Debug)]
pub struct Rekeyer {
    sender: Sender<ToRekeyer>,
    thread: Option<JoinHandle<()>>,
}

impl Rekeyer {
    /// Starts it; returns once it has its ring, which keeps the fence, and, with `lock_in`, is locked in.
    ///
    /// # Errors
    /// What the thread, its memory or its ring can't be made with.
    pub fn start(
        workers: Vec<Mailbox>,
        replies: ReplySender,
        lock_in: bool,
        fence: Option<Fence>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let (ready, is_ready) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new()
            .name("rekeyer".to_owned())
            .spawn(move || {
                match thread::Thread::prepare(workers, replies, receiver, (lock_in, fence)) {
                    Ok(prepared) => {
                        let _ = ready.send(Ok(()));
                        prepared.run();
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })?;
        is_ready
            .recv()
            .unwrap_or_else(|_| Err(std::io::Error::other("the rekeyer ended at its start")))?;
        Ok(Self {
            sender,
            thread: Some(thread),
        })
    }

    /// Asks for something. Never blocks.
    pub fn send(&self, message: ToRekeyer) {
        // It ends by `end` alone.
        let _ = self.sender.send(message);
    }

    /// Ends it and waits for it: at most until the zone under way is done. Workers still answer.
    pub fn end(mut self) {
        self.send(ToRekeyer::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
