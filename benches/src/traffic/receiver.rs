//! A queue that receives: counts frames, looks at their numbers, and gives its buffers back.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU16, AtomicU32};

use super::frame::Kind as Frame;
use super::sender::COUNTING_BITS;
use super::slots::Slots;
use crate::load::LoadError;
use crate::load::device::Signals;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::ring::{Chains as _, Ring, Used};
use crate::load::source::Kind;

/// Where the number of buffers stands in a header.
const BUFFERS_AT: usize = 10;
/// Senders that are told apart.
const SENDERS: usize = 16;
/// Buffers are given back this many at a time.
const PUBLISH_EVERY: u32 = 32;

/// A receiver's slots and what is looked at in each.
#[derive(Debug)]
struct Place<'m> {
    buffers: &'m AtomicU16,
    number: &'m AtomicU32,
}

/// The queue.
#[derive(Debug)]
pub struct Receiver<'m, R> {
    ring: R,
    slots: Slots,
    signals: &'m Signals,
    places: Vec<Place<'m>>,
    mergeable: bool,
    /// Buffers that still belong to the frame before.
    more: u16,
    /// The next number of each sender, at least.
    next: [u32; SENDERS],
    /// Frames that came from each sender.
    pub received: [u64; SENDERS],
}

impl<'m, R: Ring> Receiver<'m, R> {
    /// Offers all of its buffers. `frame`: what comes.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(
        ring: R,
        slots: Slots,
        memory: &'m Memory,
        signals: &'m Signals,
        (frame, mergeable): (Frame, bool),
    ) -> Result<Self, LoadError> {
        let mut places = Vec::new();
        for slot in 0..slots.depth() {
            let buffers = memory.slice::<AtomicU16>(slots.at(slot) + BUFFERS_AT, 1)?;
            let number = memory.slice::<AtomicU32>(slots.at(slot) + frame.number_at(), 1)?;
            let both = buffers.first().zip(number.first());
            places.extend(both.map(|(buffers, number)| Place { buffers, number }));
        }
        Ok(Self {
            ring,
            slots,
            signals,
            places,
            mergeable,
            more: 0,
            next: [0; SENDERS],
            received: [0; SENDERS],
        })
    }

    /// Offers all buffers for the first time.
    pub fn begin(&mut self) {
        for slot in 0..self.slots.depth() {
            self.ring.offer(&self.slots, slot, Kind::Read);
        }
        self.publish();
    }

    /// Takes what came, at most a round of all buffers.
    ///
    /// # Errors
    /// [`QueueError`].
    #[inline]
    pub fn step(&mut self) -> Result<(), QueueError> {
        let most = self.slots.depth();
        let (mut came, mut unpublished) = (0, 0);
        while came < most
            && let Some(used) = self.ring.poll()?
        {
            came += 1;
            self.take(used)?;
            self.ring.offer(&self.slots, used.slot, Kind::Read);
            unpublished += 1;
            if unpublished == PUBLISH_EVERY {
                self.publish();
                unpublished = 0;
            }
        }
        if came > 0 {
            self.ring.rearm();
        }
        if unpublished > 0 {
            self.publish();
        }
        Ok(())
    }

    /// A buffer came back.
    #[inline]
    fn take(&mut self, used: Used) -> Result<(), QueueError> {
        if self.more > 0 {
            self.more -= 1;
            return Ok(());
        }
        let Some(place) = self.places.get(usize::from(used.slot)) else {
            return Ok(());
        };
        if self.mergeable {
            let buffers = place.buffers.load(Relaxed);
            self.more = buffers.checked_sub(1).ok_or(QueueError::NoBuffers)?;
        }
        let number = place.number.load(Relaxed);
        let (sender, count) = (number >> COUNTING_BITS, number % (1 << COUNTING_BITS));
        let sender = sender as usize;
        let (Some(next), Some(received)) =
            (self.next.get_mut(sender), self.received.get_mut(sender))
        else {
            return Ok(());
        };
        // Behind the next one there may be a gap of what was dropped; before it is what came already.
        if count.wrapping_sub(*next) % (1 << COUNTING_BITS) >= 1 << (COUNTING_BITS - 1) {
            return Err(QueueError::Order {
                expected: *next,
                found: count,
            });
        }
        *next = (count + 1) % (1 << COUNTING_BITS);
        *received += 1;
        Ok(())
    }

    #[inline]
    fn publish(&mut self) {
        if self.ring.publish() {
            // A full counter means that the device has kicks to see already.
            let _ = self.signals.kick.write(1);
        }
    }
}
