//! A queue's turn: a batch of its requests, from the avail ring to where they go on or end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::super::batch::{Batch, Taken};
use super::super::queue::Queue;
use crate::blk::pipeline::{Begun, Outcome, Pipeline, Start};
use crate::blk::request::{Operation, is_durable, parse};
use crate::virtqueue::{Chain, RingError};

/// Ended requests are shown to the driver this often while more of the batch follow: it refills the ring
/// meanwhile.
const SHOW_EVERY: usize = 8;

/// What may be taken from a queue in its turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portion {
    /// Requests at most.
    pub(super) requests: usize,
    /// Of a limited device: bytes after which no further request is taken.
    pub(super) most_bytes: u64,
    /// Of a limited device: bytes of data of the requests that were taken.
    pub(super) bytes: u64,
}

/// Takes some requests from a queue: how many, and how its driver broke it, if it did.
#[inline]
pub(super) fn serve<const LIMITED: bool>(
    queue: &mut Queue,
    number: u32,
    pipeline: &mut Pipeline,
    batch: &mut Batch,
    portion: &mut Portion,
) -> (usize, Option<RingError>) {
    queue.ring.disarm();
    if queue.local.is_clogged() {
        return (0, None);
    }
    let most = pipeline.room_for(&queue.local).min(portion.requests);
    let broken = batch.take::<LIMITED>(&mut queue.ring, most, portion.most_bytes);
    let count = batch.count();
    let mut requests = batch.iter_mut();
    for served in 0..count {
        if served % SHOW_EVERY == SHOW_EVERY - 1 {
            queue.show();
        }
        let Some(taken) = requests.next() else {
            break;
        };
        if let Err(error) = begin::<LIMITED>(queue, number, pipeline, taken, portion) {
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
fn begin<const LIMITED: bool>(
    queue: &mut Queue,
    number: u32,
    pipeline: &mut Pipeline,
    taken: &mut Taken,
    portion: &mut Portion,
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
    if LIMITED {
        portion.bytes += data_bytes(operation, chain);
    }
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

/// What a request costs of a limit of bytes.
fn data_bytes(operation: Operation, chain: &Chain) -> u64 {
    match operation {
        Operation::Read { .. } => chain.writable.bytes(),
        Operation::Write { .. } => chain.readable.bytes(),
        Operation::Flush | Operation::GetId | Operation::Discard | Operation::WriteZeroes => 0,
    }
}
