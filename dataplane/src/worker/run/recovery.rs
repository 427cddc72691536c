//! What was in flight of a queue when whoever served it before died: taken again first, in order, through the way of
//! every request. It is charged to the limits of its device once more: what was in flight is what the frontend's
//! region says.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::Worker;
use super::serve::Portion;
use crate::blk::pipeline::Local;
use crate::crash_point;
use crate::log_limit::LogLimit;
use crate::virtqueue::Recovered;
use crate::worker::message::QueueId;
use crate::worker::queue::Queue;

/// Says what a queue found in its region, if that is worth a line; at most a few a second.
pub(super) fn report(queue: &Queue) {
    if matches!(queue.recovered, Recovered::Kept { chains } if chains > 0) {
        crash_point!("recover.found");
    }
    static LIMIT: LogLimit = LogLimit::new();
    let index = queue.id.index;
    let device = queue.owner();
    match queue.recovered {
        Recovered::Stale { why } if LIMIT.allows() => tracing::warn!(
            "queue {index} of {device}: its in-flight region is of another life of the ring and does not count: {why}"
        ),
        Recovered::Kept { chains } if chains > 0 && LIMIT.allows() => {
            tracing::info!(
                "queue {index} of {device}: {chains} requests were in flight, and are done again"
            );
        }
        Recovered::Fresh | Recovered::Kept { .. } | Recovered::Stale { .. } => {}
    }
}

impl Worker {
    /// Takes some of what was in flight: how many.
    #[cold]
    pub(super) fn serve_again<const LIMITED: bool>(
        &mut self,
        number: u32,
        portion: &mut Portion,
    ) -> usize {
        let taken = self.serve_queue::<LIMITED, true>(number, portion);
        crash_point!("recover.taken");
        if let Some(queue) = self.queue(number) {
            queue.recovers &= queue.ring.left_again() > 0;
        }
        // A card's queue receives from then on.
        self.cards.look_again();
        // All of it may have ended at once, and its queue may have waited for that to stop.
        self.give_up_if_drained(number);
        taken
    }

    /// What was in flight is taken, whatever is said of the queue from now on.
    pub(super) fn finish(&mut self, id: QueueId) {
        if let Some(number) = self.numbers.get(&id).copied()
            && let Some(queue) = self.queue(number)
        {
            queue.finishes = true;
            self.poll(number);
        }
    }

    /// A device is given up: nothing that was in flight of it is taken again.
    pub(super) fn leave_all_again(&mut self, local: &Rc<Local>) {
        for number in 0..u32::try_from(self.queues.len()).unwrap_or(u32::MAX) {
            let its = |queue: &&mut Queue| queue.local().is_some_and(|of| Rc::ptr_eq(of, local));
            if let Some(queue) = self.queue(number).filter(its) {
                queue.leave_again();
                self.give_up_if_drained(number);
            }
        }
    }
}
