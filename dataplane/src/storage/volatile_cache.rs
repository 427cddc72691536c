//! Memory behind a write cache that a power cut empties: for tests of what a flush promises.
//!
//! A write stays in the cache until a flush or a durable write of the same sectors. [`VolatileCache::cut`]
//! shows what a power cut may leave: of each sector that was in the cache, by itself, what was stable or
//! any of what was written to it since, so that writes are dropped, reordered and torn.
//!
//! A flush promises as little as a disk's does: it is for what was written when it began, is stable only when it
//! ends, and ends some looks later than it began, so that whoever takes it for more than that loses something.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Action, Begin, Completion, Done, Polled, RamSpec, Storage, Transfer};
use crate::blk::SECTOR_BYTES;
use crate::worker::ring::Ring;

const SECTOR: usize = 512;
const _: () = assert!(SECTOR as u64 == SECTOR_BYTES);

type Sector = [u8; SECTOR];

/// A storage with a volatile cache; several workers share it.
#[derive(Debug)]
pub struct VolatileCache {
    stable: RamSpec,
    cache: Mutex<Cache>,
}

/// What was written to a sector, and by the how manieth write of all.
#[derive(Debug)]
struct Version {
    number: u64,
    bytes: Sector,
}

#[derive(Debug, Default)]
struct Cache {
    /// What was written to a sector since it was stable, in order; never empty.
    versions: BTreeMap<u64, Vec<Version>>,
    /// Writes until now.
    written: u64,
    /// The next flush loses what it should have made stable, and says so once.
    loss: Option<i32>,
}

impl VolatileCache {
    /// A cache over memory with what is stable.
    #[must_use]
    pub fn new(stable: RamSpec) -> Arc<Self> {
        Arc::new(Self {
            stable,
            cache: Mutex::default(),
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.stable.bytes()
    }

    /// The next flush fails with this errno and empties the cache; those after it find nothing wrong,
    /// as a file system does that marks pages clean which it could not write.
    pub fn lose_at_next_flush(&self, errno: i32) {
        self.lock().loss = Some(errno);
    }

    /// What a power cut now may leave. `choose(n)` chooses one of `n`.
    #[must_use]
    pub fn cut(&self, mut choose: impl FnMut(usize) -> usize) -> Vec<u8> {
        let cache = self.lock();
        let mut image = vec![0; usize::try_from(self.bytes()).unwrap_or(0)];
        let _ = self.stable.copy_out(0, &mut image);
        for (sector, versions) in &cache.versions {
            let at = usize::try_from(sector * SECTOR_BYTES).unwrap_or(usize::MAX);
            let chosen = choose(versions.len() + 1).checked_sub(1);
            let chosen = chosen.and_then(|index| versions.get(index));
            if let (Some(version), Some(to)) =
                (chosen, image.get_mut(at..at.saturating_add(SECTOR)))
            {
                to.copy_from_slice(&version.bytes);
            }
        }
        image
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, transfer: &mut Transfer) -> Done {
        let sectors = transfer.offset_bytes / SECTOR_BYTES;
        let sectors = sectors..sectors + transfer.bytes / SECTOR_BYTES;
        let end = transfer.offset_bytes.checked_add(transfer.bytes);
        let whole = (transfer.offset_bytes | transfer.bytes).is_multiple_of(SECTOR_BYTES);
        if !whole || end.is_none_or(|end| end > self.bytes()) {
            return Err(libc::EINVAL);
        }
        let length = usize::try_from(transfer.bytes).map_err(|_| libc::EINVAL)?;
        let mut cache = self.lock();
        match transfer.action {
            Action::Flush => return Err(libc::EINVAL),
            // What is discarded may become anything.
            Action::Discard => cache.write(sectors, &vec![0xdb; length]),
            Action::Zero { .. } => cache.write(sectors, &vec![0; length]),
            Action::Read => {
                let mut bytes = vec![0; length];
                let fits = self.stable.copy_out(transfer.offset_bytes, &mut bytes);
                cache.read(sectors, &mut bytes);
                if !fits || !transfer.copy_in(&bytes) {
                    return Err(libc::EFAULT);
                }
            }
            Action::Write { durable } => {
                let mut bytes = vec![0; length];
                if !transfer.copy_out(&mut bytes) {
                    return Err(libc::EFAULT);
                }
                if durable {
                    cache.versions.retain(|sector, _| !sectors.contains(sector));
                    if !self.stable.copy_in(transfer.offset_bytes, &bytes) {
                        return Err(libc::EIO);
                    }
                } else {
                    cache.write(sectors, &bytes);
                }
            }
        }
        Ok(transfer.bytes)
    }

    /// How many writes a flush that begins now is for.
    fn begin_flush(&self) -> u64 {
        self.lock().written
    }

    /// Ends a flush that is for so many writes.
    fn end_flush(&self, covers: u64) -> Done {
        let mut cache = self.lock();
        let loss = cache.loss.take();
        let mut stable = true;
        cache.versions.retain(|sector, versions| {
            let count = versions.partition_point(|version| version.number <= covers);
            if let (Some(last), None) = (versions.drain(..count).next_back(), loss) {
                stable &= self.stable.copy_in(sector * SECTOR_BYTES, &last.bytes);
            }
            !versions.is_empty()
        });
        match loss {
            Some(errno) => Err(errno),
            None if stable => Ok(0),
            None => Err(libc::EIO),
        }
    }
}

impl Cache {
    fn write(&mut self, sectors: std::ops::Range<u64>, bytes: &[u8]) {
        self.written += 1;
        for (sector, part) in sectors.zip(bytes.as_chunks::<SECTOR>().0) {
            self.versions.entry(sector).or_default().push(Version {
                number: self.written,
                bytes: *part,
            });
        }
    }

    fn read(&self, sectors: std::ops::Range<u64>, bytes: &mut [u8]) {
        for (sector, part) in sectors.zip(bytes.as_chunks_mut::<SECTOR>().0) {
            if let Some(last) = self.versions.get(&sector).and_then(|v| v.last()) {
                *part = last.bytes;
            }
        }
    }
}

/// A worker's way to it.
#[derive(Debug)]
pub(super) struct VolatileStorage {
    cache: Arc<VolatileCache>,
    flushes: RefCell<VecDeque<Flush>>,
    /// For their times (a multiplicative generator): the same in each run.
    random: Cell<u32>,
}

/// A flush that has begun.
#[derive(Debug)]
struct Flush {
    token: u64,
    transfer: Transfer,
    /// How many writes it is for.
    covers: u64,
    /// How many looks it still takes.
    looks: u32,
}

/// A flush takes fewer looks than that.
const MOST_LOOKS: u32 = 16;

impl VolatileStorage {
    pub(super) fn new(cache: &Arc<VolatileCache>) -> Self {
        Self {
            cache: Arc::clone(cache),
            flushes: RefCell::default(),
            random: Cell::new(1),
        }
    }
}

impl Storage for VolatileStorage {
    fn begin(&self, _ring: &mut Ring, token: u64, mut transfer: Transfer) -> Begin {
        if transfer.action == Action::Flush {
            self.random.update(|n| n.wrapping_mul(0x915f_77f5));
            let looks = (self.random.get() >> 16) % MOST_LOOKS;
            self.flushes.borrow_mut().push_back(Flush {
                token,
                transfer,
                covers: self.cache.begin_flush(),
                looks,
            });
            return Begin::Held;
        }
        let done = self.cache.run(&mut transfer);
        Begin::Done(transfer, done)
    }

    fn poll(&self, _ring: &mut Ring) -> Option<Polled> {
        let mut flushes = self.flushes.borrow_mut();
        let first = flushes.front_mut()?;
        if first.looks > 0 {
            first.looks -= 1;
            return None;
        }
        let flush = flushes.pop_front()?;
        Some(Polled::Ended(Completion {
            token: flush.token,
            transfer: flush.transfer,
            done: self.cache.end_flush(flush.covers),
        }))
    }

    fn cancel(&self) -> Option<Completion> {
        let flush = self.flushes.borrow_mut().pop_front()?;
        Some(Completion {
            token: flush.token,
            transfer: flush.transfer,
            done: Err(libc::ECANCELED),
        })
    }
}
