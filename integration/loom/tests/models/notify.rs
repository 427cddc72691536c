//! Notifications: each side tells the other that it looks anyway, and must not sleep on what it missed
//! (virtio 1.2, 2.7.7 and 2.7.10). Both are the same protocol, with the sides changed: the one who produces
//! shows an index, then reads the other's wish; the one who consumes writes its wish, then looks at the index
//! again. Without a full fence between the two on each side both can miss the other.

use bulkhead_loom::{Event, explore};
use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::thread;
use std::sync::Arc;

/// Entries of a run.
const ENTRIES: u16 = 2;

/// Which fence is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    ProducersFence,
    ConsumersFence,
}

/// How wishes are told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// A flag: NO_NOTIFY, NO_INTERRUPT.
    Flag,
    /// EVENT_IDX: the entry that is wanted.
    Index,
}

struct Ring {
    how: How,
    without: Without,
    /// avail.idx or used.idx.
    index: AtomicU16,
    /// The flags (1: no notification), or the event index.
    wish: AtomicU16,
    /// The kick or call.
    event: Event,
}

impl Ring {
    fn fence(&self, of: Without) {
        if self.without != of {
            fence(Ordering::SeqCst);
        }
    }

    /// `SplitQueue::publish` with `notify::passed` (the driver is called), and what a driver does before a
    /// kick.
    fn produce(&self, old: u16) {
        let new = old.wrapping_add(1);
        self.index.store(new, Ordering::Release);
        self.fence(Without::ProducersFence);
        let wish = self.wish.load(Ordering::Relaxed);
        let wanted = match self.how {
            How::Flag => wish & 1 == 0,
            How::Index => new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old),
        };
        if wanted {
            self.event.write();
        }
    }

    /// `SplitQueue::arm`, and what a driver does before it waits for a call; whether there is work.
    fn arm(&self, next: u16) -> bool {
        let wish = if self.how == How::Flag { 0 } else { next };
        self.wish.store(wish, Ordering::Relaxed);
        self.fence(Without::ConsumersFence);
        self.index.load(Ordering::Acquire) != next
    }

    /// `SplitQueue::disarm`: with EVENT_IDX the event is left behind.
    fn disarm(&self) {
        if self.how == How::Flag {
            self.wish.store(1, Ordering::Relaxed);
        }
    }

    /// `Worker::run` and `Worker::sleep`: takes what there is, arms, looks again, sleeps.
    fn consume(&self) {
        loop {
            let next = self.index.load(Ordering::Acquire);
            if next == ENTRIES {
                return;
            }
            if !self.arm(next) {
                self.event.read();
            }
            self.disarm();
        }
    }
}

fn meet(how: How, without: Without) {
    explore(move || {
        let ring = Arc::new(Ring {
            how,
            without,
            index: AtomicU16::new(0),
            // As a queue starts: quiet, or with an event long gone by.
            wish: AtomicU16::new(if how == How::Flag { 1 } else { 0x8000 }),
            event: Event::default(),
        });
        let producer = Arc::clone(&ring);
        let producer = thread::spawn(move || (0..ENTRIES).for_each(|old| producer.produce(old)));
        ring.consume();
        producer.join().expect("it produces");
    });
}

#[test]
fn no_notification_is_missed_with_flags() {
    meet(How::Flag, Without::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_without_the_consumers_fence_miss_one() {
    meet(How::Flag, Without::ConsumersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_without_the_producers_fence_miss_one() {
    meet(How::Flag, Without::ProducersFence);
}

#[test]
fn no_notification_is_missed_with_event_idx() {
    meet(How::Index, Without::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_idx_without_the_consumers_fence_misses_one() {
    meet(How::Index, Without::ConsumersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_idx_without_the_producers_fence_misses_one() {
    meet(How::Index, Without::ProducersFence);
}
