//! One zone: locked, re-encrypted by way of the journal, and let go of under the other key.
//!
//! What can fail where, and what it leads to: before anything was written, the zone is let go of as it was.
//! From the first write on, the record may name the zone: it has to be closed again, stable, before the zone is
//! let go of, or what a guest wrote there meanwhile would be undone by the journal after a crash. Where it can't
//! be, requests for the zone fail until the volume is taken anew, which brings the zone to its end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::rekey::{Layout, Record, Stage, ZONE_BYTES, Zone};
use crossbeam_channel::RecvTimeoutError;

use super::Ticket;
use super::io::{Errno, Io, Pieces};
use super::record::{Volume, at_frontier, digest};
use crate::blk::transform::rekey;
use crate::blk::{BlkDevice, Cipher};
use crate::storage::Storage;
use crate::worker::Mailbox;
use crate::worker::message::{DeviceId, ToWorker, ZoneChange};

/// How long requests are waited for that are in flight in a zone, while others are kept off it: at first, and at
/// most, after twice as long each time that it was not enough. Meanwhile other volumes wait for the rekeyer,
/// whatever this one's guest does to have its requests last.
const PATIENCE: Duration = Duration::from_millis(50);
const MOST_PATIENCE: Duration = Duration::from_millis(800);

/// A volume that is re-keyed.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: DeviceId,
    pub(super) device: Arc<BlkDevice>,
    pub(super) storage: Box<dyn Storage>,
    pub(super) key: Arc<Cipher>,
    pub(super) previous: Arc<Cipher>,
    pub(super) layout: Layout,
    pub(super) record: Record,
    /// How often in a row the zone did not get clear.
    pub(super) busy: u32,
    /// Its next zone is not begun before: its guest has one in use, and others go on meanwhile.
    pub(super) due: Instant,
}

/// Where a step has led.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The frontier has moved.
    Moved,
    /// Everything is under the key, and the record says so.
    Done,
    /// A request of a guest stayed in the zone: to be tried again.
    Busy,
    /// It can't go on: why, for the operator.
    Stopped(String),
}

impl Job {
    fn volume(&self) -> Volume<'_> {
        Volume {
            device: &self.device,
            storage: &*self.storage,
        }
    }

    /// Bytes from the volume's start that are under the key.
    pub(super) fn done_bytes(&self) -> u64 {
        match self.record.stage {
            Stage::Prepared => 0,
            Stage::Running { frontier_bytes, .. } => frontier_bytes,
            Stage::Done { .. } | Stage::Over { .. } => self.record.size_bytes,
        }
    }

    /// Moves the frontier by a zone, or ends the re-key.
    pub(super) fn step(&mut self, io: &mut Io, workers: &[Mailbox]) -> Step {
        let from = self.done_bytes();
        let to = self.record.size_bytes.min(from.saturating_add(ZONE_BYTES));
        if from == to {
            return self.end(io);
        }
        let zone = from..to;
        if !self.lock(&zone, workers) {
            self.unlock(from, workers);
            self.busy = self.busy.saturating_add(1);
            return Step::Busy;
        }
        self.busy = 0;
        match self.re_encrypt(io, &zone) {
            Ok(()) => {
                self.unlock(to, workers);
                Step::Moved
            }
            Err(Failure::Untouched(reason)) => {
                self.unlock(from, workers);
                Step::Stopped(reason)
            }
            // The zone stays locked: its requests wait for the storage, as all others do.
            Err(Failure::Open(reason)) if io.has_left(self.id) => Step::Stopped(reason),
            Err(Failure::Open(reason)) => {
                tell(workers, self.id, || ZoneChange::Fail { zone: zone.clone() });
                Step::Stopped(format!(
                    "{reason}; requests for these {} bytes fail until the guest's disk is started \
                     anew or the volume attached again",
                    to - from
                ))
            }
        }
    }

    fn end(&mut self, io: &mut Io) -> Step {
        let Stage::Running { check, .. } = self.record.stage else {
            return Step::Done;
        };
        let done = self.record.next(Stage::Done { check });
        match self.volume().put(io, &self.layout, &done, Vec::new()) {
            Ok(_) => {
                self.record = done;
                Step::Done
            }
            Err(errno) => Step::Stopped(format!("its record can't be written: {errno}")),
        }
    }

    /// Keeps requests off a zone; false if some that had begun have not ended in time.
    fn lock(&self, zone: &Range<u64>, workers: &[Mailbox]) -> bool {
        let (held, is_clear) = crossbeam_channel::bounded::<()>(0);
        tell(workers, self.id, || ZoneChange::Lock {
            zone: zone.clone(),
            ticket: Ticket::new(held.clone()),
        });
        drop(held);
        is_clear.recv_timeout(self.patience()) == Err(RecvTimeoutError::Disconnected)
    }

    fn patience(&self) -> Duration {
        let doubled = PATIENCE.saturating_mul(1 << self.busy.min(8));
        doubled.min(MOST_PATIENCE)
    }

    /// How long to leave a zone alone that did not get clear: most of the time, nobody waits for it.
    pub(super) fn rest_after_busy(&self) -> Duration {
        self.patience().saturating_mul(4)
    }

    pub(super) fn unlock(&self, frontier_bytes: u64, workers: &[Mailbox]) {
        tell(workers, self.id, || ZoneChange::Unlock { frontier_bytes });
    }

    fn re_encrypt(&mut self, io: &mut Io, zone: &Range<u64>) -> Result<(), Failure> {
        let at = |what: &'static str| {
            let from = zone.start;
            move |errno: Errno| format!("{what} at byte {from} failed: {errno}")
        };
        if self.device.flush_failed() {
            // No flush can be believed any more, and nothing has to be lost for that.
            let reason = "a flush of the volume failed: detach it and attach it again";
            return Err(Failure::Untouched(reason.to_owned()));
        }
        let bytes = zone.end - zone.start;
        let pieces = io.read(&*self.storage, zone.start, bytes);
        let mut pieces = pieces.map_err(|e| Failure::Untouched(at("reading")(e)))?;
        if !re_encrypt_pieces(&mut pieces, zone.start, &self.previous, &self.key) {
            io.give(pieces);
            return Err(Failure::Untouched("no whole data units".to_owned()));
        }
        let open = Some(Zone {
            bytes,
            journal_sha256: digest(&pieces),
        });
        let opened = self
            .record
            .next(at_frontier(&self.record.stage, zone.start, open));
        let put = self.volume().put(io, &self.layout, &opened, pieces);
        let pieces = match put {
            Ok(pieces) => pieces,
            Err(errno) => {
                // The record without a zone goes to the same place: the other one is the only one that is sure
                // to be whole.
                let reason = at("writing the journal for the zone")(errno);
                return Err(match self.close(io, zone.start) {
                    Ok(()) => Failure::Untouched(reason),
                    Err(_) => Failure::Open(reason),
                });
            }
        };
        self.record = opened;
        let (lots, written) = io.write(&*self.storage, vec![(zone.start, pieces)]);
        lots.into_iter().for_each(|pieces| io.give(pieces));
        written
            .and_then(|()| io.flush(&self.device, &*self.storage))
            .map_err(|e| Failure::Open(at("writing")(e)))?;
        self.close(io, zone.end)
            .map_err(|e| Failure::Open(at("writing the record for the zone")(e)))
    }

    /// A record without a zone, stable.
    fn close(&mut self, io: &mut Io, frontier_bytes: u64) -> Result<(), Errno> {
        let closed = self
            .record
            .next(at_frontier(&self.record.stage, frontier_bytes, None));
        self.volume().put(io, &self.layout, &closed, Vec::new())?;
        self.record = closed;
        Ok(())
    }
}

/// Tells all workers of a device.
pub(super) fn tell(workers: &[Mailbox], id: DeviceId, change: impl Fn() -> ZoneChange) {
    for worker in workers {
        let change = change();
        worker.send(ToWorker::Zone { id, change });
    }
}

/// How a zone failed.
#[derive(Debug)]
enum Failure {
    /// Everything is as it was.
    Untouched(String),
    /// The record may name the zone, and its place may hold anything.
    Open(String),
}

fn re_encrypt_pieces(pieces: &mut Pieces, from: u64, previous: &Cipher, key: &Cipher) -> bool {
    let mut at = from;
    pieces.iter_mut().all(|piece| {
        let offset_bytes = at;
        at += u64::from(piece.bytes);
        rekey(&mut piece.chunk, piece.bytes, offset_bytes, previous, key)
    })
}
