//! A worker's loop: messages, queues, ring, completions; then look again, or sleep.
//!
//! One turn serves every queue for a bounded number of requests, submits what they need once,
//! takes completions in, and publishes what ended, queue by queue.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod completions;
mod events;
mod flush;
mod freeze;
mod messages;
mod moving;
mod net;
mod recovery;
mod serve;
mod start;
mod stop;
mod turn;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::batch::Batch;
use super::load::Meter;
use super::message::{DeviceId, FromWorker, QueueId, ToWorker};
use super::polling::{Next, Polling};
use super::queue::Queue;
use super::ring::FixedFile;
use super::turns::Turns;
use crate::blk::pipeline::{Local, Pipeline, TOKEN_BITS};
use crate::crash_point;
use crate::hand::{self, Hand};
use crate::net::lane::Cards;
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
    fn queue(&mut self, number: u32) -> Option<&mut Queue> {
        self.queues.get_mut(number as usize)?.as_mut()
    }

    /// A disk as this worker has it.
    fn local(&self, id: DeviceId) -> Option<&Rc<Local>> {
        match self.devices.get(&id)? {
            Served::Blk(local) => Some(local),
            Served::Net(_) => None,
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
}
