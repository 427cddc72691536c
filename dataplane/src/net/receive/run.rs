//! Buffers that are taken together: for several frames, each in one of its own, or for a long one in several. All are
//! taken first, and their lines are under way to this CPU while the others are looked at. Only frames that the driver
//! takes as they are; whatever else there is to do with one is [`deliver`](super::deliver)'s.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ops::Range;

use super::{Before, Delivered, MOST_BYTES, Receiver, header_of, length, most_buffers};
use crate::memory::GuestSlice;
use crate::net::HeaderSize;
use crate::net::frame::{Body, Frame, Offload};
use crate::net::header::feature;
use crate::virtqueue::Virtqueue;
use crate::virtqueue::run::{MOST_CHAINS, Run};

/// Frames that are given together at most.
const MOST: usize = 32;
/// Bytes of a buffer that are asked for ahead: of a longer frame the CPU sees where it goes on.
const AHEAD_BYTES: usize = 256;

/// Bytes of the buffers of a turn that is yet to come: of more than most frames have, lines would come for nothing.
const FIRST_BYTES: usize = 76;
/// Bytes of each of several buffers that are asked for ahead.
const FIRST_LINES: usize = 128;
/// A guess at how long buffers are of a driver that takes long frames.
const PIECE_BYTES: usize = 4096;

/// Room for the buffers of several frames.
#[derive(Debug)]
pub(super) struct Buffers {
    run: Run,
    /// Bytes written to each.
    lengths: [u32; MOST_CHAINS],
    /// How long the first one was of which several were taken last.
    usual: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            run: Run::to_write(),
            lengths: [0; MOST_CHAINS],
            usual: PIECE_BYTES,
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
        let done = self.each(ring, receiver, frames.clone(), delivered);
        if done > 0 {
            return done;
        }
        let mut frames = frames;
        let first = frames.next();
        let is_given = first.is_some_and(|frame| self.spread(ring, receiver, &frame, delivered));
        usize::from(is_given)
    }

    /// Frames from the front of `frames`, each in a buffer of its own: how many.
    #[inline(always)]
    fn each<'a>(
        &mut self,
        ring: &mut Virtqueue,
        receiver: Receiver,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
        delivered: &mut Delivered,
    ) -> usize {
        let Self { run, lengths, .. } = self;
        let mut wanted = 0;
        for (frame, needed) in frames.clone().zip(lengths.iter_mut()).take(MOST) {
            if matches!(frame.offload, Offload::Gso(_)) || !receiver.takes(&frame) {
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

    /// A long frame, in as many buffers as it needs; false, with all of them put back, if these are not to be had.
    #[inline(never)]
    fn spread(
        &mut self,
        ring: &mut Virtqueue,
        receiver: Receiver,
        frame: &Frame<'_>,
        delivered: &mut Delivered,
    ) -> bool {
        let Self {
            run,
            lengths,
            usual,
        } = self;
        if !receiver.has(feature::MRG_RXBUF) || !receiver.takes(frame) {
            return false;
        }
        let needed = MOST_BYTES + frame.bytes();
        let guess = needed.div_ceil((*usual).max(1)).min(MOST_CHAINS);
        let count = ring.pop_run(run, guess);
        let (mut room, mut buffers) = (0, 0);
        while room < needed && buffers < count {
            run.get(buffers).will_write(FIRST_LINES);
            room += run.bytes(buffers);
            buffers += 1;
        }
        *usual = run.bytes(0);
        // What is out of the ordinary is looked at again by whoever takes one by one.
        if room < needed
            || buffers > most_buffers(needed as u64)
            || run.bytes(0) < MOST_BYTES + frame.head.len()
        {
            ring.unpop_run(run);
            return false;
        }
        write_all(
            receiver,
            frame,
            run,
            lengths.get_mut(..buffers).unwrap_or_default(),
        );
        let lengths = lengths.get(..buffers).unwrap_or_default();
        if run.is_logged() {
            for (at, written) in lengths.iter().enumerate() {
                run.mark(at, *written as usize);
            }
        }
        delivered.packets += 1;
        delivered.bytes += frame.bytes() as u64;
        ring.push_run(run, lengths);
        if run.out() > 0 {
            ring.unpop_run(run);
        }
        true
    }
}

/// Writes a frame to buffers that have room for it, the header and its head in the first: `lengths` are how many bytes of
/// each.
fn write_all(receiver: Receiver, frame: &Frame<'_>, run: &Run, lengths: &mut [u32]) {
    let mut header = header_of(told(receiver, frame));
    if let ([.., low, high], Ok(count)) = (&mut header, u16::try_from(lengths.len())) {
        [*low, *high] = count.to_le_bytes();
    }
    let first = run.get(0);
    let mut at = MOST_BYTES + frame.head.len();
    let mut is_whole = first.copy_in(0, &header) && first.copy_in(MOST_BYTES, frame.head);
    let (mut done, bytes) = (0, frame.body.bytes());
    for (place, written) in lengths.iter_mut().enumerate() {
        let to = run.get(place);
        let here = (to.bytes() - at).min(bytes - done);
        is_whole &= write_body(to, at, &frame.body, done..done + here);
        *written = length((at + here) as u64);
        (at, done) = (0, done + here);
    }
    debug_assert!(is_whole, "both have that many bytes");
}

/// Writes some bytes of a frame's body to an offset of a buffer; false if there are fewer, or less room.
#[inline(always)]
fn write_body(to: GuestSlice<'_>, at: usize, body: &Body<'_>, bytes: Range<usize>) -> bool {
    match body {
        _ if bytes.is_empty() => true,
        Body::Guest {
            buffer, at: from, ..
        } => to.copy_from_buffer(at, buffer, from + bytes.start as u64, bytes.len()),
        Body::Slice(slice) => slice
            .part(bytes.start, bytes.len())
            .is_some_and(|part| to.copy_from(at, part)),
        Body::Bytes(own) => own.get(bytes).is_some_and(|part| to.copy_in(at, part)),
    }
}

/// What a driver is told of a frame's offloads: who can't leave a checksum isn't told that one is good either.
#[inline(always)]
fn told<'a>(receiver: Receiver, frame: &'a Frame<'_>) -> &'a Offload {
    match &frame.offload {
        Offload::Valid if !receiver.has(feature::GUEST_CSUM) => &Offload::None,
        offload => offload,
    }
}

impl Receiver {
    /// Whether a driver takes a frame as it is.
    #[inline(always)]
    fn takes(self, frame: &Frame<'_>) -> bool {
        let is_as_it_is = match &frame.offload {
            Offload::None => true,
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
    let at = MOST_BYTES + frame.head.len();
    // A buffer that comes back most often has the header of the frame before, which the driver's CPU has read.
    to.put(0, &header_of(told(receiver, frame)))
        && to.copy_in(MOST_BYTES, frame.head)
        && write_body(to, at, &frame.body, 0..frame.body.bytes())
}
