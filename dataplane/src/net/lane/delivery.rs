//! The way into a card's receive queues.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::mirrors::Mirrors;
use super::{Lane, USED_AHEAD};
use crate::net::frame::Frame;
use crate::net::receive::{Delivered, Refused, Scratch, deliver, deliver_usual};
use crate::net::{MAX_QUEUE_PAIRS, NetDevice};
use crate::port::mirror::pcapng::Direction;
use crate::port::{DropReason, Nic, Sink};
use crate::qos::{Gate, Moment};
use crate::virtqueue::{RingError, Virtqueue};
use crate::worker::queue::{Kind, Queue};

/// Flows whose queue pairs are remembered, by the low bits of their hashes.
const FLOWS: usize = 256;
/// No queue.
pub(super) const NOBODY: u32 = u32::MAX;

/// Where frames for a card go.
#[derive(Debug)]
pub(super) struct Inbox {
    device: Arc<NetDevice>,
    gate: Gate,
    /// Numbers of the queues that receive, by pair; [`NOBODY`]: that pair's does not.
    queues: [u32; MAX_QUEUE_PAIRS as usize],
    /// Pairs whose queues receive.
    pairs: Vec<u16>,
    /// The pair with which the guest sent a flow last: what answers comes with the same (virtio 1.2, 5.1.6.5.5).
    flows: Box<[u8; FLOWS]>,
}

/// The pair of a flow that the guest never sent.
const UNKNOWN: u8 = u8::MAX;

impl Inbox {
    pub(super) fn new(device: Arc<NetDevice>) -> Self {
        Self {
            device,
            gate: Gate::default(),
            queues: [NOBODY; MAX_QUEUE_PAIRS as usize],
            pairs: Vec::with_capacity(usize::from(MAX_QUEUE_PAIRS)),
            flows: Box::new([UNKNOWN; FLOWS]),
        }
    }

    /// None of its queues receives.
    pub(super) fn clear(&mut self) {
        self.queues = [NOBODY; MAX_QUEUE_PAIRS as usize];
        self.pairs.clear();
    }

    /// The queue with this number receives, of this pair.
    pub(super) fn add(&mut self, pair: u16, number: u32) {
        if let Some(place) = self.queues.get_mut(usize::from(pair)) {
            *place = number;
            self.pairs.push(pair);
        }
    }

    /// The queue for a flow.
    #[inline]
    fn choose(&self, frame: &Frame<'_>) -> Option<u32> {
        let pair = match self.pairs[..] {
            [] => return None,
            [only] => only,
            _ => self.spread(frame.info().hash),
        };
        self.queues.get(usize::from(pair)).copied()
    }

    /// The queue for all frames, of a card without limits that has one only.
    #[inline]
    fn only(&self) -> Option<u32> {
        match self.pairs[..] {
            [only] if self.device.is_up() && !Gate::is_limited(self.device.rx_qos()) => {
                self.queues.get(usize::from(only)).copied()
            }
            _ => None,
        }
    }

    fn spread(&self, hash: u32) -> u16 {
        let known = self.flows.get(hash as usize % FLOWS).copied();
        let known = u16::from(known.unwrap_or(UNKNOWN));
        let receives = |pair: &u16| {
            let number = self.queues.get(usize::from(*pair));
            number.is_some_and(|number| *number != NOBODY)
        };
        if receives(&known) {
            return known;
        }
        let at = (u64::from(hash) * self.pairs.len() as u64) >> 32;
        let at = usize::try_from(at).unwrap_or(0);
        self.pairs.get(at).copied().unwrap_or(0)
    }

    /// The guest sent a flow with this pair.
    fn note(&mut self, hash: u32, pair: u16) {
        if let Some(flow) = self.flows.get_mut(hash as usize % FLOWS) {
            *flow = u8::try_from(pair).unwrap_or(UNKNOWN);
        }
    }

    /// Counts a frame that none of its queues can be charged with.
    #[cold]
    fn lost(&self, reason: DropReason) -> DropReason {
        if let Some(first) = self.device.metrics.queue(0) {
            first.dropped(reason);
        }
        reason
    }
}

/// Everything that is needed to put a frame into a queue of this worker.
#[derive(Debug)]
pub struct Delivery<'a> {
    pub(super) queues: &'a mut [Option<Queue>],
    pub(super) inboxes: &'a mut [Option<Inbox>],
    pub(super) mirrors: &'a mut Mirrors,
    pub(super) scratch: &'a mut Scratch,
    /// Queues that got something, to be published at the end of the turn.
    pub(super) touched: &'a mut Vec<u32>,
    /// Queues whose drivers broke them.
    pub(super) broken: &'a mut Vec<(u32, RingError)>,
}

impl Delivery<'_> {
    /// Whether it matters with which pair a card's guest sends.
    #[inline]
    pub(super) fn has_pairs(&self, card: Nic) -> bool {
        let inbox = self.inboxes.get(usize::from(card.0));
        let inbox = inbox.and_then(Option::as_ref);
        inbox.is_some_and(|inbox| inbox.pairs.len() > 1)
    }

    /// A card's guest sent a flow with this pair.
    pub(super) fn note(&mut self, card: Nic, hash: u32, pair: u16) {
        let inbox = self.inboxes.get_mut(usize::from(card.0));
        if let Some(inbox) = inbox.and_then(Option::as_mut) {
            inbox.note(hash, pair);
        }
    }

    /// Copies frames from the front of `frames` into a card's only queue, as far as that is quickly done: how many.
    #[inline]
    fn deliver_usual<'a>(
        &mut self,
        to: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
    ) -> usize {
        if self.mirrors.any() {
            return 0;
        }
        let inbox = self.inboxes.get(usize::from(to.0));
        let only = inbox.and_then(Option::as_ref).and_then(Inbox::only);
        let opened = only.and_then(|number| open(self.queues, self.touched, number));
        let Some((lane, ring)) = opened else {
            return 0;
        };
        let mut delivered = Delivered::default();
        let done = deliver_usual(ring, lane.receiver, self.scratch, frames, &mut delivered);
        lane.tally.packets += delivered.packets;
        lane.tally.bytes += delivered.bytes;
        done
    }
}

/// A queue that is about to get something; none if it is no card's.
#[inline]
fn open<'a>(
    queues: &'a mut [Option<Queue>],
    touched: &mut Vec<u32>,
    number: u32,
) -> Option<(&'a mut Lane, &'a mut Virtqueue)> {
    let queue = queues.get_mut(number as usize)?.as_mut()?;
    let Kind::Net(lane) = &mut queue.kind else {
        return None;
    };
    if !std::mem::replace(&mut lane.touched, true) {
        queue.ring.disarm();
        queue.ring.announce_used_of(USED_AHEAD);
        touched.push(number);
    }
    Some((lane, &mut queue.ring))
}

impl Sink for Delivery<'_> {
    #[inline]
    fn deliver(&mut self, to: Nic, frame: &Frame<'_>) -> Result<(), DropReason> {
        let inbox = self
            .inboxes
            .get_mut(usize::from(to.0))
            .and_then(Option::as_mut);
        let Some(inbox) = inbox else {
            return Err(DropReason::NoPort);
        };
        let number = inbox.choose(frame).filter(|_| inbox.device.is_up());
        let Some(number) = number else {
            return Err(inbox.lost(DropReason::LinkDown));
        };
        let Some((lane, ring)) = open(self.queues, self.touched, number) else {
            return Err(inbox.lost(DropReason::LinkDown));
        };
        let limited = Gate::is_limited(inbox.device.rx_qos());
        let now = limited.then(Moment::now);
        if let Some(now) = now
            && inbox.gate.ask(inbox.device.rx_qos(), now).is_none()
        {
            lane.tally.dropped(DropReason::Limited);
            return Err(DropReason::Limited);
        }
        lane.announce(ring);
        let mut delivered = Delivered::default();
        let result = deliver(ring, lane.receiver, self.scratch, frame, &mut delivered);
        lane.tally.packets += delivered.packets;
        lane.tally.bytes += delivered.bytes;
        if let Some(now) = now {
            let qos = inbox.device.rx_qos();
            inbox
                .gate
                .passed(qos, delivered.packets, delivered.bytes, now);
        }
        match result {
            Ok(()) => {
                self.mirrors.record(to, Direction::Inbound, frame);
                Ok(())
            }
            Err(Refused::Dropped(reason)) => {
                lane.tally.dropped(reason);
                Err(reason)
            }
            Err(Refused::Broken(error)) => {
                lane.tally.dropped(DropReason::BadBuffers);
                self.broken.push((number, error));
                Err(DropReason::BadBuffers)
            }
        }
    }

    #[inline]
    fn deliver_all<'a>(
        &mut self,
        to: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
    ) -> usize {
        let (mut left, mut done) = (frames, 0);
        loop {
            let quickly = self.deliver_usual(to, left.clone());
            if quickly > 0 {
                done += quickly;
                left.nth(quickly - 1);
                if left.clone().next().is_none() {
                    return done;
                }
                continue;
            }
            match left.next() {
                Some(frame) if self.deliver(to, &frame).is_ok() => done += 1,
                _ => return done,
            }
        }
    }
}
