//! Which cards are on a worker, with their queues and ports.
//!
//! A port is opened with the first queue that leads to it, and closed when the last has gone: while a worker serves
//! nothing of a card it has nothing of it in its ring, and another one can.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use super::delivery::{Delivery, Inbox};
use super::frames::Frames;
use super::mirrors::Mirrors;
use super::ports::{AnyPort, Outside, open};
use super::{Lane, MOST_FRAMES};
use crate::net::current::Seen;
use crate::net::receive::Scratch;
use crate::net::{HashKey, NetDevice};
use crate::port::switch::MOST_NICS;
use crate::port::{Guard, Nic, NullPort, Port as _, PortSpec, SourcePort, Switch, Tokens};
use crate::virtqueue::RingError;
use crate::worker::queue::{Kind, Queue};
use crate::worker::ring::{Completion, Ring};

/// A card that was given to this worker.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) device: Arc<NetDevice>,
    pub(super) guard: Seen<Guard>,
    /// Queues of it that are here.
    queues: u16,
}

/// Which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// Of all cards that lead nowhere.
    Null,
    /// The switch with this number.
    Switch(u64),
    /// The own one of a card's queue pair.
    Pair(u16, u16),
}

/// A port that is open.
#[derive(Debug)]
pub(super) struct Slot {
    key: Key,
    pub(super) port: AnyPort,
    /// Queues that lead to it.
    queues: u16,
    tokens: Tokens,
}

/// The cards of a worker, and room for what is under way of their frames.
#[derive(Debug)]
pub struct Cards {
    pub(super) cards: Vec<Option<Card>>,
    /// By the same numbers.
    pub(super) inboxes: Vec<Option<Inbox>>,
    pub(super) ports: Vec<Option<Slot>>,
    /// Ports from which frames may come.
    pub(super) hearing: Vec<usize>,
    /// Ports without queues that have something in the ring.
    closing: Vec<usize>,
    pub(super) mirrors: Mirrors,
    pub(super) frames: Frames,
    pub(super) scratch: Scratch,
    pub(super) key: HashKey,
    /// Queues to be published, and those whose drivers broke them.
    pub(super) touched: Vec<u32>,
    pub(super) broken: Vec<(u32, RingError)>,
    /// Which queues receive may have changed.
    stale: bool,
    /// Upper bits of the ports' tokens.
    tokens: u64,
}

impl Cards {
    /// None. `tokens`: upper bits of what its ports have in the ring.
    #[must_use]
    pub fn new(tokens: u64) -> Self {
        Self {
            cards: Vec::new(),
            inboxes: Vec::new(),
            ports: Vec::new(),
            hearing: Vec::new(),
            closing: Vec::new(),
            mirrors: Mirrors::new(tokens),
            frames: Frames::default(),
            scratch: Scratch::default(),
            key: HashKey::new(RandomState::new().hash_one(tokens)),
            touched: Vec::with_capacity(MOST_FRAMES),
            broken: Vec::new(),
            stale: false,
            tokens,
        }
    }

    /// A card comes; its number.
    ///
    /// # Errors
    /// There are as many as a worker can have.
    pub fn join(&mut self, device: Arc<NetDevice>) -> Result<u16, String> {
        let free = self.cards.iter().position(Option::is_none);
        let at = free.unwrap_or(self.cards.len());
        let number = u16::try_from(at).ok().filter(|at| *at < MOST_NICS);
        let number = number.ok_or_else(|| format!("there are {MOST_NICS} network cards"))?;
        if free.is_none() {
            self.cards.push(None);
            self.inboxes.push(None);
        }
        if let (Some(card), Some(inbox)) = (self.cards.get_mut(at), self.inboxes.get_mut(at)) {
            *inbox = Some(Inbox::new(Arc::clone(&device)));
            *card = Some(Card {
                guard: Seen::of(&device.guard),
                device,
                queues: 0,
            });
        }
        Ok(number)
    }

    /// A card goes, of which no queue is here any more.
    pub fn leave(&mut self, number: u16) {
        let at = usize::from(number);
        if let (Some(card), Some(inbox)) = (self.cards.get_mut(at), self.inboxes.get_mut(at)) {
            (*card, *inbox) = (None, None);
        }
    }

    fn card(&mut self, number: u16) -> Option<&mut Card> {
        self.cards.get_mut(usize::from(number))?.as_mut()
    }

    /// What queue `index` of a card has beside its ring; none: there is no such card or queue.
    #[must_use]
    pub fn lane(&self, number: u16, index: u16, features: u64) -> Option<Lane> {
        let card = self.cards.get(usize::from(number))?.as_ref()?;
        let device = Arc::clone(&card.device);
        (index < device.queues()).then(|| Lane::new(device, number, index, features))
    }

    /// A queue of a card comes: its port is opened, unless it is.
    ///
    /// # Errors
    /// Why its port can't be; then nothing of the queue is here.
    pub fn come(&mut self, lane: &mut Lane, ring: &mut Ring) -> Result<(), String> {
        let nic = Nic(lane.card);
        let at = self.port(lane, ring)?;
        let slot = self.ports.get_mut(at).and_then(Option::as_mut);
        let slot = slot.ok_or("there is no such port")?;
        slot.queues += 1;
        lane.port = at;
        let is_first = match self.card(lane.card) {
            Some(card) => {
                card.queues += 1;
                card.queues == 1
            }
            None => false,
        };
        let joined = match self.ports.get_mut(at).and_then(Option::as_mut) {
            Some(Slot {
                port: AnyPort::Switch(switch),
                ..
            }) if is_first => switch.join(nic, lane.device.shape.mac),
            _ => Ok(()),
        };
        self.stale = true;
        self.mirror(lane.card, ring);
        joined.map_err(|error| {
            self.go(lane, ring);
            error.to_string()
        })
    }

    /// A queue of a card has gone, or could not come, or is retired: nothing leads from it to its port any more.
    pub fn go(&mut self, lane: &mut Lane, ring: &mut Ring) {
        self.stale = true;
        let at = std::mem::replace(&mut lane.port, usize::MAX);
        if at == usize::MAX {
            return;
        }
        let Some(card) = self.card(lane.card) else {
            return;
        };
        card.queues = card.queues.saturating_sub(1);
        let is_last = card.queues == 0;
        self.mirror(lane.card, ring);
        let Some(slot) = self.ports.get_mut(at).and_then(Option::as_mut) else {
            return;
        };
        if let (AnyPort::Switch(switch), true) = (&mut slot.port, is_last) {
            switch.leave(Nic(lane.card));
        }
        slot.queues = slot.queues.saturating_sub(1);
        if slot.queues == 0 {
            slot.port.stop(ring);
            self.hearing.retain(|port| *port != at);
            self.closing.push(at);
            self.close(ring);
        }
    }

    /// Has a card's frames copied to where they are to be now, while it has queues here.
    pub fn mirror(&mut self, number: u16, ring: &mut Ring) {
        let card = self.card(number).filter(|card| card.queues > 0);
        let file = card.and_then(|card| card.device.mirror());
        self.mirrors.set(Nic(number), file.as_ref(), ring);
    }

    /// Takes ports away that have nothing in the ring any more.
    fn close(&mut self, ring: &mut Ring) {
        let ports = &mut self.ports;
        self.closing.retain(|at| {
            let Some(place) = ports.get_mut(*at) else {
                return false;
            };
            if place.as_ref().is_some_and(|slot| !slot.port.is_idle()) {
                return true;
            }
            if let Some(slot) = place.take() {
                slot.port.close(ring);
            }
            false
        });
    }

    /// The port of a queue, which is opened if it is not.
    fn port(&mut self, lane: &Lane, ring: &mut Ring) -> Result<usize, String> {
        let key = match &lane.device.port {
            PortSpec::Null => Key::Null,
            PortSpec::Switch(switch) => Key::Switch(switch.number()),
            PortSpec::Source(_) | PortSpec::Outside(_) => Key::Pair(lane.card, lane.pair),
        };
        let is_it = |slot: &Slot| slot.key == key && slot.queues > 0;
        let known = |place: &Option<Slot>| place.as_ref().is_some_and(is_it);
        if let Some(at) = self.ports.iter().position(known) {
            return Ok(at);
        }
        let free = self.ports.iter().position(Option::is_none);
        let at = free.unwrap_or(self.ports.len());
        let tokens = Tokens::new(self.tokens | (at as u64) << Tokens::SLOT_BITS);
        let mut outside = |spec, nic, pair| open(spec, (nic, pair), (tokens, self.key), ring);
        let port = match &lane.device.port {
            PortSpec::Null => AnyPort::Null(NullPort),
            PortSpec::Source(bytes) => {
                let mac = lane.device.shape.mac;
                AnyPort::Source(SourcePort::new(Nic(lane.card), mac, *bytes, self.key))
            }
            PortSpec::Switch(switch) => {
                let uplink: Option<Outside> = match &switch.uplink {
                    Some(spec) => Some(outside(spec, Nic(0), 0)?),
                    None => None,
                };
                let counters = Arc::clone(&switch.counters);
                AnyPort::Switch(Box::new(Switch::new(uplink, counters)))
            }
            PortSpec::Outside(spec) => AnyPort::Outside(outside(spec, Nic(lane.card), lane.pair)?),
        };
        if port.hears() {
            self.hearing.push(at);
        }
        let slot = Some(Slot {
            key,
            port,
            queues: 0,
            tokens,
        });
        match self.ports.get_mut(at) {
            Some(place) => *place = slot,
            None => self.ports.push(slot),
        }
        Ok(at)
    }

    /// Something was said about queues: which of them receive is to be looked at again.
    #[inline]
    pub fn look_again(&mut self) {
        self.stale = true;
    }

    /// Looks at which queues receive, if that may have changed.
    #[inline]
    pub(super) fn look_at(&mut self, queues: &[Option<Queue>]) {
        if std::mem::take(&mut self.stale) {
            self.look_at_all(queues);
        }
    }

    #[cold]
    fn look_at_all(&mut self, queues: &[Option<Queue>]) {
        self.inboxes.iter_mut().flatten().for_each(Inbox::clear);
        for (queue, number) in queues.iter().zip(0..) {
            let Some(queue) = queue.as_ref().filter(|queue| queue.is_served()) else {
                continue;
            };
            let Kind::Net(lane) = &queue.kind else {
                continue;
            };
            let inbox = self.inboxes.get_mut(usize::from(lane.card));
            if let Some(inbox) = inbox.and_then(Option::as_mut).filter(|_| !lane.sends()) {
                inbox.add(lane.pair, number);
            }
        }
    }

    /// Whether frames may come without a queue that sends.
    #[must_use]
    #[inline]
    pub fn hears(&self) -> bool {
        !self.hearing.is_empty()
    }

    /// An entry of a port's has ended.
    pub fn landed(&mut self, completion: Completion, ring: &mut Ring) {
        let Err(completion) = self.mirrors.landed(completion, ring) else {
            return;
        };
        let is_its = |slot: &&mut Slot| slot.tokens.has(completion.token);
        if let Some(slot) = self.ports.iter_mut().flatten().find(is_its) {
            slot.port.landed(completion, ring);
        }
        if !self.closing.is_empty() {
            self.close(ring);
        }
    }

    /// The worker is about to sleep; false: something has come, or there is no room in the ring.
    pub fn arm(&mut self, ring: &mut Ring) -> bool {
        let ports = &mut self.ports;
        self.hearing.iter().all(|at| {
            let slot = ports.get_mut(*at).and_then(Option::as_mut);
            slot.is_none_or(|slot| slot.port.arm(ring))
        })
    }

    /// Whether ports or mirrors that are not used any more have something in the ring.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        !self.closing.is_empty() || self.mirrors.is_closing()
    }

    /// A queue that got something, or gave something, and is not published yet.
    #[inline]
    pub fn next_touched(&mut self, queues: &mut [Option<Queue>]) -> Option<u32> {
        let number = self.touched.pop()?;
        let queue = queues.get_mut(number as usize).and_then(Option::as_mut);
        if let Some(Kind::Net(lane)) = queue.map(|queue| &mut queue.kind) {
            lane.touched = false;
        }
        Some(number)
    }

    /// A queue whose driver broke it.
    #[inline]
    pub fn next_broken(&mut self) -> Option<(u32, RingError)> {
        self.broken.pop()
    }

    /// Lets go of the guest memory of frames that are done.
    pub fn release(&mut self) {
        self.frames.release();
        self.scratch.release();
    }

    /// Everything that is needed to give frames to queues, and the port that gives them.
    pub(super) fn parts<'a>(
        &'a mut self,
        port: usize,
        queues: &'a mut [Option<Queue>],
    ) -> Option<(&'a mut AnyPort, Delivery<'a>)> {
        let slot = self.ports.get_mut(port)?.as_mut()?;
        let delivery = Delivery {
            queues,
            inboxes: &mut self.inboxes,
            mirrors: &mut self.mirrors,
            scratch: &mut self.scratch,
            touched: &mut self.touched,
            broken: &mut self.broken,
        };
        Some((&mut slot.port, delivery))
    }
}
