//! A queue's turn: a batch of its requests, from the avail ring to where they go on or end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::super::batch::{Batch, Taken};
use super::super::queue::Blk;
use crate::blk::pipeline::{Begun, Outcome, Pipeline, Start};
use crate::blk::request::{Operation, Status, is_durable, parse};
use crate::crash_point;
use crate::virtqueue::{Chain, RingError, Virtqueue};

/// Ended requests are shown to the driver this often while more of the batch follow: it refills the ring
/// meanwhile.
const SHOW_EVERY: usize = 8;
/// Requests whose data is copied or encrypted together at most: more bring little, and the first would wait for
/// the last.
const GATHERED: usize = 8;

/// What may be taken from a queue in its turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portion {
    /// Requests at most.
    pub(super) requests: usize,
    /// Of a limited device: bytes after which no further request is taken.
    pub(super) most_bytes: u64,
    /// Of a limited device: bytes of data of the requests that were taken.
    pub(super) bytes: u64,
    /// Of a card: packets that the frames which were taken become, beyond one for each.
    pub(super) more_packets: usize,
}

impl Portion {
    /// So many requests, of any size.
    pub(super) fn of(requests: usize) -> Self {
        Self {
            requests,
            most_bytes: u64::MAX,
            bytes: 0,
            more_packets: 0,
        }
    }
}

/// Takes some requests from a queue: how many, and how its driver broke it, if it did. `AGAIN`: of those that were
/// in flight when it started.
#[inline]
pub(super) fn serve<const LIMITED: bool, const AGAIN: bool>(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    batch: &mut Batch,
    portion: &mut Portion,
) -> (usize, Option<RingError>) {
    ring.disarm();
    let may = blk.local.may_park();
    if may == 0 {
        return (0, None);
    }
    let most = pipeline.room_for(&blk.local).min(portion.requests).min(may);
    let broken = if AGAIN {
        batch.take_again(ring, most)
    } else {
        batch.take::<LIMITED>(ring, most, portion.most_bytes)
    };
    let taken = batch.taken();
    let count = taken.len();
    if count > 0 {
        crash_point!("fetch.taken");
    }
    let served = if blk.local.gathers() {
        gather::<LIMITED>(blk, ring, number, pipeline, taken, portion)
    } else {
        each::<LIMITED>(blk, ring, number, pipeline, taken, portion)
    };
    match served {
        Ok(()) => (count, broken),
        Err((served, error)) => (served, Some(error)),
    }
}

/// Begins one request after the other.
///
/// # Errors
/// How many were begun, and [`RingError::NoStatus`]: there is no way to answer the next one.
#[inline(always)]
fn each<const LIMITED: bool>(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    requests: &mut [Taken],
    portion: &mut Portion,
) -> Result<(), (usize, RingError)> {
    for (served, taken) in requests.iter_mut().enumerate() {
        if served % SHOW_EVERY == SHOW_EVERY - 1 {
            blk.show(ring);
        }
        match admit::<LIMITED>(blk, ring, taken, portion) {
            Ok(Some(operation)) => begin(blk, ring, number, pipeline, taken, operation),
            Ok(None) => {}
            Err(error) => {
                abandon(ring, requests.get(served..));
                return Err((served, error));
            }
        }
    }
    Ok(())
}

/// Has the reads and writes of a device that does them at once done a few at a time. As [`each`].
#[inline(never)]
fn gather<const LIMITED: bool>(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    requests: &mut [Taken],
    portion: &mut Portion,
) -> Result<(), (usize, RingError)> {
    let mut served = 0;
    for group in requests.chunks_mut(GATHERED) {
        let admitted = admit_group::<LIMITED>(blk, ring, number, pipeline, group, portion);
        let good = admitted.map_or_else(|(good, _)| good, |()| group.len());
        let group = group.get_mut(..good).unwrap_or_default();
        ring.announce_used();
        pipeline.gather(&blk.local, group);
        for taken in group {
            finish(blk, ring, taken);
        }
        served += good;
        if let Err((_, error)) = admitted {
            abandon(ring, requests.get(served..));
            return Err((served, error));
        }
        blk.show(ring);
    }
    Ok(())
}

/// Sees what each of a few requests asks for: reads and writes are noted, to be done together, others begun.
///
/// # Errors
/// As [`each`].
#[inline]
fn admit_group<const LIMITED: bool>(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    group: &mut [Taken],
    portion: &mut Portion,
) -> Result<(), (usize, RingError)> {
    for (at, taken) in group.iter_mut().enumerate() {
        taken.work = None;
        match admit::<LIMITED>(blk, ring, taken, portion) {
            Ok(Some(work @ (Operation::Read { .. } | Operation::Write { .. }))) => {
                blk.local.announce(work, &taken.chain);
                taken.work = Some(work);
            }
            Ok(Some(other)) => begin_other(blk, ring, number, pipeline, taken, other),
            Ok(None) => {}
            Err(error) => return Err((at, error)),
        }
    }
    Ok(())
}

/// Begins a request that neither reads nor writes.
#[inline(never)]
fn begin_other(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    taken: &mut Taken,
    operation: Operation,
) {
    begin(blk, ring, number, pipeline, taken, operation);
}

/// Ends a request that was done, or failed to be, together with others.
#[inline]
fn finish(blk: &mut Blk, ring: &mut Virtqueue, taken: &Taken) {
    let Some(work) = taken.work else {
        return;
    };
    let outcome = if taken.done {
        Outcome::ok(work, data_bytes(work, &taken.chain))
    } else {
        Outcome::failed(Status::IoError)
    };
    end(blk, ring, taken, outcome);
}

/// What a request asks for; one that can't be done is noted as ended.
///
/// # Errors
/// [`RingError::NoStatus`]: there is no way to answer it.
#[inline(always)]
fn admit<const LIMITED: bool>(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    taken: &mut Taken,
    portion: &mut Portion,
) -> Result<Option<Operation>, RingError> {
    let Taken { head, chain, .. } = taken;
    match parse(chain, &blk.local.device, blk.features)? {
        Ok(operation) => {
            if LIMITED {
                portion.bytes += data_bytes(operation, chain);
            }
            Ok(Some(operation))
        }
        Err(status) => {
            chain.writable.write_only_last_byte(status as u8);
            blk.ended(ring, *head, Outcome::failed(status));
            Ok(None)
        }
    }
}

/// Begins a request; one that ends at once is noted as ended.
#[inline(always)]
fn begin(
    blk: &mut Blk,
    ring: &mut Virtqueue,
    number: u32,
    pipeline: &mut Pipeline,
    taken: &mut Taken,
    operation: Operation,
) {
    let start = Start {
        queue: number,
        head: taken.head,
        operation,
        local: &blk.local,
        durable: is_durable(&blk.local.device, blk.features),
    };
    let begun = pipeline.begin(start, &mut taken.chain);
    crash_point!("submit.begun");
    if let Begun::Done(outcome) = begun {
        end(blk, ring, taken, outcome);
    }
}

/// Writes the status of a request, and notes that it ended.
#[inline(always)]
fn end(blk: &mut Blk, ring: &mut Virtqueue, taken: &Taken, outcome: Outcome) {
    taken.chain.writable.write_last_byte(outcome.status as u8);
    blk.ended(ring, taken.head, outcome);
}

/// Gives up requests that nobody will answer: the queue retires.
#[cold]
fn abandon(ring: &mut Virtqueue, requests: Option<&[Taken]>) {
    for taken in requests.unwrap_or_default() {
        ring.abandon(taken.head);
    }
}

/// What a request costs of a limit of bytes.
#[inline]
fn data_bytes(operation: Operation, chain: &Chain) -> u64 {
    match operation {
        Operation::Read { .. } => chain.writable.bytes(),
        Operation::Write { .. } => chain.readable.bytes(),
        Operation::Flush | Operation::GetId | Operation::Discard | Operation::WriteZeroes => 0,
    }
}
