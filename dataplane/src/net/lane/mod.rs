//! How a worker serves network cards: the queues of a card, and the turns in which frames go from one to where its
//! port leads.
//!
//! | module | owns |
//! | --- | --- |
//! | `transmit` | a turn of a queue that sends |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod transmit;

use std::sync::Arc;

use super::{Counts, Direction, NetDevice, part_of};
use crate::virtqueue::Chain;
pub use transmit::transmit;

/// Frames that are taken from a queue together at most.
pub const MOST_FRAMES: usize = 32;

/// What a card's queue has beside its ring.
#[derive(Debug)]
pub struct Lane {
    device: Arc<NetDevice>,
    /// Number of the card on this worker.
    pub card: u32,
    /// Its number in the card.
    index: u16,
    direction: Direction,
    /// Negotiated features.
    pub features: u64,
    /// What happened and is not counted yet.
    pub tally: Counts,
}

impl Lane {
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

    /// Counts what happened.
    #[inline]
    pub fn count(&mut self) {
        let tally = std::mem::take(&mut self.tally);
        if let Some(metrics) = self.device.metrics.queue(self.index) {
            metrics.add(&tally);
        }
    }
}

/// A card that was given to this worker.
#[derive(Debug)]
struct Card {
    device: Arc<NetDevice>,
}

/// The cards of a worker, and room for what is under way of their frames.
#[derive(Debug)]
pub struct Cards {
    cards: Vec<Option<Card>>,
    batch: Box<[Chain]>,
}

impl Default for Cards {
    fn default() -> Self {
        Self {
            cards: Vec::new(),
            batch: (0..MOST_FRAMES).map(|_| Chain::with_capacity(8)).collect(),
        }
    }
}

impl Cards {
    /// A card comes; its number.
    pub fn join(&mut self, device: Arc<NetDevice>) -> u32 {
        let card = Some(Card { device });
        let free = self.cards.iter().position(Option::is_none);
        let number = free.unwrap_or(self.cards.len());
        match self.cards.get_mut(number) {
            Some(place) => *place = card,
            None => self.cards.push(card),
        }
        u32::try_from(number).unwrap_or(u32::MAX)
    }

    /// A card goes, of which no queue is here any more.
    pub fn leave(&mut self, number: u32) {
        if let Some(place) = self.cards.get_mut(number as usize) {
            *place = None;
        }
    }

    /// What queue `index` of a card has beside its ring; none: there is no such card or queue.
    pub fn lane(&mut self, number: u32, index: u16, features: u64) -> Option<Lane> {
        let card = self.cards.get(number as usize)?.as_ref()?;
        if index >= card.device.queues() {
            return None;
        }
        let (direction, _) = part_of(index);
        Some(Lane {
            device: Arc::clone(&card.device),
            card: number,
            index,
            direction,
            features,
            tally: Counts::default(),
        })
    }

    /// Lets go of the guest memory of frames that are done.
    pub fn release(&mut self) {
        for chain in &mut self.batch {
            chain.release();
        }
    }
}
