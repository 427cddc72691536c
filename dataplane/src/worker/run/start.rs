//! A queue that starts.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::{Served, Worker, recovery};
use crate::net::receive::MOST_OF_BUFFER;
use crate::worker::message::{FromWorker, QueueId, QueueStart};
use crate::worker::queue::{Blk, Kind, Queue};

impl Worker {
    pub(super) fn start(&mut self, mut start: QueueStart) {
        let id = start.queue;
        let (kick, call) = (start.kick.take(), start.call.take());
        let started = if self.numbers.contains_key(&id) {
            Err("the queue is running".to_owned())
        } else {
            let kind = self.kind_of(id, start.features);
            let queue = kind.and_then(|kind| Queue::new(start, kind).map_err(|e| e.to_string()));
            queue.and_then(|queue| self.connect(queue))
        };
        let queue = match started {
            Ok(queue) => queue,
            Err(reason) => return self.reply(FromWorker::StartFailed { queue: id, reason }),
        };
        recovery::report(&queue);
        let number = self.place(queue);
        self.numbers.insert(id, number);
        self.set_kick(id, kick);
        self.set_call(id, call);
        self.reply(FromWorker::Started { queue: id });
    }

    /// What a queue that comes is for.
    pub(super) fn kind_of(&mut self, id: QueueId, features: u64) -> Result<Kind, String> {
        match self.devices.get(&id.device) {
            Some(Served::Blk(local)) if local.is_wiped() => Err("its keys were wiped".to_owned()),
            Some(Served::Blk(local)) => {
                self.pipeline.take_up(local);
                let local = Rc::clone(local);
                Ok(Kind::Blk(Blk::new(local, id.index, features)))
            }
            Some(Served::Net(card)) => {
                let lane = self.cards.lane(*card, id.index, features);
                let none = || "the card has no such queue".to_owned();
                lane.map(Kind::Net).ok_or_else(none)
            }
            None => Err("the device is not attached".to_owned()),
        }
    }

    /// Connects a card's queue with its port.
    fn connect(&mut self, mut queue: Queue) -> Result<Queue, String> {
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.come(lane, &mut self.pipeline.ring)?;
            if !lane.sends() {
                queue.ring.limit_chains(MOST_OF_BUFFER);
            }
        }
        Ok(queue)
    }

    /// Puts a queue under the lowest free number.
    pub(super) fn place(&mut self, mut queue: Queue) -> u32 {
        let device = queue.device();
        queue.seat = self.turns.seat(queue.id.device, &device);
        queue.hand = device.hand().get();
        let free = self.queues.iter().position(Option::is_none);
        let number = free.unwrap_or(self.queues.len());
        if free.is_none() {
            self.queues.push(None);
        }
        if let Some(place) = self.queues.get_mut(number) {
            *place = Some(queue);
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        self.poll(number);
        number
    }
}
