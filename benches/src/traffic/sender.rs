//! A queue that sends as fast as its frames are taken.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU32};

use super::frame::Kind as Frame;
use super::slots::Slots;
use crate::load::LoadError;
use crate::load::device::Signals;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::ring::{Chains as _, Ring};
use crate::load::source::Kind;

/// Shown to the device this often while a long batch is being made: it starts meanwhile.
const PUBLISH_EVERY: u32 = 32;
/// Bits of a frame's number that count; the others are its sender's.
pub const COUNTING_BITS: u32 = 28;

/// Who sends, to whom, what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// Number of the sender, below 16: the first bits of each frame's number.
    pub sender: u8,
    /// Its address.
    pub from: [u8; 6],
    /// The receiver's.
    pub to: [u8; 6],
    /// What.
    pub frame: Frame,
}

/// The queue.
#[derive(Debug)]
pub struct Sender<'m, R> {
    ring: R,
    slots: Slots,
    signals: &'m Signals,
    numbers: Vec<&'m AtomicU32>,
    free: Vec<u16>,
    sender: u32,
    next: u32,
    /// Frames that were taken.
    pub sent: u64,
}

impl<'m, R: Ring> Sender<'m, R> {
    /// Writes all frames; none is sent yet.
    ///
    /// # Errors
    /// [`LoadError::OutOfMemory`].
    pub fn new(
        ring: R,
        slots: Slots,
        memory: &'m Memory,
        signals: &'m Signals,
        sending: &Sending,
    ) -> Result<Self, LoadError> {
        let frame = sending.frame;
        let template = frame.template(sending.from, sending.to, sending.sender);
        let mut numbers = Vec::new();
        for slot in 0..slots.depth() {
            let bytes = memory.slice::<AtomicU8>(slots.at(slot), template.len())?;
            for (to, from) in bytes.iter().zip(&template) {
                to.store(*from, Relaxed);
            }
            let number = memory.slice::<AtomicU32>(slots.at(slot) + frame.number_at(), 1)?;
            numbers.extend(number.first());
        }
        Ok(Self {
            free: (0..slots.depth()).rev().collect(),
            ring,
            slots,
            signals,
            numbers,
            sender: u32::from(sending.sender) << COUNTING_BITS,
            next: 0,
            sent: 0,
        })
    }

    /// Takes back what was taken, at most a round of all frames, and sends as many again.
    ///
    /// # Errors
    /// [`QueueError`].
    #[inline]
    pub fn step(&mut self) -> Result<(), QueueError> {
        let most = self.slots.depth();
        let mut came = 0;
        while came < most
            && let Some(used) = self.ring.poll()?
        {
            came += 1;
            self.free.push(used.slot);
        }
        self.sent += u64::from(came);
        if came > 0 {
            self.ring.rearm();
        }
        let mut unpublished = 0;
        while let Some(slot) = self.free.pop() {
            if let Some(number) = self.numbers.get(usize::from(slot)) {
                number.store(self.sender | self.next, Relaxed);
            }
            self.next = (self.next + 1) % (1 << COUNTING_BITS);
            self.ring.offer(&self.slots, slot, Kind::Write);
            unpublished += 1;
            if unpublished == PUBLISH_EVERY {
                self.publish();
                unpublished = 0;
            }
        }
        if unpublished > 0 {
            self.publish();
        }
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
