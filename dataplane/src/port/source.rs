//! A port that makes frames: as many of one length as its card's guest takes. To measure what it costs to give frames to
//! a guest, and nothing else; what the guest sends goes nowhere.
//!
//! It never has nothing to give, so that its worker looks again and again and never sleeps.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::iter::repeat_n;

use super::{DropReason, Nic, Port, Sink};
use crate::net::HashKey;
use crate::net::frame::{Frame, MOST_FRAME_BYTES};
use crate::net::header::Header;
use crate::worker::ring::{Completion, Ring};

/// Frames that are given together at most.
const BATCH: usize = 32;
/// Bytes of the shortest frame that it makes: Ethernet, IPv4 and UDP headers.
const LEAST_BYTES: usize = 14 + 20 + 8;
/// Where its frames come from: an address that no card has.
const SOURCE_MAC: [u8; 6] = [0x02, 0xff, 0, 0, 0, 0xfe];

/// The port.
#[derive(Debug)]
pub struct SourcePort {
    nic: Nic,
    frame: Box<[u8]>,
    key: HashKey,
}

impl SourcePort {
    /// Makes frames of so many bytes (from the Ethernet header on, within what is possible) for a card with this
    /// address: UDP over IPv4 between two hosts of the range for benchmarks (RFC 2544).
    #[must_use]
    pub fn new(nic: Nic, mac: [u8; 6], bytes: usize, key: HashKey) -> Self {
        let bytes = bytes.clamp(LEAST_BYTES, MOST_FRAME_BYTES);
        let ip_bytes = u16::try_from(bytes - 14).unwrap_or(u16::MAX);
        let udp_bytes = ip_bytes - 20;
        let mut frame = Vec::with_capacity(bytes);
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&SOURCE_MAC);
        // IPv4, and its header without options.
        frame.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
        frame.extend_from_slice(&ip_bytes.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 17]);
        frame.extend_from_slice(&ip_checksum(ip_bytes).to_be_bytes());
        frame.extend_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
        // UDP from and to the discard port, without a checksum.
        frame.extend_from_slice(&[0, 9, 0, 9]);
        frame.extend_from_slice(&udp_bytes.to_be_bytes());
        frame.resize(bytes, 0);
        Self {
            nic,
            frame: frame.into(),
            key,
        }
    }
}

/// Of the header that [`SourcePort::new`] makes: everything but the length is always the same.
fn ip_checksum(ip_bytes: u16) -> u16 {
    let words = [
        0x4500, ip_bytes, 0, 0x4000, 0x4011, 0xc612, 0x0001, 0xc612, 0x0002,
    ];
    let sum: u32 = words.into_iter().map(u32::from).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

impl Port for SourcePort {
    fn receive(&mut self, _now: u64, to: &mut impl Sink, _ring: &mut Ring) -> usize {
        let Ok(frame) = Frame::of_bytes(&Header::default(), &self.frame, self.key) else {
            return 0;
        };
        to.deliver_all(self.nic, repeat_n(frame, BATCH))
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
    fn flush(&mut self, _ring: &mut Ring) {}

    fn landed(&mut self, _completion: Completion, _ring: &mut Ring) {}

    fn arm(&mut self, _ring: &mut Ring) -> bool {
        false
    }

    fn stop(&mut self, _ring: &mut Ring) {}

    fn is_idle(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(bytes: usize) -> SourcePort {
        SourcePort::new(Nic(0), [2, 0, 0, 0, 0, 1], bytes, HashKey::new(1))
    }

    #[test]
    fn its_frames_are_whole_packets_of_the_wanted_length() {
        for bytes in [LEAST_BYTES, 64, 1500, MOST_FRAME_BYTES] {
            let frame = source(bytes).frame;
            assert_eq!(frame.len(), bytes);
            let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
            let sum: u32 = (14..34).step_by(2).map(|at| u32::from(word(at))).sum();
            let folded = (sum & 0xffff) + (sum >> 16);
            assert_eq!((folded & 0xffff) + (folded >> 16), 0xffff, "{bytes}");
            assert_eq!(word(38), word(16) - 20, "{bytes}");
        }
        assert_eq!(source(0).frame.len(), LEAST_BYTES);
    }
}
