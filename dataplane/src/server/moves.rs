//! The server's part in moves: it looks at the loads, has queues moved, and passes on what waited
//! (ADR 0022).
//!
//! It looks about every 100 ms while a worker is busy, and not at all on an idle host: then the workers are
//! asked to say when they get busy.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use super::Server;
use super::balance::{Balance, Permille, QueueShare};
use super::placement::{Arrival, Moves};
use crate::worker::message::{FromWorker, QueueId, ToWorker};
use crate::worker::{WorkerHandle, clock};

/// From one look at the loads to the next.
const LOOK: Duration = Duration::from_millis(100);
/// A host whose workers are all busy for less than this is quiet.
const QUIET: Permille = 250;
/// Quiet looks in a row after which nobody looks any more.
const QUIET_LOOKS: u32 = 10;
/// With [`ServerConfig::shuffle`](super::ServerConfig::shuffle), so many moves make a line in the log.
const MOVES_PER_LINE: u64 = 100;

/// A worker, for the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerStatus {
    /// The CPU it is bound to; none: any.
    pub cpu: Option<usize>,
    /// How much of the time since the last look it was busy, in thousandths.
    pub busy_permille: u16,
    /// Queues that it serves.
    pub queues: u32,
}

/// What the server knows of its workers' loads.
#[derive(Debug)]
pub(super) struct Watch {
    /// At the last look.
    pub(super) busy: Vec<Permille>,
    /// Idle ticks of each worker then.
    idle_ticks: Vec<u64>,
    /// When that was ([`clock::now`]).
    looked_at: u64,
    /// When to look again; none: when a worker says that it is busy.
    next_look: Option<Instant>,
    quiet_looks: u32,
    balance: Balance,
    shuffle: Option<Shuffle>,
}

/// Moves without a reason, for tests.
#[derive(Debug)]
struct Shuffle {
    every: Duration,
    next: Instant,
    random: u64,
    /// Moves that the log tells of.
    told: u64,
}

impl Watch {
    pub(super) fn new(workers: &[WorkerHandle], shuffle: Option<Duration>) -> Self {
        let several = workers.len() > 1;
        if several {
            workers.iter().for_each(|worker| worker.load().watch());
        }
        let shuffle = shuffle.filter(|_| several).map(|every| Shuffle {
            every,
            next: Instant::now() + every,
            random: clock::now() | 1,
            told: 0,
        });
        Self {
            busy: vec![0; workers.len()],
            idle_ticks: vec![0; workers.len()],
            looked_at: clock::now(),
            next_look: None,
            quiet_looks: 0,
            balance: Balance::default(),
            shuffle,
        }
    }

    /// As [`Watch::measure`], where nobody looks regularly and the last time is a while ago.
    fn measure_if_old(&mut self, workers: &[WorkerHandle]) {
        let age = clock::now().saturating_sub(self.looked_at);
        if self.next_look.is_none() && age >= clock::ticks_in(LOOK) {
            self.measure(workers);
        }
    }

    /// Finds out how busy each worker was since the last time.
    fn measure(&mut self, workers: &[WorkerHandle]) {
        let now = clock::now();
        let elapsed = now.saturating_sub(std::mem::replace(&mut self.looked_at, now));
        let known = self.busy.iter_mut().zip(&mut self.idle_ticks);
        for (worker, (busy, before)) in workers.iter().zip(known) {
            let idle_ticks = worker.load().idle_ticks(now);
            let idle = idle_ticks.saturating_sub(std::mem::replace(before, idle_ticks));
            *busy = busy_permille(elapsed, idle);
        }
    }
}

/// The part of `elapsed` ticks that was not idle.
fn busy_permille(elapsed: u64, idle: u64) -> Permille {
    let busy = u128::from(elapsed.saturating_sub(idle)) * 1000;
    let share = busy.checked_div(u128::from(elapsed)).unwrap_or(0);
    Permille::try_from(share).unwrap_or(1000)
}

/// A queue's part of its worker's time, by what it and all of that worker's queues have cost.
fn share_of(busy: Permille, cost: u64, all: u64) -> Permille {
    let share = u128::from(busy) * u128::from(cost);
    let share = share.checked_div(u128::from(all)).unwrap_or(0);
    Permille::try_from(share).unwrap_or(1000)
}

impl Server {
    /// Has a queue served by another worker, once nothing of it is in flight. It may be given up: if that
    /// takes too long, or something is said about the queue in between.
    ///
    /// # Errors
    /// That there is no such worker, or that the queue does not run elsewhere, or is a network card's.
    pub fn move_queue(&mut self, queue: QueueId, worker: usize) -> Result<(), String> {
        let count = self.workers.len();
        if worker >= count {
            return Err(format!("there is no worker {worker}: there are {count}"));
        }
        let from = self.placement.set_out(queue, worker, Instant::now());
        let from = from.and_then(|from| self.workers.get(from));
        let from =
            from.ok_or(
            "the queue does not run, is moving or stopping, is there already, or is a network card's",
        )?;
        from.send(ToWorker::Move { queue });
        Ok(())
    }

    /// The worker that has a queue, or is about to; none: it does not run.
    #[must_use]
    pub fn worker_of(&self, queue: QueueId) -> Option<usize> {
        self.placement.worker_of(queue)
    }

    /// Moves of queues so far.
    #[must_use]
    pub fn moves(&self) -> Moves {
        self.placement.moves()
    }

    /// What the workers are doing.
    pub fn worker_status(&mut self) -> Vec<WorkerStatus> {
        self.watch.measure_if_old(&self.workers);
        let mut queues = vec![0; self.workers.len()];
        for (_, worker) in self.placement.places() {
            if let Some(count) = queues.get_mut(worker) {
                *count += 1;
            }
        }
        let workers = self.cpus.iter().zip(&self.watch.busy).zip(queues);
        workers
            .map(|((cpu, busy), queues)| WorkerStatus {
                cpu: *cpu,
                busy_permille: *busy,
                queues,
            })
            .collect()
    }

    /// Takes what a worker says about moves and loads; what is for a device is given back.
    pub(super) fn take_reply(&mut self, message: FromWorker) -> Option<FromWorker> {
        let now = Instant::now();
        match message {
            FromWorker::Moved(moved) => {
                let queue = moved.queue;
                let arrival = self.placement.moved(queue, now);
                debug_assert!(arrival.is_some(), "{queue:?} moved unasked");
                let arrival = arrival?;
                self.send(arrival.worker, ToWorker::Resume(moved));
                self.deliver(arrival);
            }
            FromWorker::Stays { queue } => {
                let arrival = self.placement.stays(queue, now);
                debug_assert!(arrival.is_some(), "{queue:?} stays unasked");
                self.deliver(arrival?);
            }
            FromWorker::Busy { .. } => {
                self.watch.quiet_looks = 0;
                if self.watch.next_look.is_none() {
                    // What was before says nothing about now.
                    self.watch.measure(&self.workers);
                    self.watch.next_look = Some(now + LOOK);
                }
            }
            FromWorker::Started { queue } => {
                self.placement.begun(queue);
                return Some(message);
            }
            FromWorker::Stopped { queue, .. } | FromWorker::StartFailed { queue, .. } => {
                self.placement.forget(queue);
                return Some(message);
            }
            message => return Some(message),
        }
        None
    }

    pub(super) fn send(&self, worker: usize, message: ToWorker) {
        match self.workers.get(worker) {
            Some(worker) => worker.send(message),
            None => debug_assert!(false, "there is no worker {worker}"),
        }
    }

    /// Passes on what waited for a queue.
    fn deliver(&self, arrival: Arrival) {
        for message in arrival.held {
            self.send(arrival.worker, message);
        }
    }

    /// Passes a message for a queue on to its worker.
    pub(super) fn send_to_queue(&mut self, queue: QueueId, message: ToWorker) {
        if matches!(message, ToWorker::Start(_)) {
            self.watch.measure_if_old(&self.workers);
        }
        let device = self.devices.get(&queue.device);
        let together = device.and_then(|device| device.together(queue.index));
        let busy = &self.watch.busy;
        let (worker, message) = self.placement.route((queue, together), message, busy);
        if let Some(message) = message {
            self.send(worker, message);
        }
    }

    /// When [`Server::attend`] has something to do.
    pub(super) fn next_attendance(&self) -> Option<Instant> {
        if self.is_frozen() {
            return None;
        }
        let shuffle = self.watch.shuffle.as_ref().map(|shuffle| shuffle.next);
        let times = [self.placement.next_overdue(), self.watch.next_look, shuffle];
        times.into_iter().flatten().min()
    }

    /// Gives up moves that take too long, and looks at the loads if it is time.
    pub(super) fn attend(&mut self) {
        if self.is_frozen() {
            return;
        }
        let now = Instant::now();
        for (queue, worker) in self.placement.overdue(now) {
            self.send(worker, ToWorker::Stay { queue });
        }
        if self.watch.next_look.is_some_and(|at| at <= now) {
            self.look(now);
        }
        if self.watch.shuffle.as_ref().is_some_and(|s| s.next <= now) {
            self.shuffle(now);
        }
    }

    fn look(&mut self, now: Instant) {
        self.watch.measure(&self.workers);
        let quiet = self.watch.busy.iter().all(|busy| *busy < QUIET);
        self.watch.quiet_looks = if quiet { self.watch.quiet_looks + 1 } else { 0 };
        self.watch.next_look = Some(now + LOOK);
        if self.watch.quiet_looks >= QUIET_LOOKS {
            self.watch.next_look = None;
            let workers = self.workers.iter();
            workers.for_each(|worker| worker.load().watch());
        }
        let shares = self.shares(now);
        let Some(decision) = self.watch.balance.look(&self.watch.busy, &shares) else {
            return;
        };
        let moved = self.move_queue(decision.queue, decision.to);
        tracing::debug!(
            "{:?} goes from worker {} to {}, by loads of {:?}: {moved:?}",
            decision.queue,
            decision.from,
            decision.to,
            self.watch.busy
        );
    }

    /// What each queue had of its worker's time since the last look.
    fn shares(&mut self, now: Instant) -> Vec<QueueShare> {
        let devices = &self.devices;
        let work = |queue: QueueId| {
            let device = devices.get(&queue.device);
            device.map_or(0, |device| device.work(queue.index))
        };
        let costs = self.placement.look(now, work);
        let mut all = vec![0u64; self.workers.len()];
        for (_, worker, cost, _) in &costs {
            if let Some(all) = all.get_mut(*worker) {
                *all = all.saturating_add(*cost);
            }
        }
        let of = |worker: usize, cost: u64| {
            let busy = self.watch.busy.get(worker).copied().unwrap_or(0);
            share_of(busy, cost, all.get(worker).copied().unwrap_or(0))
        };
        costs
            .into_iter()
            .map(|(queue, worker, cost, movable)| QueueShare {
                queue,
                worker,
                share: of(worker, cost),
                movable,
            })
            .collect()
    }

    /// Moves one queue, whichever, to the worker behind its own.
    fn shuffle(&mut self, now: Instant) {
        let Some(shuffle) = &mut self.watch.shuffle else {
            return;
        };
        shuffle.next = now + shuffle.every;
        let Moves { done, given_up } = self.placement.moves();
        if done >= shuffle.told + MOVES_PER_LINE {
            shuffle.told = done;
            tracing::warn!("queues moved {done} times, {given_up} moves were given up");
        }
        // Xorshift: a test needs variety.
        shuffle.random ^= shuffle.random << 13;
        shuffle.random ^= shuffle.random >> 7;
        shuffle.random ^= shuffle.random << 17;
        let random = shuffle.random >> 16;
        let count = self.placement.places().count() as u64;
        let at = random.checked_rem(count).unwrap_or(0);
        let place = self
            .placement
            .places()
            .nth(usize::try_from(at).unwrap_or(0));
        let Some((queue, worker)) = place else { return };
        // It may be on its way still.
        let _ = self.move_queue(queue, (worker + 1) % self.workers.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_thousandths_of_what_was_not_idle() {
        assert_eq!(busy_permille(2000, 500), 750);
        assert_eq!(busy_permille(2000, 2500), 0);
        assert_eq!(busy_permille(0, 0), 0);
        assert_eq!(share_of(900, 1, 3), 300);
        assert_eq!(share_of(900, 0, 0), 0);
        assert_eq!(share_of(1000, u64::MAX, u64::MAX), 1000);
    }
}
