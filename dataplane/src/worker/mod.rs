//! Workers: one thread on one core each, which owns its queues and one io_uring.

pub mod message;
pub mod ring;
pub mod staging;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::{EfdFlags, EventFd};

use message::{FromWorker, ToWorker};

/// How a worker runs.
#[derive(Debug, Clone, Default)]
pub struct WorkerConfig {
    /// The CPU it is bound to; none: any.
    pub cpu: Option<usize>,
    /// Lock the thread in (`sandbox`) before it serves.
    pub lock_in: bool,
}

/// The control thread's end of a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    sender: Sender<ToWorker>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Sends a message and wakes the worker. Never blocks; a worker never goes away before
    /// [`ToWorker::End`].
    pub fn send(&self, message: ToWorker) {
        if self.sender.send(message).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    /// Ends the worker and waits for it: until nothing is in flight.
    pub fn end(mut self) {
        self.send(ToWorker::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the workers say, for the control thread's event loop.
#[derive(Debug)]
pub struct Replies {
    receiver: Receiver<FromWorker>,
    event: Arc<EventFd>,
}

impl AsFd for Replies {
    /// Readable when there is something to receive.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Replies {
    /// The next message; none: wait until the descriptor is readable.
    pub fn next(&self) -> Option<FromWorker> {
        if let Ok(message) = self.receiver.try_recv() {
            return Some(message);
        }
        // Clear, then look again: a message that came in between has made it readable anew.
        let _ = self.event.read();
        self.receiver.try_recv().ok()
    }
}
