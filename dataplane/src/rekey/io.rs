//! Transfers and flushes that are waited for: the rekeyer has its own ring and staging, and otherwise takes
//! part in what a device's workers do, its one flush at a time above all.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::left::{Flush, Left};
use crate::blk::BlkDevice;
use crate::blk::pipeline::{MAX_RETRIES, is_temporary};
use crate::fence::Fence;
use crate::hand;
use crate::storage::{Action, Begin, Buffer, Completion, Polled, Storage, Transfer};
use crate::worker::message::DeviceId;
use crate::worker::ring::Ring;
use crate::worker::staging::{Chunk, Staging};

/// How long to sleep where nothing wakes: another's flush, a storage that holds transfers.
const SHORT: Duration = Duration::from_micros(100);
/// How long to sleep for a completion, before looking once more.
const LONG: Duration = Duration::from_millis(100);
/// How long those that were cancelled may take to end before they are left behind.
const CANCEL_TIME: Duration = Duration::from_millis(200);

/// Bytes in staging memory.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) chunk: Chunk,
    /// Of the chunk's front.
    pub(super) bytes: u32,
}

/// Bytes in staging memory that belong together, in their order.
pub(super) type Pieces = Vec<Piece>;

/// Why something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Errno(pub(super) i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

/// The way to storages.
pub(super) struct Io {
    /// Dropped first: it waits for what the kernel still uses.
    pub(super) ring: Ring,
    staging: Staging,
    /// Whose storage it is at present; none: nobody's that could be left.
    whose: Option<(DeviceId, Arc<BlkDevice>)>,
    /// High half of the tokens of transfers under way: those of others were left behind.
    lot: u32,
    left: Left,
    /// Called before each lot of transfers, so that tests can cut the power there.
    #[cfg(test)]
    watch: Box<dyn FnMut()>,
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Io")
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}

impl Io {
    /// With a fence for the ring to keep.
    pub(super) fn new(fence: Option<Fence>) -> std::io::Result<Self> {
        let staging = Staging::new()?;
        let mut ring = Ring::new(&staging)?;
        if let Some(fence) = fence {
            ring.keep_fence(fence.as_fd())?;
        }
        Ok(Self {
            ring,
            staging,
            whose: None,
            lot: 0,
            left: Left::default(),
            #[cfg(test)]
            watch: Box::new(|| {}),
        })
    }

    /// What follows is done with this device's storage, until something else is said.
    ///
    /// # Errors
    /// Something of it was left behind, which has to end first.
    pub(super) fn turn_to(&mut self, id: DeviceId, device: &Arc<BlkDevice>) -> Result<(), String> {
        hand::take(device.hand.get());
        self.whose = Some((id, Arc::clone(device)));
        if !self.has_left(id) {
            return Ok(());
        }
        Err(
            "requests of its re-key are still with the kernel: its storage does not answer"
                .to_owned(),
        )
    }

    /// Whether something of a device was left behind that has not ended.
    pub(super) fn has_left(&self, id: DeviceId) -> bool {
        self.left.has(id)
    }

    /// Whether anything was.
    pub(super) fn has_left_any(&self) -> bool {
        !self.left.is_empty()
    }

    /// Takes in what has ended of what was left behind.
    pub(super) fn look_after_left(&mut self) {
        self.ring.turn();
        let mut ended = VecDeque::new();
        self.reap(&mut ended);
        debug_assert!(ended.is_empty(), "nothing else is under way");
    }

    #[cfg(test)]
    pub(super) fn watch(&mut self, watch: impl FnMut() + 'static) {
        self.watch = Box::new(watch);
    }

    /// Reads that many bytes.
    pub(super) fn read(
        &mut self,
        storage: &dyn Storage,
        offset_bytes: u64,
        bytes: u64,
    ) -> Result<Pieces, Errno> {
        let pieces = self.pieces(bytes)?;
        let (pieces, result) = self.pass(storage, Action::Read, vec![(offset_bytes, pieces)]);
        match result {
            Ok(()) => Ok(pieces.into_iter().flatten().collect()),
            Err(errno) => {
                pieces.into_iter().for_each(|pieces| self.give(pieces));
                Err(errno)
            }
        }
    }

    /// Writes pieces to where each lot belongs, all at once, and gives them back.
    pub(super) fn write(
        &mut self,
        storage: &dyn Storage,
        lots: Vec<(u64, Pieces)>,
    ) -> (Vec<Pieces>, Result<(), Errno>) {
        self.pass(storage, Action::Write { durable: false }, lots)
    }

    /// Room for that many bytes.
    pub(super) fn pieces(&mut self, bytes: u64) -> Result<Pieces, Errno> {
        let (mut pieces, mut left) = (Pieces::new(), bytes);
        while left > 0 {
            if self.staging.is_short(left) {
                self.ring.grow(&mut self.staging);
            }
            let Some(chunk) = self.staging.take(left) else {
                // There is room for several zones, and one is under way at a time.
                self.give(pieces);
                return Err(Errno(libc::ENOMEM));
            };
            let bytes = chunk.bytes().min(u32::try_from(left).unwrap_or(u32::MAX));
            left -= u64::from(bytes);
            pieces.push(Piece { chunk, bytes });
        }
        Ok(pieces)
    }

    /// Takes room back.
    pub(super) fn give(&mut self, pieces: Pieces) {
        for piece in pieces {
            self.staging.give(piece.chunk);
        }
    }

    /// Makes everything that was written to a device stable, in its turn among the device's flushes: a lost
    /// write is told of once, to whichever flush ends first.
    pub(super) fn flush(&mut self, device: &BlkDevice, storage: &dyn Storage) -> Result<(), Errno> {
        if self.is_left() {
            return Err(Errno(libc::EBUSY));
        }
        let before = device.flushes_begun();
        let deadline = Instant::now() + device.health.patience().hung;
        while !device.take_flush_turn() {
            // Guests that flush all the time leave no moment between their flushes; one that began since is for
            // what was written before, too.
            if device.flushed_since(before) {
                return if device.flush_failed() {
                    Err(Errno(libc::EIO))
                } else {
                    Ok(())
                };
            }
            if Instant::now() >= deadline || device.is_wiped() {
                return Err(Errno(libc::ETIMEDOUT));
            }
            self.ring.wait(Some(SHORT));
        }
        if device.flush_failed() {
            device.give_flush_turn();
            return Err(Errno(libc::EIO));
        }
        let flush = Flush::begin(device);
        let (_, result) = self.run(storage, vec![Transfer::flush()], Some(flush));
        if !self.left_last() {
            flush.end(device, result);
        }
        result
    }

    fn pass(
        &mut self,
        storage: &dyn Storage,
        action: Action,
        lots: Vec<(u64, Pieces)>,
    ) -> (Vec<Pieces>, Result<(), Errno>) {
        let counts: Vec<usize> = lots.iter().map(|(_, pieces)| pieces.len()).collect();
        let mut transfers = Vec::new();
        for (mut offset_bytes, pieces) in lots {
            for piece in pieces {
                transfers.push(Transfer {
                    action,
                    offset_bytes,
                    bytes: u64::from(piece.bytes),
                    buffer: Buffer::Staging(piece.chunk),
                    retries: 0,
                });
                offset_bytes += u64::from(piece.bytes);
            }
        }
        let (back, result) = self.run(storage, transfers, None);
        let mut back = back.into_iter().filter_map(|transfer| {
            let bytes = u32::try_from(transfer.bytes).unwrap_or(u32::MAX);
            match transfer.buffer {
                Buffer::Staging(chunk) => Some(Piece { chunk, bytes }),
                Buffer::None | Buffer::Guest(_) => None,
            }
        });
        let lots = counts
            .into_iter()
            .map(|count| back.by_ref().take(count).collect());
        (lots.collect(), result)
    }

    /// Runs transfers beside each other to their end; gives them back in their order, with the first error. Those
    /// that don't end in time are left behind.
    fn run(
        &mut self,
        storage: &dyn Storage,
        transfers: Vec<Transfer>,
        flush: Option<Flush>,
    ) -> (Vec<Transfer>, Result<(), Errno>) {
        #[cfg(test)]
        (self.watch)();
        if self.is_left() {
            return (transfers, Err(Errno(libc::EBUSY)));
        }
        self.lot = self.lot.wrapping_add(1);
        let first = u64::from(self.lot) << 32;
        let mut under_way = transfers.len();
        let mut due: VecDeque<(u64, Transfer)> = (first..).zip(transfers).collect();
        let mut back: Vec<(u64, Transfer)> = Vec::with_capacity(under_way);
        let (mut ended, mut held, mut result) = (VecDeque::new(), 0usize, Ok(()));
        let mut deadline = self.deadline();
        let mut cancelled = false;
        while under_way > 0 {
            self.begin(storage, &mut due, &mut ended, &mut held);
            self.look(storage, &mut ended, &mut held, !due.is_empty());
            while let Some(Completion {
                token,
                mut transfer,
                done,
            }) = ended.pop_front()
            {
                let judged = transfer.judge(done).map_err(Errno);
                if let Err(Errno(errno)) = judged
                    && is_temporary(transfer.action, errno)
                    && transfer.retries < MAX_RETRIES
                    && !cancelled
                {
                    transfer.retries += 1;
                    due.push_back((token, transfer));
                    continue;
                }
                result = result.and(judged);
                back.push((token, transfer));
                under_way -= 1;
            }
            if under_way > 0 && self.is_over(deadline, cancelled) {
                result = Err(Errno(libc::ETIMEDOUT));
                under_way -= due.len();
                back.extend(due.drain(..));
                if under_way == 0 {
                    break;
                }
                // A flush that is cancelled would count as failed.
                if cancelled || flush.is_some() {
                    self.leave(under_way, flush);
                    break;
                }
                cancelled = true;
                ended.extend(std::iter::from_fn(|| storage.cancel()));
                held = 0;
                self.ring
                    .cancel_transfers(|token| token >> 32 == first >> 32);
                deadline = Some(Instant::now() + CANCEL_TIME);
            }
        }
        back.sort_by_key(|(token, _)| *token);
        let back = back.into_iter().map(|(_, transfer)| transfer).collect();
        (back, result)
    }

    /// Whether something of the device that it is about was left behind.
    fn is_left(&self) -> bool {
        let whose = self.whose.as_ref();
        whose.is_some_and(|(id, _)| self.has_left(*id))
    }

    /// When what begins now is waited for no longer: meanwhile the other volumes wait.
    fn deadline(&self) -> Option<Instant> {
        let (_, device) = self.whose.as_ref()?;
        Instant::now().checked_add(device.health.patience().hung)
    }

    /// Whether it is over; also once the device's keys were wiped, unless the transfers are being cancelled.
    fn is_over(&self, deadline: Option<Instant>, cancelled: bool) -> bool {
        let whose = self.whose.as_ref();
        let wiped = !cancelled && whose.is_some_and(|(_, device)| device.is_wiped());
        wiped || deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn leave(&mut self, under_way: usize, flush: Option<Flush>) {
        if let Some((id, device)) = &self.whose {
            let count = u32::try_from(under_way).unwrap_or(u32::MAX);
            tracing::warn!(
                requests = count,
                "the storage of a volume that is re-keyed does not answer"
            );
            self.left.add(self.lot, (*id, device), count, flush);
        }
    }

    /// Whether the last transfers were left behind.
    fn left_last(&self) -> bool {
        self.left.has_lot(self.lot)
    }

    fn begin(
        &mut self,
        storage: &dyn Storage,
        due: &mut VecDeque<(u64, Transfer)>,
        ended: &mut VecDeque<Completion>,
        held: &mut usize,
    ) {
        while let Some((token, transfer)) = due.pop_front() {
            match storage.begin(&mut self.ring, token, transfer) {
                Begin::Later => {}
                Begin::Held => *held += 1,
                Begin::Done(transfer, done) => ended.push_back(Completion {
                    token,
                    transfer,
                    done,
                }),
                Begin::Full(transfer) => return due.push_front((token, transfer)),
            }
        }
    }

    /// Sleeps until something has ended, unless something has, and takes it.
    fn look(
        &mut self,
        storage: &dyn Storage,
        ended: &mut VecDeque<Completion>,
        held: &mut usize,
        again: bool,
    ) {
        if ended.is_empty() {
            self.ring
                .wait(Some(if *held > 0 || again { SHORT } else { LONG }));
        }
        while let Some(polled) = storage.poll(&mut self.ring) {
            *held = held.saturating_sub(1);
            if let Polled::Ended(completion) = polled {
                self.sort(completion, ended);
            }
        }
        self.reap(ended);
    }

    /// Takes completions from the ring.
    fn reap(&mut self, ended: &mut VecDeque<Completion>) {
        while let Some(completion) = self.ring.reap() {
            if let Some(transfer) = completion.transfer {
                let completion = Completion {
                    token: completion.token,
                    transfer,
                    done: completion.done,
                };
                self.sort(completion, ended);
            }
        }
    }

    /// One that ended: of those under way, or of those that were left behind.
    fn sort(&mut self, completion: Completion, ended: &mut VecDeque<Completion>) {
        let lot = u32::try_from(completion.token >> 32).unwrap_or(u32::MAX);
        if lot == self.lot && !self.left.has_lot(lot) {
            return ended.push_back(completion);
        }
        let result = completion.transfer.judge(completion.done);
        if let Buffer::Staging(chunk) = completion.transfer.buffer {
            self.staging.give(chunk);
        }
        self.left.ended(lot, result);
    }
}
