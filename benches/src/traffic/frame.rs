//! What is sent: a UDP datagram, or a large TCP segment that is to be cut, over IPv4 between hosts of the range for
//! benchmarks (RFC 2544); in front of it the header that a driver writes (virtio 1.2, section 5.1.6).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Bytes of the header in front of each frame.
pub const HEADER_BYTES: usize = 12;
const ETHERNET_BYTES: usize = 14;
const IP_BYTES: usize = 20;
/// Payload of the packets that a large segment is cut into.
const MSS: u16 = 1448;
/// The header says: a checksum is to be completed, and TCP over IPv4 to be cut.
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// What frames are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A datagram in a frame of so many bytes, at least [`LEAST_BYTES`].
    Datagram(u32),
    /// A TCP segment in a frame of so many bytes, to be cut by whoever has to.
    Segment(u32),
}

/// Bytes of the shortest frame that has room for its number.
pub const LEAST_BYTES: u32 = 60;

impl Kind {
    /// Bytes from the Ethernet header on.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Datagram(bytes) | Self::Segment(bytes) => bytes,
        }
    }

    /// Where the frame's number stands, from the header in front of it on: right behind the transport's.
    #[must_use]
    #[inline]
    pub fn number_at(self) -> usize {
        let transport = match self {
            Self::Datagram(_) => 8,
            Self::Segment(_) => 20,
        };
        HEADER_BYTES + ETHERNET_BYTES + IP_BYTES + transport
    }

    /// Header and frame from one card to another, all but its number; `flow` makes it one of several flows.
    #[must_use]
    pub fn template(self, from: [u8; 6], to: [u8; 6], flow: u8) -> Vec<u8> {
        let total = HEADER_BYTES + self.bytes().max(LEAST_BYTES) as usize;
        let mut frame = Vec::with_capacity(total);
        frame.extend_from_slice(&self.header());
        frame.extend_from_slice(&to);
        frame.extend_from_slice(&from);
        let ip_bytes = total - HEADER_BYTES - ETHERNET_BYTES;
        let ip_bytes = u16::try_from(ip_bytes).unwrap_or(u16::MAX);
        let protocol = match self {
            Self::Datagram(_) => 17,
            Self::Segment(_) => 6,
        };
        frame.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
        frame.extend_from_slice(&ip_bytes.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol]);
        let addresses = [198, 18, 0, flow, 198, 18, 1, flow];
        frame.extend_from_slice(&ip_checksum(ip_bytes, protocol, addresses).to_be_bytes());
        frame.extend_from_slice(&addresses);
        // From and to the discard port.
        frame.extend_from_slice(&[0, 9, 0, 9]);
        match self {
            Self::Datagram(_) => {
                frame.extend_from_slice(&ip_bytes.saturating_sub(20).to_be_bytes());
            }
            // An ACK whose header has five words.
            Self::Segment(_) => frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10]),
        }
        frame.resize(total, 0);
        frame
    }

    fn header(self) -> [u8; HEADER_BYTES] {
        let Self::Segment(_) = self else {
            return [0; HEADER_BYTES];
        };
        let [mss_low, mss_high] = MSS.to_le_bytes();
        let [headers, transport] = [54, 34];
        [
            NEEDS_CSUM, GSO_TCPV4, headers, 0, mss_low, mss_high, transport, 0, 16, 0, 0, 0,
        ]
    }
}

fn ip_checksum(ip_bytes: u16, protocol: u8, addresses: [u8; 8]) -> u16 {
    let fixed = 0x4500 + u32::from(ip_bytes) + 0x4000 + 0x4000 + u32::from(protocol);
    let pairs = addresses.chunks_exact(2);
    let words = pairs.map(|pair| {
        pair.iter()
            .fold(0, |word, byte| word << 8 | u32::from(*byte))
    });
    let sum = fixed + words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole_packets() {
        for kind in [
            Kind::Datagram(64),
            Kind::Datagram(1500),
            Kind::Segment(65_549),
        ] {
            let frame = kind.template([2; 6], [4; 6], 3);
            assert_eq!(frame.len(), HEADER_BYTES + kind.bytes() as usize);
            let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
            let sum: u32 = (26..46).step_by(2).map(|at| u32::from(word(at))).sum();
            let folded = (sum & 0xffff) + (sum >> 16);
            assert_eq!((folded & 0xffff) + (folded >> 16), 0xffff, "{kind:?}");
            assert_eq!(usize::from(word(28)), frame.len() - HEADER_BYTES - 14);
            assert!(kind.number_at() + 4 <= frame.len());
            assert!((kind.number_at() + super::super::slots::START).is_multiple_of(4));
        }
    }
}
