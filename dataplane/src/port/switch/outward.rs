//! Who sends out of the host, and so waits for the uplink rather than lose frames.
//!
//! What guests send to each other never waits for the uplink; but a NIC whose last frames went out would lose most of
//! its next ones while the uplink is full. So such a NIC's frames stay in its guest until there is room, for
//! [`PATIENCE`]: an uplink that takes nothing for longer is none that is worth waiting for, and what is for the other
//! guests goes on.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::Duration;

use crate::port::Nic;
use crate::worker::clock;

/// How long a NIC waits for a full uplink.
const PATIENCE: Duration = Duration::from_millis(10);

/// What is known of the NICs' ways out.
#[derive(Debug)]
pub(super) struct Outward {
    /// By number: of the NIC's last batch something went out.
    senders: Vec<bool>,
    /// Whose batch it is, and whether something of it went out.
    batch: Option<(Nic, bool)>,
    /// Since when the uplink is full, in ticks.
    full_since: Option<u64>,
    now: u64,
    patience: u64,
}

impl Default for Outward {
    fn default() -> Self {
        Self {
            senders: Vec::new(),
            batch: None,
            full_since: None,
            now: 0,
            patience: clock::ticks_in(PATIENCE),
        }
    }
}

impl Outward {
    /// Makes room for a NIC, which has sent nothing out yet.
    pub(super) fn join(&mut self, nic: Nic) {
        let at = usize::from(nic.0);
        if self.senders.len() <= at {
            self.senders.resize(at + 1, false);
        }
        self.set(nic, false);
    }

    /// A turn begins, with this room in the uplink.
    #[inline]
    pub(super) fn turn(&mut self, now: u64, room: usize) {
        self.now = now;
        self.full_since = match room {
            0 => self.full_since.or(Some(now)),
            _ => None,
        };
    }

    /// A frame of a NIC's, which goes out or does not.
    #[inline]
    pub(super) fn note(&mut self, from: Nic, out: bool) {
        match &mut self.batch {
            Some((nic, has)) if *nic == from => *has |= out,
            _ => self.batch = Some((from, out)),
        }
    }

    /// The batch is over.
    #[inline]
    pub(super) fn end(&mut self) {
        if let Some((nic, out)) = self.batch.take() {
            self.set(nic, out);
        }
    }

    fn set(&mut self, nic: Nic, out: bool) {
        if let Some(sender) = self.senders.get_mut(usize::from(nic.0)) {
            *sender = out;
        }
    }

    /// How many frames of a NIC's are taken, with this room in the uplink.
    #[inline]
    pub(super) fn room(&self, from: Nic, uplink: usize) -> usize {
        let sends_out = self.senders.get(usize::from(from.0)) == Some(&true);
        let is_hopeless = |since| self.now.saturating_sub(since) > self.patience;
        if !sends_out || self.full_since.is_some_and(is_hopeless) {
            return usize::MAX;
        }
        uplink
    }
}
