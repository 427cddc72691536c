//! The port that leads to a TAP of the host's: one queue of it, which the agent has opened, with the virtio header of
//! 12 bytes in front of each frame, so that checksums and segments cross as they are.
//!
//! **Sending.** A frame is copied behind its header into a buffer and written by the ring; all of a turn are submitted
//! together. The kernel carries them through its own stack during that submission. A TAP whose queue is full makes
//! its writes wait in the ring: buffers run out ([`Port::room`]) and what waits, waits in the guest.
//!
//! **Receiving.** While nothing comes, one read waits in the ring: no system call, and the worker may sleep. When a frame
//! has come, the next are asked for in a burst of reads that don't wait, with one submission, twice as many each time
//! until one finds nothing; then one waits again. Frames stay in order, because only one kind is ever under way.
//!
//! **Failures.** A TAP that is down or was removed refuses what is written: counted and forgotten, the guest
//! is not held up. One that can't be read is tried again, a few times at once and then once a second, as long as
//! the worker has other work to wake it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::interface::InterfaceCounters;
use super::{DropReason, Nic, Port, Sink, Tokens};
use crate::net::HashKey;
use crate::net::frame::Frame;
use crate::net::header::{Header, MOST_BYTES as HEADER_BYTES};
use crate::worker::clock;
use crate::worker::frame_buffer::FrameBuffer;
use crate::worker::ring::{Completion, EntryId, FixedFile, FrameAction, Ring};

/// Frames that can be on their way out.
const SENDING: u16 = 64;
/// Frames that can be on their way in.
const RECEIVING: u16 = 32;
/// Reads of the first burst after a frame that was waited for.
const FIRST_BURST: u16 = 2;
/// Reads in a row that may fail before the interface is taken to be gone for a while.
const MOST_FAILURES: u8 = 8;
/// How long that is.
const PAUSE: Duration = Duration::from_secs(1);

/// Slots of the port's tokens: what an entry of the ring is.
const AWAIT: u32 = 0;
const TAKE: u32 = 1;
const SEND: u32 = 2;

/// A queue of a TAP.
#[derive(Debug)]
pub struct TapPort {
    /// Whose frames these are.
    nic: Nic,
    file: FixedFile,
    tokens: Tokens,
    key: HashKey,
    counters: Arc<InterfaceCounters>,
    /// Buffers for frames to send.
    unsent: Vec<FrameBuffer>,
    /// Buffers for frames to come.
    unfilled: Vec<FrameBuffer>,
    /// Frames that came, with their bytes, header included.
    arrived: VecDeque<(FrameBuffer, usize)>,
    /// The read that waits.
    awaiting: Option<EntryId>,
    /// Reads of a burst under way.
    taking: u16,
    /// How many the next burst has.
    burst: u16,
    /// A read of this burst found nothing.
    is_dry: bool,
    /// Reads that failed since one that did not.
    failures: u8,
    /// Until then nothing is read, after too many.
    paused_until: Option<u64>,
    pause: u64,
    is_stopping: bool,
}

impl TapPort {
    /// A port for the queue that `file` is. `key`: of the flow hash of what comes.
    ///
    /// # Errors
    /// There is no memory for its buffers.
    pub fn new(
        nic: Nic,
        file: FixedFile,
        tokens: Tokens,
        key: HashKey,
        counters: Arc<InterfaceCounters>,
    ) -> io::Result<Self> {
        Ok(Self {
            nic,
            file,
            tokens,
            key,
            counters,
            unsent: FrameBuffer::several(SENDING)?,
            unfilled: FrameBuffer::several(RECEIVING)?,
            arrived: VecDeque::with_capacity(usize::from(RECEIVING)),
            awaiting: None,
            taking: 0,
            burst: 0,
            is_dry: false,
            failures: 0,
            paused_until: None,
            pause: clock::ticks_in(PAUSE),
            is_stopping: false,
        })
    }

    /// The file that it uses, to be taken off the ring when the port is gone.
    #[must_use]
    pub fn file(&self) -> FixedFile {
        self.file
    }

    /// Has a read wait, or a burst begin, if nothing is under way.
    #[inline]
    fn read_on(&mut self, ring: &mut Ring) {
        if self.awaiting.is_some() || self.taking > 0 || self.is_stopping {
            return;
        }
        if self.paused_until.is_some() {
            return;
        }
        if self.burst == 0 {
            return self.wait_for_one(ring);
        }
        for _ in 0..self.burst {
            let Some(buffer) = self.unfilled.pop() else {
                break;
            };
            match self.push(ring, TAKE, FrameAction::Take, buffer) {
                Ok(_) => self.taking += 1,
                Err(buffer) => {
                    self.unfilled.push(buffer);
                    break;
                }
            }
        }
    }

    fn wait_for_one(&mut self, ring: &mut Ring) {
        let Some(buffer) = self.unfilled.pop() else {
            return;
        };
        match self.push(ring, AWAIT, FrameAction::Await, buffer) {
            Ok(entry) => self.awaiting = Some(entry),
            Err(buffer) => self.unfilled.push(buffer),
        }
    }

    #[inline]
    fn push(
        &self,
        ring: &mut Ring,
        slot: u32,
        action: FrameAction,
        buffer: FrameBuffer,
    ) -> Result<EntryId, FrameBuffer> {
        ring.push_frame(self.tokens.token(slot), self.file, action, buffer)
    }

    /// A read has ended.
    #[inline]
    fn has_read(&mut self, buffer: FrameBuffer, done: Result<u64, i32>) {
        match done {
            Ok(bytes) => {
                self.failures = 0;
                // Never more than the buffer has.
                let bytes = usize::try_from(bytes).unwrap_or(0);
                self.arrived.push_back((buffer, bytes));
            }
            Err(errno) => {
                self.unfilled.push(buffer);
                self.is_dry = true;
                if !matches!(errno, libc::EAGAIN | libc::ECANCELED | libc::EINTR) {
                    self.has_failed(errno);
                }
            }
        }
    }

    #[cold]
    fn has_failed(&mut self, errno: i32) {
        self.counters.count_unreadable(errno);
        self.failures = self.failures.saturating_add(1);
        if self.failures >= MOST_FAILURES {
            self.paused_until = Some(clock::now() + self.pause);
        }
    }

    /// A read that waited, or the last of a burst, has ended: how it goes on.
    #[inline]
    fn next_burst(&mut self, ring: &mut Ring) {
        if std::mem::take(&mut self.is_dry) {
            self.burst = 0;
            self.read_on(ring);
        } else {
            self.burst = (self.burst * 2).clamp(FIRST_BURST, RECEIVING);
        }
    }

    #[cold]
    fn is_paused(&mut self, now: u64) -> bool {
        let is_paused = self.paused_until.is_some_and(|until| now < until);
        if !is_paused {
            self.paused_until = None;
            // One more failure is enough for the next pause.
            self.failures = MOST_FAILURES - 1;
        }
        is_paused
    }

    fn give(&self, to: &mut impl Sink, bytes: &[u8]) {
        let Some((header, frame)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return self.counters.count_malformed();
        };
        match Frame::of_bytes(&Header::parse(header), frame, self.key) {
            // Whoever did not get it has counted it.
            Ok(frame) => drop(to.deliver(self.nic, &frame)),
            Err(_) => self.counters.count_malformed(),
        }
    }
}

impl Port for TapPort {
    #[inline]
    fn receive(&mut self, now: u64, to: &mut impl Sink, ring: &mut Ring) -> usize {
        let count = self.arrived.len();
        while let Some((buffer, bytes)) = self.arrived.pop_front() {
            self.give(to, buffer.bytes().get(..bytes).unwrap_or_default());
            self.unfilled.push(buffer);
        }
        if self.paused_until.is_some() && self.is_paused(now) {
            return count;
        }
        self.read_on(ring);
        count
    }

    #[inline]
    fn room(&self, _from: Nic) -> usize {
        self.unsent.len()
    }

    #[inline]
    fn transmit(
        &mut self,
        _from: Nic,
        frame: &Frame<'_>,
        _to: &mut impl Sink,
        ring: &mut Ring,
    ) -> Result<(), DropReason> {
        let Some(mut buffer) = self.unsent.pop() else {
            return Err(DropReason::PortBusy);
        };
        let bytes = written(frame, buffer.bytes_mut());
        let Some(bytes) = bytes else {
            self.unsent.push(buffer);
            return Err(DropReason::TooLong);
        };
        self.push(ring, SEND, FrameAction::Send(bytes), buffer)
            .map(drop)
            .map_err(|buffer| {
                self.unsent.push(buffer);
                DropReason::PortBusy
            })
    }

    /// The worker's turn submits what was queued, together with what other ports and disks have.
    #[inline]
    fn flush(&mut self, _ring: &mut Ring) {}

    #[inline]
    fn landed(&mut self, completion: Completion, ring: &mut Ring) {
        let Some(buffer) = completion.frame else {
            return;
        };
        match Tokens::slot(completion.token) {
            SEND => {
                self.unsent.push(buffer);
                if let Err(errno) = completion.done {
                    self.counters.count_refused(1, errno);
                }
            }
            TAKE => {
                self.has_read(buffer, completion.done);
                self.taking -= 1;
                if self.taking == 0 {
                    self.next_burst(ring);
                }
            }
            _ => {
                self.has_read(buffer, completion.done);
                self.awaiting = None;
                self.next_burst(ring);
            }
        }
    }

    fn arm(&mut self, ring: &mut Ring) -> bool {
        if self.is_stopping || self.paused_until.is_some() {
            return true;
        }
        if !self.arrived.is_empty() || self.taking > 0 {
            return false;
        }
        self.burst = 0;
        self.read_on(ring);
        self.awaiting.is_some()
    }

    fn stop(&mut self, ring: &mut Ring) {
        self.is_stopping = true;
        if let Some(entry) = self.awaiting {
            ring.cancel(entry);
        }
    }

    fn is_idle(&self) -> bool {
        self.awaiting.is_none() && self.taking == 0 && self.unsent.len() == usize::from(SENDING)
    }
}

/// A frame with its header, at the front of `to`: how many bytes; none if it is longer than any.
#[inline]
fn written(frame: &Frame<'_>, to: &mut [u8]) -> Option<u32> {
    let (header, rest) = to.split_first_chunk_mut::<HEADER_BYTES>()?;
    *header = frame.offload.header().bytes();
    let bytes = frame.copy_to(rest)?;
    u32::try_from(HEADER_BYTES + bytes).ok()
}
