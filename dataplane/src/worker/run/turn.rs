//! A round of turns: each device that may have one, each of its polled queues; which queues are polled, and how
//! the worker falls asleep.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use super::events::Armed;
use super::serve::{Portion, serve};
use super::{WAKE, Worker};
use crate::blk::pipeline::ageing::LOOK_EVERY;
use crate::hand;
use crate::net::lane::MOST_FRAMES;
use crate::qos::Gate;
use crate::worker::batch;
use crate::worker::clock;
use crate::worker::message::QueueId;
use crate::worker::queue::{Kind, Queue};
use crate::worker::ring::Event;
use crate::worker::turns::Turn;

/// Requests or frames of a turn at most.
const MOST: usize = MOST_FRAMES;
const _: () = assert!(MOST_FRAMES >= batch::MOST);
/// How long a queue without a kick, and a request that no completion will wake, may wait for its worker.
const SHORT_SLEEP: Duration = Duration::from_micros(100);
impl Worker {
    /// Gives every device a turn that may have one; whether any had requests.
    #[inline]
    pub(super) fn serve_queues(&mut self) -> bool {
        if let Some((number, requests)) = self.turns.lone(MOST)
            && let Some(taken) = self.serve_lone(number, requests)
        {
            return taken > 0;
        }
        self.serve_devices()
    }

    /// The only queue that is polled; none if it has limits, or is not served.
    #[inline]
    fn serve_lone(&mut self, number: u32, requests: usize) -> Option<usize> {
        let queue = self.queue(number)?;
        if !queue.is_served() || Gate::is_limited(queue.qos()) {
            return None;
        }
        Some(self.serve_unlimited(number, requests))
    }

    fn serve_devices(&mut self) -> bool {
        let began = clock::now();
        let round = self.turns.round(began);
        let mut from = began;
        let mut busy = false;
        // A device may fall out of its place meanwhile: the one that gets it has its turn in the next round.
        for place in 0..self.turns.awake() {
            let Some(turn) = self.turns.turn(place, &round, from, MOST) else {
                continue;
            };
            let requests = self.serve_device(&turn, from);
            let to = clock::now();
            self.turns.charge(&turn, requests, from, to);
            from = to;
            busy |= requests > 0;
        }
        if !busy {
            self.turns.waited(&round, began, from);
        }
        busy
    }

    /// A device's turn: how many requests were taken.
    #[inline]
    fn serve_device(&mut self, turn: &Turn, now: u64) -> usize {
        let mut requests = 0;
        for _ in 0..turn.queues {
            let Some(number) = self.turns.next_queue(turn.seat) else {
                break;
            };
            let Some(queue) = self
                .queues
                .get_mut(number as usize)
                .and_then(Option::as_mut)
                .filter(|queue| queue.seat == turn.seat)
            else {
                self.turns.unpoll(turn.seat, number);
                continue;
            };
            let again = !queue.is_served();
            if again && !queue.is_recovered() {
                continue;
            }
            let limited = Gate::is_limited(queue.qos());
            let taken = if limited {
                let Some(taken) = self.serve_limited(turn, number, (now, again)) else {
                    break;
                };
                taken
            } else if again {
                let mut portion = Portion::of(turn.batch);
                self.serve_again::<false>(number, &mut portion)
            } else {
                self.serve_unlimited(number, turn.batch)
            };
            if taken == 0 {
                self.found_empty(number, now);
            }
            requests += taken;
            if turn.queues > 1 && clock::now() >= turn.ends_at {
                break;
            }
        }
        requests
    }

    #[inline]
    fn serve_unlimited(&mut self, number: u32, requests: usize) -> usize {
        let mut portion = Portion::of(requests);
        self.serve_queue::<false, false>(number, &mut portion)
    }

    /// As far as the device's limits allow; none: they don't allow anything now.
    fn serve_limited(
        &mut self,
        turn: &Turn,
        number: u32,
        (now, again): (u64, bool),
    ) -> Option<usize> {
        let allowance = self.turns.allowance(turn.seat, now)?;
        let mut portion = Portion {
            requests: turn.batch.min(allowance.requests),
            most_bytes: allowance.bytes,
            bytes: 0,
            more_packets: 0,
        };
        let taken = if again {
            self.serve_again::<true>(number, &mut portion)
        } else {
            self.serve_queue::<true, false>(number, &mut portion)
        };
        let passed = taken + portion.more_packets;
        self.turns.passed(turn.seat, passed, portion.bytes);
        Some(taken)
    }

    #[inline]
    pub(super) fn serve_queue<const LIMITED: bool, const AGAIN: bool>(
        &mut self,
        number: u32,
        portion: &mut Portion,
    ) -> usize {
        let Some(queue) = self
            .queues
            .get_mut(number as usize)
            .and_then(Option::as_mut)
        else {
            return 0;
        };
        hand::take(queue.hand);
        let Kind::Blk(blk) = &mut queue.kind else {
            return self.serve_card::<AGAIN>(number, portion);
        };
        let (ring, pipeline, batch) = (&mut queue.ring, &mut self.pipeline, &mut self.batch);
        let (taken, broken) = serve::<LIMITED, AGAIN>(blk, ring, number, pipeline, batch, portion);
        if taken > 0 {
            queue.empty_since = 0;
        }
        if let Some(error) = broken {
            self.retire(number, error);
        } else if taken > 0 {
            self.publish(number);
        }
        taken
    }
    /// A queue had nothing to be taken. After a while it is polled no more.
    fn found_empty(&mut self, number: u32, now: u64) {
        let Some(queue) = self.queue(number) else {
            return;
        };
        if queue.empty_since == 0 {
            queue.empty_since = now;
        } else if now.saturating_sub(queue.empty_since) > queue.grace {
            let seat = queue.seat;
            queue.empty_since = now;
            self.park(number);
            let took = clock::now().saturating_sub(now);
            self.turns.charge_more(seat, took);
        }
    }

    /// Has a queue's driver kick, and polls it no more; unless there is something to do, or no kick.
    fn park(&mut self, number: u32) -> Armed {
        // One to receive with is looked at when a frame comes, and needs no kick.
        let has_turns = self.queue(number).is_none_or(|queue| queue.has_turns());
        let armed = if has_turns {
            self.arm(number)
        } else {
            Armed::Waits
        };
        if let (Armed::Waits, Some(queue)) = (&armed, self.queue(number)) {
            queue.polled = false;
            let seat = queue.seat;
            self.turns.unpoll(seat, number);
        }
        armed
    }

    /// Polls a queue: something happened in it.
    #[inline]
    pub(super) fn poll(&mut self, number: u32) {
        let goes = |queue: &&mut Queue| !queue.polled && queue.has_turns();
        if let Some(queue) = self.queue(number).filter(goes) {
            queue.polled = true;
            let seat = queue.seat;
            let parked_at = std::mem::take(&mut queue.empty_since);
            let grace = queue.grace;
            let grace = self.turns.grace(grace, parked_at);
            if let Some(queue) = self.queue(number) {
                queue.grace = grace;
            }
            self.turns.poll(seat, number);
        }
    }

    /// Polls a queue about which something was said.
    pub(super) fn look_again(&mut self, queue: QueueId) {
        if let Some(number) = self.numbers.get(&queue).copied() {
            self.poll(number);
        }
    }

    /// Arms the kick of every polled queue and sleeps until one comes, a transfer ends, a message is there, or
    /// a device may be served again that had used up its limits.
    pub(super) fn sleep(&mut self) {
        let Some(longest) = self.park_all() else {
            return self.polling.busy();
        };
        if !self.wake_is_awaited {
            self.wake_is_awaited = self
                .pipeline
                .ring
                .push_event(WAKE, self.wake, Event::Wait)
                .is_some();
        }
        if !self.cards.arm(&mut self.pipeline.ring) {
            return self.polling.busy();
        }
        // A message that came before the wait is in the channel; one that comes later wakes.
        if self.receiver.is_empty() && self.wake_is_awaited {
            let since = Instant::now();
            let briefly = self.pipeline.has_waiting() || self.call_is_due;
            let briefly = briefly.then_some(SHORT_SLEEP);
            // What is under way grows old while nothing happens.
            let watchful = self.pipeline.watches().then_some(LOOK_EVERY);
            let timeout = [briefly, longest, watchful].into_iter().flatten().min();
            self.pipeline.tell_of_ended();
            let ring = &mut self.pipeline.ring;
            self.meter.asleep(|| ring.wait(timeout));
            self.pipeline.woke();
            if self.pipeline.is_look_due() {
                self.look_at_ages();
            }
            self.polling.slept(since.elapsed());
        }
    }

    /// Parks every queue that can be: how long the worker may sleep at most, if there is a limit to that; none
    /// if there is something to do.
    fn park_all(&mut self) -> Option<Option<Duration>> {
        let now = clock::now();
        let mut longest = None;
        // From the end: what is parked leaves its place to what comes behind it.
        for place in (0..self.turns.awake()).rev() {
            let Some((seat, queues)) = self.turns.place(place) else {
                continue;
            };
            let shut = self.turns.shut_until(seat).saturating_sub(now);
            if shut > 0 {
                longest = sooner(longest, clock::duration_of(shut));
                continue;
            }
            for at in (0..queues).rev() {
                let Some(number) = self.turns.polled(seat, at) else {
                    continue;
                };
                match self.park(number) {
                    Armed::Waits | Armed::Idle => {}
                    Armed::Unkicked => longest = sooner(longest, SHORT_SLEEP),
                    Armed::Work => return None,
                }
            }
        }
        Some(longest)
    }
}

fn sooner(longest: Option<Duration>, other: Duration) -> Option<Duration> {
    Some(longest.map_or(other, |longest| longest.min(other)))
}
