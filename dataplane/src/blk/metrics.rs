//! Counters of a device. A worker adds once per batch of completions, not per request.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was attached.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests completed with VIRTIO_BLK_S_OK.
    pub requests_ok: Counter,
    /// Requests completed with another status.
    pub requests_failed: Counter,
    /// Bytes read for the guest.
    pub read_bytes: Counter,
    /// Bytes written for the guest.
    pub written_bytes: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    #[inline]
    pub fn add(&self, n: u64) {
        if n > 0 {
            self.0.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
