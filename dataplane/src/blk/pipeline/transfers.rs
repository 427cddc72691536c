//! Reads and writes: between guest memory and the storage as they lie, or part by part through staging.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::Pipeline;
use super::flight::Local;
use crate::blk::part;
use crate::blk::request::Operation;
use crate::blk::transform::{Place, Span, load, store};
use crate::storage::{Action, Buffer, Transfer};

impl Pipeline {
    /// The whole request as one transfer between guest memory and file.
    #[inline]
    pub(super) fn submit_direct(&mut self, index: u32) {
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return;
        };
        let (action, offset_bytes, buffer) = match flight.operation {
            Operation::Read { offset_bytes } => {
                (Action::Read, offset_bytes, &mut flight.chain.writable)
            }
            Operation::Write { offset_bytes } => {
                let durable = flight.durable;
                let action = Action::Write { durable };
                (action, offset_bytes, &mut flight.chain.readable)
            }
            _ => return,
        };
        let transfer = Transfer {
            action,
            offset_bytes,
            bytes: flight.bytes,
            buffer: Buffer::Guest(std::mem::take(buffer)),
            retries: 0,
        };
        flight.submitted = flight.bytes;
        self.submit(index, 0, transfer);
    }

    pub(super) fn advance_staged(&mut self, index: u32, local: &Rc<Local>) {
        loop {
            let Some(flight) = self.flights.get_mut(index as usize) else {
                return;
            };
            let left = flight.bytes - flight.submitted;
            if flight.failed || left == 0 {
                return;
            }
            if self.staging.is_short(left) {
                self.ring.grow(&mut self.staging);
            }
            let Some(chunk) = local.share.take_chunk(&mut self.staging, left) else {
                return self.wait_in_line(index);
            };
            let at = flight.submitted;
            let (Operation::Read { offset_bytes } | Operation::Write { offset_bytes }) =
                flight.operation
            else {
                return local.share.give_chunk(&mut self.staging, chunk);
            };
            let offset_bytes = offset_bytes + at;
            // A transfer is under one key.
            let keys = local.keys.borrow();
            let (cipher, most) = part(keys.as_ref(), offset_bytes, left);
            let bytes = chunk.bytes().min(u32::try_from(most).unwrap_or(u32::MAX));
            let action = match flight.operation {
                Operation::Write { .. } => {
                    let span = Span {
                        buffer: &flight.chain.readable,
                        at,
                        bytes: bytes as usize,
                        offset_bytes,
                    };
                    if !store(span, cipher, Place::Chunk(&chunk)) {
                        local.share.give_chunk(&mut self.staging, chunk);
                        return self.fail(index);
                    }
                    let durable = flight.durable;
                    Action::Write { durable }
                }
                _ => Action::Read,
            };
            flight.submitted += u64::from(bytes);
            let transfer = Transfer {
                action,
                offset_bytes,
                bytes: u64::from(bytes),
                buffer: Buffer::Staging(chunk),
                retries: 0,
            };
            if !self.submit(index, at, transfer) {
                return;
            }
        }
    }

    /// The buffer of a transfer: back to where it is from, with what was read.
    #[inline]
    pub(super) fn take_back(&mut self, index: u32, at: u64, local: &Local, transfer: Transfer) {
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return;
        };
        match transfer.buffer {
            Buffer::None => {}
            Buffer::Guest(buffer) => match flight.operation {
                Operation::Read { .. } => flight.chain.writable = buffer,
                _ => flight.chain.readable = buffer,
            },
            Buffer::Staging(chunk) => {
                if let (Operation::Read { .. }, false) = (flight.operation, flight.failed) {
                    let span = Span {
                        buffer: &flight.chain.writable,
                        at,
                        bytes: usize::try_from(transfer.bytes).unwrap_or(usize::MAX),
                        offset_bytes: transfer.offset_bytes,
                    };
                    let keys = local.keys.borrow();
                    let (cipher, bytes) =
                        part(keys.as_ref(), transfer.offset_bytes, transfer.bytes);
                    // It was cut where the frontier lay, which has not moved past it since.
                    flight.failed |=
                        bytes != transfer.bytes || !load(span, cipher, Place::Chunk(&chunk));
                }
                local.share.give_chunk(&mut self.staging, chunk);
            }
        }
    }
}
