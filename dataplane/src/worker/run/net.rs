//! Turns of network cards' queues and ports.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::serve::Portion;
use super::{Served, Worker};
use crate::hand::{self, Hand};
use crate::net::lane::Asked;
use crate::virtqueue::{Chain, RingError, Virtqueue};
use crate::worker::message::{DeviceId, QueueId};
use crate::worker::ring::Completion;

impl Worker {
    /// A turn of a card's queue: how many frames were taken, or buffers given back.
    #[inline(never)]
    pub(super) fn serve_card<const AGAIN: bool>(
        &mut self,
        number: u32,
        portion: &mut Portion,
    ) -> usize {
        let (taken, broken) = if AGAIN {
            let queue = self.queue(number);
            queue.map_or((0, None), |queue| {
                give_back(&mut queue.ring, portion.requests)
            })
        } else {
            let asked = Asked {
                frames: portion.requests,
                bytes: portion.most_bytes,
            };
            let ring = &mut self.pipeline.ring;
            let sent = self.cards.transmit(&mut self.queues, ring, number, asked);
            portion.bytes += sent.bytes;
            portion.more_packets += sent.more_packets;
            (sent.frames, sent.broken)
        };
        if let Some(queue) = self.queue(number).filter(|_| taken > 0) {
            queue.empty_since = 0;
        }
        self.publish_touched();
        if let Some(error) = broken {
            self.retire(number, error);
        } else if taken > 0 {
            self.publish(number);
        }
        taken
    }

    /// Takes what has come to ports from outside; whether anything had.
    #[inline(never)]
    pub(super) fn hear(&mut self) -> bool {
        let ring = &mut self.pipeline.ring;
        // What the network sends is no guest's doing.
        hand::take(Hand::NOTHING);
        let frames = self.cards.hear(&mut self.queues, ring);
        self.publish_touched();
        frames > 0
    }

    /// Publishes the queues that got something.
    #[inline]
    fn publish_touched(&mut self) {
        while let Some(number) = self.cards.next_touched(&mut self.queues) {
            self.publish(number);
        }
        while let Some((number, error)) = self.cards.next_broken() {
            self.retire(number, error);
        }
    }

    /// Something of a port's has ended.
    pub(super) fn port_landed(&mut self, completion: Completion) {
        hand::take(Hand::NOTHING);
        self.cards.landed(completion, &mut self.pipeline.ring);
    }

    /// A card's mirror is another one.
    pub(super) fn look_at_mirror(&mut self, id: DeviceId) {
        if let Some(Served::Net(card)) = self.devices.get(&id) {
            self.cards.mirror(*card, &mut self.pipeline.ring);
        }
    }

    /// A card's guest has come from another host.
    pub(super) fn announce(&mut self, queue: QueueId) {
        if let Some(number) = self.numbers.get(&queue).copied() {
            let ring = &mut self.pipeline.ring;
            self.cards.announce(&mut self.queues, ring, number);
            self.publish_touched();
        }
    }
}

/// Gives back what was in flight when a queue started. Nobody can tell whether a frame in it went out, and networks
/// lose frames: whoever minds sends again. What was to be received into has nothing in it, which drivers drop.
fn give_back(ring: &mut Virtqueue, most: usize) -> (usize, Option<RingError>) {
    let mut chain = Chain::default();
    for count in 0..most {
        match ring.pop_again(&mut chain) {
            Ok(Some(head)) => ring.push_used(head, 0),
            Ok(None) => return (count, None),
            Err(error) => return (count, Some(error)),
        }
    }
    (most, None)
}
