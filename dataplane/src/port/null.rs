//! The port that leads nowhere: it takes every frame and none ever comes. For NICs that are to be there and connected
//! to nothing, and to measure what everything before a port costs.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{DropReason, Nic, Port, Sink};
use crate::net::Counts;
use crate::net::frame::Frame;
use crate::worker::ring::{Completion, Ring};

/// The null port.
#[derive(Debug, Clone, Copy, Default)]
pub struct NullPort;

impl Port for NullPort {
    #[inline]
    fn receive(&mut self, _now: u64, _to: &mut impl Sink, _ring: &mut Ring) -> usize {
        0
    }

    #[inline]
    fn room(&self, _from: Nic) -> usize {
        usize::MAX
    }

    #[inline]
    fn transmit(
        &mut self,
        _from: Nic,
        _frame: &Frame<'_>,
        _to: &mut impl Sink,
        _ring: &mut Ring,
    ) -> Result<(), DropReason> {
        Ok(())
    }

    #[inline]
    fn transmit_all<'a>(
        &mut self,
        _from: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
        _to: &mut impl Sink,
        _ring: &mut Ring,
        counts: &mut Counts,
    ) {
        for frame in frames {
            counts.frame(frame.bytes() as u64);
        }
    }

    #[inline]
    fn flush(&mut self, _ring: &mut Ring) {}

    fn landed(&mut self, _completion: Completion, _ring: &mut Ring) {}

    fn arm(&mut self, _ring: &mut Ring) -> bool {
        true
    }

    fn stop(&mut self, _ring: &mut Ring) {}

    fn is_idle(&self) -> bool {
        true
    }
}
