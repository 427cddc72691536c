//! A mirror: the frames of a NIC, those that its guest sent and those that it received, copied to a pcap-ng file that
//! the agent opened.
//!
//! Frames are what the guest gave or got: a segment of 64 KiB is one frame, and a checksum that is left to the
//! receiver is not there. Of those that the guest sends the ones that passed its guard. The first bytes are those that
//! were judged; what follows them is read out of the guest's memory by itself, so that a guest which changes a frame
//! while it is sent can show the mirror something else than the receiver.
//!
//! **It never holds up a NIC.** Records are gathered in [`BUFFERS`] buffers, and the worker's ring writes them, one
//! buffer at a time, so that they stay in order. When none is free a frame is not recorded; the next record says how
//! many are missing. When the file has all the bytes that it may have, or can't be written, the mirror is over, and
//! costs no more than a look.
//!
//! A NIC whose queues are served by several workers has one [`MirrorFile`] and a [`Mirror`] on each: the file is open
//! for appending, and each write is of whole records.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod pcapng;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_protocol::net::MirrorSpec;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::EventFd;

use super::Tokens;
use crate::net::frame::{Body, Frame};
use crate::worker::frame_buffer::FrameBuffer;
use crate::worker::ring::{Completion, FixedFile, FrameAction, Ring};
use pcapng::{Direction, Record};

/// Buffers of a mirror on a worker: as many as the frames of a long turn, of the longest, take.
pub const BUFFERS: u16 = 32;

/// `end`: it goes on.
const RUNNING: i32 = 0;
/// `end`: all bytes are written; else the errno.
const FULL: i32 = -1;

/// A mirror's file, shared by the workers that write to it.
#[derive(Debug)]
pub struct MirrorFile {
    file: OwnedFd,
    snap_bytes: u32,
    most_bytes: u64,
    /// Bytes that it has or will have.
    reserved: AtomicU64,
    frames: AtomicU64,
    dropped: AtomicU64,
    end: AtomicI32,
    /// Its end was asked for.
    is_told: AtomicBool,
    /// Written to when it ends.
    bell: OnceLock<Arc<EventFd>>,
}

/// How a mirror ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorEnd {
    /// It has all the bytes that it may have.
    Full,
    /// A write failed with this errno.
    Failed(i32),
}

/// What a mirror has recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorCounts {
    /// Frames in its file, or on their way there.
    pub frames: u64,
    /// Bytes of its file, with those on their way.
    pub bytes: u64,
    /// Frames that could not be recorded in time.
    pub dropped: u64,
    /// Whether it is over, and why.
    pub end: Option<MirrorEnd>,
}

impl MirrorFile {
    /// Begins a mirror in a file, or goes on with one that a process before this one began. To be called by the
    /// control thread: it writes what the file begins with.
    ///
    /// # Errors
    /// InvalidInput for what is no regular file, or is not open for appending; what the file system fails with.
    pub fn begin(file: OwnedFd, nic: &str, spec: &MirrorSpec) -> io::Result<Arc<Self>> {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        let mut file = File::from(file);
        let metadata = file.metadata()?;
        if !metadata.is_file() || !flags.contains(OFlag::O_APPEND) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a mirror's file is a regular one that is open for appending",
            ));
        }
        let mut bytes = metadata.len();
        if bytes == 0 {
            let header = pcapng::header(nic, spec.snap_bytes);
            file.write_all(&header)?;
            bytes = header.len() as u64;
        }
        Ok(Arc::new(Self {
            file: file.into(),
            snap_bytes: spec.snap_bytes,
            most_bytes: spec.most_bytes,
            reserved: AtomicU64::new(bytes),
            frames: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            end: AtomicI32::new(RUNNING),
            is_told: AtomicBool::new(false),
            bell: OnceLock::new(),
        }))
    }

    /// Has this event written to when the mirror ends by itself. To be said before it begins to record, and once.
    pub fn ring_when_over(&self, bell: Arc<EventFd>) {
        let _ = self.bell.set(bell);
    }

    /// How it ended, if it has and nobody was told yet.
    #[must_use]
    pub fn take_end(&self) -> Option<MirrorEnd> {
        let end = self.counts().end?;
        (!self.is_told.swap(true, Ordering::Relaxed)).then_some(end)
    }

    /// What it has recorded so far.
    #[must_use]
    pub fn counts(&self) -> MirrorCounts {
        MirrorCounts {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.reserved.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            end: match self.end.load(Ordering::Relaxed) {
                RUNNING => None,
                FULL => Some(MirrorEnd::Full),
                errno => Some(MirrorEnd::Failed(errno)),
            },
        }
    }

    #[inline]
    fn is_over(&self) -> bool {
        self.end.load(Ordering::Relaxed) != RUNNING
    }

    fn has_failed(&self) -> bool {
        !matches!(self.end.load(Ordering::Relaxed), RUNNING | FULL)
    }

    /// The first end is the one that is told.
    fn end_as(&self, how: i32) {
        let order = Ordering::Relaxed;
        let ended = self.end.compare_exchange(RUNNING, how, order, order);
        if let (Ok(_), Some(bell)) = (ended, self.bell.get()) {
            // Once for each mirror. Whoever waits counts nothing, so that it never overflows.
            let _ = bell.write(1);
        }
    }

    /// Whether it may have so many bytes more; if not, it is over.
    fn reserve(&self, bytes: usize) -> bool {
        let order = Ordering::Relaxed;
        let more = |reserved: u64| {
            let reserved = reserved.checked_add(bytes as u64)?;
            (reserved <= self.most_bytes).then_some(reserved)
        };
        let fits = self.reserved.fetch_update(order, order, more).is_ok();
        if !fits {
            self.end_as(FULL);
        }
        fits
    }
}

/// A mirror on a worker.
#[derive(Debug)]
pub struct Mirror {
    shared: Arc<MirrorFile>,
    file: FixedFile,
    token: u64,
    unused: Vec<FrameBuffer>,
    /// The buffer that records are added to, with its bytes.
    filling: Option<(FrameBuffer, usize)>,
    /// Those that have no room for more, in order.
    filled: VecDeque<(FrameBuffer, usize)>,
    /// Bytes of the write that is under way.
    writing: Option<usize>,
    /// Frames that are missing since the last record.
    dropped: u64,
}

impl Mirror {
    /// A mirror into this file, whose writes get the first of the tokens.
    ///
    /// # Errors
    /// There is no memory for its buffers, or no place for its file in the ring.
    pub fn new(shared: Arc<MirrorFile>, tokens: Tokens, ring: &mut Ring) -> io::Result<Self> {
        let unused = FrameBuffer::several(BUFFERS)?;
        let file = ring.register_file(shared.file.as_fd())?;
        Ok(Self {
            shared,
            file,
            token: tokens.token(0),
            unused,
            filling: None,
            filled: VecDeque::with_capacity(usize::from(BUFFERS)),
            writing: None,
            dropped: 0,
        })
    }

    /// Records a frame, if there is room for it.
    #[inline]
    pub fn record(&mut self, direction: Direction, frame: &Frame<'_>) {
        if !self.shared.is_over() && !self.add(direction, frame) {
            self.dropped += 1;
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// False: there was no room.
    fn add(&mut self, direction: Direction, frame: &Frame<'_>) -> bool {
        let original = u32::try_from(frame.bytes()).unwrap_or(u32::MAX);
        let captured = original.min(self.shared.snap_bytes);
        let needed = pcapng::most_bytes(captured as usize);
        if !self.has_room(needed) {
            return false;
        }
        let record = Record {
            time_ns: now_ns(),
            direction,
            captured,
            original,
            dropped: self.dropped,
        };
        let Some((buffer, used)) = &mut self.filling else {
            return false;
        };
        let place = buffer.bytes_mut().get_mut(*used..).unwrap_or_default();
        let Some(bytes) = pcapng::write(place, &record, |to| copy_front(frame, to)) else {
            return false;
        };
        if self.shared.reserve(bytes) {
            *used += bytes;
            self.dropped = 0;
            self.shared.frames.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Sees to it that so many bytes fit where records are added; false if they can't.
    fn has_room(&mut self, bytes: usize) -> bool {
        if let Some((buffer, used)) = &self.filling
            && buffer.bytes().len() - used >= bytes
        {
            return true;
        }
        let Some(next) = self.unused.pop() else {
            return false;
        };
        if let Some(full) = self.filling.replace((next, 0)) {
            self.filled.push_back(full);
        }
        true
    }

    /// Has the ring write what was recorded, if it isn't writing already. To be called at the end of a turn.
    #[inline]
    pub fn flush(&mut self, ring: &mut Ring) {
        if self.writing.is_none() && (self.filling.is_some() || !self.filled.is_empty()) {
            self.write(ring);
        }
    }

    fn write(&mut self, ring: &mut Ring) {
        let Some((buffer, bytes)) = self.filled.pop_front().or_else(|| self.filling.take()) else {
            return;
        };
        // Behind a record that is not whole none can be read.
        if bytes == 0 || self.shared.has_failed() {
            return self.unused.push(buffer);
        }
        // A buffer is not that long.
        let action = FrameAction::Send(u32::try_from(bytes).unwrap_or(0));
        match ring.push_frame(self.token, self.file, action, buffer) {
            Ok(_) => self.writing = Some(bytes),
            // With the next flush.
            Err(buffer) => self.filled.push_front((buffer, bytes)),
        }
    }

    /// A write has ended.
    pub fn landed(&mut self, completion: Completion, ring: &mut Ring) {
        let expected = self.writing.take().map(|bytes| bytes as u64);
        self.unused.extend(completion.frame);
        match completion.done {
            Ok(bytes) if Some(bytes) == expected => {}
            // The file's end has no whole record: nothing may follow it.
            Ok(_) => self.give_up(libc::ENOSPC),
            Err(errno) => self.give_up(errno),
        }
        self.flush(ring);
    }

    fn give_up(&mut self, errno: i32) {
        self.shared.end_as(errno);
        let rest = self.filled.drain(..).chain(self.filling.take());
        self.unused.extend(rest.map(|(buffer, _)| buffer));
    }

    /// Whether all that was recorded is written.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let nothing = self.filling.as_ref().is_none_or(|(_, bytes)| *bytes == 0);
        self.writing.is_none() && self.filled.is_empty() && nothing
    }

    /// Ends it on this worker; it must be idle.
    pub fn close(self, ring: &mut Ring) {
        ring.forget_file(self.file);
    }
}

/// Copies the front of a frame, as much as `to` takes.
fn copy_front(frame: &Frame<'_>, to: &mut [u8]) -> bool {
    let (head, rest) = to.split_at_mut(to.len().min(frame.head.len()));
    let Some(front) = frame.head.get(..head.len()) else {
        return false;
    };
    head.copy_from_slice(front);
    match &frame.body {
        Body::Guest { buffer, at, .. } => buffer.copy_out(*at, rest),
        Body::Slice(slice) => slice.copy_out(0, rest),
        Body::Bytes(bytes) => match bytes.get(..rest.len()) {
            Some(bytes) => {
                rest.copy_from_slice(bytes);
                true
            }
            None => false,
        },
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
