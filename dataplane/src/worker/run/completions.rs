//! What the ring has ended, and what becomes of it: requests, kicks, calls, frames of ports.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::{Served, Worker, flush};
use crate::blk::pipeline::{Outcome, TOKEN_BITS};
use crate::crash_point;
use crate::worker::clock;
use crate::worker::message::FromWorker;
use crate::worker::queue::{Kind, Queue};
use crate::worker::ring::Completion;

impl Worker {
    #[inline]
    pub(super) fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Some(completion) = self.pipeline.ring.reap() {
            any |= self.take_completion(completion);
        }
        if self.pipeline.has_waiting() {
            let (queues, touched) = (&mut self.queues, &mut self.touched);
            any |= self
                .pipeline
                .resume(|landed| note(queues, touched, landed.queue, landed.head, landed.outcome));
        }
        for at in 0..self.touched.len() {
            let Some(number) = self.touched.get(at).copied() else {
                continue;
            };
            if number >= flush::FIRST {
                self.flushed(number);
                continue;
            }
            self.poll(number);
            self.publish(number);
            self.give_up_if_drained(number);
        }
        self.touched.clear();
        if self.pipeline.has_clearing() {
            self.pipeline.look_for_clear();
        }
        if !self.flushes.is_empty() {
            self.begin_flushes();
        }
        self.make_due_calls();
        // The driver waits for these.
        if std::mem::take(&mut self.called) {
            self.pipeline.ring.turn();
            crash_point!("call.made");
        }
        any
    }

    /// A transfer ended, and a request may have with it.
    #[inline]
    fn land(&mut self, completion: Completion) {
        // It may be decrypted now: that is its device's time, too, if there is one to be fair to.
        let charged = (self.turns.awake() > 1)
            .then(|| Some((self.pipeline.queue_of(completion.token)?, clock::now())))
            .flatten();
        if let Some(landed) = self.pipeline.land(completion) {
            crash_point!("complete.landed");
            let (queues, touched) = (&mut self.queues, &mut self.touched);
            note(queues, touched, landed.queue, landed.head, landed.outcome);
        }
        if let Some((number, since)) = charged
            && let Some(seat) = self.queue(number).map(|queue| queue.seat)
        {
            let ticks = clock::now().saturating_sub(since);
            self.turns.charge_more(seat, ticks);
        }
    }

    /// Whether it was a sign of work.
    #[inline]
    fn take_completion(&mut self, completion: Completion) -> bool {
        match completion.token >> TOKEN_BITS {
            0 => {
                crash_point!("complete.came");
                self.land(completion);
                return true;
            }
            1 => {
                self.kicked(completion.token);
                return true;
            }
            2 => {
                self.wake_is_awaited = false;
                return true;
            }
            3 => self.has_called(completion.token),
            5 => {
                self.port_landed(completion);
                return true;
            }
            _ => {}
        }
        false
    }

    /// Says which devices do better or worse than before: the control thread tells people.
    #[cold]
    pub(super) fn look_at_ages(&mut self) {
        let (devices, replies) = (&self.devices, &self.replies);
        let mut any = false;
        self.pipeline.look_at_ages(self.index, |local| {
            let its = |of: &Served| matches!(of, Served::Blk(of) if Rc::ptr_eq(of, local));
            let known = devices.iter().find(|(_, of)| its(of));
            if let Some((id, _)) = known {
                any |= replies.send(FromWorker::Health { id: *id }).is_ok();
            }
        });
        if any {
            let _ = self.reply_event.write(1);
        }
    }
}

/// Notes that a request of a queue ended.
fn note(
    queues: &mut [Option<Queue>],
    touched: &mut Vec<u32>,
    number: u32,
    head: u16,
    outcome: Outcome,
) {
    let queue = queues.get_mut(number as usize).and_then(Option::as_mut);
    if let Some(queue) = queue {
        let Kind::Blk(blk) = &mut queue.kind else {
            return;
        };
        if blk.local.is_given_up() {
            queue.ring.abandon(head);
        } else {
            blk.ended(&mut queue.ring, head, outcome);
        }
    } else if number < flush::FIRST {
        return;
    }
    if touched.last() != Some(&number) && !touched.contains(&number) {
        touched.push(number);
    }
}
