//! A worker's io_uring: made disabled, restricted to a handful of operations on fixed files, then
//! enabled. It owns the buffers that the kernel uses until their completion was seen.
//!
//! What a process that was broken into could do with it: read, write, flush and give up blocks of the volumes,
//! read the eventfds and send and receive by the network interfaces that this worker has anyway. It can't open,
//! connect or pass anything.
//!
//! UNSAFETY: the kernel reads and writes the buffers of a submitted entry at any time until its
//! completion. They are moved into the ring's table with the submission and leave it with the
//! completion only; the table never moves; dropping the ring waits for all of them.
#![expect(unsafe_code, reason = "io_uring submission")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod setup;
mod submission;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::squeue::{self, Flags};
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use super::frame_buffer::FrameBuffer;
use super::staging::PIECES;
use crate::crash_point;
use crate::memory::USUAL_MOST_PIECES;
use crate::storage::{Done, Transfer};
use submission::submission;

/// Transfers that can be in flight, and the completion queue's length, so that it can't overflow.
pub const MAX_IN_FLIGHT: u32 = 4096;
/// Events in flight up to which another kick may be waited for, and another call be made: whoever has very many
/// queues must leave room for calls, and all of them for transfers.
const MAX_KICKS: u32 = MAX_IN_FLIGHT / 2;
const MAX_CALLS: u32 = MAX_IN_FLIGHT / 4 * 3;
/// The kernel's limit on segments of one transfer (`UIO_MAXIOV`).
pub const MAX_SEGMENTS: usize = 1024;
/// `IORING_ENTER_GETEVENTS`.
const ENTER_GETEVENTS: u32 = 1;
/// User data of cancellations, whose completions say nothing.
const NO_ENTRY: u64 = u64::MAX;

/// Number of a file in the ring's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedFile {
    number: u32,
    off_thread: bool,
}

impl FixedFile {
    /// The same, with everything that is done with it begun by a thread of the kernel's: its file system makes
    /// whoever begins a transfer wait for its end.
    #[must_use]
    pub fn off_thread(self) -> Self {
        Self {
            off_thread: true,
            ..self
        }
    }
}

/// What is done with an eventfd. Such an entry may end late or never: it waits for whoever has the
/// eventfd's other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Wait for it and clear it.
    Wait,
    /// Add one to it. Not by a system call: the frontend shares the open file, and can make it full and
    /// blocking at any time.
    Signal,
    /// Wait until a socket has something to be read. Without an end of its own, as the first.
    Readable,
    /// Have a socket look at its transmit ring: a send of nothing, which waits for nothing.
    Kick,
}

/// What is done with a whole frame and an interface. Such an entry is no transfer: it ends at once, or when a frame
/// comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameAction {
    /// Write the first so many bytes, which are no more than the buffer has.
    Send(u32),
    /// Read one that is there: EAGAIN if none is.
    Take,
    /// Read one, as soon as it comes.
    Await,
}

/// An entry that ended.
#[derive(Debug)]
pub struct Completion {
    /// As it was given with the submission.
    pub token: u64,
    /// The transfer back; none: it was an event or a frame.
    pub transfer: Option<Transfer>,
    /// The frame's buffer back, if it was one.
    pub frame: Option<FrameBuffer>,
    /// As many bytes as the kernel says, or the errno. Whether that is all of them, and whether to try
    /// again, is decided by who pushed it.
    pub done: Done,
}

/// An entry in the table: what to cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryId(u32);

#[derive(Debug)]
enum Job {
    Transfer(Transfer),
    Event(Event),
    Frame(FrameAction, FrameBuffer),
}

#[derive(Debug)]
struct InFlight {
    token: u64,
    file: FixedFile,
    job: Job,
}

#[derive(Debug, Default)]
struct Entry {
    in_flight: Option<InFlight>,
    /// Segments of a guest transfer; the kernel reads them at submission or later.
    iovecs: Vec<libc::iovec>,
    /// What an eventfd gives or gets.
    word: u64,
}

/// The ring.
pub struct Ring {
    uring: IoUring,
    /// As long as MAX_IN_FLIGHT, never moved.
    entries: Box<[Entry]>,
    free: Vec<u32>,
    free_files: Vec<u32>,
    /// Events and frames in flight: they end only when something happens.
    events: u32,
    /// Which pieces of the staging memory are registered, each as the buffer of its number.
    registered: [bool; PIECES],
    /// Kept in its table, so that it is open as long as a request is in flight.
    fences: Vec<FixedFile>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight())
            .field("events", &self.events)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Transfers in flight, events aside.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.entries.len() - self.free.len() - self.events as usize
    }

    /// Gives a descriptor a number in the ring's table; the caller may close its own.
    ///
    /// # Errors
    /// ENFILE when the table is full.
    pub fn register_file(&mut self, fd: BorrowedFd<'_>) -> io::Result<FixedFile> {
        let index = self
            .free_files
            .pop()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENFILE))?;
        let submitter = self.uring.submitter();
        match submitter.register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(_) => Ok(FixedFile {
                number: index,
                off_thread: false,
            }),
            Err(error) => {
                self.free_files.push(index);
                Err(error)
            }
        }
    }

    /// Takes a file off the table. Transfers in flight keep it open until they end.
    pub fn forget_file(&mut self, file: FixedFile) {
        // What is queued means the file that has the number now, and not the one that gets it next.
        while !self.uring.submission().is_empty() {
            self.enter();
        }
        let submitter = self.uring.submitter();
        match submitter.register_files_update(file.number, &[-1]) {
            Ok(_) => self.free_files.push(file.number),
            // The number is lost, the file stays open: better than using it for another one.
            Err(error) => tracing::error!("a fixed file can't be taken off its ring: {error}"),
        }
    }

    /// Keeps a fence of the process's until the ring is gone with its last request, or [`Ring::let_go_of_fence`].
    ///
    /// # Errors
    /// As [`Ring::register_file`].
    pub fn keep_fence(&mut self, fence: BorrowedFd<'_>) -> io::Result<()> {
        let fence = self.register_file(fence)?;
        self.fences.push(fence);
        Ok(())
    }

    /// Lets go of every fence: whoever waits for it takes it that nothing of this ring is in flight any more. The
    /// kernel doesn't wait for requests here, so the caller has.
    pub fn let_go_of_fence(&mut self) {
        for fence in std::mem::take(&mut self.fences) {
            self.forget_file(fence);
        }
    }

    /// Queues a transfer with a file; it is submitted by the next [`Ring::turn`] or [`Ring::wait`], with what
    /// else is queued until then; or at once, if there are then no fewer in the queue than the storage has: the
    /// first, the second, two, four, and so on. Storage that ran dry works on those while the rest of a batch
    /// comes together.
    ///
    /// # Errors
    /// Gives the transfer back when as many are in flight as can be; the caller tries again
    /// after a completion.
    #[inline]
    pub fn push(
        &mut self,
        token: u64,
        file: FixedFile,
        transfer: Transfer,
    ) -> Result<EntryId, Transfer> {
        let Some(id) = self.free.pop() else {
            return Err(transfer);
        };
        let job = Job::Transfer(transfer);
        let entry = self.enqueue(id, InFlight { token, file, job });
        let queued = self.uring.submission().len();
        if queued * 2 >= self.in_flight() {
            self.enter();
        }
        Ok(entry)
    }

    /// Whether there is room for another kick to be waited for.
    #[must_use]
    pub fn takes_kick(&self) -> bool {
        self.events < MAX_KICKS
    }

    /// Whether there is room for another call.
    #[must_use]
    #[inline]
    pub fn takes_call(&self) -> bool {
        self.events < MAX_CALLS
    }

    /// Queues something with an eventfd, as [`Ring::push`] does; none: there is no room.
    #[inline]
    pub fn push_event(&mut self, token: u64, file: FixedFile, event: Event) -> Option<EntryId> {
        let id = self.free.pop()?;
        self.events += 1;
        let job = Job::Event(event);
        Some(self.enqueue(id, InFlight { token, file, job }))
    }

    /// Queues something with a frame; it is submitted by the next [`Ring::turn`] or [`Ring::wait`].
    ///
    /// # Errors
    /// Gives the buffer back when there is no room, as [`Ring::push`].
    #[inline]
    pub fn push_frame(
        &mut self,
        token: u64,
        file: FixedFile,
        action: FrameAction,
        buffer: FrameBuffer,
    ) -> Result<EntryId, FrameBuffer> {
        let Some(id) = self.free.pop() else {
            return Err(buffer);
        };
        self.events += 1;
        let job = Job::Frame(action, buffer);
        Ok(self.enqueue(id, InFlight { token, file, job }))
    }

    #[inline]
    fn enqueue(&mut self, id: u32, in_flight: InFlight) -> EntryId {
        if let Some(entry) = self.entries.get_mut(id as usize) {
            entry.in_flight = Some(in_flight);
        }
        self.queue(id);
        EntryId(id)
    }

    /// Asks for the end of a transfer; its completion comes with ECANCELED, or as it was.
    pub fn cancel(&mut self, id: EntryId) {
        let sqe = opcode::AsyncCancel::new(u64::from(id.0))
            .build()
            .user_data(NO_ENTRY);
        self.queue_sqe(sqe.flags(Flags::FIXED_FILE));
    }

    /// Asks for the end of the transfers whose tokens are `its`, as [`Ring::cancel`] does.
    pub fn cancel_transfers(&mut self, its: impl Fn(u64) -> bool) {
        let is_its = |entry: &Entry| {
            let of = entry.in_flight.as_ref();
            of.is_some_and(|of| matches!(of.job, Job::Transfer(_)) && its(of.token))
        };
        let ids: Vec<u32> = (0u32..)
            .zip(self.entries.iter())
            .filter_map(|(id, entry)| is_its(entry).then_some(id))
            .collect();
        ids.into_iter().for_each(|id| self.cancel(EntryId(id)));
    }

    /// Puts the submission queue entry of a table entry into the queue.
    #[inline]
    fn queue(&mut self, id: u32) {
        let registered = &self.registered;
        let Some(sqe) = self
            .entries
            .get_mut(id as usize)
            .and_then(|entry| submission(entry, registered))
        else {
            debug_assert!(false, "entry {id} has nothing that the kernel could do");
            return;
        };
        self.queue_sqe(sqe.user_data(u64::from(id)));
    }

    #[inline]
    fn queue_sqe(&mut self, sqe: squeue::Entry) {
        loop {
            // SAFETY: the entry's buffers lie in the table (or are nothing) until its completion.
            if unsafe { self.uring.submission().push(&sqe) }.is_ok() {
                return;
            }
            self.enter();
        }
    }

    /// Submits what is queued and lets the kernel finish what it can.
    fn enter(&mut self) {
        let queued = u32::try_from(self.uring.submission().len()).unwrap_or(u32::MAX);
        // SAFETY: no argument structure is passed; the counts are those of our own queue.
        let result = unsafe {
            self.uring
                .submitter()
                .enter::<libc::sigset_t>(queued, 0, ENTER_GETEVENTS, None)
        };
        Self::entered(result.map(drop));
    }

    /// What is left of an error of `io_uring_enter`: entries stay queued on a temporary one.
    fn entered(result: io::Result<()>) {
        if let Err(error) = result {
            match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME | libc::ENOMEM) => {}
                _ => tracing::error!("io_uring_enter failed: {error}"),
            }
        }
    }

    /// Submits what is queued, if something is, and takes up what the kernel has for us.
    #[inline]
    pub fn turn(&mut self) {
        let queue = self.uring.submission();
        let needed = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if needed {
            self.enter();
            crash_point!("submit.turn");
        }
    }

    /// Submits what is queued and sleeps until a completion, at most for `timeout`.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        let result = match timeout {
            None => self.uring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        Self::entered(result.map(drop));
    }

    /// The next completion, if there is one.
    #[inline]
    pub fn reap(&mut self) -> Option<Completion> {
        loop {
            let cqe = self.uring.completion().next()?;
            if let Some(completion) = self.finish(cqe.user_data(), cqe.result()) {
                return Some(completion);
            }
        }
    }

    #[inline]
    fn finish(&mut self, user_data: u64, result: i32) -> Option<Completion> {
        let id = u32::try_from(user_data).ok()?;
        let entry = self.entries.get_mut(id as usize)?;
        let in_flight = entry.in_flight.take()?;
        if entry.iovecs.capacity() > USUAL_MOST_PIECES {
            entry.iovecs = Vec::with_capacity(USUAL_MOST_PIECES);
        }
        self.free.push(id);
        let (transfer, frame) = match in_flight.job {
            Job::Transfer(transfer) => (Some(transfer), None),
            Job::Event(_) => {
                self.events -= 1;
                (None, None)
            }
            Job::Frame(_, buffer) => {
                self.events -= 1;
                (None, Some(buffer))
            }
        };
        Some(Completion {
            token: in_flight.token,
            transfer,
            frame,
            done: u64::try_from(result).map_err(|_| -result),
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let used = |e: &Entry| e.in_flight.is_some();
        let ids: Vec<u32> = (0u32..)
            .zip(self.entries.iter())
            .filter_map(|(id, entry)| used(entry).then_some(id))
            .collect();
        for id in ids {
            self.cancel(EntryId(id));
        }
        while self.free.len() < self.entries.len() {
            self.wait(None);
            while self.reap().is_some() {}
        }
    }
}

#[cfg(test)]
mod escape;

#[cfg(test)]
mod tests;
