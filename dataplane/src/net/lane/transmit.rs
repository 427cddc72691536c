//! A turn of a queue that sends.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{Cards, Lane};
use crate::virtqueue::{RingError, Virtqueue};

/// Bytes of the header in front of a frame that goes nowhere.
const HEADER_BYTES: u64 = 12;

/// Takes some frames from a queue: how many, and how its driver broke it, if it did.
pub fn transmit(
    cards: &mut Cards,
    lane: &mut Lane,
    ring: &mut Virtqueue,
    most: usize,
) -> (usize, Option<RingError>) {
    ring.disarm();
    let mut count = 0;
    for chain in cards.batch.iter_mut().take(most) {
        let head = match ring.pop(chain) {
            Ok(Some(head)) => head,
            Ok(None) => break,
            Err(error) => return (count, Some(error)),
        };
        count += 1;
        lane.tally
            .frame(chain.readable.bytes().saturating_sub(HEADER_BYTES));
        ring.push_used(head, 0);
    }
    (count, None)
}
