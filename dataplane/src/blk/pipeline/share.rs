//! What a device may have of its worker's room: flights and chunks of staging. And the lines in which flights
//! wait for it: one for each device, so that one that may have no more does not stop the others.
//!
//! A device may have [`TIMES_FREE`] times as many as are free. Alone it gets three quarters; two that want all
//! get three sevenths each. So there is always something left for one that comes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;
use std::rc::Rc;

use super::Pipeline;
use super::flight::{Landed, Local};
use crate::worker::staging::{Chunk, Staging};

/// See above.
const TIMES_FREE: usize = 3;
/// No flight.
pub(super) const NOBODY: u32 = u32::MAX;

/// What a device has.
#[derive(Debug)]
pub(super) struct Share {
    /// Flights.
    pub(super) flights: Cell<usize>,
    chunks: Cell<usize>,
    line: Line,
}

/// Flights that wait, each with the next ([`super::flight::Flight::behind`]).
#[derive(Debug)]
struct Line {
    first: Cell<u32>,
    last: Cell<u32>,
    length: Cell<usize>,
    /// The device is in [`Pipeline::lines`].
    listed: Cell<bool>,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            flights: Cell::new(0),
            chunks: Cell::new(0),
            line: Line {
                first: Cell::new(NOBODY),
                last: Cell::new(NOBODY),
                length: Cell::new(0),
                listed: Cell::new(false),
            },
        }
    }
}

impl Share {
    /// A chunk for `bytes` bytes, or for the first part of them; none while the device has its share.
    #[inline]
    pub(super) fn take_chunk(&self, staging: &mut Staging, bytes: u64) -> Option<Chunk> {
        if self.chunks.get() >= TIMES_FREE * staging.unused() {
            return None;
        }
        let chunk = staging.take(bytes)?;
        self.chunks.update(|n| n + 1);
        Some(chunk)
    }

    /// Takes a chunk back.
    #[inline]
    pub(super) fn give_chunk(&self, staging: &mut Staging, chunk: Chunk) {
        self.chunks.update(|n| n - 1);
        staging.give(chunk);
    }
}

impl Pipeline {
    /// How many more requests of a device can be begun.
    #[must_use]
    #[inline]
    pub fn room_for(&self, local: &Local) -> usize {
        let most = TIMES_FREE * self.room();
        // Each that it takes is one free less, too.
        most.saturating_sub(local.share.flights.get())
            .div_ceil(TIMES_FREE + 1)
    }

    /// A flight goes to the end of its device's line; to its front, if it comes from there.
    pub(super) fn wait_in_line(&mut self, index: u32) {
        let is_first = self.resumed == Some(index);
        let Some(flight) = self.flights.get_mut(index as usize) else {
            return;
        };
        let Some(local) = flight.local.as_ref().filter(|_| !flight.waiting) else {
            return;
        };
        flight.waiting = true;
        let line = &local.share.line;
        if !line.listed.replace(true) {
            self.lines.push_back(Rc::clone(local));
        }
        line.length.update(|n| n + 1);
        let (first, last) = (line.first.get(), line.last.get());
        flight.behind = if is_first { first } else { NOBODY };
        if is_first || first == NOBODY {
            line.first.set(index);
        }
        if first == NOBODY || !is_first {
            line.last.set(index);
        }
        if !is_first && let Some(before) = self.flights.get_mut(last as usize) {
            before.behind = index;
        }
    }

    fn leave_line(&mut self, local: &Local) -> Option<u32> {
        let line = &local.share.line;
        let index = line.first.get();
        let flight = self.flights.get_mut(index as usize)?;
        flight.waiting = false;
        line.first.set(flight.behind);
        if flight.behind == NOBODY {
            line.last.set(NOBODY);
        }
        line.length.update(|n| n - 1);
        Some(index)
    }

    /// Goes on with each device's line as far as there is room for it; whether something did.
    pub(super) fn resume_lines(&mut self, landed: &mut impl FnMut(Landed)) -> bool {
        let mut any = false;
        // Each time another device is first.
        self.lines.rotate_left(usize::from(self.lines.len() > 1));
        for _ in 0..self.lines.len() {
            let Some(local) = self.lines.pop_front() else {
                break;
            };
            any |= self.resume_line(&local, landed);
            let more = local.share.line.first.get() != NOBODY;
            local.share.line.listed.set(more);
            if more {
                self.lines.push_back(local);
            }
        }
        any
    }

    fn resume_line(&mut self, local: &Rc<Local>, landed: &mut impl FnMut(Landed)) -> bool {
        let mut any = false;
        for _ in 0..local.share.line.length.get() {
            let Some(index) = self.leave_line(local) else {
                break;
            };
            self.resumed = Some(index);
            if let Some(ended) = self.go_on(index) {
                landed(ended);
            }
            self.resumed = None;
            // The first that still has no room: the others behind it have none either.
            if local.share.line.first.get() == index {
                break;
            }
            any = true;
        }
        any
    }
}
