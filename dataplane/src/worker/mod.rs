//! Workers: one thread on one core each, which owns its queues and one io_uring.

pub(crate) mod batch;
pub mod clock;
pub mod frame_buffer;
pub mod load;
pub mod message;
mod polling;
pub(crate) mod queue;
pub mod ring;
mod run;
pub mod staging;
mod turns;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;

use crate::blk::pipeline::Pipeline;
use crate::fence::Fence;
use load::{Load, Meter};
use message::{FromWorker, ToWorker};
use ring::Ring;
use run::{Ends, Worker};
use staging::Staging;

/// How a worker runs.
#[derive(Debug, Clone, Default)]
pub struct WorkerConfig {
    /// The CPU it is bound to; none: any.
    pub cpu: Option<usize>,
    /// Lock the thread in (`sandbox`) before it serves.
    pub lock_in: bool,
    /// What its ring keeps, to tell a successor of the end of its last request.
    pub fence: Option<Fence>,
}

/// A way to a worker.
#[derive(Debug, Clone)]
pub struct Mailbox {
    sender: Sender<ToWorker>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// Sends a message and wakes the worker. Never blocks; a worker never goes away before
    /// [`ToWorker::End`].
    pub fn send(&self, message: ToWorker) {
        if self.sender.send(message).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// The control thread's end of a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    mailbox: Mailbox,
    load: Arc<Load>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// As [`Mailbox::send`].
    pub fn send(&self, message: ToWorker) {
        self.mailbox.send(message);
    }

    /// Another way to it.
    #[must_use]
    pub fn mailbox(&self) -> Mailbox {
        self.mailbox.clone()
    }

    /// How busy it is.
    #[must_use]
    pub fn load(&self) -> &Load {
        &self.load
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
    sender: ReplySender,
    event: Arc<EventFd>,
}

/// How something is said to the control thread.
#[derive(Debug, Clone)]
pub struct ReplySender {
    sender: Sender<FromWorker>,
    event: Arc<EventFd>,
}

impl ReplySender {
    /// Sends a message and wakes the control thread.
    pub fn send(&self, message: FromWorker) {
        if self.sender.send(message).is_ok() {
            let _ = self.event.write(1);
        }
    }
}

impl AsFd for Replies {
    /// Readable when there is something to receive.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Replies {
    /// Another way to say something to whoever has these.
    #[must_use]
    pub fn sender(&self) -> ReplySender {
        self.sender.clone()
    }

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

pub(crate) fn event() -> io::Result<Arc<EventFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(EventFd::from_flags(flags)?))
}

/// Starts a worker for each configuration; returns once each has its ring and is locked in.
///
/// # Errors
/// What stopped the first that could not start; the others are ended.
pub fn start(configs: &[WorkerConfig]) -> io::Result<(Vec<WorkerHandle>, Replies)> {
    let (replies, receiver) = crossbeam_channel::unbounded();
    let event_of_replies = event()?;
    let mut workers = Vec::with_capacity(configs.len());
    for (index, config) in configs.iter().enumerate() {
        let started = start_one(index, config.clone(), &replies, &event_of_replies);
        match started {
            Ok(handle) => workers.push(handle),
            Err(error) => {
                workers.into_iter().for_each(WorkerHandle::end);
                return Err(error);
            }
        }
    }
    let sender = ReplySender {
        sender: replies,
        event: Arc::clone(&event_of_replies),
    };
    let replies = Replies {
        receiver,
        sender,
        event: event_of_replies,
    };
    Ok((workers, replies))
}

fn start_one(
    index: usize,
    config: WorkerConfig,
    replies: &Sender<FromWorker>,
    reply_event: &Arc<EventFd>,
) -> io::Result<WorkerHandle> {
    let (sender, receiver) = crossbeam_channel::unbounded();
    let wake = event()?;
    let (ready, is_ready) = crossbeam_channel::bounded::<io::Result<()>>(1);
    let load = Arc::new(Load::default());
    let ends = Ends {
        receiver,
        replies: replies.clone(),
        reply_event: Arc::clone(reply_event),
        meter: Meter::new(Arc::clone(&load)),
    };
    let wake_in = Arc::clone(&wake);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || match prepare(index, config, &wake_in, ends) {
            Ok(worker) => {
                let _ = ready.send(Ok(()));
                worker.run();
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        })?;
    is_ready
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("a worker thread ended at its start")))?;
    Ok(WorkerHandle {
        mailbox: Mailbox { sender, wake },
        load,
        thread: Some(thread),
    })
}

/// On the worker's own thread: everything that needs system calls it will not have later. The fence is the
/// ring's alone afterwards.
fn prepare(index: usize, config: WorkerConfig, wake: &EventFd, ends: Ends) -> io::Result<Worker> {
    if let Some(cpu) = config.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let staging = Staging::new()?;
    let mut ring = Ring::new(&staging)?;
    if let Some(fence) = config.fence {
        ring.keep_fence(fence.as_fd())?;
    }
    let worker = Worker::new(index, Pipeline::new(ring, staging), wake, ends)?;
    if config.lock_in {
        crate::sandbox::lock_worker_thread().map_err(io::Error::other)?;
    }
    Ok(worker)
}
