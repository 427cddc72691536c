//! Queues that go to another worker, and that come from one (ADR 0022).
//!
//! A queue that leaves takes no more requests. Once nothing of it is in flight, and the wait for its kick is
//! off the ring, all of it goes to the control thread, and from there to the next worker, which looks into
//! its ring before it waits for a kick: so no request and no kick is lost on the way. The wait has to be
//! gone first: one that ends late would swallow a kick that was meant for the next worker.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Worker;
use crate::worker::message::{FromWorker, MovedQueue, QueueId};
use crate::worker::queue::Queue;
use crate::worker::ring::EntryId;

impl Worker {
    /// A queue is to leave.
    pub(super) fn begin_move(&mut self, id: QueueId) {
        let number = self.numbers.get(&id).copied();
        let can = |queue: &&mut Queue| !queue.stopping && !queue.retired;
        let Some(number) = number.filter(|n| self.queue(*n).filter(can).is_some()) else {
            return self.reply(FromWorker::Stays { queue: id });
        };
        if let Some(queue) = self.queue(number) {
            queue.leaving = true;
        }
        if let Some(entry) = self.kick_wait(number) {
            self.pipeline.ring.cancel(entry);
        }
        self.give_up_if_drained(number);
    }

    /// The wait for its kick, while it is in the ring.
    fn kick_wait(&mut self, number: u32) -> Option<EntryId> {
        let kick = self.queue(number)?.kick.as_ref()?;
        kick.wait.map(|(entry, _)| entry)
    }

    /// It is to be served here on, if it has not left.
    pub(super) fn stay(&mut self, id: QueueId) {
        let number = self.numbers.get(&id).copied();
        let queue = number.and_then(|number| self.queue(number));
        if queue.is_some_and(|queue| std::mem::take(&mut queue.leaving)) {
            // The wait for its kick was given up.
            self.look_again(id);
            self.reply(FromWorker::Stays { queue: id });
        }
    }

    /// Gives a queue away of which nothing is in flight.
    pub(super) fn hand_over(&mut self, number: u32) {
        // Retires one whose memory went away, and then it stays.
        self.publish(number);
        let leaves = |queue: &&mut Queue| queue.leaving;
        if self.queue(number).filter(leaves).is_none() || self.kick_wait(number).is_some() {
            return;
        }
        let kick = self.drop_kick(number);
        let call = self.drop_call(number);
        let Some(mut queue) = self.queues.get_mut(number as usize).and_then(Option::take) else {
            return;
        };
        self.leave(number, &mut queue);
        let (call, due) = call.map_or((None, false), |(fd, due)| (Some(fd), due));
        let parked = queue.park();
        let moved = MovedQueue {
            kick,
            call,
            call_due: due || parked.call_due,
            ..parked
        };
        self.reply(FromWorker::Moved(Box::new(moved)));
    }

    /// A queue comes from another worker. What can't be served here is retired: the driver hears of it, and
    /// a stop still finds out where the ring goes on.
    pub(super) fn resume(&mut self, mut moved: MovedQueue) {
        let (id, base) = (moved.queue, moved.ring.base());
        let (kick, call, call_due) = (moved.kick.take(), moved.call.take(), moved.call_due);
        let error = moved.error.take();
        let kind = self.kind_of(id, moved.features);
        let resumed =
            kind.and_then(|kind| Queue::resume(moved, kind).map_err(|error| error.to_string()));
        let mut queue = match resumed {
            Ok(queue) => queue,
            Err(reason) => {
                self.unresumed.insert(id, base);
                if let Some(error) = error {
                    self.signal_error(&error);
                }
                let reason = format!("it could not be served by another worker: {reason}");
                return self.reply(FromWorker::Retired { queue: id, reason });
            }
        };
        queue.error = error;
        queue.call_due = call_due;
        let number = self.place(queue);
        self.numbers.insert(id, number);
        self.set_kick(id, kick);
        self.set_call(id, call);
    }
}
