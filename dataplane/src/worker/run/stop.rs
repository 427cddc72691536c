//! A queue that stops, or that its driver broke.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Worker;
use crate::virtqueue::RingError;
use crate::worker::message::{FromWorker, QueueId};
use crate::worker::queue::{Kind, Queue};

impl Worker {
    pub(super) fn stop(&mut self, id: QueueId) {
        let Some(number) = self.numbers.get(&id).copied() else {
            let base = self.unresumed.remove(&id);
            let left = false;
            return self.reply(FromWorker::Stopped {
                queue: id,
                base,
                left,
            });
        };
        self.stay(id);
        if let Some(queue) = self.queue(number) {
            queue.stopping = true;
            if !queue.finishes {
                queue.leave_again();
            }
        }
        self.give_up_if_drained(number);
    }

    /// Gives a queue that stops or leaves up once nothing of it is in flight.
    pub(super) fn give_up_if_drained(&mut self, number: u32) {
        let drained = |q: &&mut Queue| (q.stopping || q.leaving) && q.is_drained();
        let Some(queue) = self.queue(number).filter(drained) else {
            return;
        };
        if !queue.stopping {
            return self.hand_over(number);
        }
        self.publish(number);
        self.drop_kick(number);
        self.drop_call(number);
        let Some(mut queue) = self.queues.get_mut(number as usize).and_then(Option::take) else {
            return;
        };
        self.leave(number, &mut queue);
        self.reply(FromWorker::Stopped {
            queue: queue.id,
            base: Some(queue.ring.base()),
            left: queue.left,
        });
    }

    /// A queue is not here any more.
    pub(super) fn leave(&mut self, number: u32, queue: &mut Queue) {
        self.numbers.remove(&queue.id);
        self.turns.unpoll(queue.seat, number);
        // It may hold on to the guest memory of requests that ended at once.
        self.batch.release();
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.go(lane, &mut self.pipeline.ring);
            self.cards.release();
        }
    }

    pub(super) fn retire(&mut self, number: u32, error: RingError) {
        let queue = self
            .queues
            .get_mut(number as usize)
            .and_then(Option::as_mut);
        let Some(queue) = queue.filter(|queue| !queue.retired) else {
            return;
        };
        queue.retired = true;
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.go(lane, &mut self.pipeline.ring);
        }
        queue.leave_again();
        let leaving = std::mem::take(&mut queue.leaving);
        let event = queue.error.take();
        let id = queue.id;
        if let Some(event) = event {
            self.signal_error(&event);
        }
        self.reply(FromWorker::Retired {
            queue: id,
            reason: error.to_string(),
        });
        if leaving {
            self.reply(FromWorker::Stays { queue: id });
        }
    }
}
