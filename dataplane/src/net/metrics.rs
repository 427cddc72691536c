//! Counters of a network card: each queue has its own, so that its worker adds without waiting for other CPUs.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::blk::Counter;
use crate::port::DropReason;

/// Counters since the card was attached.
#[derive(Debug)]
pub struct Metrics {
    queues: Box<[QueueMetrics]>,
    /// Written by each worker now and then.
    worker_ticks: AtomicU64,
}

/// What a queue has counted, or several together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames: of a queue that sends those that went on, of one that receives those that were delivered. One that
    /// is cut on the way counts once for each piece where it arrives.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Frames that went no further, by [`DropReason::number`].
    pub drops: [u64; DropReason::COUNT],
}

impl Counts {
    /// One frame that went on, or was delivered.
    #[inline]
    pub fn frame(&mut self, bytes: u64) {
        self.packets += 1;
        self.bytes += bytes;
    }

    /// One frame that did not.
    #[inline]
    pub fn dropped(&mut self, reason: DropReason) {
        if let Some(count) = self.drops.get_mut(reason.number()) {
            *count += 1;
        }
    }

    /// Whether nothing was counted.
    #[must_use]
    #[inline]
    pub fn is_nothing(&self) -> bool {
        self.packets == 0 && !self.has_drops()
    }

    #[inline]
    fn has_drops(&self) -> bool {
        self.drops.iter().fold(0, |any, count| any | count) != 0
    }

    /// All frames that went no further.
    #[must_use]
    pub fn all_drops(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        for (mine, others) in self.drops.iter_mut().zip(other.drops) {
            *mine += others;
        }
    }
}

impl Metrics {
    /// Of a card with so many queues, those of both directions together.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        Self {
            queues: (0..queues).map(|_| QueueMetrics::default()).collect(),
            worker_ticks: AtomicU64::new(0),
        }
    }

    /// Adds time that a worker spent on the card ([`clock::now`](crate::worker::clock::now)).
    pub fn add_worker_ticks(&self, ticks: u64) {
        self.worker_ticks.fetch_add(ticks, Ordering::Relaxed);
    }

    /// Time that workers spent on the card, as of a disk
    /// ([`blk::Metrics::worker_ticks`](crate::blk::Metrics::worker_ticks)).
    #[must_use]
    pub fn worker_ticks(&self) -> u64 {
        self.worker_ticks.load(Ordering::Relaxed)
    }

    /// A queue's counters; none if the card has no such queue.
    #[must_use]
    #[inline]
    pub fn queue(&self, index: u16) -> Option<&QueueMetrics> {
        self.queues.get(usize::from(index))
    }

    /// All queues of one direction together: `first` is 0 for those that receive, 1 for those that send.
    fn of(&self, first: usize) -> Counts {
        let mut all = Counts::default();
        for queue in self.queues.iter().skip(first).step_by(2) {
            all.add(&queue.counts());
        }
        all
    }

    /// What the guest received.
    #[must_use]
    pub fn received(&self) -> Counts {
        self.of(0)
    }

    /// What the guest sent.
    #[must_use]
    pub fn sent(&self) -> Counts {
        self.of(1)
    }
}

/// Counters of a queue, on cache lines that no other queue's worker writes to.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueMetrics {
    packets: Counter,
    bytes: Counter,
    drops: [Counter; DropReason::COUNT],
}

impl QueueMetrics {
    /// Adds what was counted. By the worker that serves the queue alone.
    pub fn add(&self, counts: &Counts) {
        self.packets.add(counts.packets);
        self.bytes.add(counts.bytes);
        if counts.has_drops() {
            for (mine, others) in self.drops.iter().zip(counts.drops) {
                mine.add(others);
            }
        }
    }

    /// Counts a frame that went no further.
    pub fn dropped(&self, reason: DropReason) {
        if let Some(count) = self.drops.get(reason.number()) {
            count.add(1);
        }
    }

    /// What was added so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            packets: self.packets.get(),
            bytes: self.bytes.get(),
            ..Counts::default()
        };
        for (to, from) in counts.drops.iter_mut().zip(&self.drops) {
            *to = from.get();
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_is_counted_by_itself_and_drops_by_their_reasons() {
        let metrics = Metrics::new(4);
        for queue in 0..4u16 {
            let mut counts = Counts::default();
            for _ in 0..=queue {
                counts.frame(100);
            }
            counts.dropped(DropReason::NoRoom);
            let of_queue = metrics.queue(queue).expect("there is");
            of_queue.add(&counts);
            of_queue.add(&counts);
        }
        assert!(metrics.queue(4).is_none());
        let (received, sent) = (metrics.received(), metrics.sent());
        assert_eq!((received.packets, received.bytes), (8, 800));
        assert_eq!((sent.packets, sent.bytes), (12, 1200));
        assert_eq!(sent.drops[DropReason::NoRoom.number()], 4);
        assert_eq!((sent.all_drops(), received.all_drops()), (4, 4));
    }
}
