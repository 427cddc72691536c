//! Turns of the queues of network cards.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Worker;
use super::serve::Portion;
use crate::net::lane::transmit;
use crate::virtqueue::{Chain, RingError, Virtqueue};
use crate::worker::message::QueueId;
use crate::worker::queue::Kind;

impl Worker {
    /// A turn of a card's queue: how many frames were taken, or buffers given back.
    pub(super) fn serve_card<const AGAIN: bool>(
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
        let Kind::Net(lane) = &mut queue.kind else {
            return 0;
        };
        let (taken, broken) = if AGAIN {
            give_back(&mut queue.ring, portion.requests)
        } else {
            let before = lane.tally.bytes;
            let done = transmit(&mut self.cards, lane, &mut queue.ring, portion.requests);
            portion.bytes += lane.tally.bytes - before;
            done
        };
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

    /// A card's guest has come from another host.
    pub(super) fn announce(&mut self, queue: QueueId) {
        tracing::debug!("{queue:?}: the guest is here now");
    }
}

/// Gives back what was in flight when a queue started. Nobody can tell whether a frame in it went out, and sending it
/// again could do harm no more than losing it: networks do both, and whoever minds sends again. What was to be received
/// into has nothing in it, which drivers drop.
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
