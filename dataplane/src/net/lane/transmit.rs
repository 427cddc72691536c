//! A turn of a queue that sends, and of a port that gives.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::frames::{Frames, Place, Source};
use super::ports::AnyPort;
use super::{Cards, Delivery, Lane};
use crate::memory::GuestBuffer;
use crate::net::frame::{Frame, Offload, Readable};
use crate::net::header::Header;
use crate::net::parse::ethertype::RARP;
use crate::net::{Counts, HashKey, HeaderSize, NetDevice};
use crate::port::mirror::pcapng::Direction;
use crate::port::{DropReason, Guard, Nic, Port as _};
use crate::virtqueue::{RingError, Virtqueue};
use crate::worker::clock;
use crate::worker::queue::{Kind, Queue};
use crate::worker::ring::Ring;

/// What a queue may send in its turn.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Frames at most.
    pub frames: usize,
    /// Bytes after which no further frame is taken.
    pub bytes: u64,
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Frames that were taken.
    pub frames: usize,
    /// Packets that those become beyond one for each: of segments that are to be cut.
    pub more_packets: usize,
    /// Their bytes, headers included.
    pub bytes: u64,
    /// How the driver broke its ring, if it did.
    pub broken: Option<RingError>,
}

/// Who sends.
struct Sender<'a> {
    device: &'a NetDevice,
    guard: &'a Guard,
    nic: Nic,
    pair: u16,
    header: HeaderSize,
    key: HashKey,
}

/// Where frames go on.
struct Onward<'a, 'd> {
    port: &'a mut AnyPort,
    to: &'a mut Delivery<'d>,
    ring: &'a mut Ring,
}

impl Sender<'_> {
    /// Gives what was taken to a port, each step for all frames before the next step: what became of them. What they
    /// become beyond one packet each is added to `more`.
    #[inline]
    fn send(&self, frames: &mut Frames, onward: Onward<'_, '_>, more: &mut usize) -> Counts {
        match frames.taken() {
            (Source::Run(run), places) => self.send_all(places, |at| run.get(at), onward, more),
            (Source::Chains(chains), places) => {
                let no_chain = &GuestBuffer::default();
                let readable = |at: usize| chains.get(at).map_or(no_chain, |(_, c)| &c.readable);
                self.send_all(places, readable, onward, more)
            }
        }
    }

    #[inline(always)]
    fn send_all<'a, R: Readable<'a>>(
        &self,
        places: &'a mut [Place],
        readable: impl Fn(usize) -> R + Copy,
        onward: Onward<'_, '_>,
        more: &mut usize,
    ) -> Counts {
        let mut counts = Counts::default();
        let Onward { port, to, ring } = onward;
        for (at, place) in places.iter_mut().enumerate() {
            let copied = place.head.copy(readable(at), self.header);
            place.settle(copied, &mut counts);
        }
        for place in places.iter_mut().filter(|place| place.goes.get()) {
            let looked = place.head.look(self.key);
            place.settle(looked, &mut counts);
        }
        let places: &'a [Place] = places;
        let (is_up, has_pairs) = (self.device.is_up(), to.has_pairs(self.nic));
        let good = |(_, place): &(usize, &Place)| place.goes.get();
        for (at, place) in places.iter().enumerate().filter(good) {
            let frame = place.head.frame(readable(at), self.key);
            place.settle(self.may_go(&frame, is_up), &mut counts);
            if !place.goes.get() {
                continue;
            }
            to.mirrors.record(self.nic, Direction::Outbound, &frame);
            if has_pairs {
                to.note(self.nic, frame.info().hash, self.pair);
            }
            if let Offload::Gso(_) = frame.offload {
                *more += frame.packets().saturating_sub(1);
            }
        }
        let key = self.key;
        let going = places.iter().enumerate().filter(good);
        let going = going.map(move |(at, place)| place.head.frame(readable(at), key));
        port.transmit_all(self.nic, going, to, ring, &mut counts);
        counts
    }

    /// Whether a frame of the card's may go on.
    #[inline(always)]
    fn may_go(&self, frame: &Frame<'_>, is_up: bool) -> Result<(), DropReason> {
        if !is_up {
            return Err(DropReason::LinkDown);
        }
        // Nothing on the way cuts it: what each piece of it is on a wire counts.
        if frame.packet_bytes() > usize::from(self.device.shape.mtu) {
            return Err(DropReason::TooLong);
        }
        self.guard.check(frame)
    }
}

/// A card's queue, and what it has beside its ring.
#[inline]
fn lane_of(queues: &mut [Option<Queue>], number: u32) -> Option<(&mut Lane, &mut Virtqueue)> {
    let queue = queues.get_mut(number as usize)?.as_mut()?;
    match &mut queue.kind {
        Kind::Net(lane) => Some((lane, &mut queue.ring)),
        Kind::Blk(_) => None,
    }
}

impl Cards {
    /// A turn of the queue with this number, which is one that sends. What [`Cards::next_touched`] then has is to be
    /// published, and so is this queue.
    pub fn transmit(
        &mut self,
        queues: &mut [Option<Queue>],
        ring: &mut Ring,
        number: u32,
        asked: Asked,
    ) -> Sent {
        self.look_at(queues);
        let Some((lane, virtqueue)) = lane_of(queues, number) else {
            return Sent::default();
        };
        if !lane.sends() {
            return Sent::default();
        }
        let slot = self.ports.get_mut(lane.port).and_then(Option::as_mut);
        let card = self.cards.get_mut(usize::from(lane.card));
        let (Some(slot), Some(Some(card))) = (slot, card) else {
            return Sent::default();
        };
        virtqueue.disarm();
        let frames = asked.frames.min(slot.port.room(Nic(lane.card)));
        let mut sent = self.frames.take(virtqueue, Asked { frames, ..asked });
        if sent.frames == 0 {
            return sent;
        }
        virtqueue.announce_used_of(u16::try_from(sent.frames).unwrap_or(0));
        let sender = Sender {
            device: &card.device,
            guard: card.guard.look(&card.device.guard),
            nic: Nic(lane.card),
            pair: lane.pair,
            header: lane.header,
            key: self.key,
        };
        let mut delivery = Delivery {
            queues,
            inboxes: &mut self.inboxes,
            mirrors: &mut self.mirrors,
            scratch: &mut self.scratch,
            touched: &mut self.touched,
            broken: &mut self.broken,
        };
        let port = &mut slot.port;
        // What comes from outside is not for this sender to pay for: it has a turn of its own, in which the port is told
        // the time as well ([`Cards::hear`]).
        if !port.hears() {
            port.receive(clock::now(), &mut delivery, ring);
        }
        let onward = Onward {
            port,
            to: &mut delivery,
            ring,
        };
        let more = &mut sent.more_packets;
        let counts = sender.send(&mut self.frames, onward, more);
        port.flush(ring);
        self.mirrors.flush(ring);
        if let Some((lane, virtqueue)) = lane_of(queues, number) {
            self.frames.give_back(virtqueue);
            lane.tally.add(&counts);
        }
        sent
    }

    /// Takes what has come to ports from outside: how many frames there were. As [`Cards::transmit`], what
    /// [`Cards::next_touched`] then has is to be published.
    pub fn hear(&mut self, queues: &mut [Option<Queue>], ring: &mut Ring) -> usize {
        self.look_at(queues);
        let now = clock::now();
        let mut frames = 0;
        for place in 0..self.hearing.len() {
            let at = self.hearing.get(place).copied().unwrap_or(usize::MAX);
            if let Some((port, mut delivery)) = self.parts(at, queues) {
                frames += port.receive(now, &mut delivery, ring);
                port.flush(ring);
            }
        }
        self.mirrors.flush(ring);
        frames
    }

    /// Tells the network behind a queue's port where its card is: as if the guest had sent a RARP frame (RFC 903), as
    /// hypervisors do for a guest that has come from another host.
    pub fn announce(&mut self, queues: &mut [Option<Queue>], ring: &mut Ring, number: u32) {
        self.look_at(queues);
        let lane = lane_of(queues, number).map(|(lane, _)| lane);
        let Some(lane) = lane.filter(|lane| lane.device.is_up()) else {
            return;
        };
        let (nic, at, frame) = (
            Nic(lane.card),
            lane.port,
            announcement(lane.device.shape.mac),
        );
        let key = self.key;
        let frame = Frame::of_bytes(&Header::default(), &frame, key);
        let Some((port, mut delivery)) = self.parts(at, queues) else {
            return;
        };
        port.receive(clock::now(), &mut delivery, ring);
        if let Ok(frame) = frame
            && port.room(nic) > 0
            && let Err(reason) = port.transmit(nic, &frame, &mut delivery, ring)
        {
            tracing::debug!("nobody heard of a guest that has come: {}", reason.name());
        }
        port.flush(ring);
        self.mirrors.flush(ring);
    }
}

/// Bytes of the shortest Ethernet frame, without its checksum.
const SHORTEST_FRAME: usize = 60;

/// A RARP request in which a station asks for its own address: what bridges learn from is its source.
fn announcement(mac: [u8; 6]) -> [u8; SHORTEST_FRAME] {
    let mut frame = [0; SHORTEST_FRAME];
    let parts: [&[u8]; 8] = [
        &[0xff; 6],
        &mac,
        &RARP.to_be_bytes(),
        // Ethernet (1) and IPv4 addresses of 6 and 4 bytes; request reverse (3).
        &[0, 1, 8, 0, 6, 4, 0, 3],
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
    ];
    let bytes = parts.into_iter().flatten();
    for (to, from) in frame.iter_mut().zip(bytes) {
        *to = *from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::parse::Network;

    #[test]
    fn an_announcement_comes_from_the_card_and_goes_to_everybody() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let bytes = announcement(mac);
        let frame = Frame::of_bytes(&Header::default(), &bytes, HashKey::new(1));
        let frame = frame.expect("a frame");
        assert_eq!((frame.link.src(), frame.link.dst()), (mac, [0xff; 6]));
        assert_eq!(frame.link.ethertype, RARP);
        assert_eq!(frame.info().network, Network::Arp);
        assert_eq!(frame.claims().mac, Some(mac));
    }
}
