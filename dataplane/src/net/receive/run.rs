//! Several frames for one queue together: buffers are taken for all of them first, and their lines are under way to this
//! CPU while the others are looked at. Only frames that the driver takes as they are, each in a buffer of its own;
//! whatever else there is to do with one is [`deliver`](super::deliver)'s.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{Before, Delivered, MOST_BYTES, Receiver, header_of, length};
use crate::memory::GuestSlice;
use crate::net::HeaderSize;
use crate::net::frame::{Body, Frame, Offload};
use crate::net::header::feature;
use crate::virtqueue::Virtqueue;
use crate::virtqueue::run::Run;

/// Frames that are given together at most.
const MOST: usize = 32;
/// Bytes of a buffer that are asked for ahead: of a longer frame the CPU sees where it goes on.
const AHEAD_BYTES: usize = 256;

/// Bytes of the buffers of a turn that is yet to come: of more than most frames have, lines would come for nothing.
const FIRST_BYTES: usize = 76;

/// Room for the buffers of several frames.
#[derive(Debug)]
pub(super) struct Buffers {
    run: Run,
    /// Bytes written to each.
    lengths: [u32; MOST],
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            run: Run::to_write(),
            lengths: [0; MOST],
        }
    }
}

impl Buffers {
    /// Lets go of guest memory.
    pub(super) fn release(&mut self) {
        self.run.release();
    }

    /// Copies frames from the front of `frames` into a driver's buffers: how many. The next one, if there is one, is for
    /// [`deliver`](super::deliver), which also says what is wrong.
    #[inline]
    pub(super) fn deliver<'a>(
        &mut self,
        ring: &mut Virtqueue,
        receiver: Receiver,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
        delivered: &mut Delivered,
    ) -> usize {
        let Self { run, lengths } = self;
        let mut wanted = 0;
        for (frame, needed) in frames.clone().zip(lengths.iter_mut()) {
            if !receiver.takes(&frame) {
                break;
            }
            *needed = length((MOST_BYTES + frame.bytes()) as u64);
            wanted += 1;
        }
        if wanted == 0 {
            return 0;
        }
        let count = ring.pop_run(run, wanted);
        for (at, needed) in lengths.iter().enumerate().take(count) {
            let most = (*needed as usize).min(AHEAD_BYTES);
            run.get(at).will_put(MOST_BYTES, most);
        }
        let mut done = 0;
        for frame in frames.take(count) {
            if !write(receiver, &frame, run.get(done)) {
                break;
            }
            done += 1;
        }
        let lengths = lengths.get(..done).unwrap_or_default();
        if run.is_logged() {
            for (at, written) in lengths.iter().enumerate() {
                run.mark(at, *written as usize);
            }
        }
        let bytes: u64 = lengths.iter().map(|bytes| u64::from(*bytes)).sum();
        delivered.packets += done as u64;
        delivered.bytes += bytes - (done * MOST_BYTES) as u64;
        ring.push_run(run, lengths);
        if run.out() > 0 {
            ring.unpop_run(run);
        }
        // The next ones come while others have their turns: who got frames just now is likely to get more.
        ring.announce_run(done, MOST_BYTES, FIRST_BYTES);
        done
    }
}

impl Receiver {
    /// Whether a driver takes a frame as it is, and in a buffer of its own if there is one of a usual length.
    #[inline(always)]
    fn takes(self, frame: &Frame<'_>) -> bool {
        let is_as_it_is = match &frame.offload {
            Offload::None => true,
            Offload::Gso(_) => false,
            other => self.before(other) == Before::Nothing,
        };
        is_as_it_is
            && self.header == HeaderSize::Long
            && frame.packet_bytes() <= usize::from(self.mtu)
    }
}

/// Writes a frame to a buffer; false, with nothing that matters written, if that is too short.
#[inline(always)]
fn write(receiver: Receiver, frame: &Frame<'_>, to: GuestSlice<'_>) -> bool {
    if to.bytes() < MOST_BYTES + frame.bytes() {
        return false;
    }
    let offload = match &frame.offload {
        Offload::Valid if !receiver.has(feature::GUEST_CSUM) => &Offload::None,
        offload => offload,
    };
    let at = MOST_BYTES + frame.head.len();
    // A buffer that comes back most often has the header of the frame before, which the driver's CPU has read.
    to.put(0, &header_of(offload))
        && to.copy_in(MOST_BYTES, frame.head)
        && match frame.body {
            _ if frame.body.is_empty() => true,
            Body::Guest {
                buffer,
                at: from_at,
                bytes,
            } => to.copy_from_buffer(at, buffer, from_at, bytes as usize),
            Body::Slice(slice) => to.copy_from(at, slice),
            Body::Bytes(own) => to.copy_in(at, own),
        }
}
