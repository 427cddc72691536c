//! A block device as every worker sees it: what never changes while it is attached, and its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_crypto::{DataUnit, XtsKey};

use super::metrics::Metrics;
use crate::storage::StorageSpec;

/// Bytes of a sector, always (virtio 1.2, 5.2).
pub const SECTOR_BYTES: u64 = 512;

/// Shape and identity of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in sectors.
    pub capacity_sectors: u64,
    /// Logical block in bytes, 512 or 4096: requests are whole numbers of them.
    pub logical_block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; 20],
    /// Request queues.
    pub queues: u16,
}

/// The cipher of an encrypted volume.
#[derive(Debug)]
pub struct Cipher {
    /// Its expanded key.
    pub key: XtsKey,
    /// Bytes that share a tweak.
    pub unit: DataUnit,
}

/// An attached block device. The key lives until the last worker and the control thread have
/// dropped it.
#[derive(Debug)]
pub struct BlkDevice {
    /// Shape and identity.
    pub geometry: Geometry,
    /// Where its blocks live.
    pub storage: StorageSpec,
    /// How they are encrypted there; none: plain.
    pub cipher: Option<Cipher>,
    /// Counters, written by the workers.
    pub metrics: Metrics,
    /// A flush failed: what was written before may be lost, and no later flush can say otherwise.
    flush_failed: AtomicBool,
}

impl BlkDevice {
    /// A device.
    #[must_use]
    pub fn new(geometry: Geometry, storage: StorageSpec, cipher: Option<Cipher>) -> Arc<Self> {
        Arc::new(Self {
            geometry,
            storage,
            cipher,
            metrics: Metrics::default(),
            flush_failed: AtomicBool::new(false),
        })
    }

    /// Whether a flush failed since it was attached.
    #[must_use]
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    /// From now on every flush fails, until the volume is attached anew.
    pub fn latch_flush_failure(&self) {
        self.flush_failed.store(true, Ordering::Release);
    }
}
