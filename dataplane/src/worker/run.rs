//! A worker's loop: messages, queues, ring, completions; then look again, or sleep.
//!
//! One turn serves every queue for a bounded number of requests, submits what they need once,
//! takes completions in, and publishes what ended, queue by queue.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod events;
mod flush;
mod freeze;
mod moving;
mod net;
mod recovery;
mod serve;
mod turn;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::batch::Batch;
use super::clock;
use super::load::Meter;
use super::message::{DeviceId, FromWorker, QueueId, QueueStart, ToWorker, ZoneChange};
use super::polling::{Next, Polling};
use super::queue::{Blk, Kind, Queue};
use super::ring::{Completion, FixedFile};
use super::turns::Turns;
use crate::blk::pipeline::{Local, Outcome, Pipeline, TOKEN_BITS};
use crate::crash_point;
use crate::device::Device;
use crate::hand::{self, Hand};
use crate::net::lane::Cards;
use crate::net::receive::MOST_OF_BUFFER;
use crate::virtqueue::RingError;
use flush::Flushes;

/// Tokens of waits for a kick: queue number and serial below.
const KICK: u64 = 1 << TOKEN_BITS;
/// Token of the wait for a message.
const WAKE: u64 = 2 << TOKEN_BITS;
/// Tokens of calls: queue number and serial below.
const CALL: u64 = 3 << TOKEN_BITS;
/// Token of signals that nobody waits for.
const ERROR: u64 = 4 << TOKEN_BITS;
/// Tokens of ports of network cards.
const PORT: u64 = 5 << TOKEN_BITS;

/// A device as a worker has it.
#[derive(Debug)]
enum Served {
    /// The way to a disk.
    Blk(Rc<Local>),
    /// The number of a network card.
    Net(u16),
}

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
    devices: HashMap<DeviceId, Served>,
    hands: HashMap<DeviceId, Hand>,
    cards: Cards,
    /// By number; a number is used again once its queue has nothing in flight.
    queues: Vec<Option<Queue>>,
    numbers: HashMap<QueueId, u32>,
    /// Where queues go on that came from another worker and could not be served here.
    unresumed: HashMap<QueueId, u32>,
    /// Numbers of queues with something to publish.
    touched: Vec<u32>,
    /// Where requests are taken to.
    batch: Batch,
    polling: Polling,
    turns: Turns,
    meter: Meter,
    /// Serial of the last wait for a kick, and of the last call.
    serial: u32,
    /// Calls are queued in the ring, to be submitted at once.
    called: bool,
    /// A call found no room in the ring.
    call_is_due: bool,
    flushes: Flushes,
    ending: bool,
    /// It is to let go of the fence once nothing is in flight.
    freezing: bool,
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
    /// How busy it is.
    pub meter: Meter,
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
            hands: HashMap::new(),
            cards: Cards::new(PORT),
            queues: Vec::new(),
            numbers: HashMap::new(),
            unresumed: HashMap::new(),
            touched: Vec::new(),
            batch: Batch::default(),
            polling: Polling::default(),
            turns: Turns::default(),
            meter: ends.meter,
            serial: 0,
            called: false,
            call_is_due: false,
            flushes: Flushes::default(),
            ending: false,
            freezing: false,
        })
    }

    /// Serves until [`ToWorker::End`], then until nothing is in flight.
    pub fn run(mut self) {
        loop {
            self.pipeline.turn();
            let mut busy = self.take_messages();
            busy |= self.serve_queues();
            if self.cards.hears() {
                busy |= self.hear();
            }
            self.pipeline.ring.turn();
            self.pipeline.turn();
            busy |= self.take_completions();
            if self.pipeline.is_look_due() {
                self.look_at_ages();
            }
            if self.freezing {
                self.freeze_if_idle();
            }
            if self.meter.turn(busy) {
                self.reply(FromWorker::Busy { worker: self.index });
            }
            if busy {
                self.polling.busy();
            } else if self.ending && self.is_done() {
                return;
            } else if self.polling.idle() == Next::Sleep {
                self.sleep();
            }
        }
    }

    /// Whether nothing is left of what it was told to end.
    fn is_done(&self) -> bool {
        self.numbers.is_empty() && self.flushes.is_empty() && !self.cards.is_closing()
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
            hand::take(self.hand_for(&message));
            self.take_message(message);
        }
        true
    }

    /// For whom a message is.
    fn hand_for(&self, message: &ToWorker) -> Hand {
        if let ToWorker::Attach { device, .. } = message {
            return device.hand().get();
        }
        let hand = message.device().and_then(|id| self.hands.get(&id));
        hand.copied().unwrap_or_default()
    }

    fn take_message(&mut self, message: ToWorker) {
        self.cards.look_again();
        if let Some(queue) = message.changes() {
            self.look_again(queue);
        }
        match message {
            ToWorker::Attach { id, device } => self.attach(id, device),
            ToWorker::Detach { id } => self.detach(id),
            ToWorker::GiveUp { id, wipe } => {
                if let Some(local) = self.local(id).map(Rc::clone) {
                    self.pipeline.give_up(&local, wipe);
                    self.leave_all_again(&local);
                }
            }
            ToWorker::Start(start) => self.start(*start),
            ToWorker::Finish { queue } => self.finish(queue),
            ToWorker::Stop { queue } => self.stop(queue),
            ToWorker::Move { queue } => self.begin_move(queue),
            ToWorker::Stay { queue } => self.stay(queue),
            ToWorker::Resume(moved) => self.resume(*moved),
            ToWorker::SetMemory { queue, memory } => {
                if let Some(number) = self.numbers.get(&queue).copied() {
                    let set = self.queue(number).map(|q| q.ring.set_memory(&memory));
                    if let Some(Err(error)) = set {
                        self.retire(number, error);
                    }
                    // Requests that ended at once hold on to the memory before.
                    self.batch.release();
                    self.cards.release();
                }
                self.reply(FromWorker::MemorySet { queue });
            }
            ToWorker::SetEnabled { queue, enabled } => self.change(queue, |q| q.enabled = enabled),
            ToWorker::SetLog { queue, log } => self.change(queue, |q| q.ring.set_log(log)),
            ToWorker::SetCall { queue, fd } => {
                self.set_call(queue, fd);
                self.reply(FromWorker::Changed { queue });
            }
            ToWorker::SetError { queue, fd } => self.change(queue, |q| q.error = fd),
            ToWorker::SetKick { queue, fd } => {
                self.set_kick(queue, fd);
                self.reply(FromWorker::Changed { queue });
            }
            ToWorker::Announce { queue } => self.announce(queue),
            ToWorker::LookAtMirror { id } => self.look_at_mirror(id),
            ToWorker::Flush { queue } => self.flush(queue),
            ToWorker::Freeze => self.freezing = true,
            ToWorker::Thaw { fence } => self.thaw(fence),
            ToWorker::Zone { id, change } => self.change_zone(id, change),
            // Not for a worker: the server gives them to the rekeyer.
            ToWorker::TakeVolume { .. } | ToWorker::LetGoOfVolume { .. } => {}
            ToWorker::End => {
                self.ending = true;
                let all: Vec<QueueId> = self.numbers.keys().copied().collect();
                for queue in all {
                    self.stop(queue);
                }
            }
        }
    }

    /// What the rekeyer says about a device. One that is gone has no zone.
    fn change_zone(&mut self, id: DeviceId, change: ZoneChange) {
        let Some(local) = self.local(id).map(Rc::clone) else {
            return;
        };
        match change {
            ZoneChange::Lock { zone, ticket } => self.pipeline.lock_zone(&local, zone, ticket),
            ZoneChange::Unlock { frontier_bytes } => {
                self.pipeline.unlock_zone(&local, frontier_bytes);
            }
            ZoneChange::Fail { zone } => self.pipeline.fail_zone(&local, zone),
            ZoneChange::Ciphers(ciphers) => self.pipeline.set_ciphers(&local, &ciphers),
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

    fn attach(&mut self, id: DeviceId, device: Device) {
        self.hands.insert(id, device.hand().get());
        let served = match device {
            Device::Blk(device) => Local::open(device, &mut self.pipeline.ring)
                .map(|local| Served::Blk(Rc::new(local)))
                .map_err(|e| format!("the worker can't take the volume's storage: {e}")),
            Device::Net(device) => self.cards.join(device).map(Served::Net),
        };
        let result = served.map(|served| {
            self.devices.insert(id, served);
        });
        self.reply(FromWorker::Attached {
            id,
            worker: self.index,
            result,
        });
    }

    fn detach(&mut self, id: DeviceId) {
        self.turns.leave(id);
        self.hands.remove(&id);
        match self.devices.remove(&id) {
            Some(Served::Blk(local)) => {
                self.pipeline.forget(self.index, &local);
                local.close(&mut self.pipeline.ring);
            }
            Some(Served::Net(card)) => self.cards.leave(card),
            None => {}
        }
        self.reply(FromWorker::Detached {
            id,
            worker: self.index,
        });
    }

    fn start(&mut self, mut start: QueueStart) {
        let id = start.queue;
        let (kick, call) = (start.kick.take(), start.call.take());
        let started = if self.numbers.contains_key(&id) {
            Err("the queue is running".to_owned())
        } else {
            let kind = self.kind_of(id, start.features);
            let queue = kind.and_then(|kind| Queue::new(start, kind).map_err(|e| e.to_string()));
            queue.and_then(|queue| self.connect(queue))
        };
        let queue = match started {
            Ok(queue) => queue,
            Err(reason) => return self.reply(FromWorker::StartFailed { queue: id, reason }),
        };
        recovery::report(&queue);
        let number = self.place(queue);
        self.numbers.insert(id, number);
        self.set_kick(id, kick);
        self.set_call(id, call);
        self.reply(FromWorker::Started { queue: id });
    }

    /// What a queue that comes is for.
    fn kind_of(&mut self, id: QueueId, features: u64) -> Result<Kind, String> {
        match self.devices.get(&id.device) {
            Some(Served::Blk(local)) if local.is_wiped() => Err("its keys were wiped".to_owned()),
            Some(Served::Blk(local)) => {
                self.pipeline.take_up(local);
                let local = Rc::clone(local);
                Ok(Kind::Blk(Blk::new(local, id.index, features)))
            }
            Some(Served::Net(card)) => {
                let lane = self.cards.lane(*card, id.index, features);
                let none = || "the card has no such queue".to_owned();
                lane.map(Kind::Net).ok_or_else(none)
            }
            None => Err("the device is not attached".to_owned()),
        }
    }

    /// Connects a card's queue with its port.
    fn connect(&mut self, mut queue: Queue) -> Result<Queue, String> {
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.come(lane, &mut self.pipeline.ring)?;
            if !lane.sends() {
                queue.ring.limit_chains(MOST_OF_BUFFER);
            }
        }
        Ok(queue)
    }

    /// A disk as this worker has it.
    fn local(&self, id: DeviceId) -> Option<&Rc<Local>> {
        match self.devices.get(&id)? {
            Served::Blk(local) => Some(local),
            Served::Net(_) => None,
        }
    }

    /// Puts a queue under the lowest free number.
    fn place(&mut self, mut queue: Queue) -> u32 {
        let device = queue.device();
        queue.seat = self.turns.seat(queue.id.device, &device);
        queue.hand = device.hand().get();
        let free = self.queues.iter().position(Option::is_none);
        let number = free.unwrap_or(self.queues.len());
        if free.is_none() {
            self.queues.push(None);
        }
        if let Some(place) = self.queues.get_mut(number) {
            *place = Some(queue);
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        self.poll(number);
        number
    }

    fn stop(&mut self, id: QueueId) {
        let Some(number) = self.numbers.get(&id).copied() else {
            let base = self.unresumed.remove(&id);
            let left = false;
            return self.reply(FromWorker::Stopped {
                queue: id,
                base,
                left,
            });
        };
        self.stay(id);
        if let Some(queue) = self.queue(number) {
            queue.stopping = true;
            if !queue.finishes {
                queue.leave_again();
            }
        }
        self.give_up_if_drained(number);
    }

    /// Gives a queue that stops or leaves up once nothing of it is in flight.
    fn give_up_if_drained(&mut self, number: u32) {
        let drained = |q: &&mut Queue| (q.stopping || q.leaving) && q.is_drained();
        let Some(queue) = self.queue(number).filter(drained) else {
            return;
        };
        if !queue.stopping {
            return self.hand_over(number);
        }
        self.publish(number);
        self.drop_kick(number);
        self.drop_call(number);
        let Some(mut queue) = self.queues.get_mut(number as usize).and_then(Option::take) else {
            return;
        };
        self.leave(number, &mut queue);
        self.reply(FromWorker::Stopped {
            queue: queue.id,
            base: Some(queue.ring.base()),
            left: queue.left,
        });
    }

    /// A queue is not here any more.
    fn leave(&mut self, number: u32, queue: &mut Queue) {
        self.numbers.remove(&queue.id);
        self.turns.unpoll(queue.seat, number);
        // It may hold on to the guest memory of requests that ended at once.
        self.batch.release();
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.go(lane, &mut self.pipeline.ring);
            self.cards.release();
        }
    }

    fn retire(&mut self, number: u32, error: RingError) {
        let queue = self
            .queues
            .get_mut(number as usize)
            .and_then(Option::as_mut);
        let Some(queue) = queue.filter(|queue| !queue.retired) else {
            return;
        };
        queue.retired = true;
        if let Kind::Net(lane) = &mut queue.kind {
            self.cards.go(lane, &mut self.pipeline.ring);
        }
        queue.leave_again();
        let leaving = std::mem::take(&mut queue.leaving);
        let event = queue.error.take();
        let id = queue.id;
        if let Some(event) = event {
            self.signal_error(&event);
        }
        self.reply(FromWorker::Retired {
            queue: id,
            reason: error.to_string(),
        });
        if leaving {
            self.reply(FromWorker::Stays { queue: id });
        }
    }

    /// Publishes what ended of a queue, unless its memory went away: then what ended did not
    /// end in the guest's memory.
    #[inline]
    fn publish(&mut self, number: u32) {
        let Some(queue) = self.queue(number) else {
            return;
        };
        hand::take(queue.hand);
        if queue.ring.is_lost() {
            return self.retire(number, RingError::MemoryLost);
        }
        if queue.publish() {
            crash_point!("publish.done");
            self.call(number);
        }
    }

    #[inline]
    fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Some(completion) = self.pipeline.ring.reap() {
            any |= self.take_completion(completion);
        }
        if self.pipeline.has_waiting() {
            let (queues, touched) = (&mut self.queues, &mut self.touched);
            any |= self
                .pipeline
                .resume(|landed| note(queues, touched, landed.queue, landed.head, landed.outcome));
        }
        for at in 0..self.touched.len() {
            let Some(number) = self.touched.get(at).copied() else {
                continue;
            };
            if number >= flush::FIRST {
                self.flushed(number);
                continue;
            }
            self.poll(number);
            self.publish(number);
            self.give_up_if_drained(number);
        }
        self.touched.clear();
        if self.pipeline.has_clearing() {
            self.pipeline.look_for_clear();
        }
        if !self.flushes.is_empty() {
            self.begin_flushes();
        }
        self.make_due_calls();
        // The driver waits for these.
        if std::mem::take(&mut self.called) {
            self.pipeline.ring.turn();
            crash_point!("call.made");
        }
        any
    }

    /// A transfer ended, and a request may have with it.
    #[inline]
    fn land(&mut self, completion: Completion) {
        // It may be decrypted now: that is its device's time, too, if there is one to be fair to.
        let charged = (self.turns.awake() > 1)
            .then(|| Some((self.pipeline.queue_of(completion.token)?, clock::now())))
            .flatten();
        if let Some(landed) = self.pipeline.land(completion) {
            crash_point!("complete.landed");
            let (queues, touched) = (&mut self.queues, &mut self.touched);
            note(queues, touched, landed.queue, landed.head, landed.outcome);
        }
        if let Some((number, since)) = charged
            && let Some(seat) = self.queue(number).map(|queue| queue.seat)
        {
            let ticks = clock::now().saturating_sub(since);
            self.turns.charge_more(seat, ticks);
        }
    }

    /// Whether it was a sign of work.
    #[inline]
    fn take_completion(&mut self, completion: Completion) -> bool {
        match completion.token >> TOKEN_BITS {
            0 => {
                crash_point!("complete.came");
                self.land(completion);
                return true;
            }
            1 => {
                self.kicked(completion.token);
                return true;
            }
            2 => {
                self.wake_is_awaited = false;
                return true;
            }
            3 => self.has_called(completion.token),
            5 => {
                self.port_landed(completion);
                return true;
            }
            _ => {}
        }
        false
    }

    /// Says which devices do better or worse than before: the control thread tells people.
    #[cold]
    fn look_at_ages(&mut self) {
        let (devices, replies) = (&self.devices, &self.replies);
        let mut any = false;
        self.pipeline.look_at_ages(self.index, |local| {
            let its = |of: &Served| matches!(of, Served::Blk(of) if Rc::ptr_eq(of, local));
            let known = devices.iter().find(|(_, of)| its(of));
            if let Some((id, _)) = known {
                any |= replies.send(FromWorker::Health { id: *id }).is_ok();
            }
        });
        if any {
            let _ = self.reply_event.write(1);
        }
    }
}

/// Notes that a request of a queue ended.
fn note(
    queues: &mut [Option<Queue>],
    touched: &mut Vec<u32>,
    number: u32,
    head: u16,
    outcome: Outcome,
) {
    let queue = queues.get_mut(number as usize).and_then(Option::as_mut);
    if let Some(queue) = queue {
        let Kind::Blk(blk) = &mut queue.kind else {
            return;
        };
        if blk.local.is_given_up() {
            queue.ring.abandon(head);
        } else {
            blk.ended(&mut queue.ring, head, outcome);
        }
    } else if number < flush::FIRST {
        return;
    }
    if touched.last() != Some(&number) && !touched.contains(&number) {
        touched.push(number);
    }
}
