//! How a worker serves network cards: their queues, their ports, and the turns in which frames go from one to the
//! other.
//!
//! **A frame from one guest to another**, in a turn of the queue that sends it:
//! 1. some chains are taken together, and what is read of them first is asked for ([`Cards::transmit`]);
//! 2. a frame's header and head are copied and held against each other ([`Frame::of_chain`](super::Frame::of_chain)), and
//!    what it claims to be against what its card may be ([`Guard`](crate::port::Guard));
//! 3. the port decides where it goes ([`Port::transmit`](crate::port::Port::transmit)), and has it copied into the
//!    receiver's buffers ([`Delivery`], [`deliver`](super::receive::deliver));
//! 4. all chains are given back, and each queue that got something or gave something is published once.
//!
//! Nothing of a card is ever in flight between two turns: whoever stops, moves or hands over a queue waits for nothing.
//!
//! | module | owns |
//! | --- | --- |
//! | `cards` | which cards are here, with their queues and ports |
//! | `ports` | a port of whichever kind |
//! | `frames` | room for frames that are taken together |
//! | `transmit` | a turn of a queue that sends, and of a port that gives |
//! | `mirrors` | copies of what a card sends and receives |
//! | `delivery` | the way into a card's receive queues |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod cards;
mod delivery;
mod frames;
mod mirrors;
mod ports;
mod transmit;

use std::sync::Arc;

use super::receive::Receiver;
use super::{Counts, Direction, HeaderSize, NetDevice, part_of};
use crate::virtqueue::Virtqueue;
pub use cards::Cards;
use delivery::Delivery;
pub use transmit::Asked;

/// Frames that are taken from a queue together at most.
pub const MOST_FRAMES: usize = 32;

/// Bytes at the front of a receive buffer that are asked for ahead: header and frame of the shortest. Of a longer one the
/// CPU sees where it goes on.
const FIRST_BYTES: u32 = 76;
/// Receive buffers that are asked for ahead: as many as are filled while a line comes from another CPU.
const AHEAD: u16 = 8;

/// Receive buffers whose place among the used ones is asked for at the beginning of a turn.
const USED_AHEAD: u16 = 16;

/// What a card's queue has beside its ring.
#[derive(Debug)]
pub struct Lane {
    device: Arc<NetDevice>,
    /// Number of the card on this worker.
    card: u16,
    /// Its number in the card.
    index: u16,
    direction: Direction,
    pair: u16,
    /// Number of its port on this worker.
    port: usize,
    /// What is in front of each frame that is sent.
    header: HeaderSize,
    /// How frames are received.
    receiver: Receiver,
    /// Buffers that come next and that the CPU was asked for already.
    announced: u16,
    /// It is among those that are published at the end of the turn.
    touched: bool,
    /// What happened and is not counted yet.
    tally: Counts,
}

impl Lane {
    fn new(device: Arc<NetDevice>, card: u16, index: u16, features: u64) -> Self {
        let (direction, pair) = part_of(index);
        let mtu = device.shape.mtu;
        Self {
            device,
            card,
            index,
            direction,
            pair,
            port: usize::MAX,
            header: HeaderSize::of(features),
            receiver: Receiver::of(features, mtu),
            announced: 0,
            touched: false,
            tally: Counts::default(),
        }
    }

    /// The card.
    #[must_use]
    #[inline]
    pub fn device(&self) -> &Arc<NetDevice> {
        &self.device
    }

    /// Whether the guest sends with it.
    #[must_use]
    #[inline]
    pub fn sends(&self) -> bool {
        self.direction == Direction::Tx
    }

    /// A frame is about to be written to the next buffer. Its lines belong to another CPU, which read the frame that was
    /// there before; they are asked for some buffers ahead, since one that is written without that stands still for as
    /// long as a line takes to come.
    #[inline]
    fn announce(&mut self, ring: &mut Virtqueue) {
        while self.announced < AHEAD && ring.announce_next(self.announced, FIRST_BYTES) {
            self.announced += 1;
        }
        self.announced = self.announced.saturating_sub(1);
    }

    /// Counts what happened.
    #[inline]
    pub fn count(&mut self) {
        if self.tally.is_nothing() {
            return;
        }
        if let Some(metrics) = self.device.metrics.queue(self.index) {
            metrics.add(&self.tally);
        }
        self.tally = Counts::default();
    }
}
