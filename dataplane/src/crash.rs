//! Named points at which a test has the process die: [`crash_point!`](crate::crash_point).
//!
//! Only builds with debug assertions have them, as the tests' are; in a release build a point is nothing at all.
//! A point costs one load of a word that nobody writes, until a test writes to it.
//!
//! A locked-in process can't be told by a file or a variable, so it is told from outside: the switch begins
//! with [`MAGIC`], by which whoever may write this process's memory (`/proc/<pid>/mem`) finds it among its
//! writable mappings, and writes behind it the hash ([`hash`]) of a point's name and how often the point is to be
//! passed first. The process then aborts at the point, with whatever its other threads do at that moment.
//!
//! | point | what was done last |
//! | --- | --- |
//! | `fetch.taken` | a batch of chains was taken off the ring and noted as in flight |
//! | `submit.begun` | a request was begun: it is with the ring, or has ended |
//! | `submit.turn` | the ring was given to the kernel |
//! | `complete.came` | a completion came, and nobody has looked at it |
//! | `complete.landed` | the data is in guest memory, the status is written, the used ring says nothing |
//! | `publish.noted` | the batch that ends is noted in the in-flight region, the used index is as before |
//! | `publish.shown` | the used index is shown, the in-flight region says that the batch is in flight |
//! | `publish.clearing` | it says so no more of a part of the batch |
//! | `publish.cleared` | nor of the rest; its own used index is behind |
//! | `publish.done` | all of it; nobody was called |
//! | `call.made` | the driver was called |
//! | `flush.begun` | a flush was asked for, the storage was not |
//! | `flush.done` | the storage has flushed, nobody was told |
//! | `start.taken` | what the process before left was taken from the store |
//! | `start.offered` | its volumes, queues and connections stand again, nothing is served |
//! | `fence.gone` | the last request of the process before has ended, its fence is still in the store |
//! | `recover.found` | a queue knows what was in flight on it |
//! | `recover.taken` | some of that was taken again |
//! | `start.resumed` | everything is served again, nobody was told |
//! | `message.looked` | a frontend's message was looked at |
//! | `message.applied` | what it asks for is done, nothing is remembered of it |
//! | `state.stored` | what a volume's state is to name is stored, the state is not written |
//! | `message.recorded` | the state says that it is done, and what its reply is |
//! | `message.sent` | the reply is sent |
//! | `message.marked` | the state says so |
//! | `message.taken` | it is out of the socket, the state does not say so |
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::hand;

/// What the switch begins with.
pub const MAGIC: [u64; 2] = [0x6872_616d_7469_6d62, 0x9e1f_c4a5_d2b7_3880];

/// The switch. Its layout is what tests outside of this process know.
#[derive(Debug)]
#[repr(C)]
pub struct Switch {
    magic: [AtomicU64; 2],
    /// Hash of the point's name; 0: none.
    armed: AtomicU64,
    /// How often it is to be passed before.
    before: AtomicU64,
    /// Not 0: only while the volume in the slot before this is in hand, which is blamed for it. Else nobody is, as for a kill
    /// from outside.
    whose: AtomicU64,
}

/// The process's switch.
pub static SWITCH: Switch = Switch {
    magic: [AtomicU64::new(MAGIC[0]), AtomicU64::new(MAGIC[1])],
    armed: AtomicU64::new(0),
    before: AtomicU64::new(0),
    whose: AtomicU64::new(0),
};

/// Hash of a point's name (FNV-1a).
#[must_use]
pub const fn hash(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let (mut hash, mut at) = (0xcbf2_9ce4_8422_2325, 0);
    while at < bytes.len() {
        #[expect(clippy::indexing_slicing, reason = "a constant function, in bounds")]
        let byte = bytes[at] as u64;
        hash = (hash ^ byte).wrapping_mul(0x0100_0000_01b3);
        at += 1;
    }
    hash
}

impl Switch {
    /// Has this very process die at a point, after it has passed it `before` times. An empty name: nowhere.
    pub fn arm(&self, point: &str, before: u64) {
        self.before.store(before, Relaxed);
        let armed = if point.is_empty() { 0 } else { hash(point) };
        self.armed.store(armed, Relaxed);
    }

    /// A point with this hash is passed: the process ends, if it is armed and its turn.
    #[inline(always)]
    pub fn pass(&self, point: u64) {
        if self.armed.load(Relaxed) == point {
            self.count_down();
        }
    }

    #[cold]
    fn count_down(&self) {
        let whose = self.whose.load(Relaxed);
        if whose != 0 && hand::current().slot().map(|slot| u64::from(slot) + 1) != Some(whose) {
            return;
        }
        // Several threads may pass at once: one of them finds nothing left.
        let left = self.before.fetch_sub(1, Relaxed);
        if left == 0 || left > u64::MAX / 2 {
            if whose != 0 {
                hand::blame();
            }
            std::process::abort();
        }
    }
}

/// The process dies here, if a test has armed the point of this name. See [`crash`](crate::crash).
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(debug_assertions)]
        {
            const POINT: u64 = $crate::crash::hash($name);
            $crate::crash::SWITCH.pass(POINT);
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ() {
        assert_eq!(hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c);
        assert_ne!(hash("flush.begun"), hash("flush.done"));
    }

    #[test]
    fn what_is_not_armed_is_passed() {
        crash_point!("nobody.arms.this");
        let other = Switch {
            magic: [const { AtomicU64::new(0) }; 2],
            armed: AtomicU64::new(hash("here")),
            before: AtomicU64::new(2),
            whose: AtomicU64::new(0),
        };
        other.pass(hash("there"));
        other.pass(hash("here"));
        other.pass(hash("here"));
        assert_eq!(other.before.load(Relaxed), 0, "the next time it ends");
    }
}
