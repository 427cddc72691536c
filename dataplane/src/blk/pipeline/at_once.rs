//! What needs no transfer: the serial, and devices whose blocks are memory of this process or nothing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Pipeline;
use super::flight::{Memory, Outcome, Start, data};
use crate::blk::device::BlkDevice;
use crate::blk::part;
use crate::blk::request::{Operation, Status};
use crate::blk::transform::{Place, Span, load, store};
use crate::virtqueue::Chain;

impl Pipeline {
    /// Between guest memory and that of the device, encrypted or decrypted in the same pass.
    #[inline(never)]
    pub(super) fn at_once(&self, start: Start<'_>, chain: &Chain) -> Outcome {
        let local = start.local;
        let buffer = data(start.operation, chain);
        let total = buffer.bytes();
        // Such a device is never re-keyed: there is one key for all bytes.
        let keys = local.keys.borrow();
        let (cipher, _) = part(keys.as_ref(), 0, total);
        let Some(chunk) = &self.scratch else {
            return Outcome::failed(Status::IoError);
        };
        let mut at = 0;
        let mut ok = true;
        while ok && at < total {
            let step = match &local.memory {
                Memory::Ram(_) => total - at,
                _ => u64::from(chunk.bytes()).min(total - at),
            };
            let bytes = usize::try_from(step).unwrap_or(usize::MAX);
            let span = |offset_bytes: u64| Span {
                buffer,
                at,
                bytes,
                offset_bytes: offset_bytes + at,
            };
            let place = |offset_bytes: u64| match &local.memory {
                Memory::Ram(ram) => Place::Ram(ram, offset_bytes + at),
                _ => Place::Chunk(chunk),
            };
            ok = match start.operation {
                Operation::Read { offset_bytes: o } => load(span(o), cipher, place(o)),
                Operation::Write { offset_bytes: o } => store(span(o), cipher, place(o)),
                _ => false,
            };
            at += step;
        }
        if ok {
            Outcome::ok(start.operation, total)
        } else {
            Outcome::failed(Status::IoError)
        }
    }
}

/// GET_ID: the serial, zero-padded to the buffer.
pub(super) fn identify(device: &BlkDevice, chain: &Chain) -> Outcome {
    let buffer = &chain.writable;
    let bytes = buffer.bytes();
    let serial = &device.geometry.serial;
    let shown = usize::try_from(bytes).map_or(serial.len(), |b| b.min(serial.len()));
    let rest = usize::try_from(bytes).unwrap_or(0).saturating_sub(shown);
    let written = serial.get(..shown).is_some_and(|s| buffer.copy_in(0, s))
        && buffer.zero(shown as u64, rest);
    if written {
        Outcome::ok(Operation::GetId, bytes)
    } else {
        Outcome::failed(Status::IoError)
    }
}
