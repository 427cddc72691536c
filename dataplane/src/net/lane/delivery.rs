//! The way into a card's receive queues.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::USED_AHEAD;
use super::mirrors::Mirrors;
use crate::net::frame::Frame;
use crate::net::receive::{Delivered, Refused, Scratch, deliver};
use crate::net::{MAX_QUEUE_PAIRS, NetDevice};
use crate::port::mirror::pcapng::Direction;
use crate::port::{DropReason, Nic, Sink};
use crate::qos::{Gate, Moment};
use crate::virtqueue::RingError;
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
    fn choose(&self, hash: u32) -> Option<u32> {
        let pair = match self.pairs[..] {
            [] => return None,
            [only] => only,
            _ => self.spread(hash),
        };
        self.queues.get(usize::from(pair)).copied()
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
    #[inline]
    fn note(&mut self, hash: u32, pair: u16) {
        if self.pairs.len() > 1
            && let Some(flow) = self.flows.get_mut(hash as usize % FLOWS)
        {
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
    /// A card's guest sent a flow with this pair.
    #[inline]
    pub(super) fn note(&mut self, card: Nic, hash: u32, pair: u16) {
        if let Some(inbox) = self
            .inboxes
            .get_mut(usize::from(card.0))
            .and_then(Option::as_mut)
        {
            inbox.note(hash, pair);
        }
    }
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
        let number = inbox
            .choose(frame.info.hash)
            .filter(|_| inbox.device.is_up());
        let Some(number) = number else {
            return Err(inbox.lost(DropReason::LinkDown));
        };
        let queue = self
            .queues
            .get_mut(number as usize)
            .and_then(Option::as_mut);
        let Some(queue) = queue else {
            return Err(inbox.lost(DropReason::LinkDown));
        };
        let Kind::Net(lane) = &mut queue.kind else {
            return Err(DropReason::NoPort);
        };
        if !std::mem::replace(&mut lane.touched, true) {
            queue.ring.disarm();
            queue.ring.announce_used_of(USED_AHEAD);
            self.touched.push(number);
        }
        let limited = Gate::is_limited(inbox.device.rx_qos());
        let now = limited.then(Moment::now);
        if let Some(now) = now
            && inbox.gate.ask(inbox.device.rx_qos(), now).is_none()
        {
            lane.tally.dropped(DropReason::Limited);
            return Err(DropReason::Limited);
        }
        lane.announce(&mut queue.ring);
        let mut delivered = Delivered::default();
        let (ring, receiver) = (&mut queue.ring, lane.receiver);
        let result = deliver(ring, receiver, self.scratch, frame, &mut delivered);
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
}
