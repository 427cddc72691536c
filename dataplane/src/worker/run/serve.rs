//! A queue's turn: a batch of its requests, from the avail ring to where they go on or end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::super::batch::{Batch, Taken};
use super::super::queue::Queue;
use crate::blk::pipeline::{Begun, Outcome, Pipeline, Start};
use crate::blk::request::{is_durable, parse};
use crate::virtqueue::RingError;

/// Ended requests are shown to the driver this often while more of the batch follow: it refills the ring
/// meanwhile.
const SHOW_EVERY: usize = 8;

/// Takes some requests from a queue: how many, and how its driver broke it, if it did.
#[inline]
pub(super) fn serve(
    queue: &mut Queue,
    number: u32,
    pipeline: &mut Pipeline,
    batch: &mut Batch,
) -> (usize, Option<RingError>) {
    queue.ring.disarm();
    if queue.local.is_clogged() {
        return (0, None);
    }
    let broken = batch.take(&mut queue.ring, pipeline.room());
    let count = batch.count();
    let mut requests = batch.iter_mut();
    for served in 0..count {
        if served % SHOW_EVERY == SHOW_EVERY - 1 {
            queue.show();
        }
        let Some(taken) = requests.next() else {
            break;
        };
        if let Err(error) = begin(queue, number, pipeline, taken) {
            queue.ring.abandon(taken.head);
            requests.for_each(|taken| queue.ring.abandon(taken.head));
            return (served, Some(error));
        }
    }
    (count, broken)
}

/// Begins a request; one that ends at once is noted as ended.
///
/// # Errors
/// [`RingError::NoStatus`]: there is no way to answer it.
#[inline]
fn begin(
    queue: &mut Queue,
    number: u32,
    pipeline: &mut Pipeline,
    taken: &mut Taken,
) -> Result<(), RingError> {
    let Taken { head, chain } = taken;
    let operation = match parse(chain, &queue.local.device, queue.features)? {
        Ok(operation) => operation,
        Err(status) => {
            chain.writable.write_only_last_byte(status as u8);
            queue.ended(*head, Outcome::failed(status));
            return Ok(());
        }
    };
    let start = Start {
        queue: number,
        head: *head,
        operation,
        local: &queue.local,
        durable: is_durable(&queue.local.device, queue.features),
    };
    if let Begun::Done(outcome) = pipeline.begin(start, chain) {
        chain.writable.write_last_byte(outcome.status as u8);
        queue.ended(*head, outcome);
    }
    Ok(())
}
