//! Flushes that the control thread asks for, before a volume is let go of. They go the way of a
//! guest's, as requests of a queue that is not there.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::Worker;
use crate::blk::pipeline::{Begun, Start};
use crate::blk::request::Operation;
use crate::virtqueue::Chain;
use crate::worker::message::{FromWorker, QueueId};

/// Numbers from here on are those of flushes, not of queues.
pub(super) const FIRST: u32 = 1 << 31;

/// Flushes of a worker.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// Not begun, for lack of room.
    due: Vec<QueueId>,
    /// Under way, with their numbers.
    begun: Vec<(u32, QueueId)>,
    last: u32,
}

impl Flushes {
    pub(super) fn is_empty(&self) -> bool {
        self.due.is_empty() && self.begun.is_empty()
    }
}

impl Worker {
    pub(super) fn flush(&mut self, queue: QueueId) {
        self.flushes.due.push(queue);
        self.begin_flushes();
    }

    /// Begins what is due, as far as there is room.
    pub(super) fn begin_flushes(&mut self) {
        while self.pipeline.room() > 0 {
            let Some(queue) = self.flushes.due.pop() else {
                return;
            };
            self.begin_flush(queue);
        }
    }

    fn begin_flush(&mut self, queue: QueueId) {
        // A device that is gone has nothing left to be flushed.
        let Some(local) = self.local(queue.device).map(Rc::clone) else {
            return self.reply(FromWorker::Flushed { queue });
        };
        self.flushes.last = self.flushes.last.wrapping_add(1);
        let number = FIRST | self.flushes.last;
        let start = Start {
            queue: number,
            head: 0,
            operation: Operation::Flush,
            local: &local,
            durable: false,
        };
        match self.pipeline.begin(start, &mut Chain::default()) {
            Begun::Done(_) => self.reply(FromWorker::Flushed { queue }),
            Begun::Pending => self.flushes.begun.push((number, queue)),
        }
    }

    /// A flush ended. If it failed, its device says so to every flush from now on.
    pub(super) fn flushed(&mut self, number: u32) {
        if let Some(at) = self.flushes.begun.iter().position(|(n, _)| *n == number) {
            let (_, queue) = self.flushes.begun.swap_remove(at);
            self.reply(FromWorker::Flushed { queue });
        }
    }
}
