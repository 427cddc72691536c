//! A block device as every worker sees it: what never changes while it is attached, the little that
//! does (capacity, progress of a re-key; in [`cache`] its cache mode and flushes), and its counters.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_protocol::control::{RekeyProgress, RekeyState};

use super::cipher::{Cipher, Ciphers};
use super::health::Health;
use super::metrics::Metrics;
use crate::hand::SharedHand;
use crate::log_limit::LogLimit;
use crate::memory::SharedFlag;
use crate::qos::Qos;
use crate::storage::StorageSpec;

mod cache;

/// Bytes of a sector, always (virtio 1.2, 5.2).
pub const SECTOR_BYTES: u64 = 512;

/// Shape and identity of a device: what never changes while it is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block in bytes, 512 or 4096: requests are whole numbers of them.
    pub logical_block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; 20],
    /// Request queues.
    pub queues: u16,
    /// DISCARD is offered, and reaches the storage.
    pub discard: bool,
}

/// What a storage may turn out not to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Lack {
    /// Blocks can be given up (`FALLOC_FL_PUNCH_HOLE`).
    Punch = 1,
    /// A range can be zeroed (`FALLOC_FL_ZERO_RANGE`).
    ZeroRange = 2,
}

impl Lack {
    /// What is done instead, for the log.
    pub(super) fn consequence(self) -> &'static str {
        match self {
            Self::Punch => "discards do nothing, zeroes are allocated",
            Self::ZeroRange => "zeroes are written",
        }
    }
}

/// Why a device can't have another capacity.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// Less than before.
    #[error(
        "{to_sectors} sectors are fewer than the device's {from_sectors}: a guest may have data \
         behind them; a smaller device is another volume"
    )]
    Shrinks {
        /// As it is.
        from_sectors: u64,
        /// As it was to be.
        to_sectors: u64,
    },
    /// Not whole logical blocks, or more bytes than a file can have.
    #[error(
        "{0} sectors are no size of a device: they are whole logical blocks of it, below 2^63 bytes"
    )]
    Size(u64),
    /// The storage ends before.
    #[error(
        "the volume's storage has {has_bytes} bytes, and {needs_bytes} are needed: grow it first"
    )]
    Storage {
        /// Of the storage.
        has_bytes: u64,
        /// Of the device.
        needs_bytes: u64,
    },
    /// The record of a re-key lies where it would grow to.
    #[error("it is being re-keyed: it can grow when that is done and over")]
    Rekeyed,
    /// The storage does not tell its length.
    #[error("the length of the volume's storage can't be told: {0}")]
    Io(#[from] std::io::Error),
}

/// An attached block device. The key lives until the last worker and the control thread have
/// dropped it.
#[derive(Debug)]
pub struct BlkDevice {
    /// Shape and identity.
    pub geometry: Geometry,
    /// Where its blocks live.
    pub storage: StorageSpec,
    /// How they are encrypted there; none: plain. Replaced when a re-key begins or ends: workers have their
    /// own.
    ciphers: Mutex<Option<Ciphers>>,
    encrypted: bool,
    /// How far the re-key is, for the status; the rekeyer writes it.
    progress: Mutex<Option<RekeyProgress>>,
    /// Counters, written by the workers.
    pub metrics: Metrics,
    qos: Qos,
    /// Whether its storage answers in time, as the workers see it.
    pub health: Health,
    /// Grows only.
    capacity_sectors: AtomicU64,
    /// The driver's cache mode: completed writes may be volatile until a flush.
    writeback: AtomicBool,
    /// The driver chose it, and did not just begin with it.
    writeback_chosen: AtomicBool,
    /// How often the driver changed to write-through, and up to which of these what was written before
    /// is stable.
    settle_wanted: AtomicU64,
    settled: AtomicU64,
    /// A flush is in flight.
    flushing: AtomicBool,
    /// How many were begun, and the last of them that succeeded.
    flushes_begun: AtomicU64,
    flushes_done: AtomicU64,
    /// What the storage was found not to have: a bit for each [`Lack`].
    lacks: AtomicU8,
    /// A flush failed: what was written before may be lost, and no later flush can say otherwise.
    flush_failed: AtomicBool,
    /// The same, where a successor finds it.
    kept_flush_failure: OnceLock<Arc<SharedFlag>>,
    /// What a thread that works for it has in hand.
    pub hand: SharedHand,
    /// Length of its storage when it was looked at last: the rekeyer can't ask the kernel.
    storage_bytes: AtomicU64,
    /// The record of a re-key that is over is being closed, behind the end that it has now.
    closing: AtomicBool,
    /// It was given up and does not come back.
    wiped: AtomicBool,
}

impl BlkDevice {
    /// A device.
    #[must_use]
    pub fn new(
        geometry: Geometry,
        capacity_sectors: u64,
        storage: StorageSpec,
        cipher: Option<Cipher>,
    ) -> Arc<Self> {
        Self::with_ciphers(
            geometry,
            capacity_sectors,
            storage,
            cipher.map(Ciphers::single),
        )
    }

    /// A device that may have a record of a re-key, and be in one.
    #[must_use]
    pub fn with_ciphers(
        geometry: Geometry,
        capacity_sectors: u64,
        storage: StorageSpec,
        ciphers: Option<Ciphers>,
    ) -> Arc<Self> {
        let progress = ciphers
            .as_ref()
            .and_then(|ciphers| unknown_progress(ciphers, capacity_sectors));
        let storage_bytes = AtomicU64::new(storage.bytes().unwrap_or(0));
        let metrics = Metrics::new(geometry.queues);
        Arc::new(Self {
            geometry,
            storage,
            encrypted: ciphers.is_some(),
            ciphers: Mutex::new(ciphers),
            progress: Mutex::new(progress),
            metrics,
            qos: Qos::default(),
            health: Health::new(),
            capacity_sectors: AtomicU64::new(capacity_sectors),
            writeback: AtomicBool::new(true),
            writeback_chosen: AtomicBool::new(false),
            settle_wanted: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            flushing: AtomicBool::new(false),
            flushes_begun: AtomicU64::new(0),
            flushes_done: AtomicU64::new(0),
            lacks: AtomicU8::new(0),
            flush_failed: AtomicBool::new(false),
            kept_flush_failure: OnceLock::new(),
            hand: SharedHand::default(),
            storage_bytes,
            closing: AtomicBool::new(false),
            wiped: AtomicBool::new(false),
        })
    }

    /// How much of it may be used in a second.
    #[must_use]
    #[inline]
    pub fn qos(&self) -> &Qos {
        &self.qos
    }

    /// Whether its blocks are encrypted.
    #[must_use]
    #[inline]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// Its keys as they are now.
    #[must_use]
    pub fn ciphers(&self) -> Option<Ciphers> {
        lock(&self.ciphers).clone()
    }

    /// Other keys for the same bytes: each worker is told by itself.
    pub(crate) fn set_ciphers(&self, ciphers: Ciphers) {
        // What was known of an earlier re-key says nothing about this one.
        self.set_rekey_progress(unknown_progress(&ciphers, self.capacity_sectors()));
        *lock(&self.ciphers) = Some(ciphers);
    }

    /// Whether it goes without its keys, although something of it is left.
    pub(crate) fn is_wiped(&self) -> bool {
        self.wiped.load(Ordering::Acquire)
    }

    /// Lets go of its keys for good: the device goes, although something of it is left.
    pub(crate) fn wipe(&self) {
        self.wiped.store(true, Ordering::Release);
        *lock(&self.ciphers) = None;
    }

    /// Its keys, of a device that nobody else has any more.
    pub(crate) fn into_ciphers(self) -> Option<Ciphers> {
        self.ciphers
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How far its re-key is; none without one, or before the rekeyer has it.
    #[must_use]
    pub fn rekey_progress(&self) -> Option<RekeyProgress> {
        lock(&self.progress).clone()
    }

    /// Whether the record of a re-key is being closed: meanwhile the device does not grow over it.
    pub(crate) fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::Release);
    }

    /// Looks at the length of its storage, for [`BlkDevice::storage_bytes`]. On the control thread, which may
    /// ask the kernel.
    pub(crate) fn measure_storage(&self) {
        match self.storage.bytes() {
            Ok(bytes) => self.storage_bytes.store(bytes, Ordering::Release),
            Err(error) => {
                // A frontend can have it measured again and again.
                static LIMIT: LogLimit = LogLimit::new();
                if LIMIT.allows() {
                    tracing::warn!("the length of a volume's storage can't be told: {error}");
                }
            }
        }
    }

    /// The length of its storage in bytes, as it was measured last.
    pub(crate) fn storage_bytes(&self) -> u64 {
        self.storage_bytes.load(Ordering::Acquire)
    }

    pub(crate) fn set_rekey_progress(&self, progress: Option<RekeyProgress>) {
        *lock(&self.progress) = progress;
    }

    /// Capacity in sectors. Whoever checks a request against it reads it once, and uses what it read.
    #[must_use]
    #[inline]
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Acquire)
    }

    /// Gives it another capacity: at least the one it has, and no more than its storage has. To be called
    /// by one thread at a time; the frontend still has to be told.
    ///
    /// # Errors
    /// See [`ResizeError`]; then nothing has changed.
    pub fn resize(&self, capacity_sectors: u64) -> Result<(), ResizeError> {
        let from_sectors = self.capacity_sectors();
        if capacity_sectors < from_sectors {
            return Err(ResizeError::Shrinks {
                from_sectors,
                to_sectors: capacity_sectors,
            });
        }
        let block = u64::from(self.geometry.logical_block_bytes);
        let needs_bytes = capacity_sectors
            .checked_mul(SECTOR_BYTES)
            .filter(|bytes| i64::try_from(*bytes).is_ok() && bytes.is_multiple_of(block))
            .ok_or(ResizeError::Size(capacity_sectors))?;
        let rekeyed = |ciphers: Ciphers| ciphers.rekey.is_some();
        if self.ciphers().is_some_and(rekeyed) || self.closing.load(Ordering::Acquire) {
            return Err(ResizeError::Rekeyed);
        }
        let has_bytes = self.storage.bytes()?;
        if needs_bytes > has_bytes {
            return Err(ResizeError::Storage {
                has_bytes,
                needs_bytes,
            });
        }
        self.capacity_sectors
            .store(capacity_sectors, Ordering::Release);
        Ok(())
    }

    /// Whether its storage was found not to have something.
    #[inline]
    pub(super) fn lacks(&self, lack: Lack) -> bool {
        self.lacks.load(Ordering::Relaxed) & lack as u8 != 0
    }

    /// Its storage does not have something; whether that was known.
    pub(super) fn note_lack(&self, lack: Lack) -> bool {
        self.lacks.fetch_or(lack as u8, Ordering::Relaxed) & lack as u8 != 0
    }
}

/// How far a re-key is whose record was not looked at yet.
fn unknown_progress(ciphers: &Ciphers, capacity_sectors: u64) -> Option<RekeyProgress> {
    ciphers.rekey.as_ref().map(|_| RekeyProgress {
        done_bytes: 0,
        total_bytes: capacity_sectors * SECTOR_BYTES,
        state: RekeyState::Waiting,
    })
}

/// None of these locks is on the way of a request, or held for more than a copy.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
