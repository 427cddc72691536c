//! Workers: one thread on one core each, which owns its queues and one io_uring.

pub mod message;
mod polling;
mod queue;
pub mod ring;
mod run;
pub mod staging;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;

use crate::blk::pipeline::Pipeline;
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

fn event() -> io::Result<Arc<EventFd>> {
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
    let replies = Replies {
        receiver,
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
    let ends = Ends {
        receiver,
        replies: replies.clone(),
        reply_event: Arc::clone(reply_event),
    };
    let wake_in = Arc::clone(&wake);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || match prepare(index, &config, &wake_in, ends) {
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
        sender,
        wake,
        thread: Some(thread),
    })
}

/// On the worker's own thread: everything that needs system calls it will not have later.
fn prepare(index: usize, config: &WorkerConfig, wake: &EventFd, ends: Ends) -> io::Result<Worker> {
    if let Some(cpu) = config.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let staging = Staging::new()?;
    let ring = Ring::new(&staging)?;
    let worker = Worker::new(index, Pipeline::new(ring, staging), wake, ends)?;
    if config.lock_in {
        crate::sandbox::lock_worker_thread().map_err(io::Error::other)?;
    }
    Ok(worker)
}
