//! DISCARD and WRITE_ZEROES: range by range, by giving blocks up or zeroing them where the storage can, else
//! by writing zeroes.
//!
//! Zeroes read back as zeroes: on an encrypted device they are written, encrypted, since a hole would
//! decrypt to noise. A discard gives the blocks up on either; what is read there afterwards can be anything.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::Pipeline;
use super::flight::{Begun, Local, Outcome, Start};
use crate::blk::device::{BlkDevice, Lack};
use crate::blk::part;
use crate::blk::request::{self, Operation, Range, Status};
use crate::blk::transform::zeroes;
use crate::storage::{Action, Buffer, Transfer};
use crate::virtqueue::Chain;

/// Transfers that one such request has in flight: it is long, and others want staging too.
const DEPTH: u32 = 4;

/// How a range is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The storage can't, and does not have to.
    Nothing,
    /// By one transfer.
    Whole(Action),
    /// By written zeroes, one chunk after another.
    Written,
}

fn step(operation: Operation, range: &Range, device: &BlkDevice) -> Step {
    let can_punch = !device.lacks(Lack::Punch);
    if operation == Operation::Discard {
        return if can_punch {
            Step::Whole(Action::Discard)
        } else {
            Step::Nothing
        };
    }
    if device.is_encrypted() {
        Step::Written
    } else if range.unmap && can_punch {
        Step::Whole(Action::Zero { unmap: true })
    } else if !device.lacks(Lack::ZeroRange) {
        Step::Whole(Action::Zero { unmap: false })
    } else {
        Step::Written
    }
}

/// What a storage lacks that can't do an action.
fn lack(action: Action) -> Option<Lack> {
    match action {
        Action::Discard | Action::Zero { unmap: true } => Some(Lack::Punch),
        Action::Zero { unmap: false } => Some(Lack::ZeroRange),
        Action::Read | Action::Write { .. } | Action::Flush => None,
    }
}

impl Pipeline {
    pub(super) fn begin_ranges(&mut self, start: Start<'_>, chain: &mut Chain) -> Begun {
        let mut ranges = std::mem::take(&mut self.ranges);
        let device = &start.local.device;
        let parsed = request::ranges(chain, start.operation, device, &mut ranges);
        let begun = match parsed.and_then(|()| {
            let off = self.take_off(start, chain, 0);
            off.ok_or(Status::IoError)
        }) {
            Ok(index) => {
                if let Some(flight) = self.flights.get_mut(index as usize) {
                    flight.ranges.extend_from_slice(&ranges);
                    flight.flushes = start.durable;
                }
                if !self.parks_ranges(index, start.local) {
                    self.advance(index);
                }
                Begun::Pending
            }
            Err(status) => Begun::Done(Outcome::failed(status)),
        };
        self.ranges = ranges;
        begun
    }

    /// Gives the storage as much of a request's ranges as it is to have at a time.
    pub(super) fn advance_ranges(&mut self, index: u32, local: &Rc<Local>) {
        loop {
            let Some(flight) = self.flights.get_mut(index as usize) else {
                return;
            };
            if flight.failed || flight.outstanding >= DEPTH {
                return;
            }
            let Some(range) = flight.ranges.last_mut() else {
                return;
            };
            let transfer = match step(flight.operation, range, &local.device) {
                Step::Nothing => {
                    flight.ranges.pop();
                    continue;
                }
                Step::Whole(action) => Transfer {
                    action,
                    offset_bytes: range.offset_bytes,
                    bytes: range.bytes,
                    buffer: Buffer::None,
                    retries: 0,
                },
                Step::Written => {
                    if self.staging.is_short(range.bytes) {
                        self.ring.grow(&mut self.staging);
                    }
                    let Some(mut chunk) = local.share.take_chunk(&mut self.staging, range.bytes)
                    else {
                        return self.wait_in_line(index);
                    };
                    let keys = local.keys.borrow();
                    let (cipher, most) = part(keys.as_ref(), range.offset_bytes, range.bytes);
                    let bytes = most.min(u64::from(chunk.bytes()));
                    if !zeroes(&mut chunk, bytes, range.offset_bytes, cipher) {
                        local.share.give_chunk(&mut self.staging, chunk);
                        return self.fail(index);
                    }
                    Transfer {
                        // A flush follows where it has to be stable.
                        action: Action::Write { durable: false },
                        offset_bytes: range.offset_bytes,
                        bytes,
                        buffer: Buffer::Staging(chunk),
                        retries: 0,
                    }
                }
            };
            range.offset_bytes += transfer.bytes;
            range.bytes -= transfer.bytes;
            if range.bytes == 0 {
                flight.ranges.pop();
            }
            if !self.submit(index, 0, transfer) {
                return;
            }
        }
    }

    /// What to do about an action that a storage does not have: another way from now on. False where the
    /// transfer failed by something else.
    pub(super) fn goes_another_way(
        &mut self,
        index: u32,
        local: &Rc<Local>,
        transfer: &Transfer,
        errno: i32,
    ) -> bool {
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS);
        let Some(lack) = lack(transfer.action).filter(|_| unsupported) else {
            return false;
        };
        if !local.device.note_lack(lack) {
            tracing::info!(
                "the volume's storage does not have {lack:?}: {}",
                lack.consequence()
            );
        }
        if let (Some(flight), Action::Zero { unmap }) =
            (self.flights.get_mut(index as usize), transfer.action)
        {
            flight.ranges.push(Range {
                offset_bytes: transfer.offset_bytes,
                bytes: transfer.bytes,
                unmap,
            });
        }
        true
    }
}
