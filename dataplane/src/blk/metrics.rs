//! Counters of a device: each queue has its own, so that its worker adds without waiting for other CPUs.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was attached.
#[derive(Debug)]
pub struct Metrics {
    queues: Box<[QueueMetrics]>,
    /// Written by each worker now and then.
    worker_ticks: AtomicU64,
}

/// What a queue has counted, or all of a device's together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests completed with VIRTIO_BLK_S_OK.
    pub requests_ok: u64,
    /// Requests completed with another status.
    pub requests_failed: u64,
    /// Bytes read for the guest.
    pub read_bytes: u64,
    /// Bytes written for the guest.
    pub written_bytes: u64,
}

impl Metrics {
    /// Of a device with so many queues.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        Self {
            queues: (0..queues).map(|_| QueueMetrics::default()).collect(),
            worker_ticks: AtomicU64::new(0),
        }
    }

    /// Adds time that a worker spent on the device ([`clock::now`](crate::worker::clock::now)).
    pub fn add_worker_ticks(&self, ticks: u64) {
        self.worker_ticks.fetch_add(ticks, Ordering::Relaxed);
    }

    /// Time that workers spent on the device, or waited for it while others had to
    /// ([`clock::duration_of`](crate::worker::clock::duration_of)); what they spent in the last millisecond may
    /// be missing.
    #[must_use]
    pub fn worker_ticks(&self) -> u64 {
        self.worker_ticks.load(Ordering::Relaxed)
    }

    /// A queue's counters; none if the device has no such queue.
    #[must_use]
    #[inline]
    pub fn queue(&self, index: u16) -> Option<&QueueMetrics> {
        self.queues.get(usize::from(index))
    }

    /// All queues together.
    #[must_use]
    pub fn totals(&self) -> Counts {
        let mut all = Counts::default();
        for counts in self.queues.iter().map(QueueMetrics::counts) {
            all.requests_ok += counts.requests_ok;
            all.requests_failed += counts.requests_failed;
            all.read_bytes += counts.read_bytes;
            all.written_bytes += counts.written_bytes;
        }
        all
    }
}

/// Counters of a queue, on cache lines that no other queue's worker writes to.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueMetrics {
    requests_ok: Counter,
    requests_failed: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
}

impl QueueMetrics {
    /// Adds what ended. By the worker that serves the queue alone.
    #[inline]
    pub fn add(&self, counts: Counts) {
        self.requests_ok.add(counts.requests_ok);
        self.requests_failed.add(counts.requests_failed);
        self.read_bytes.add(counts.read_bytes);
        self.written_bytes.add(counts.written_bytes);
    }

    /// What was added so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            requests_ok: self.requests_ok.get(),
            requests_failed: self.requests_failed.get(),
            read_bytes: self.read_bytes.get(),
            written_bytes: self.written_bytes.get(),
        }
    }
}

/// A number that only grows, by one thread at a time, and that any may read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Not one indivisible step: that would wait for all that the thread has written so far.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        let sum = self.0.load(Ordering::Relaxed).wrapping_add(n);
        self.0.store(sum, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_totals_are_those_of_all_queues() {
        let metrics = Metrics::new(3);
        for queue in 0..3u16 {
            let n = u64::from(queue) + 1;
            let counts = Counts {
                requests_ok: n,
                requests_failed: 10 * n,
                read_bytes: 100 * n,
                written_bytes: 1000 * n,
            };
            let of_queue = metrics.queue(queue).expect("there is");
            of_queue.add(counts);
            of_queue.add(counts);
        }
        assert!(metrics.queue(3).is_none());
        let expected = Counts {
            requests_ok: 12,
            requests_failed: 120,
            read_bytes: 1200,
            written_bytes: 12000,
        };
        assert_eq!(metrics.totals(), expected);
    }
}
