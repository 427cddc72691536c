//! Transfers and flushes that are waited for: the rekeyer has its own ring and staging, and otherwise takes
//! part in what a device's workers do, its one flush at a time above all.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::time::Duration;

use crate::blk::BlkDevice;
use crate::blk::pipeline::{MAX_RETRIES, is_temporary};
use crate::storage::{Action, Begin, Buffer, Completion, Polled, Storage, Transfer};
use crate::worker::ring::Ring;
use crate::worker::staging::{Chunk, Staging};

/// How long to sleep where nothing wakes: another's flush, a storage that holds transfers.
const SHORT: Duration = Duration::from_micros(100);
/// How long to sleep for a completion, before looking once more.
const LONG: Duration = Duration::from_millis(100);

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
    pub(super) fn new() -> std::io::Result<Self> {
        let staging = Staging::new()?;
        let ring = Ring::new(&staging)?;
        Ok(Self {
            ring,
            staging,
            #[cfg(test)]
            watch: Box::new(|| {}),
        })
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
        let before = device.flushes_begun();
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
            self.ring.wait(Some(SHORT));
        }
        let result = if device.flush_failed() {
            Err(Errno(libc::EIO))
        } else {
            let (settles, number) = (device.settle_wanted(), device.begin_flush());
            let (_, result) = self.run(storage, vec![Transfer::flush()]);
            match result {
                Ok(()) => {
                    device.settle(settles);
                    device.flush_succeeded(number);
                }
                // Latched before the next flush can begin.
                Err(_) => device.latch_flush_failure(),
            }
            result
        };
        device.give_flush_turn();
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
        let (back, result) = self.run(storage, transfers);
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

    /// Runs transfers beside each other to their end; gives them back in their order, with the first error.
    fn run(
        &mut self,
        storage: &dyn Storage,
        transfers: Vec<Transfer>,
    ) -> (Vec<Transfer>, Result<(), Errno>) {
        #[cfg(test)]
        (self.watch)();
        let mut left = transfers.len();
        let mut due: VecDeque<(u64, Transfer)> = (0..).zip(transfers).collect();
        let mut back: Vec<(u64, Transfer)> = Vec::with_capacity(left);
        let (mut ended, mut held, mut result) = (VecDeque::new(), 0usize, Ok(()));
        while left > 0 {
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
                {
                    transfer.retries += 1;
                    due.push_back((token, transfer));
                    continue;
                }
                result = result.and(judged);
                back.push((token, transfer));
                left -= 1;
            }
        }
        back.sort_by_key(|(token, _)| *token);
        let back = back.into_iter().map(|(_, transfer)| transfer).collect();
        (back, result)
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
        while *held > 0
            && let Some(polled) = storage.poll(&mut self.ring)
        {
            *held -= 1;
            if let Polled::Ended(completion) = polled {
                ended.push_back(completion);
            }
        }
        while let Some(completion) = self.ring.reap() {
            if let Some(transfer) = completion.transfer {
                ended.push_back(Completion {
                    token: completion.token,
                    transfer,
                    done: completion.done,
                });
            }
        }
    }
}
