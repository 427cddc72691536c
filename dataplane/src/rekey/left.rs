//! What was left behind: transfers of the rekeyer that did not end in time (ADR 0024).
//!
//! They are cancelled where they can be, and what they use stays theirs until the kernel has given it back. Nothing
//! more is done with their volume before that: a write that lands late must not undo a newer one. A flush keeps its
//! turn among the device's flushes, and what it says is taken in when it ends.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Instant;

use crate::blk::{BlkDevice, Found, REKEYER};
use crate::worker::message::DeviceId;

/// A flush, with what it settles and its number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flush {
    pub(super) settles: u64,
    pub(super) number: u64,
}

impl Flush {
    /// Begins one; the device's turn was taken.
    pub(super) fn begin(device: &BlkDevice) -> Self {
        Self {
            settles: device.settle_wanted(),
            number: device.begin_flush(),
        }
    }

    /// It ended. Whoever has the turn gives it back.
    pub(super) fn end<E>(self, device: &BlkDevice, result: Result<(), E>) {
        match result {
            Ok(()) => {
                device.settle(self.settles);
                device.flush_succeeded(self.number);
            }
            // Latched before the next flush can begin.
            Err(_) => device.latch_flush_failure(),
        }
        device.give_flush_turn();
    }
}

/// Transfers that were left behind at one time.
#[derive(Debug)]
struct Lot {
    /// High half of their tokens.
    lot: u32,
    id: DeviceId,
    device: Arc<BlkDevice>,
    count: u32,
    since: Instant,
    flush: Option<Flush>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Left(Vec<Lot>);

impl Left {
    /// Leaves transfers behind.
    pub(super) fn add(
        &mut self,
        lot: u32,
        (id, device): (DeviceId, &Arc<BlkDevice>),
        count: u32,
        flush: Option<Flush>,
    ) {
        self.0.push(Lot {
            lot,
            id,
            device: Arc::clone(device),
            count,
            since: Instant::now(),
            flush,
        });
        self.tell(device);
    }

    /// One of them has ended; false if it was not left behind.
    pub(super) fn ended(&mut self, lot: u32, result: Result<(), i32>) -> bool {
        let Some(at) = self.0.iter().position(|left| left.lot == lot) else {
            return false;
        };
        let over = self.0.get_mut(at).is_some_and(|left| {
            left.count = left.count.saturating_sub(1);
            left.count == 0
        });
        if over {
            let left = self.0.swap_remove(at);
            if let Some(flush) = left.flush {
                flush.end(&left.device, result);
            }
            self.tell(&left.device);
        }
        true
    }

    /// Whether something of a device is left.
    pub(super) fn has(&self, id: DeviceId) -> bool {
        self.0.iter().any(|left| left.id == id)
    }

    /// Whether these are among them.
    pub(super) fn has_lot(&self, lot: u32) -> bool {
        self.0.iter().any(|left| left.lot == lot)
    }

    /// Whether anything is.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells whoever asks for the device's health.
    fn tell(&self, device: &Arc<BlkDevice>) {
        let of = self
            .0
            .iter()
            .filter(|left| Arc::ptr_eq(&left.device, device));
        let found = of.fold(Found::default(), |found, left| Found {
            old: found.old + left.count,
            oldest: Some(found.oldest.map_or(left.since, |o| o.min(left.since))),
        });
        device.health.report(REKEYER, found);
    }
}
