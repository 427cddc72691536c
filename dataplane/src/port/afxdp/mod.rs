//! The port that leads to a queue of an interface by AF_XDP: past the host's stack, from and to memory of our own that
//! the kernel knows.
//!
//! The socket is made by whoever may, and passed; [`XdpQueue`] registers memory and binds it. There are no offloads
//! here: a frame is copied into one of ours, its checksum completed in place, a segment cut; what comes has the checksum
//! that it has, and guests check it themselves. An interface that leaves checksums to its hardware for frames
//! that never see any (a veth pair) must not: `ethtool -K PEER tx off`.
//!
//! Frames that came are seen in memory, without a system call. What goes is put into the socket's ring and the kernel
//! told once a turn, by a send of nothing through the worker's ring. While the interface is down or gone, frames are
//! refused as they come, and it is tried again ten times a second at most.
//!
//! | module | owns |
//! | --- | --- |
//! | `socket` | making a passed socket work |
//! | `frames` | which frames are free, have come, have gone |
//! | `umem` | the frames, and whose each is |
//! | `ring` | the rings that are shared with the kernel |
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod frames;
mod ring;
mod socket;
mod umem;

use std::sync::Arc;
use std::time::Duration;

use super::interface::InterfaceCounters;
use super::{DropReason, Nic, Port, Sink, Tokens};
use crate::net::HashKey;
use crate::net::frame::{Frame, Gso, Offload};
use crate::net::header::Header;
use crate::net::offload::{Checksums, SegmentHead, Segments, Staging, complete};
use crate::worker::clock;
use crate::worker::ring::{Completion, EntryId, Event, FixedFile, Ring};
use frames::Frames;

pub use socket::{XdpError, XdpQueue};
pub use umem::MOST_MTU;

/// Frames that are given to a NIC in one turn at most.
const MOST_RECEIVED: u32 = 64;
/// Frames that the longest segment of a usual size becomes.
const SEGMENTS: usize = 46;
/// How long an interface that refused is left alone.
const PAUSE: Duration = Duration::from_millis(100);

/// Slots of the port's tokens: what an entry of the ring is.
const READABLE: u32 = 0;
const KICK: u32 = 1;

/// A queue of an interface.
#[derive(Debug)]
pub struct AfXdpPort {
    /// Whose frames these are.
    nic: Nic,
    file: FixedFile,
    tokens: Tokens,
    key: HashKey,
    counters: Arc<InterfaceCounters>,
    frames: Frames,
    /// Where a segment is copied to before it is cut.
    staging: Staging,
    head: SegmentHead,
    /// The kernel is being told.
    kicking: bool,
    /// The wait for something to come.
    awaiting: Option<EntryId>,
    /// The interface refused: until then it is not asked again.
    refused_until: Option<u64>,
    pause: u64,
    is_stopping: bool,
}

impl AfXdpPort {
    /// A port for a queue whose socket is `file`. `key`: of the flow hash of what comes.
    #[must_use]
    pub fn new(
        nic: Nic,
        file: FixedFile,
        tokens: Tokens,
        key: HashKey,
        counters: Arc<InterfaceCounters>,
        queue: XdpQueue,
    ) -> Self {
        Self {
            nic,
            file,
            tokens,
            key,
            counters,
            frames: Frames::new(queue),
            staging: Staging::default(),
            head: SegmentHead::default(),
            kicking: false,
            awaiting: None,
            refused_until: None,
            pause: clock::ticks_in(PAUSE),
            is_stopping: false,
        }
    }

    /// The file that it uses, to be taken off the ring when the port is gone.
    #[must_use]
    pub fn file(&self) -> FixedFile {
        self.file
    }

    /// Its queue back, to be a port elsewhere.
    #[must_use]
    pub fn into_queue(self) -> XdpQueue {
        self.frames.queue
    }

    /// Sends a segment as the frames that it stands for: all, or none.
    fn send_cut(&mut self, frame: &Frame<'_>, gso: Gso) -> Result<(), DropReason> {
        let longest = usize::from(gso.header_bytes) + usize::from(gso.mss);
        if longest > self.frames.queue.umem.frame_bytes() {
            return Err(DropReason::TooLong);
        }
        if frame.packets() > self.frames.unsent() {
            return Err(DropReason::PortBusy);
        }
        let bytes = self.staging.stage(frame).ok_or(DropReason::Malformed)?;
        let cut = Segments::new(bytes, gso, frame.link.l3, Checksums::Complete);
        let mut cut = cut.ok_or(DropReason::Malformed)?;
        while let Some((head, payload)) = cut.next(&mut self.head) {
            self.frames.send(|to| {
                let (front, rest) = to.split_at_mut_checked(head.len())?;
                front.copy_from_slice(head);
                rest.get_mut(..payload.len())?.copy_from_slice(payload);
                Some(head.len() + payload.len())
            })?;
        }
        Ok(())
    }

    /// Has the kernel look at what goes, unless it does already or has just refused.
    #[inline]
    fn kick(&mut self, ring: &mut Ring) {
        if !self.frames.is_unkicked || self.kicking || self.is_stopping {
            return;
        }
        if !self.frames.queue.sending.wants_wakeup() {
            self.frames.is_unkicked = false;
            return;
        }
        if self.refused_until.is_some() {
            return;
        }
        let token = self.tokens.token(KICK);
        if ring.push_event(token, self.file, Event::Kick).is_some() {
            self.frames.is_unkicked = false;
            self.kicking = true;
        }
    }

    /// The kernel has looked at what goes.
    fn has_kicked(&mut self, done: Result<u64, i32>) {
        self.kicking = false;
        self.frames.take_sent();
        match done {
            Ok(_) => {}
            // It takes a few at a time, or has no room for now.
            Err(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR) => {}
            Err(errno) => {
                self.counters.count_refused(0, errno);
                self.refused_until = Some(clock::now() + self.pause);
            }
        }
        self.frames.is_unkicked |= self.frames.queue.sending.used() > 0;
    }

    /// A driver that has run out of room for what comes has to be told that there is some again; looking whether the
    /// socket is readable does that.
    #[cold]
    fn wake_driver(&mut self, ring: &mut Ring) {
        match self.awaiting {
            Some(entry) => ring.cancel(entry),
            None => drop(self.wait_for_one(ring)),
        }
    }

    fn wait_for_one(&mut self, ring: &mut Ring) -> bool {
        if self.awaiting.is_none() && !self.is_stopping {
            let token = self.tokens.token(READABLE);
            self.awaiting = ring.push_event(token, self.file, Event::Readable);
        }
        self.awaiting.is_some()
    }
}

impl Port for AfXdpPort {
    #[inline]
    fn receive(&mut self, now: u64, to: &mut impl Sink, ring: &mut Ring) -> usize {
        let count = self.frames.queue.received.waiting().min(MOST_RECEIVED);
        for _ in 0..count {
            let (nic, key, counters) = (self.nic, self.key, &self.counters);
            self.frames.receive(|bytes| {
                match Frame::of_bytes(&Header::default(), bytes, key) {
                    // Whoever did not get it has counted it.
                    Ok(frame) => drop(to.deliver(nic, &frame)),
                    Err(_) => counters.count_malformed(),
                }
            });
        }
        if count > 0 {
            self.frames.has_received();
            if self.frames.queue.fill.wants_wakeup() {
                self.wake_driver(ring);
            }
        }
        self.frames.take_sent();
        if self.refused_until.is_some_and(|until| now >= until) {
            self.refused_until = None;
        }
        self.kick(ring);
        count as usize
    }

    /// While the interface refuses, nothing is kept for it.
    #[inline]
    fn room(&self, _from: Nic) -> usize {
        if self.refused_until.is_some() {
            return usize::MAX;
        }
        self.frames.unsent() / SEGMENTS
    }

    #[inline]
    fn transmit(
        &mut self,
        _from: Nic,
        frame: &Frame<'_>,
        _to: &mut impl Sink,
        _ring: &mut Ring,
    ) -> Result<(), DropReason> {
        if self.refused_until.is_some() {
            return Err(DropReason::PortError);
        }
        match frame.offload {
            Offload::None | Offload::Valid => self.frames.send(|to| frame.copy_to(to)),
            Offload::NeedsCsum(csum) => self.frames.send(|to| {
                let bytes = frame.copy_to(to)?;
                complete(to.get_mut(..bytes)?, csum);
                Some(bytes)
            }),
            Offload::Gso(gso) => self.send_cut(frame, gso),
        }
    }

    #[inline]
    fn flush(&mut self, ring: &mut Ring) {
        self.kick(ring);
    }

    fn landed(&mut self, completion: Completion, ring: &mut Ring) {
        if Tokens::slot(completion.token) == KICK {
            self.has_kicked(completion.done);
            self.kick(ring);
        } else {
            self.awaiting = None;
        }
    }

    fn arm(&mut self, ring: &mut Ring) -> bool {
        if self.frames.queue.received.waiting() > 0 {
            return false;
        }
        if self.frames.is_unkicked && !self.kicking && self.refused_until.is_none() {
            self.kick(ring);
        }
        self.wait_for_one(ring) || self.is_stopping
    }

    fn stop(&mut self, ring: &mut Ring) {
        self.is_stopping = true;
        if let Some(entry) = self.awaiting {
            ring.cancel(entry);
        }
    }

    fn is_idle(&self) -> bool {
        self.awaiting.is_none() && !self.kicking
    }
}
