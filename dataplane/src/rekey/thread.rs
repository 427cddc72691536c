//! The rekeyer's thread: what the control thread asks, and between that a zone of one volume after the other.
//!
//! Guests come first: after each step it rests for as long as the step took.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::control::{RekeyProgress, RekeyState};
use bulkhead_protocol::rekey::{Found, Stage};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::ToRekeyer;
use super::io::Io;
use super::record::{State, Stuck, Volume, is_with};
use super::zone::{Job, Step, tell};
use crate::blk::{BlkDevice, SECTOR_BYTES};
use crate::fence::Fence;
use crate::worker::message::{DeviceId, FromWorker, ZoneChange};
use crate::worker::{Mailbox, ReplySender};

/// When a re-key is tried again that could not begin on a volume in use.
const AGAIN: Duration = Duration::from_secs(5);
/// How often what was left behind is looked after.
const LEFT_EVERY: Duration = Duration::from_millis(100);

/// The thread.
#[derive(Debug)]
pub(super) struct Thread {
    io: Io,
    workers: Vec<Mailbox>,
    replies: ReplySender,
    receiver: Receiver<ToRekeyer>,
    /// Volumes that are held and re-keyed; of those that are due the first is next.
    jobs: Vec<Job>,
    /// Volumes in use whose re-key could not begin, and when it is tried again.
    stuck: Vec<(DeviceId, Arc<BlkDevice>, Instant)>,
    /// What is to be said of devices when nothing of them is left behind any more.
    owed: Vec<(DeviceId, FromWorker)>,
    /// Until then it rests, for the guests' sake.
    rests_until: Instant,
    /// It is told to stop; what it let go of the fence for is not known to whoever told it yet, or is.
    frozen: Frozen,
}

/// Whether it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frozen {
    No,
    /// As soon as nothing that was left behind is under way.
    Soon,
    Yes,
}

impl Thread {
    /// On the thread itself: everything that needs system calls it will not have later.
    pub(super) fn prepare(
        workers: Vec<Mailbox>,
        replies: ReplySender,
        receiver: Receiver<ToRekeyer>,
        (lock_in, fence): (bool, Option<Fence>),
    ) -> std::io::Result<Self> {
        let io = Io::new(fence)?;
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
            owed: Vec::new(),
            rests_until: Instant::now(),
            frozen: Frozen::No,
        })
    }

    /// Works until [`ToRekeyer::End`].
    pub(super) fn run(mut self) {
        loop {
            let message = match self.due() {
                None => self
                    .receiver
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => {
                    let left = due.saturating_duration_since(Instant::now());
                    self.receiver.recv_timeout(left)
                }
            };
            match message {
                Ok(ToRekeyer::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.take_message(message),
                Err(RecvTimeoutError::Timeout) => self.work(),
            }
            self.look_after_left();
            self.freeze_if_idle();
        }
    }

    /// When there is something to do again; none: when somebody asks.
    fn due(&self) -> Option<Instant> {
        let left = self.io.has_left_any().then(|| Instant::now() + LEFT_EVERY);
        if self.frozen != Frozen::No {
            return left;
        }
        let jobs = self.jobs.iter().map(|job| job.due.max(self.rests_until));
        jobs.chain(self.stuck.iter().map(|(.., due)| *due))
            .chain(left)
            .min()
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
                self.say_when_clear(id, FromWorker::VolumeReleased { device: id });
            }
            ToRekeyer::Begin { id, device } => {
                self.let_go(id);
                self.begin(id, device);
            }
            ToRekeyer::Look { id, device } => self.look(id, &device),
            ToRekeyer::Close { id, device } => {
                self.let_go(id);
                self.close(id, &device);
                device.set_closing(false);
            }
            ToRekeyer::Forget { id } => {
                self.let_go(id);
                let worker = usize::MAX;
                self.say_when_clear(id, FromWorker::Detached { id, worker });
            }
            ToRekeyer::Freeze => self.frozen = Frozen::Soon,
            ToRekeyer::Thaw { fence } => self.thaw(fence),
            ToRekeyer::End => {}
        }
    }

    /// Lets go of the fence if it is to and nothing is under way.
    fn freeze_if_idle(&mut self) {
        if self.frozen == Frozen::Soon && !self.io.has_left_any() {
            self.frozen = Frozen::Yes;
            self.io.ring.let_go_of_fence();
            let worker = usize::MAX;
            self.replies.send(FromWorker::Frozen { worker });
        }
    }

    fn thaw(&mut self, fence: Option<Fence>) {
        self.frozen = Frozen::No;
        self.io.ring.let_go_of_fence();
        let kept = fence.map_or(Ok(()), |fence| self.io.ring.keep_fence(fence.as_fd()));
        let result = kept.map_err(|e| format!("the rekeyer's ring does not take the fence: {e}"));
        let worker = usize::MAX;
        self.replies.send(FromWorker::Thawed { worker, result });
    }

    /// Says something that holds once nothing of a device is left behind.
    fn say_when_clear(&mut self, id: DeviceId, message: FromWorker) {
        self.owed.push((id, message));
        self.look_after_left();
    }

    fn look_after_left(&mut self) {
        if self.io.has_left_any() {
            self.io.look_after_left();
        }
        let (io, replies) = (&self.io, &self.replies);
        for (_, message) in self.owed.extract_if(.., |(id, _)| !io.has_left(*id)) {
            replies.send(message);
        }
    }

    /// Works on a volume no longer. Of what it was doing, nothing is left half done between two steps.
    fn let_go(&mut self, id: DeviceId) {
        self.stuck.retain(|(stuck, ..)| *stuck != id);
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
        self.io.turn_to(id, &device)?;
        let storage = device.storage.open(&mut self.io.ring);
        let storage = storage.map_err(|e| format!("the rekeyer can't take its storage: {e}"))?;
        let volume = Volume {
            device: &device,
            storage: &*storage,
        };
        let state = volume.take(&mut self.io, &ciphers);
        let (layout, record, rekey) = match (state, ciphers.rekey) {
            (Ok(State::Rekeyed(layout, record)), Some(rekey)) => (layout, record, rekey),
            // Its requests wait, as they would for any storage that hangs.
            (Ok(State::Stuck(stuck)), _) if self.io.has_left(id) => {
                storage.close(&mut self.io.ring);
                return Err(stuck.reason);
            }
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
            due: Instant::now(),
        };
        let done = job.done_bytes();
        // Before anybody hears that the volume is ready: the workers' queues are started after.
        job.unlock(done, &self.workers);
        if job.record.stage.is_complete() {
            job.storage.close(&mut self.io.ring);
            note(&job.device, done, RekeyState::Done);
            return Ok(());
        }
        tracing::info!(id = %job.record.rekey, at = done, of = job.record.size_bytes, "re-keying goes on");
        note(&job.device, done, RekeyState::Running);
        self.jobs.push(job);
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
        let before = device.rekey_progress().map(|progress| progress.state);
        if let Err(reason) = self.take(id, Arc::clone(&device)) {
            let again = RekeyState::Failed {
                reason: reason.clone(),
            };
            if before != Some(again) {
                tracing::warn!("a re-key can't begin, and is tried again: {reason}");
            }
            self.stuck.push((id, device, Instant::now() + AGAIN));
        }
    }

    /// How far the re-key of a volume is that nobody here holds.
    fn look(&mut self, id: DeviceId, device: &Arc<BlkDevice>) {
        let Some(ciphers) = device.ciphers() else {
            return;
        };
        let Some(rekey) = &ciphers.rekey else {
            return;
        };
        if self.io.turn_to(id, device).is_err() {
            return;
        }
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
            Ok(Some((_, Found::Record(record))))
                if Some(record.volume) == ciphers.volume
                    && record.rekey == rekey.id
                    && is_with(&record, &ciphers.cipher) =>
            {
                record
            }
            _ => return,
        };
        match record.stage {
            Stage::Prepared => {}
            Stage::Running { frontier_bytes, .. } => {
                note(device, frontier_bytes, RekeyState::Waiting);
            }
            Stage::Done { .. } | Stage::Over { .. } => {
                note(device, record.size_bytes, RekeyState::Done);
            }
        }
    }

    fn close(&mut self, id: DeviceId, device: &Arc<BlkDevice>) {
        let Some(volume) = device.ciphers().and_then(|ciphers| ciphers.volume) else {
            return;
        };
        if self.io.turn_to(id, device).is_err() {
            return;
        }
        let Ok(storage) = device.storage.open(&mut self.io.ring) else {
            return;
        };
        let place = Volume {
            device,
            storage: &*storage,
        };
        // What stays says that the re-key is done, which is true.
        if let Err(reason) = place.close(&mut self.io, volume) {
            tracing::warn!("{reason}");
        }
        storage.close(&mut self.io.ring);
    }

    fn work(&mut self) {
        if self.frozen != Frozen::No {
            return;
        }
        let now = Instant::now();
        let is_due = |due: &Instant| *due <= now;
        while let Some(at) = self.stuck.iter().position(|(.., due)| is_due(due)) {
            let (id, device, _) = self.stuck.swap_remove(at);
            self.begin(id, device);
        }
        let next = self.jobs.iter().position(|job| is_due(&job.due));
        let Some(next) = next.filter(|_| is_due(&self.rests_until)) else {
            return;
        };
        let mut job = self.jobs.remove(next);
        if job.device.is_wiped() {
            return job.storage.close(&mut self.io.ring);
        }
        let begun = Instant::now();
        if self.io.turn_to(job.id, &job.device).is_err() {
            debug_assert!(
                false,
                "a job of which something is left behind is none any more"
            );
            return;
        }
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
            Step::Stopped(ref reason) if self.io.has_left(job.id) => {
                // The zone stays locked, or as it was. What was interrupted is brought to its end when the
                // storage answers, as after a crash.
                tracing::warn!(id = %job.record.rekey, at = done, "the re-key waits for its storage: {reason}");
                note(&job.device, done, RekeyState::Waiting);
                let device = Arc::clone(&job.device);
                self.stuck.push((job.id, device, Instant::now() + AGAIN));
            }
            Step::Stopped(ref reason) => {
                tracing::error!(id = %job.record.rekey, at = done, "the re-key stopped: {reason}");
                note_failure(&job.device, reason);
            }
        }
        let now = Instant::now();
        if step == Step::Busy {
            // Nothing was done that others would have to rest for.
            job.due = now + job.rest_after_busy();
        } else {
            self.rests_until = now + took;
        }
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

#[cfg(test)]
mod tests {
    use super::super::tests::{device_on, image, rekeyed, rekeyed_as};
    use super::*;
    use crate::worker::start;

    fn thread() -> Thread {
        let (_, replies) = start(&[]).expect("no workers");
        let (_, receiver) = crossbeam_channel::unbounded();
        Thread::prepare(Vec::new(), replies.sender(), receiver, (false, None)).expect("ring")
    }

    /// A guest whose requests stay in a zone, and a volume that is not prepared, keep nobody else waiting.
    #[test]
    fn a_volume_that_waits_lets_the_others_go_on() {
        let mut thread = thread();
        let (one, two) = (
            device_on(&image(), rekeyed()),
            device_on(&image(), rekeyed()),
        );
        let unprepared = device_on(&image(), rekeyed_as(8));
        for (id, device) in [(1, &one), (2, &two), (3, &unprepared)] {
            thread.begin(DeviceId(id), Arc::clone(device));
        }
        assert_eq!((thread.jobs.len(), thread.stuck.len()), (2, 1));
        let later = Instant::now() + Duration::from_secs(3600);
        thread.jobs[0].due = later;
        let tried_again = thread.stuck[0].2;
        let is_done = |device: &BlkDevice| {
            device.rekey_progress().expect("a re-key").state == RekeyState::Done
        };
        while !is_done(&two) {
            let due = thread.due().expect("a volume is left");
            assert!(due < tried_again, "the second is always next");
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            thread.work();
        }
        assert!(!is_done(&one) && thread.jobs.len() == 1);
        assert_eq!(thread.stuck[0].2, tried_again, "not before its time");
        assert_eq!(thread.due(), Some(tried_again));
    }
}
