//! Which queue goes to which worker: the policy, without threads, clocks or descriptors (ADR 0022).
//!
//! A queue that starts goes to the worker with the least load ([`place`]). A queue that runs goes elsewhere
//! only where that is clearly better, and has been for a while ([`Balance`]):
//! - the busiest worker has little room left ([`BUSY`]), and without the queue, or the other with it,
//!   the busier of the two would have at least [`GAIN`] more room than now; or
//! - both have none left ([`FULL`]), which hides how much their queues would like to have: then those that
//!   are busy are spread evenly, if one worker has two more of them than the other;
//! - [`AGREEING`] looks in a row have found so for the same two workers.
//!
//! It doesn't oscillate: a move is only made towards a worker that stays below where the first was, by more
//! than a look's error; each move begins the count anew; and a queue that has moved rests.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::blk::{self, BlkDevice, Counts};
use crate::device::Device;
use crate::net;
use crate::storage::StorageSpec;
use crate::worker::message::{DeviceId, QueueId};

/// Shares of a worker's time are in thousandths.
pub type Permille = u16;

/// A worker that is busy for less than this has room enough.
const BUSY: Permille = 600;
/// How much more room the busier of two workers must have after a move.
const GAIN: Permille = 150;
/// A worker that is busy for more than this may be the limit of its queues.
const FULL: Permille = 980;
/// A queue that has less of its worker's time is not busy.
const BUSY_QUEUE: Permille = 50;
/// Looks in a row that must agree.
const AGREEING: u32 = 3;
/// Workers whose loads differ by less than this are equally loaded, for a queue that starts.
const EQUAL: Permille = 100;

/// What the requests of a device cost a worker, in units of about 64 ns: queues share their worker's busy
/// time by that. Rough figures, which only have to say which of the queues of one worker is the heavy one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weights {
    request: u64,
    /// Bytes are divided by two to this for their cost.
    bytes_shift: u32,
}

impl Weights {
    /// Of a device.
    pub(super) fn of(device: &BlkDevice) -> Self {
        let request = match device.storage {
            StorageSpec::Null | StorageSpec::Ram(_) => 1,
            _ => 16,
        };
        let bytes_shift = match device.storage {
            _ if device.is_encrypted() => 9,
            StorageSpec::Ram(_) => 11,
            _ => 63,
        };
        Self {
            request,
            bytes_shift,
        }
    }

    /// Of all that a queue has done.
    pub(super) fn cost(self, done: Counts) -> u64 {
        let requests = done.requests_ok.saturating_add(done.requests_failed);
        let bytes = done.read_bytes.saturating_add(done.written_bytes);
        self.sum(requests, bytes)
    }

    fn of_frames(self, done: &net::Counts) -> u64 {
        self.sum(done.packets.saturating_add(done.all_drops()), done.bytes)
    }

    fn sum(self, requests: u64, bytes: u64) -> u64 {
        let of_requests = requests.saturating_mul(self.request);
        of_requests.saturating_add(bytes >> self.bytes_shift)
    }
}

/// What the frames of a network card cost a worker: as much as a request of a disk in memory each, and a copy.
const NET: Weights = Weights {
    request: 1,
    bytes_shift: 11,
};

/// What a queue of a device has cost its workers so far.
pub(super) fn work(device: &Device, queue: u16) -> u64 {
    match device {
        Device::Blk(device) => {
            let counts = device.metrics.queue(queue).map(blk::QueueMetrics::counts);
            counts.map_or(0, |counts| Weights::of(device).cost(counts))
        }
        Device::Net(device) => {
            let counts = device.metrics.queue(queue).map(net::QueueMetrics::counts);
            counts.map_or(0, |counts| NET.of_frames(&counts))
        }
    }
}

/// A queue and what it has of its worker's time.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueShare {
    pub(super) queue: QueueId,
    /// Number of its worker.
    pub(super) worker: usize,
    pub(super) share: Permille,
    /// It has not moved lately.
    pub(super) movable: bool,
}

/// A queue that is to go to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) queue: QueueId,
    pub(super) from: usize,
    pub(super) to: usize,
}

/// The worker for a queue that starts: the least busy; of those that are equally busy, the one with the
/// fewest queues of the same device, then with the fewest queues.
pub(super) fn place(
    device: DeviceId,
    busy: &[Permille],
    queues: impl Iterator<Item = (QueueId, usize)>,
) -> usize {
    let mut counts = vec![(0u32, 0u32); busy.len()];
    for (queue, worker) in queues {
        if let Some((own, all)) = counts.get_mut(worker) {
            *own += u32::from(queue.device == device);
            *all += 1;
        }
    }
    let loads = busy.iter().map(|share| share / EQUAL).zip(counts);
    let least = loads.enumerate().min_by_key(|(_, load)| *load);
    least.map_or(0, |(worker, _)| worker)
}

/// What looks have found so far.
#[derive(Debug, Default)]
pub(super) struct Balance {
    /// From which worker to which a queue should go, and how many looks in a row say so.
    agreed: Option<(usize, usize, u32)>,
}

impl Balance {
    /// Takes a look at the loads: one move, if it is time for one.
    pub(super) fn look(&mut self, busy: &[Permille], queues: &[QueueShare]) -> Option<Decision> {
        let Some(wish) = wish(busy, queues) else {
            self.agreed = None;
            return None;
        };
        let looks = match self.agreed {
            Some((from, to, looks)) if (from, to) == (wish.from, wish.to) => looks + 1,
            _ => 1,
        };
        if looks < AGREEING {
            self.agreed = Some((wish.from, wish.to, looks));
            return None;
        }
        self.agreed = None;
        Some(wish)
    }
}

/// What one look would have moved.
fn wish(busy: &[Permille], queues: &[QueueShare]) -> Option<Decision> {
    let workers = || (0..).zip(busy.iter().copied());
    let (from, most) = workers().max_by_key(|(_, share)| *share)?;
    let (to, least) = workers().min_by_key(|(_, share)| *share)?;
    if most < BUSY {
        return None;
    }
    if least >= FULL {
        return spread(busy, queues);
    }
    let of = queues.iter().filter(|q| q.worker == from && q.movable);
    let after = |share: Permille| most.saturating_sub(share).max(least.saturating_add(share));
    let best = of.min_by_key(|q| (after(q.share), q.queue))?;
    let better = after(best.share).saturating_add(GAIN) <= most;
    better.then_some(Decision {
        queue: best.queue,
        from,
        to,
    })
}

/// No worker has room: their busy queues, counted.
fn spread(busy: &[Permille], queues: &[QueueShare]) -> Option<Decision> {
    let is_busy = |q: &&QueueShare| q.share >= BUSY_QUEUE;
    let count = |worker: usize| {
        queues
            .iter()
            .filter(is_busy)
            .filter(|q| q.worker == worker)
            .count()
    };
    let counts = || (0..busy.len()).map(|worker| (worker, count(worker)));
    let (from, most) = counts().max_by_key(|(worker, n)| (*n, std::cmp::Reverse(*worker)))?;
    let (to, least) = counts().min_by_key(|(worker, n)| (*n, *worker))?;
    if most < least + 2 {
        return None;
    }
    let of = queues.iter().filter(|q| q.worker == from && q.movable);
    let lightest = of.filter(is_busy).min_by_key(|q| (q.share, q.queue))?;
    Some(Decision {
        queue: lightest.queue,
        from,
        to,
    })
}

#[cfg(test)]
mod tests;
