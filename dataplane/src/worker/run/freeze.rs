//! A worker that stops before another process takes over, and one that goes on because none does.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsFd;

use super::Worker;
use crate::fence::Fence;
use crate::worker::message::FromWorker;
use crate::worker::queue::Queue;

impl Worker {
    /// Lets go of the fence once nothing is in flight: no queue is here that could begin something, none has
    /// something under way, and what was said to drivers is said.
    #[cold]
    pub(super) fn freeze_if_idle(&mut self) {
        let is_done = |queue: &Queue| queue.retired;
        let served = self.queues.iter().flatten().any(|queue| !is_done(queue));
        let busy = self.pipeline.ring.in_flight() > 0 || self.pipeline.has_waiting();
        if served || busy || !self.flushes.is_empty() {
            return;
        }
        self.freezing = false;
        self.pipeline.ring.let_go_of_fence();
        self.reply(FromWorker::Frozen { worker: self.index });
    }

    /// Keeps another fence, in the place of the one that it may have let go of.
    pub(super) fn thaw(&mut self, fence: Option<Fence>) {
        self.freezing = false;
        let ring = &mut self.pipeline.ring;
        ring.let_go_of_fence();
        let kept = fence.map_or(Ok(()), |fence| ring.keep_fence(fence.as_fd()));
        let result = kept.map_err(|e| format!("a worker's ring does not take the fence: {e}"));
        self.reply(FromWorker::Thawed {
            worker: self.index,
            result,
        });
    }
}
