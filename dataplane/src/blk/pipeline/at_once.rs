//! What needs no transfer: the serial, and devices whose blocks are memory of this process or nothing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Pipeline;
use super::flight::{Local, Memory, Outcome, Start, data};
use crate::blk::device::BlkDevice;
use crate::blk::request::{Operation, Status};
use crate::blk::transform::{Place, Span, Together, load, store};
use crate::blk::{Cipher, part};
use crate::virtqueue::Chain;
use crate::worker::batch::Taken;
use crate::worker::staging::Chunk;

/// How much of a request goes through the scratch of a device without blocks at a time: so little that it stays
/// in the nearest caches beside the request's own data.
const SCRATCH_BYTES: u64 = 32 << 10;

impl Local {
    /// Whether its reads and writes end at once, and are better done several together ([`Pipeline::gather`]).
    #[must_use]
    #[inline]
    pub fn gathers(&self) -> bool {
        match self.memory {
            Memory::No => false,
            Memory::Nowhere => self.device.is_encrypted(),
            Memory::Ram(_) => true,
        }
    }

    /// Has the CPU fetch what a read or write of its memory begins with.
    #[inline]
    pub fn announce(&self, operation: Operation, chain: &Chain) {
        if let (Memory::Ram(ram), Some(offset_bytes)) = (&self.memory, offset(operation)) {
            let writes = matches!(operation, Operation::Write { .. });
            ram.announce(offset_bytes, data(operation, chain).bytes(), writes);
        }
    }
}

impl Pipeline {
    /// A read or write between guest memory and that of the device.
    #[inline(never)]
    pub(super) fn at_once(&self, start: Start<'_>, chain: &Chain) -> Outcome {
        let keys = start.local.keys.borrow();
        // Such a device is never re-keyed: there is one key for all bytes.
        let (cipher, _) = part(keys.as_ref(), 0, 0);
        let Some(scratch) = &self.scratch else {
            return Outcome::failed(Status::IoError);
        };
        let target = Target {
            local: start.local,
            cipher,
            scratch,
        };
        if target.do_alone(start.operation, chain) {
            Outcome::ok(start.operation, data(start.operation, chain).bytes())
        } else {
            Outcome::failed(Status::IoError)
        }
    }

    /// Does the reads and writes among these ([`Taken::work`]) between guest memory and that of the device,
    /// encrypted or decrypted in the same pass; several short ones in one call. Notes of each whether it
    /// succeeded.
    pub fn gather(&self, local: &Local, requests: &mut [Taken]) {
        let Some(scratch) = &self.scratch else {
            return;
        };
        let keys = local.keys.borrow();
        // As above.
        let (cipher, _) = part(keys.as_ref(), 0, 0);
        let target = Target {
            local,
            cipher,
            scratch,
        };
        let (mut writes, mut reads) = (Together::new(true), Together::new(false));
        // A bit for each request: done by itself, and to be done together with others.
        let (mut done, mut gathered) = (0u32, 0u32);
        for (at, taken) in requests.iter().enumerate() {
            let Some(work) = taken.work else {
                continue;
            };
            let together = match work {
                Operation::Write { .. } => &mut writes,
                _ => &mut reads,
            };
            if target.add(work, &taken.chain, together) {
                gathered |= 1 << at;
            } else if target.do_alone(work, &taken.chain) {
                done |= 1 << at;
            }
        }
        if let Some(cipher) = cipher
            && writes.run(cipher)
            && reads.run(cipher)
        {
            done |= gathered;
        }
        for (at, taken) in requests.iter_mut().enumerate() {
            taken.done = done & (1 << at) != 0;
        }
    }
}

/// What a device's requests are done with.
#[derive(Clone, Copy)]
struct Target<'a> {
    local: &'a Local,
    cipher: Option<&'a Cipher>,
    scratch: &'a Chunk,
}

impl<'a> Target<'a> {
    #[inline]
    fn place(self, offset_bytes: u64) -> Place<'a> {
        match &self.local.memory {
            Memory::Ram(ram) => Place::Ram(ram, offset_bytes),
            _ => Place::Chunk(self.scratch),
        }
    }

    /// Adds a request to those that are done together; false if it is to be done by itself.
    #[inline]
    fn add(self, work: Operation, chain: &'a Chain, together: &mut Together<'a>) -> bool {
        let (Some(cipher), Some(offset_bytes)) = (self.cipher, offset(work)) else {
            return false;
        };
        let buffer = data(work, chain);
        let span = Span {
            buffer,
            at: 0,
            bytes: usize::try_from(buffer.bytes()).unwrap_or(usize::MAX),
            offset_bytes,
        };
        together.add(span, cipher, self.place(offset_bytes))
    }

    /// Does a request by itself; whether it succeeded.
    fn do_alone(self, work: Operation, chain: &Chain) -> bool {
        let Some(offset_bytes) = offset(work) else {
            return false;
        };
        let buffer = data(work, chain);
        let total = buffer.bytes();
        let step = match &self.local.memory {
            Memory::Ram(_) => total,
            _ => SCRATCH_BYTES,
        };
        let mut at = 0;
        while at < total {
            let bytes = step.min(total - at);
            let span = Span {
                buffer,
                at,
                bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
                offset_bytes: offset_bytes + at,
            };
            let place = self.place(offset_bytes + at);
            let done = match work {
                Operation::Write { .. } => store(span, self.cipher, place),
                _ => load(span, self.cipher, place),
            };
            if !done {
                return false;
            }
            at += bytes;
        }
        true
    }
}

/// Where a read or write begins on the device.
#[inline]
fn offset(operation: Operation) -> Option<u64> {
    match operation {
        Operation::Read { offset_bytes } | Operation::Write { offset_bytes } => Some(offset_bytes),
        _ => None,
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
