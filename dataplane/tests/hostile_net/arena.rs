//! A card that is attacked, on a switch with two others, and what must hold of these.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_dataplane::net::Counts;
use bulkhead_dataplane::port::DropReason;
use bulkhead_integration::card::{Card, Options, net_feature};
use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::memory::GuestMemory;
use bulkhead_integration::driver::ring::Desc;
use bulkhead_integration::packets::{Packet, UDP};

use crate::rig::{Offered, PATIENCE, Rig, counted, mac};

/// How an attack ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The frame was dropped for this reason, counted with the attacker's queue; no other was.
    Dropped(DropReason),
    /// It came where it goes, byte by byte.
    Delivered,
    /// The queue was retired, and its error descriptor signalled.
    Retired,
    /// The frontend's message was refused, or its connection closed.
    Refused,
    /// The message was taken.
    Accepted,
    /// Only the attacker can tell, of itself.
    Harmless,
}

/// What is wrong.
pub(crate) type Wrong = Box<dyn Error>;
/// An attack.
pub(crate) type Run = Arc<dyn Fn(&mut Arena) -> Result<End, Wrong> + Send + Sync>;

/// Number of the attacked card, and of its neighbours.
pub(crate) const A: u8 = 1;
pub(crate) const B: u8 = 2;
pub(crate) const C: u8 = 3;

/// What a case is about.
pub(crate) struct Arena {
    pub rig: Rig,
    /// The attacked card.
    pub a: Offered,
    /// Its neighbours, with their guests.
    pub b: (Offered, Card),
    pub c: (Offered, Card),
    /// Whether the attacker's rings are packed.
    pub packed: bool,
    next_port: u16,
}

impl Arena {
    pub fn new(packed: bool) -> Self {
        let mut rig = Rig::new();
        let a = rig.on_switch(2);
        let mut guest = || {
            let offered = rig.on_switch(1);
            let card = Card::attach(&offered.path, &Options::default()).expect("attach");
            (offered, card)
        };
        let (b, c) = (guest(), guest());
        Self {
            rig,
            a,
            b,
            c,
            packed,
            next_port: 1000,
        }
    }

    /// The attacker's usual options: every offload, tables, one pair, 64 buffers of a page.
    pub fn options(&self) -> Options {
        let usual = Options::default();
        let packed = if self.packed { feature::RING_PACKED } else { 0 };
        Options {
            features: usual.features | feature::INDIRECT_DESC | packed,
            buffers: 64,
            ..usual
        }
    }

    /// The attacker with no buffers to receive into.
    pub fn without_buffers(&self) -> Options {
        Options {
            buffers: 0,
            ..self.options()
        }
    }

    /// The same, of whose frames each comes into one buffer.
    pub fn unmerged(&self) -> Options {
        let options = self.without_buffers();
        Options {
            features: options.features & !net_feature::MRG_RXBUF,
            ..options
        }
    }

    pub fn attach(&self, options: &Options) -> Result<Card, Wrong> {
        Ok(Card::attach(&self.a.path, options)?)
    }

    /// What the attacked card has counted, of frames that it sends and that it receives.
    pub fn sent(&self) -> Counts {
        self.a.device.metrics.sent()
    }

    pub fn received(&self) -> Counts {
        self.a.device.metrics.received()
    }

    /// A frame that no other is like.
    pub fn frame(&mut self, from: u8, to: u8, payload: usize) -> Vec<u8> {
        self.next_port += 1;
        Packet {
            dst: mac(to),
            src: mac(from),
            ports: (self.next_port, 9),
            ..Packet::v4(UDP, &vec![from; payload])
        }
        .complete()
    }

    /// The one reason for which a frame was dropped; waits for it.
    pub fn dropped(counts: impl Fn() -> Counts) -> End {
        let counts = counted(counts, |all| all.all_drops() > 0);
        let mut reasons = DropReason::ALL
            .into_iter()
            .filter(|reason| counts.drops[reason.number()] > 0);
        let reason = reasons.next().expect("there is one");
        assert_eq!(
            (reasons.next(), counts.all_drops()),
            (None, 1),
            "{counts:?}"
        );
        End::Dropped(reason)
    }

    /// Whether a queue of the attacked card was retired, and says so.
    pub fn retired(&self, card: &Card, queue: usize) -> Result<End, Wrong> {
        if !card.rings[queue].has_failed(PATIENCE) {
            return Err("no error was signalled".into());
        }
        let until = Instant::now() + PATIENCE;
        let id = self.a.id;
        while self.rig.status(id).retired_queues != 1 {
            if Instant::now() > until {
                return Err("no queue was retired".into());
            }
            std::thread::yield_now();
        }
        Ok(End::Retired)
    }

    /// B sends a frame to the attacked card.
    pub fn b_sends(&mut self, payload: usize) -> Result<Vec<u8>, Wrong> {
        let frame = self.frame(B, A, payload);
        self.b.1.send(0, &frame)?;
        Ok(frame)
    }

    /// What must hold after every attack.
    pub fn check(&mut self) -> Result<(), Wrong> {
        self.neighbours_talk()?;
        for (name, neighbour) in [("B", &self.b.0), ("C", &self.c.0)] {
            let status = self.rig.status(neighbour.id);
            if status.retired_queues != 0 {
                return Err(format!("a queue of {name} is retired").into());
            }
            let counts = neighbour.device.metrics.received();
            if counts.all_drops() != 0 {
                return Err(format!("{name} has lost frames: {counts:?}").into());
            }
        }
        // Somebody else's frontend, in order.
        let mut again = self.attach(&Options::default())?;
        for _ in 0..3 {
            let there = self.frame(A, B, 100);
            again.send(0, &there)?;
            arrives(&mut self.b.1, &there)?;
            let back = self.b_sends(100)?;
            arrives(&mut again, &back)?;
        }
        Ok(())
    }

    /// B and C talk to each other, both ways.
    pub fn neighbours_talk(&mut self) -> Result<(), Wrong> {
        (0..3).try_for_each(|_| self.neighbours_talk_once())
    }

    pub fn neighbours_talk_once(&mut self) -> Result<(), Wrong> {
        let there = self.frame(B, C, 1000);
        self.b.1.send(0, &there)?;
        arrives(&mut self.c.1, &there)?;
        let back = self.frame(C, B, 1000);
        self.c.1.send(0, &back)?;
        arrives(&mut self.b.1, &back)
    }
}

/// The attacker, which had no buffers, offers one and gets a frame there.
pub(crate) fn gets(arena: &mut Arena, card: &mut Card) -> Result<(), Wrong> {
    let at = card.slot(0, 5);
    offer(card, 0, 0, &[Desc::writable(at, 4096)])?;
    publish(card, 0)?;
    let frame = arena.b_sends(100)?;
    let memory = Arc::clone(&card.memory);
    let used = card.rings[0].wait_used(&memory, PATIENCE)?;
    let bytes = memory.read(at + 12, used.len as usize - 12)?;
    if bytes == frame {
        Ok(())
    } else {
        Err("another frame came".into())
    }
}

/// A frame comes, perhaps behind others.
pub(crate) fn arrives(card: &mut Card, frame: &[u8]) -> Result<(), Wrong> {
    loop {
        if card.receive(0)?.frame == frame {
            return Ok(());
        }
    }
}

/// Offers a chain to a queue: directly if it is short, else in a table.
pub(crate) fn offer(card: &mut Card, queue: usize, id: u16, descs: &[Desc]) -> Result<(), Wrong> {
    let table = card.slot(0, 15) + 0x4000 * u64::from(id % 4);
    let memory: Arc<GuestMemory> = Arc::clone(&card.memory);
    let ring = &mut card.rings[queue];
    if descs.len() > 4 {
        ring.offer_table(&memory, id, table, descs)?;
    } else {
        ring.offer(&memory, id, descs)?;
    }
    Ok(())
}

/// Shows the device what was offered.
pub(crate) fn publish(card: &mut Card, queue: usize) -> Result<(), Wrong> {
    let memory = Arc::clone(&card.memory);
    Ok(card.rings[queue].publish(&memory)?)
}
