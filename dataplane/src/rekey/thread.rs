//! The rekeyer's thread: what the control thread asks, and between that a zone of one volume after the other.
//!
//! Guests come first: after each step it rests for as long as the step took.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::control::{RekeyProgress, RekeyState};
use bulkhead_protocol::rekey::{Found, Stage};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::ToRekeyer;
use super::io::Io;
use super::record::{State, Stuck, Volume};
use super::zone::{Job, Step, tell};
use crate::blk::{BlkDevice, SECTOR_BYTES};
use crate::worker::message::{DeviceId, FromWorker, ZoneChange};
use crate::worker::{Mailbox, ReplySender};

/// When a re-key is tried again that could not begin on a volume in use.
const AGAIN: Duration = Duration::from_secs(5);

/// The thread.
#[derive(Debug)]
pub(super) struct Thread {
    io: Io,
    workers: Vec<Mailbox>,
    replies: ReplySender,
    receiver: Receiver<ToRekeyer>,
    /// Volumes that are held and re-keyed; the first is next.
    jobs: Vec<Job>,
    /// Volumes in use whose re-key could not begin.
    stuck: Vec<(DeviceId, Arc<BlkDevice>)>,
    /// When there is something to do again.
    due: Instant,
}

impl Thread {
    /// On the thread itself: everything that needs system calls it will not have later.
    pub(super) fn prepare(
        workers: Vec<Mailbox>,
        replies: ReplySender,
        receiver: Receiver<ToRekeyer>,
        lock_in: bool,
    ) -> std::io::Result<Self> {
        let io = Io::new()?;
        if lock_in {
            crate::sandbox::lock_worker_thread().map_err(std::io::Error::other)?;
        }
        Ok(Self {
            io,
            workers,
            replies,
            receiver,
            jobs: Vec::new(),
            stuck: Vec::new(),
            due: Instant::now(),
        })
    }

    /// Works until [`ToRekeyer::End`].
    pub(super) fn run(mut self) {
        loop {
            let message = if self.jobs.is_empty() && self.stuck.is_empty() {
                self.receiver
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                let left = self.due.saturating_duration_since(Instant::now());
                self.receiver.recv_timeout(left)
            };
            match message {
                Ok(ToRekeyer::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.take_message(message),
                Err(RecvTimeoutError::Timeout) => self.work(),
            }
        }
    }

    fn take_message(&mut self, message: ToRekeyer) {
        match message {
            ToRekeyer::Take { id, device } => {
                self.let_go(id);
                let result = self.take(id, device);
                self.replies
                    .send(FromWorker::VolumeReady { device: id, result });
            }
            ToRekeyer::LetGo { id } => {
                self.let_go(id);
                self.replies.send(FromWorker::VolumeReleased { device: id });
            }
            ToRekeyer::Begin { id, device } => {
                self.let_go(id);
                self.begin(id, device);
            }
            ToRekeyer::Look { device } => self.look(&device),
            ToRekeyer::Erase { id, device } => {
                self.let_go(id);
                self.erase(&device);
                device.set_erasing(false);
            }
            ToRekeyer::Forget { id } => {
                self.let_go(id);
                self.replies.send(FromWorker::Detached {
                    id,
                    worker: usize::MAX,
                });
            }
            ToRekeyer::End => {}
        }
    }

    /// Works on a volume no longer. Of what it was doing, nothing is left half done between two steps.
    fn let_go(&mut self, id: DeviceId) {
        self.stuck.retain(|(stuck, _)| *stuck != id);
        while let Some(at) = self.jobs.iter().position(|job| job.id == id) {
            let job = self.jobs.swap_remove(at);
            job.storage.close(&mut self.io.ring);
            note(&job.device, job.done_bytes(), RekeyState::Waiting);
        }
    }

    /// Finds out what is where, tells the workers, and goes on with the re-key.
    fn take(&mut self, id: DeviceId, device: Arc<BlkDevice>) -> Result<(), String> {
        let Some(ciphers) = device.ciphers() else {
            return Ok(());
        };
        let storage = device.storage.open(&mut self.io.ring);
        let storage = storage.map_err(|e| format!("the rekeyer can't take its storage: {e}"))?;
        let volume = Volume {
            device: &device,
            storage: &*storage,
        };
        let state = volume.take(&mut self.io, &ciphers);
        let (layout, record, rekey) = match (state, ciphers.rekey) {
            (Ok(State::Rekeyed(layout, record)), Some(rekey)) => (layout, record, rekey),
            (Ok(State::Stuck(stuck)), _) => {
                storage.close(&mut self.io.ring);
                self.serve_stuck(id, &device, &stuck);
                return Ok(());
            }
            (result, _) => {
                storage.close(&mut self.io.ring);
                if let Err(reason) = &result {
                    note_failure(&device, reason);
                } else {
                    // A zone that failed here was finished by the host that had the volume since.
                    tell(&self.workers, id, || ZoneChange::Unlock {
                        frontier_bytes: 0,
                    });
                }
                return result.map(drop);
            }
        };
        let job = Job {
            id,
            device,
            storage,
            key: ciphers.cipher,
            previous: rekey.previous,
            layout,
            record,
            busy: 0,
        };
        let done = job.done_bytes();
        // Before anybody hears that the volume is ready: the workers' queues are started after.
        job.unlock(done, &self.workers);
        if matches!(job.record.stage, Stage::Done { .. }) {
            job.storage.close(&mut self.io.ring);
            note(&job.device, done, RekeyState::Done);
            return Ok(());
        }
        tracing::info!(id = %job.record.rekey, at = done, of = job.record.size_bytes, "re-keying goes on");
        note(&job.device, done, RekeyState::Running);
        self.jobs.push(job);
        self.due = Instant::now();
        Ok(())
    }

    /// A volume that is served as it is, but for a zone of which nobody knows what it holds.
    fn serve_stuck(&self, id: DeviceId, device: &BlkDevice, stuck: &Stuck) {
        let frontier_bytes = stuck.frontier_bytes;
        tell(&self.workers, id, || ZoneChange::Unlock { frontier_bytes });
        if let Some(zone) = &stuck.fails {
            tell(&self.workers, id, || ZoneChange::Fail {
                zone: zone.clone(),
            });
        }
        tracing::error!(
            at = frontier_bytes,
            "the re-key does not go on: {}",
            stuck.reason
        );
        note(device, frontier_bytes, RekeyState::Waiting);
        note_failure(device, &stuck.reason);
    }

    /// A volume in use has got a re-key. Until it can begin, everything is under the previous key, as before.
    fn begin(&mut self, id: DeviceId, device: Arc<BlkDevice>) {
        match self.take(id, Arc::clone(&device)) {
            Ok(()) => {}
            Err(reason) => {
                if self.stuck.is_empty() {
                    tracing::warn!("a re-key can't begin, and is tried again: {reason}");
                }
                self.stuck.push((id, device));
                self.due = Instant::now() + AGAIN;
            }
        }
    }

    /// How far the re-key of a volume is that nobody here holds.
    fn look(&mut self, device: &BlkDevice) {
        let Some(rekey) = device.ciphers().and_then(|ciphers| ciphers.rekey) else {
            return;
        };
        let Ok(storage) = device.storage.open(&mut self.io.ring) else {
            return;
        };
        let volume = Volume {
            device,
            storage: &*storage,
        };
        let found = volume.found(&mut self.io);
        storage.close(&mut self.io.ring);
        let record = match found {
            Ok(Some((_, Found::Record(record)))) if record.rekey == rekey.id => record,
            // It was there, and is erased when its re-key is done and over alone.
            Ok(Some((_, Found::Nothing))) if device.record_was_seen() => {
                let bytes = device.capacity_sectors() * SECTOR_BYTES;
                return note(device, bytes, RekeyState::Done);
            }
            _ => return,
        };
        device.note_record_seen();
        match record.stage {
            Stage::Prepared => {}
            Stage::Running { frontier_bytes, .. } => {
                note(device, frontier_bytes, RekeyState::Waiting);
            }
            Stage::Done { .. } => note(device, record.size_bytes, RekeyState::Done),
        }
    }

    fn erase(&mut self, device: &BlkDevice) {
        let Some(volume) = device.ciphers().and_then(|ciphers| ciphers.volume) else {
            return;
        };
        let Ok(storage) = device.storage.open(&mut self.io.ring) else {
            return;
        };
        let place = Volume {
            device,
            storage: &*storage,
        };
        // What stays says that the re-key is done, which is true.
        if let Err(reason) = place.erase(&mut self.io, volume) {
            tracing::warn!("{reason}");
        }
        storage.close(&mut self.io.ring);
    }

    fn work(&mut self) {
        for (id, device) in std::mem::take(&mut self.stuck) {
            self.begin(id, device);
        }
        if self.jobs.is_empty() {
            return;
        }
        let mut job = self.jobs.remove(0);
        let begun = Instant::now();
        let step = job.step(&mut self.io, &self.workers);
        let took = begun.elapsed();
        let done = job.done_bytes();
        match step {
            Step::Moved => note(&job.device, done, RekeyState::Running),
            Step::Busy => {}
            Step::Done => {
                tracing::info!(id = %job.record.rekey, "re-key finished: apply a bundle without the previous key");
                note(&job.device, done, RekeyState::Done);
            }
            Step::Stopped(ref reason) => {
                tracing::error!(id = %job.record.rekey, at = done, "the re-key stopped: {reason}");
                note_failure(&job.device, reason);
            }
        }
        let rest = if step == Step::Busy {
            job.rest_after_busy()
        } else {
            took
        };
        self.due = Instant::now() + rest;
        if matches!(step, Step::Moved | Step::Busy) {
            self.jobs.push(job);
        } else {
            job.storage.close(&mut self.io.ring);
        }
    }
}

fn note(device: &BlkDevice, done_bytes: u64, state: RekeyState) {
    device.set_rekey_progress(Some(RekeyProgress {
        done_bytes,
        total_bytes: device.capacity_sectors() * SECTOR_BYTES,
        state,
    }));
}

fn note_failure(device: &BlkDevice, reason: &str) {
    let done_bytes = device
        .rekey_progress()
        .map_or(0, |progress| progress.done_bytes);
    if device
        .ciphers()
        .is_some_and(|ciphers| ciphers.rekey.is_some())
    {
        let reason = reason.to_owned();
        note(device, done_bytes, RekeyState::Failed { reason });
    }
}
