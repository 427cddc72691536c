//! A turn of a queue that sends, and of a port that gives.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::ports::AnyPort;
use super::{Cards, Delivery, Lane, MOST_FRAMES};
use crate::net::frame::{Copied, Frame, HeadBuffer, Offload};
use crate::net::header::Header;
use crate::net::parse::ethertype::RARP;
use crate::net::{Counts, HashKey, HeaderSize, NetDevice};
use crate::port::mirror::pcapng::Direction;
use crate::port::{DropReason, Guard, Nic, Port as _};
use crate::virtqueue::{Chain, RingError, Virtqueue};
use crate::worker::clock;
use crate::worker::queue::{Kind, Queue};
use crate::worker::ring::Ring;

/// Bytes at the front of what is sent that are asked for as soon as they are known: the header, and what is looked at of
/// most frames.
const FIRST_BYTES: u32 = 128;

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

/// Room for a frame that was taken.
#[derive(Debug)]
struct Place {
    id: u16,
    chain: Chain,
    head: HeadBuffer,
}

/// Room for frames that are taken together.
#[derive(Debug)]
pub(super) struct Frames {
    places: Box<[Place]>,
    count: usize,
}

impl Default for Frames {
    fn default() -> Self {
        let place = |_| Place {
            id: 0,
            chain: Chain::with_capacity(32),
            head: HeadBuffer::default(),
        };
        Self {
            places: (0..MOST_FRAMES).map(place).collect(),
            count: 0,
        }
    }
}

impl Frames {
    /// Takes what a queue has, as far as it may.
    #[inline]
    fn take(&mut self, ring: &mut Virtqueue, asked: Asked) -> Sent {
        let mut sent = Sent::default();
        for place in self.places.iter_mut().take(asked.frames) {
            match ring.pop(&mut place.chain) {
                Ok(Some(id)) => place.id = id,
                Ok(None) => break,
                Err(error) => {
                    sent.broken = Some(error);
                    break;
                }
            }
            place.chain.readable.announce_front(FIRST_BYTES);
            sent.frames += 1;
            sent.bytes += place.chain.readable.bytes();
            if sent.bytes >= asked.bytes {
                break;
            }
        }
        self.count = sent.frames;
        sent
    }

    fn taken(&mut self) -> &mut [Place] {
        self.places.get_mut(..self.count).unwrap_or_default()
    }

    /// Lets go of guest memory.
    pub(super) fn release(&mut self) {
        for place in &mut self.places {
            place.chain.release();
        }
    }
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

impl Sender<'_> {
    /// Gives frames to a port: what became of them. What they become beyond one packet each is added to `more`.
    #[inline]
    fn send(
        &self,
        taken: &mut [Place],
        port: &mut AnyPort,
        to: &mut Delivery<'_>,
        (ring, more): (&mut Ring, &mut usize),
    ) -> Counts {
        let mut counts = Counts::default();
        for place in taken {
            match self.send_one(place, port, to, (ring, more)) {
                Ok(bytes) => counts.frame(bytes as u64),
                Err(reason) => counts.dropped(reason),
            }
        }
        counts
    }

    #[inline]
    fn send_one(
        &self,
        place: &mut Place,
        port: &mut AnyPort,
        to: &mut Delivery<'_>,
        (ring, more): (&mut Ring, &mut usize),
    ) -> Result<usize, DropReason> {
        let Place { chain, head, .. } = place;
        let copied = Copied::of_chain(&chain.readable, self.header, head)?;
        let mut frame = Frame::unseen(copied.head, copied.body);
        frame.look(&copied.header, self.key)?;
        if !self.device.is_up() {
            return Err(DropReason::LinkDown);
        }
        // Nothing on the way cuts it: what each piece of it is on a wire counts.
        if frame.packet_bytes() > usize::from(self.device.shape.mtu) {
            return Err(DropReason::TooLong);
        }
        self.guard.check(&frame)?;
        to.mirrors.record(self.nic, Direction::Outbound, &frame);
        to.note(self.nic, frame.info.hash, self.pair);
        if let Offload::Gso(_) = frame.offload {
            *more += frame.packets().saturating_sub(1);
        }
        port.transmit(self.nic, &frame, to, ring)?;
        Ok(frame.bytes())
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
        let taken = self.frames.taken();
        let more = &mut sent.more_packets;
        let counts = sender.send(taken, port, &mut delivery, (ring, more));
        port.flush(ring);
        self.mirrors.flush(ring);
        if let Some((lane, virtqueue)) = lane_of(queues, number) {
            for place in taken {
                virtqueue.push_used(place.id, 0);
            }
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
        let Some((lane, _)) = lane_of(queues, number) else {
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
        assert_eq!((frame.info.src, frame.info.dst), (mac, [0xff; 6]));
        assert_eq!(frame.info.ethertype, RARP);
        assert_eq!(frame.info.network, Network::Arp);
        assert_eq!(frame.claims().mac, Some(mac));
    }
}
