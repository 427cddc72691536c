//! The switch: a learning bridge (IEEE 802.1Q) among the NICs that are connected to it, and at most one way out of the
//! host, its uplink.
//!
//! One worker serves all queues of all of its NICs. So a frame from one guest to another goes from the sender's
//! buffers into the receiver's in one copy, without a lock, another thread or a system call, and with its offloads as
//! they are: a segment of 64 KiB crosses whole, its checksum never computed, if the receiver takes such.
//!
//! Where a frame goes is decided once for each flow ([`flow`]), by what the switch has learned ([`table`]). Broadcast,
//! multicast and frames for stations that aren't known go to everyone else. What bridges keep to themselves (spanning
//! tree and its like) goes nowhere, and nothing goes back to where it came from.
//!
//! A receiver without room loses the frame, and nobody waits for it. Copying a frame to all others takes its sender's
//! time on the worker, so that a guest that floods has a smaller part left and others have not.
//!
//! | module | owns |
//! | --- | --- |
//! | [`station`] | MAC addresses in VLANs, and members |
//! | [`table`] | where the stations are |
//! | [`flow`] | what was decided about flows |
//! | [`bridge`] | the decision |
//! | `counters` | what it has done |
//! | `outward` | who waits for the uplink |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod bridge;
mod counters;
pub mod flow;
mod outward;
pub mod station;
pub mod table;

use std::sync::Arc;

use super::{DropReason, Nic, Port, Sink};
use crate::net::Counts as FrameCounts;
use crate::net::frame::Frame;
use crate::net::parse::Link;
use crate::worker::ring::{Completion, Ring};
use bridge::{Bridge, Verdict};
pub use bridge::{Counts, JoinError, MOST_NICS};
pub use counters::SwitchCounters;
use outward::Outward;
use station::{Member, Station};

/// Packets that a segment becomes at most which goes to everybody: with segments of 512 bytes, the smallest that TCP uses
/// unasked, the longest is 128. Each receiver who takes none whole has it cut for itself; one of 1,365 packets to 250
/// such would keep the worker for 50 ms.
const MOST_FLOODED: usize = 128;

/// A switch whose uplink is a `U`.
#[derive(Debug)]
pub struct Switch<U> {
    bridge: Bridge,
    uplink: Option<U>,
    outward: Outward,
    counters: Arc<SwitchCounters>,
    /// What the counters have.
    counted: Counts,
}

impl<U: Port> Switch<U> {
    /// A switch without NICs, which adds to these counters. It allocates its tables.
    #[must_use]
    pub fn new(uplink: Option<U>, counters: Arc<SwitchCounters>) -> Self {
        Self {
            bridge: Bridge::default(),
            uplink,
            outward: Outward::default(),
            counters,
            counted: Counts::default(),
        }
    }

    /// Connects a NIC, whose own MAC address is known from now on and stays its own. It allocates.
    ///
    /// # Errors
    /// [`JoinError`]: it is not connected then.
    pub fn join(&mut self, nic: Nic, mac: [u8; 6]) -> Result<(), JoinError> {
        self.bridge.join(nic, mac)?;
        self.outward.join(nic);
        Ok(())
    }

    /// Takes a NIC off, with what was learned from it; nothing happens if it isn't connected.
    pub fn leave(&mut self, nic: Nic) {
        self.bridge.leave(nic);
        // Without NICs it ends, and knows nothing any more.
        let is_left = !self.bridge.members().is_empty();
        let known = if is_left { self.bridge.known } else { 0 };
        self.counters.set_stations(known);
    }

    /// Its NICs.
    #[must_use]
    pub fn nics(&self) -> &[Nic] {
        self.bridge.members()
    }

    /// What it has done so far, what its counters do not have yet included.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.bridge.counts()
    }

    /// Stations that it knows now. It looks at the whole table: for `status`.
    #[must_use]
    pub fn stations(&self) -> usize {
        self.bridge.stations()
    }

    /// The way out.
    #[must_use]
    pub fn uplink(&self) -> Option<&U> {
        self.uplink.as_ref()
    }

    /// Another way out, or none, and the one until now. That one must be idle, or its completions are to be given to
    /// it further on.
    pub fn set_uplink(&mut self, uplink: Option<U>) -> Option<U> {
        self.bridge.forget_uplink();
        std::mem::replace(&mut self.uplink, uplink)
    }

    /// A frame goes where was decided.
    #[inline]
    fn go(
        &mut self,
        verdict: Verdict,
        from: Nic,
        frame: &Frame<'_>,
        to: &mut impl Sink,
        ring: &mut Ring,
    ) -> Result<(), DropReason> {
        self.outward
            .note(from, verdict == Verdict::To(Member::UPLINK));
        match verdict {
            Verdict::To(member) => match (member.nic(), &mut self.uplink) {
                (Some(nic), _) => {
                    // What became of it there is counted there.
                    let _ = to.deliver(nic, frame);
                    Ok(())
                }
                (None, Some(uplink)) => uplink.transmit(from, frame, to, ring),
                (None, None) => Err(DropReason::NoPort),
            },
            Verdict::Flood => self.flood(from, frame, to, ring),
            Verdict::Drop(reason) => Err(reason),
        }
    }

    /// The NIC that so many frames of a known flow go to; none where there is more to decide about each.
    #[inline]
    fn decide_known(&mut self, from: Nic, first: &Frame<'_>, frames: usize) -> Option<Nic> {
        let (destination, source) = stations(&first.link);
        let nic = self
            .bridge
            .known_nic(from.into(), destination, source, frames as u64)?;
        self.outward.note(from, false);
        Some(nic)
    }

    /// Copies a frame to all NICs but one, and out of the host.
    fn flood(
        &mut self,
        from: Nic,
        frame: &Frame<'_>,
        to: &mut impl Sink,
        ring: &mut Ring,
    ) -> Result<(), DropReason> {
        if frame.packets() > MOST_FLOODED {
            return Err(DropReason::BadOffload);
        }
        let others = flood_nics(&self.bridge, from.into(), frame, to);
        match &mut self.uplink {
            // Who else got it has got it: what the uplink lost is counted apart.
            Some(uplink) => {
                if uplink.transmit(from, frame, to, ring).is_err() {
                    self.bridge.counts.uplink_drops += 1;
                }
                Ok(())
            }
            None if others == 0 => Err(DropReason::NoPort),
            None => Ok(()),
        }
    }
}

impl<U: Port> Port for Switch<U> {
    #[inline]
    fn receive(&mut self, now: u64, to: &mut impl Sink, ring: &mut Ring) -> usize {
        self.bridge.set_now(now);
        let Some(uplink) = &mut self.uplink else {
            return 0;
        };
        let bridge = &mut self.bridge;
        let received = uplink.receive(now, &mut Inward { bridge, to }, ring);
        // It has the same room for whoever it is.
        self.outward.turn(now, uplink.room(Nic(0)));
        received
    }

    #[inline]
    fn room(&self, from: Nic) -> usize {
        match &self.uplink {
            Some(uplink) => self.outward.room(from, uplink.room(from)),
            None => usize::MAX,
        }
    }

    #[inline]
    fn transmit(
        &mut self,
        from: Nic,
        frame: &Frame<'_>,
        to: &mut impl Sink,
        ring: &mut Ring,
    ) -> Result<(), DropReason> {
        let verdict = decide(&mut self.bridge, from.into(), &frame.link);
        self.go(verdict, from, frame, to, ring)
    }

    #[inline]
    fn transmit_all<'a>(
        &mut self,
        from: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
        to: &mut impl Sink,
        ring: &mut Ring,
        counts: &mut FrameCounts,
    ) {
        let mut left = frames;
        while let Some(first) = left.clone().next() {
            let of_flow = |frame: &Frame<'_>| frame.link.is_same_way(&first.link);
            let flow = left.clone().take_while(of_flow).count();
            match self.decide_known(from, &first, flow) {
                Some(nic) => {
                    for frame in left.clone().take(flow) {
                        counts.frame(frame.bytes() as u64);
                    }
                    deliver_to(nic, left.clone().take(flow), to);
                    left.nth(flow - 1);
                }
                None => {
                    match self.transmit(from, &first, to, ring) {
                        Ok(()) => counts.frame(first.bytes() as u64),
                        Err(reason) => counts.dropped(reason),
                    }
                    left.next();
                }
            }
        }
    }

    #[inline]
    fn flush(&mut self, ring: &mut Ring) {
        self.outward.end();
        self.counters.add(&self.counted, &self.bridge.counts);
        self.counted = self.bridge.counts;
        self.counters.set_stations(self.bridge.known);
        if let Some(uplink) = &mut self.uplink {
            uplink.flush(ring);
        }
    }

    fn landed(&mut self, completion: Completion, ring: &mut Ring) {
        if let Some(uplink) = &mut self.uplink {
            uplink.landed(completion, ring);
        }
    }

    fn arm(&mut self, ring: &mut Ring) -> bool {
        self.uplink.as_mut().is_none_or(|uplink| uplink.arm(ring))
    }

    fn stop(&mut self, ring: &mut Ring) {
        if let Some(uplink) = &mut self.uplink {
            uplink.stop(ring);
        }
    }

    fn is_idle(&self) -> bool {
        self.uplink.as_ref().is_none_or(Port::is_idle)
    }
}

/// What comes in by the uplink.
struct Inward<'a, S> {
    bridge: &'a mut Bridge,
    to: &'a mut S,
}

impl<S: Sink> Sink for Inward<'_, S> {
    /// To whom it is for, whichever NIC the uplink takes it to be for.
    #[inline]
    fn deliver(&mut self, _to: Nic, frame: &Frame<'_>) -> Result<(), DropReason> {
        let reason = match decide(self.bridge, Member::UPLINK, &frame.link) {
            Verdict::To(member) => match member.nic() {
                Some(nic) => return self.to.deliver(nic, frame),
                None => DropReason::Hairpin,
            },
            Verdict::Flood if frame.packets() > MOST_FLOODED => DropReason::BadOffload,
            Verdict::Flood => match flood_nics(self.bridge, Member::UPLINK, frame, self.to) {
                0 => DropReason::NoPort,
                _ => return Ok(()),
            },
            Verdict::Drop(reason) => reason,
        };
        self.bridge.counts.uplink_drops += 1;
        Err(reason)
    }
}

#[inline]
fn decide(bridge: &mut Bridge, from: Member, link: &Link) -> Verdict {
    let (destination, source) = stations(link);
    bridge.decide(from, destination, source)
}

/// Where a frame goes, and where it comes from.
#[inline]
fn stations(link: &Link) -> (Station, Station) {
    (Station::of_bits(link.to), Station::of_bits(link.from))
}

/// Copies frames to a NIC. What became of each is counted there.
#[inline]
fn deliver_to<'a>(nic: Nic, frames: impl Iterator<Item = Frame<'a>> + Clone, to: &mut impl Sink) {
    let mut left = frames;
    while left.clone().next().is_some() {
        let done = to.deliver_all(nic, left.clone());
        // The one that it did not get is behind them.
        left.nth(done);
    }
}

/// Copies a frame to all NICs but the one that it is from: how many they were.
fn flood_nics(bridge: &Bridge, from: Member, frame: &Frame<'_>, to: &mut impl Sink) -> usize {
    let mut others = 0;
    for nic in bridge.members() {
        if Member::from(*nic) != from {
            others += 1;
            // What became of it there is counted there.
            let _ = to.deliver(*nic, frame);
        }
    }
    others
}

#[cfg(test)]
mod tests;
