//! Offloads in software, for whoever can't take them as they are: a checksum is completed, a segment is cut.
//!
//! Both work on our own copy of the frame ([`Staging`]), made by one read of guest memory. A sum that was made over the
//! guest's bytes while they are copied, or over what a peer was given, would save that copy; but then a header that
//! was written first had to be found again in the peer's buffers, and each byte's path would be one of unsafe code.
//! The copy stays in the CPU's cache: it costs a tenth of the frame's whole way.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::checksum::{checksum, fold, sum};
use super::frame::{Csum, Frame, Gso, GsoKind, HEAD_BYTES, MOST_FRAME_BYTES};
use super::parse::{IPV6_BYTES, bytes, protocol, word};

/// Room for one frame of our own.
#[derive(Debug)]
pub struct Staging(Box<[u8]>);

impl Default for Staging {
    fn default() -> Self {
        Self(vec![0; MOST_FRAME_BYTES].into_boxed_slice())
    }
}

impl Staging {
    /// A copy of a frame, head and body; guest memory is copied once, and only the copy is looked at. None if memory is shorter than the
    /// frame says, which it never is.
    #[must_use]
    pub fn stage(&mut self, frame: &Frame<'_>) -> Option<&mut [u8]> {
        let bytes = frame.copy_to(&mut self.0)?;
        self.0.get_mut(..bytes)
    }
}

/// Stores a field of two bytes in network order, if it lies there.
fn put(bytes: &mut [u8], at: usize, value: u16) {
    let field = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut());
    if let Some(field) = field {
        *field = value.to_be_bytes();
    }
}

/// Completes a checksum (virtio 1.2, 5.1.6.2) of a whole frame: what stands in its place, the pseudo header's, is part
/// of the sum.
pub fn complete(frame: &mut [u8], csum: Csum) {
    let covered = frame.get(usize::from(csum.start)..).unwrap_or_default();
    let value = checksum(fold([sum(covered)]));
    put(frame, csum.at(), value);
}

/// What becomes of the transport's checksum of each segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// It is complete.
    Complete,
    /// It is left to the receiver, with the pseudo header's in its place.
    Left,
}

/// The segments that a frame is cut into, in order.
#[derive(Debug)]
pub struct Segments<'a> {
    gso: Gso,
    checksums: Checksums,
    l3: usize,
    headers: &'a [u8],
    payload: &'a [u8],
    /// Bytes of payload that are in segments already.
    done: usize,
    /// Segments so far.
    count: u16,
    /// Sum of both addresses and the protocol.
    pseudo: u32,
}

/// Where the headers of a segment are written to.
#[derive(Debug, Clone)]
pub struct SegmentHead([u8; HEAD_BYTES]);

impl Default for SegmentHead {
    fn default() -> Self {
        Self([0; HEAD_BYTES])
    }
}

/// TCP flags: no more data, hand it over, the congestion window was reduced.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

impl<'a> Segments<'a> {
    /// Of a whole frame, with its network header at `l3`; none if the frame is not what `gso` says.
    #[must_use]
    pub fn new(frame: &'a [u8], gso: Gso, l3: u16, checksums: Checksums) -> Option<Self> {
        let (headers, payload) = frame.split_at_checked(usize::from(gso.header_bytes))?;
        let l3 = usize::from(l3);
        let (addresses, proto) = match gso.kind {
            GsoKind::Tcp4 => (headers.get(l3 + 12..l3 + 20)?, protocol::TCP),
            GsoKind::Udp4 => (headers.get(l3 + 12..l3 + 20)?, protocol::UDP),
            GsoKind::Tcp6 => (headers.get(l3 + 8..l3 + 40)?, protocol::TCP),
            GsoKind::Udp6 => (headers.get(l3 + 8..l3 + 40)?, protocol::UDP),
        };
        Some(Self {
            gso,
            checksums,
            l3,
            headers,
            payload,
            done: 0,
            count: 0,
            pseudo: sum(addresses) + u32::from(proto),
        })
    }

    /// The next segment: its headers, written to `head`, and its payload.
    pub fn next<'h>(&mut self, head: &'h mut SegmentHead) -> Option<(&'h [u8], &'a [u8])> {
        let left = self
            .payload
            .get(self.done..)
            .filter(|left| !left.is_empty())?;
        let bytes = left.len().min(usize::from(self.gso.mss));
        let payload = left.get(..bytes)?;
        let head = head.0.get_mut(..self.headers.len())?;
        head.copy_from_slice(self.headers);
        self.network(head, bytes)?;
        self.transport(head, bytes == left.len(), bytes)?;
        self.checksum(head, payload);
        self.done += bytes;
        self.count = self.count.wrapping_add(1);
        Some((head, payload))
    }

    /// Bytes from the transport's header to the segment's end.
    fn transport_bytes(&self, payload: usize) -> Option<u16> {
        let header = self.headers.len() - usize::from(self.gso.csum.start);
        u16::try_from(header + payload).ok()
    }

    /// Length, number and checksum of the IP header.
    fn network(&self, head: &mut [u8], payload: usize) -> Option<()> {
        let l3 = self.l3;
        let packet = u16::try_from(head.len() - l3 + payload).ok()?;
        match self.gso.kind {
            GsoKind::Tcp4 | GsoKind::Udp4 => {
                let number = word(head, l3 + 4)?.wrapping_add(self.count);
                put(head, l3 + 2, packet);
                put(head, l3 + 4, number);
                put(head, l3 + 10, 0);
                let header = head.get(l3..usize::from(self.gso.csum.start))?;
                let check = !fold([sum(header)]);
                put(head, l3 + 10, check);
            }
            GsoKind::Tcp6 | GsoKind::Udp6 => {
                put(
                    head,
                    l3 + 4,
                    packet.checked_sub(u16::try_from(IPV6_BYTES).ok()?)?,
                );
            }
        }
        Some(())
    }

    /// Number and flags of TCP, length of UDP.
    fn transport(&self, head: &mut [u8], is_last: bool, payload: usize) -> Option<()> {
        let l4 = usize::from(self.gso.csum.start);
        match self.gso.kind {
            GsoKind::Tcp4 | GsoKind::Tcp6 => {
                let number = u32::from_be_bytes(bytes(head, l4 + 4)?);
                let number = number.wrapping_add(u32::try_from(self.done).ok()?);
                *head.get_mut(l4 + 4..)?.first_chunk_mut()? = number.to_be_bytes();
                let flags = head.get_mut(l4 + 13)?;
                if !is_last {
                    *flags &= !(FIN | PSH);
                }
                if self.count > 0 {
                    *flags &= !CWR;
                }
            }
            GsoKind::Udp4 | GsoKind::Udp6 => put(head, l4 + 4, self.transport_bytes(payload)?),
        }
        Some(())
    }

    /// The transport's checksum, over headers that are as they will be.
    fn checksum(&self, head: &mut [u8], payload: &[u8]) {
        let csum = self.gso.csum;
        let length = u32::from(self.transport_bytes(payload.len()).unwrap_or(0));
        let pseudo = fold([self.pseudo, length]);
        put(head, csum.at(), pseudo);
        if self.checksums == Checksums::Complete {
            let header = head.get(usize::from(csum.start)..).unwrap_or_default();
            // The header has an even number of bytes.
            let value = checksum(fold([sum(header), sum(payload)]));
            put(head, csum.at(), value);
        }
    }
}
