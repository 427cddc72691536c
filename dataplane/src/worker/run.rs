//! A worker's loop: messages, queues, ring, completions; then look again, or sleep.
//!
//! One turn serves every queue for a bounded number of requests, submits what they need once,
//! takes completions in, and publishes what ended, queue by queue.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::message::{DeviceId, FromWorker, QueueId, QueueStart, ToWorker};
use super::polling::{Next, Polling};
use super::queue::{Kick, Queue, signal};
use super::ring::{Action, Buffer, Completion, FixedFile, Transfer};
use crate::blk::BlkDevice;
use crate::blk::pipeline::{Begun, Local, Outcome, Pipeline, Start, TOKEN_BITS};
use crate::blk::request::parse;
use crate::storage::StorageSpec;
use crate::virtqueue::{Chain, RingError};

/// Requests taken from a queue before the next queue has its turn, and what was used is published:
/// small enough that a fast driver refills the ring while the rest is served.
const REQUESTS_PER_TURN: usize = 16;
/// How long a queue without a kick may wait for its worker.
const UNKICKED_SLEEP: Duration = Duration::from_micros(100);

/// Tokens of waits for a kick: queue number and serial below.
const KICK: u64 = 1 << TOKEN_BITS;
/// Token of the wait for a message.
const WAKE: u64 = 2 << TOKEN_BITS;

/// Everything a worker thread owns.
#[derive(Debug)]
pub struct Worker {
    /// Its number.
    index: usize,
    pipeline: Pipeline,
    /// The wake-up of [`super::WorkerHandle`], and whether it is waited for.
    wake: FixedFile,
    wake_is_awaited: bool,
    receiver: Receiver<ToWorker>,
    replies: Sender<FromWorker>,
    reply_event: Arc<EventFd>,
    devices: HashMap<DeviceId, Rc<Local>>,
    /// By number; a number is used again once its queue has nothing in flight.
    queues: Vec<Option<Queue>>,
    numbers: HashMap<QueueId, u32>,
    /// Numbers of queues with something to publish.
    touched: Vec<u32>,
    /// Where a chain is put together.
    chain: Chain,
    polling: Polling,
    /// Serial of the last wait for a kick.
    serial: u32,
    ending: bool,
}

/// The channel's ends that a worker has.
#[derive(Debug)]
pub struct Ends {
    /// Messages in.
    pub receiver: Receiver<ToWorker>,
    /// Messages out.
    pub replies: Sender<FromWorker>,
    /// Signalled after a message out.
    pub reply_event: Arc<EventFd>,
}

impl Worker {
    /// A worker without devices. `wake` is the eventfd that announces messages.
    ///
    /// # Errors
    /// When the ring does not take the eventfd.
    pub fn new(
        index: usize,
        mut pipeline: Pipeline,
        wake: &EventFd,
        ends: Ends,
    ) -> std::io::Result<Self> {
        let wake = pipeline.ring.register_file(wake.as_fd())?;
        Ok(Self {
            index,
            pipeline,
            wake,
            wake_is_awaited: false,
            receiver: ends.receiver,
            replies: ends.replies,
            reply_event: ends.reply_event,
            devices: HashMap::new(),
            queues: Vec::new(),
            numbers: HashMap::new(),
            touched: Vec::new(),
            chain: Chain::with_capacity(128),
            polling: Polling::default(),
            serial: 0,
            ending: false,
        })
    }

    /// Serves until [`ToWorker::End`], then until nothing is in flight.
    pub fn run(mut self) {
        loop {
            let mut busy = self.take_messages();
            busy |= self.serve_queues();
            self.pipeline.ring.turn();
            busy |= self.take_completions();
            if busy {
                self.polling.busy();
            } else if self.ending && self.numbers.is_empty() {
                return;
            } else if self.polling.idle() == Next::Sleep {
                self.sleep();
            }
        }
    }

    fn reply(&self, message: FromWorker) {
        if self.replies.send(message).is_ok() {
            let _ = self.reply_event.write(1);
        }
    }

    #[inline]
    fn take_messages(&mut self) -> bool {
        if self.receiver.is_empty() {
            return false;
        }
        while let Ok(message) = self.receiver.try_recv() {
            self.take_message(message);
        }
        true
    }

    fn take_message(&mut self, message: ToWorker) {
        match message {
            ToWorker::Attach { id, device } => self.attach(id, device),
            ToWorker::Detach { id } => self.detach(id),
            ToWorker::Start(start) => self.start(*start),
            ToWorker::Stop { queue } => self.stop(queue),
            ToWorker::SetMemory { queue, memory } => {
                if let Some(number) = self.numbers.get(&queue).copied() {
                    let set = self.queue(number).map(|q| q.ring.set_memory(&memory));
                    if let Some(Err(error)) = set {
                        self.retire(number, error);
                    }
                }
                self.reply(FromWorker::MemorySet { queue });
            }
            ToWorker::SetEnabled { queue, enabled } => self.change(queue, |q| q.enabled = enabled),
            ToWorker::SetCall { queue, fd } => self.change(queue, |q| q.call = fd),
            ToWorker::SetError { queue, fd } => self.change(queue, |q| q.error = fd),
            ToWorker::SetKick { queue, fd } => {
                self.set_kick(queue, fd);
                self.reply(FromWorker::Changed { queue });
            }
            ToWorker::End => {
                self.ending = true;
                let all: Vec<QueueId> = self.numbers.keys().copied().collect();
                for queue in all {
                    self.stop(queue);
                }
            }
        }
    }

    #[inline]
    fn queue(&mut self, number: u32) -> Option<&mut Queue> {
        self.queues.get_mut(number as usize)?.as_mut()
    }

    fn change(&mut self, id: QueueId, f: impl FnOnce(&mut Queue)) {
        if let Some(number) = self.numbers.get(&id).copied()
            && let Some(queue) = self.queue(number)
        {
            f(queue);
        }
        self.reply(FromWorker::Changed { queue: id });
    }

    fn attach(&mut self, id: DeviceId, device: Arc<BlkDevice>) {
        let result = match &device.storage {
            StorageSpec::File(file) => self
                .pipeline
                .ring
                .register_file(file.as_fd())
                .map(Some)
                .map_err(|e| format!("the worker can't take the volume's file: {e}")),
            StorageSpec::Null | StorageSpec::Ram(_) => Ok(None),
        };
        let result = result.map(|file| {
            self.devices.insert(id, Rc::new(Local { device, file }));
        });
        self.reply(FromWorker::Attached {
            id,
            worker: self.index,
            result,
        });
    }

    fn detach(&mut self, id: DeviceId) {
        let file = self.devices.remove(&id).and_then(|local| local.file);
        if let Some(file) = file {
            self.pipeline.ring.forget_file(file);
        }
        self.reply(FromWorker::Detached {
            id,
            worker: self.index,
        });
    }

    fn start(&mut self, mut start: QueueStart) {
        let id = start.queue;
        let kick = start.kick.take();
        let started = match (self.devices.get(&id.device), self.numbers.get(&id)) {
            (Some(local), None) => {
                Queue::new(start, Rc::clone(local)).map_err(|error| error.to_string())
            }
            (None, _) => Err("the device is not attached".to_owned()),
            (_, Some(_)) => Err("the queue is running".to_owned()),
        };
        let queue = match started {
            Ok(queue) => queue,
            Err(reason) => return self.reply(FromWorker::StartFailed { queue: id, reason }),
        };
        let number = self.place(queue);
        self.numbers.insert(id, number);
        self.set_kick(id, kick);
        self.reply(FromWorker::Started { queue: id });
    }

    /// Puts a queue under the lowest free number.
    fn place(&mut self, queue: Queue) -> u32 {
        let free = self.queues.iter().position(Option::is_none);
        let number = free.unwrap_or(self.queues.len());
        if free.is_none() {
            self.queues.push(None);
        }
        if let Some(place) = self.queues.get_mut(number) {
            *place = Some(queue);
        }
        u32::try_from(number).unwrap_or(u32::MAX)
    }

    fn set_kick(&mut self, id: QueueId, fd: Option<OwnedFd>) {
        let Some(number) = self.numbers.get(&id).copied() else {
            return;
        };
        self.drop_kick(number);
        let registered = fd.map(|fd| self.pipeline.ring.register_file(fd.as_fd()));
        let file = match registered {
            None => return,
            Some(Ok(file)) => file,
            Some(Err(error)) => {
                tracing::warn!("a kick can't be waited for, its queue is polled: {error}");
                return;
            }
        };
        if let Some(queue) = self.queue(number) {
            queue.kick = Some(Kick { file, wait: None });
        }
    }

    fn drop_kick(&mut self, number: u32) {
        let Some(kick) = self.queue(number).and_then(|queue| queue.kick.take()) else {
            return;
        };
        if let Some((wait, _)) = kick.wait {
            self.pipeline.ring.cancel(wait);
        }
        self.pipeline.ring.forget_file(kick.file);
    }

    fn stop(&mut self, id: QueueId) {
        let Some(number) = self.numbers.get(&id).copied() else {
            return self.reply(FromWorker::Stopped {
                queue: id,
                next_avail: None,
            });
        };
        if let Some(queue) = self.queue(number) {
            queue.stopping = true;
        }
        self.give_up_if_drained(number);
    }

    /// Gives a stopping queue up once nothing of it is in flight.
    fn give_up_if_drained(&mut self, number: u32) {
        let drained = |q: &mut Queue| q.stopping && q.ring.in_flight() == 0;
        if !self.queue(number).is_some_and(drained) {
            return;
        }
        self.drop_kick(number);
        let Some(mut queue) = self.queues.get_mut(number as usize).and_then(Option::take) else {
            return;
        };
        queue.publish();
        self.numbers.remove(&queue.id);
        self.reply(FromWorker::Stopped {
            queue: queue.id,
            next_avail: Some(queue.ring.next_avail()),
        });
    }

    fn retire(&mut self, number: u32, error: RingError) {
        let Some(queue) = self.queue(number).filter(|queue| !queue.retired) else {
            return;
        };
        queue.retired = true;
        if let Some(event) = &queue.error {
            signal(event);
        }
        let retired = FromWorker::Retired {
            queue: queue.id,
            reason: error.to_string(),
        };
        self.reply(retired);
    }

    #[inline]
    fn serve_queues(&mut self) -> bool {
        let mut busy = false;
        for number in 0..self.queues.len() {
            let Some(queue) = self
                .queues
                .get_mut(number)
                .and_then(Option::as_mut)
                .filter(|queue| queue.is_served())
            else {
                continue;
            };
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let (taken, broken) = serve(queue, number, &mut self.pipeline, &mut self.chain);
            busy |= taken > 0;
            if let Some(error) = broken {
                self.retire(number, error);
            } else if taken > 0 {
                self.publish(number);
            }
        }
        busy
    }

    /// Publishes what ended of a queue, unless its memory went away: then what ended did not
    /// end in the guest's memory.
    #[inline]
    fn publish(&mut self, number: u32) {
        let Some(queue) = self.queue(number) else {
            return;
        };
        if queue.ring.memory().is_lost() {
            return self.retire(number, RingError::MemoryLost);
        }
        queue.publish();
    }

    #[inline]
    fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Some(completion) = self.pipeline.ring.reap() {
            any = true;
            self.take_completion(completion);
        }
        if self.pipeline.has_waiting() {
            let (queues, touched) = (&mut self.queues, &mut self.touched);
            self.pipeline
                .resume(|landed| note(queues, touched, landed.queue, landed.head, landed.outcome));
        }
        for at in 0..self.touched.len() {
            let Some(number) = self.touched.get(at).copied() else {
                continue;
            };
            self.publish(number);
            self.give_up_if_drained(number);
        }
        self.touched.clear();
        any
    }

    #[inline]
    fn take_completion(&mut self, completion: Completion) {
        match completion.token >> TOKEN_BITS {
            0 => {
                if let Some(landed) = self.pipeline.land(completion) {
                    let (queues, touched) = (&mut self.queues, &mut self.touched);
                    note(queues, touched, landed.queue, landed.head, landed.outcome);
                }
            }
            1 => {
                let number = u32::try_from((completion.token & !KICK) >> 32).unwrap_or(u32::MAX);
                let serial = u32::try_from(completion.token & 0xffff_ffff).unwrap_or(0);
                if let Some(kick) = self.queue(number).and_then(|q| q.kick.as_mut())
                    && kick.wait.is_some_and(|(_, of)| of == serial)
                {
                    kick.wait = None;
                }
            }
            _ => self.wake_is_awaited = false,
        }
    }

    /// Arms every kick and sleeps until one comes, a transfer ends or a message is there.
    fn sleep(&mut self) {
        let mut unkicked = false;
        for number in 0..self.queues.len() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            match self.arm(number) {
                Armed::Idle => {}
                Armed::Unkicked => unkicked = true,
                Armed::Work => return self.polling.busy(),
            }
        }
        if !self.wake_is_awaited {
            self.wake_is_awaited = self.await_event(WAKE, self.wake).is_some();
        }
        // A message that came before the wait is in the channel; one that comes later wakes.
        if self.receiver.is_empty() && self.wake_is_awaited {
            let since = Instant::now();
            self.pipeline.ring.wait(unkicked.then_some(UNKICKED_SLEEP));
            self.polling.slept(since.elapsed());
        }
        for queue in self.queues.iter_mut().flatten() {
            queue.ring.disarm();
        }
    }

    fn arm(&mut self, number: u32) -> Armed {
        let Some(queue) = self.queue(number).filter(|queue| queue.is_served()) else {
            return Armed::Idle;
        };
        match queue.ring.arm() {
            Ok(true) => return Armed::Work,
            // The zeroes in the place of a ring that went away can look like one without requests.
            Ok(false) if queue.ring.memory().is_lost() => {
                self.retire(number, RingError::MemoryLost);
                return Armed::Work;
            }
            Ok(false) => {}
            Err(error) => {
                self.retire(number, error);
                return Armed::Work;
            }
        }
        let Some((file, wait)) = queue.kick.as_ref().map(|kick| (kick.file, kick.wait)) else {
            return Armed::Unkicked;
        };
        if wait.is_some() {
            return Armed::Idle;
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let token = KICK | (u64::from(number) << 32) | u64::from(serial);
        let Some(entry) = self.await_event(token, file) else {
            return Armed::Unkicked;
        };
        if let Some(kick) = self.queue(number).and_then(|queue| queue.kick.as_mut()) {
            kick.wait = Some((entry, serial));
        }
        Armed::Idle
    }

    fn await_event(&mut self, token: u64, file: FixedFile) -> Option<super::ring::EntryId> {
        let transfer = Transfer {
            action: Action::Event,
            file,
            offset_bytes: 0,
            buffer: Buffer::None,
        };
        self.pipeline.ring.push(token, transfer).ok()
    }
}

/// How a queue goes to sleep.
enum Armed {
    /// Its kick is waited for, or it is not served.
    Idle,
    /// It has no kick.
    Unkicked,
    /// There is something to do first.
    Work,
}

/// Notes that a request of a queue ended.
fn note(
    queues: &mut [Option<Queue>],
    touched: &mut Vec<u32>,
    number: u32,
    head: u16,
    outcome: Outcome,
) {
    if let Some(queue) = queues.get_mut(number as usize).and_then(Option::as_mut) {
        queue.ended(head, outcome);
        if touched.last() != Some(&number) && !touched.contains(&number) {
            touched.push(number);
        }
    }
}

/// Takes some requests from a queue: how many, and how its driver broke it, if it did.
#[inline]
fn serve(
    queue: &mut Queue,
    number: u32,
    pipeline: &mut Pipeline,
    chain: &mut Chain,
) -> (usize, Option<RingError>) {
    queue.ring.disarm();
    for taken in 0..REQUESTS_PER_TURN {
        if !pipeline.has_room() {
            return (taken, None);
        }
        let head = match queue.ring.pop(chain) {
            Ok(Some(head)) => head,
            Ok(None) => return (taken, None),
            Err(error) => return (taken, Some(error)),
        };
        let parsed = match parse(chain, &queue.local.device.geometry, queue.flush) {
            Ok(parsed) => parsed,
            Err(error) => {
                queue.ring.abandon(head);
                return (taken, Some(error));
            }
        };
        let begun = match parsed {
            Ok(operation) => {
                let start = Start {
                    queue: number,
                    head,
                    operation,
                    local: &queue.local,
                    durable: !queue.flush,
                };
                pipeline.begin(start, chain)
            }
            Err(status) => Begun::Done(Outcome::failed(status)),
        };
        if let Begun::Done(outcome) = begun {
            chain.writable.write_last_byte(outcome.status as u8);
            queue.ended(head, outcome);
        }
    }
    (REQUESTS_PER_TURN, None)
}
