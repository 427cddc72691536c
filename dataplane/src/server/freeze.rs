//! The server stops, so that another process can go on with everything, and goes on itself where none does.
//!
//! | step | what happens |
//! | --- | --- |
//! | 1 | frontends, workers' answers and timers are left alone; what there is to say to workers is held |
//! | 2 | the rekeyer stops between two zones; workers give up each queue once nothing of it is in flight, as for a move |
//! | 3 | with nothing in flight, workers and rekeyer take the fence out of their rings: [`Event::Frozen`] |
//! | 4 | another process goes on with what is stored, and this one is killed |
//! | or | [`Server::thaw`], at any step: a new fence, then the queues, then what was held |
//!
//! What a session waits for meanwhile it waits for afterwards, too, here or there: a message that is not done is
//! still in its socket.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::time::Instant;

use super::connection::ToWorkers;
use super::{Event, Server};
use crate::fence::Fence;
use crate::rekey::ToRekeyer;
use crate::worker::message::{DeviceId, FromWorker, MovedQueue, QueueId, ToWorker};

/// A server that has stopped, or is about to.
#[derive(Debug)]
pub(super) struct Frozen {
    stage: Stage,
    /// Queues that no worker has.
    parked: Vec<MovedQueue>,
    /// Of those that leave.
    retired: BTreeSet<QueueId>,
    /// What workers said that is not about this.
    said: Vec<FromWorker>,
    /// What waits until workers go on.
    held: ToWorkers,
    since: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// So many workers, the rekeyer among them, still have their fence.
    Stopping(usize),
    /// Nothing is in flight.
    Frozen,
    /// So many do not have a new one yet.
    Thawing(usize),
}

impl Server {
    /// Stops serving, without a word to any frontend. [`Event::Frozen`] follows when nothing is in flight any
    /// more and everything that a successor needs is stored; or never, where a storage does not answer. A frontend
    /// whose connection found no room in the store has to connect again: it does not hold up the others' upgrade.
    ///
    /// # Errors
    /// Why it can't, in words; it goes on then.
    pub fn freeze(&mut self) -> Result<(), String> {
        if self.frozen.is_some() {
            return Err("it was told so before".to_owned());
        }
        if self.fences.is_up() {
            return Err(
                "requests of the process before this one are still under way: try again".to_owned(),
            );
        }
        let mut devices = self.devices.values();
        if let Some(device) = devices.find(|device| !device.can_be_handed_over()) {
            return Err(format!(
                "{} is not stored with rot, since its storage may hold up whoever closes it, and its frontend is \
                 connected: detach it, or restart the data plane",
                device.label()
            ));
        }
        for device in self.devices.values_mut() {
            device.cut_off(self.poll.registry());
        }
        self.frozen = Some(Frozen {
            stage: Stage::Stopping(self.workers.len() + 1),
            parked: Vec::new(),
            retired: BTreeSet::new(),
            said: Vec::new(),
            held: Vec::new(),
            since: Instant::now(),
        });
        self.rekeyer.send(ToRekeyer::Freeze);
        let queues: Vec<QueueId> = self.placement.places().map(|place| place.0).collect();
        queues.into_iter().for_each(|queue| self.park(queue));
        for worker in &self.workers {
            worker.send(ToWorker::Freeze);
        }
        Ok(())
    }

    /// Serves again, with this fence in every ring. [`Event::Thawed`] follows when it does.
    pub fn thaw(&mut self, fence: Option<&Fence>) {
        let Some(frozen) = &mut self.frozen else {
            return;
        };
        frozen.stage = Stage::Thawing(self.workers.len() + 1);
        for worker in &self.workers {
            let fence = fence.cloned();
            worker.send(ToWorker::Thaw { fence });
        }
        let fence = fence.cloned();
        self.rekeyer.send(ToRekeyer::Thaw { fence });
    }

    /// Whether it is stopped, or about to be.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    /// Has a queue's worker give it up.
    fn park(&mut self, queue: QueueId) {
        if let Some(worker) = self.placement.park(queue, Instant::now()) {
            self.send(worker, ToWorker::Move { queue });
        }
    }

    /// Holds what there is to say to workers, while it is stopped; else gives it back.
    pub(super) fn hold(&mut self, queue: QueueId, message: ToWorker) -> Option<ToWorker> {
        match &mut self.frozen {
            None => Some(message),
            Some(frozen) => {
                frozen.held.push((queue, message));
                None
            }
        }
    }

    /// Takes what a worker says to a server that stops, is stopped, or begins again.
    pub(super) fn take_reply_frozen(&mut self, message: FromWorker) {
        let Some(frozen) = &mut self.frozen else {
            return;
        };
        let (now, mut begun) = (Instant::now(), None);
        match message {
            FromWorker::Moved(moved) => {
                let arrival = self.placement.moved(moved.queue, now);
                let waits = arrival.into_iter().flat_map(|arrival| arrival.held);
                frozen.held.extend(waits.map(|held| (moved.queue, held)));
                frozen.parked.push(*moved);
            }
            FromWorker::Stays { queue } => {
                let arrival = self.placement.stays(queue, now);
                let waits = arrival.into_iter().flat_map(|arrival| arrival.held);
                frozen.held.extend(waits.map(|held| (queue, held)));
                // A move was given up at the same time.
                let again = matches!(frozen.stage, Stage::Stopping(_));
                if again && !frozen.retired.contains(&queue) && !self.is_retired(queue) {
                    self.park(queue);
                }
            }
            FromWorker::Frozen { .. } => self.one_frozen(),
            FromWorker::Thawed { result, .. } => {
                if let Err(reason) = result {
                    tracing::error!("{reason}: a successor would not wait for its requests");
                    // Rather than serve without it.
                    return self.stop();
                }
                self.one_thawed();
            }
            message => {
                match &message {
                    FromWorker::Stopped { queue, .. } | FromWorker::StartFailed { queue, .. } => {
                        self.placement.forget(*queue);
                    }
                    FromWorker::Started { queue } => {
                        self.placement.begun(*queue);
                        begun = Some(*queue);
                    }
                    FromWorker::Retired { queue, .. } => {
                        frozen.retired.insert(*queue);
                    }
                    _ => {}
                }
                frozen.said.push(message);
            }
        }
        if let Some(queue) = begun.filter(|_| self.is_stopping()) {
            self.park(queue);
        }
    }

    fn is_stopping(&self) -> bool {
        let stage = self.frozen.as_ref().map(|frozen| frozen.stage);
        matches!(stage, Some(Stage::Stopping(_)))
    }

    fn is_retired(&self, queue: QueueId) -> bool {
        let device = self.devices.get(&queue.device);
        device.is_some_and(|device| device.is_retired(queue.index))
    }

    fn one_frozen(&mut self) {
        if let Some(frozen) = &mut self.frozen
            && let Stage::Stopping(left) = &mut frozen.stage
        {
            *left = left.saturating_sub(1);
            if *left == 0 {
                frozen.stage = Stage::Frozen;
                let (queues, us) = (frozen.parked.len(), frozen.since.elapsed().as_micros());
                tracing::info!(queues, "stopped within {us} us: another process may go on");
                self.events.push(Event::Frozen);
            }
        }
    }

    fn one_thawed(&mut self) {
        let Some(Frozen {
            stage: Stage::Thawing(left),
            ..
        }) = &mut self.frozen
        else {
            return;
        };
        *left = left.saturating_sub(1);
        if *left == 0
            && let Some(frozen) = self.frozen.take()
        {
            self.go_on(frozen);
        }
    }

    /// Every ring has its fence: queues go back to their workers, and what was held or said meanwhile takes its
    /// course.
    fn go_on(&mut self, frozen: Frozen) {
        for moved in frozen.parked {
            match self.placement.worker_of(moved.queue) {
                Some(worker) => self.send(worker, ToWorker::Resume(Box::new(moved))),
                None => debug_assert!(false, "{:?} was parked and has no worker", moved.queue),
            }
        }
        // Those that were on their way to nobody stay where they are.
        for (queue, worker) in self.placement.parking() {
            self.send(worker, ToWorker::Stay { queue });
        }
        for (queue, message) in frozen.held {
            self.pass_on(queue, message);
        }
        let us = frozen.since.elapsed().as_micros();
        tracing::warn!("serving again after {us} us: no other process went on");
        self.events.push(Event::Thawed);
        for message in frozen.said {
            self.take_one_reply(message);
        }
        let ids: Vec<DeviceId> = self.devices.keys().copied().collect();
        for id in ids {
            let mut out = ToWorkers::new();
            if let Some(device) = self.devices.get_mut(&id) {
                device.look_at_everything(self.poll.registry(), &mut out);
            }
            self.settle(id, out);
        }
    }
}
