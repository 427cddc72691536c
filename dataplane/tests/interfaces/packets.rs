//! UDP over IPv4, written out by hand: what a guest would send, and what one would look at.

use bulkhead_dataplane::net::header::{GSO_UDP_L4, Header, NEEDS_CSUM};

/// The guest's address.
pub const GUEST: [u8; 4] = [10, 7, 0, 2];
/// The host's.
pub const HOST: [u8; 4] = [10, 7, 0, 1];
/// The guest's station.
pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Bytes of Ethernet's, IP's and UDP's headers.
pub const HEADERS: usize = 14 + 20 + 8;

/// A datagram from the guest to a port of the host's, and how its checksum stands.
pub struct Datagram<'a> {
    /// The host's station.
    pub to: [u8; 6],
    pub from_port: u16,
    pub to_port: u16,
    pub payload: &'a [u8],
}

impl Datagram<'_> {
    /// The frame, with a checksum that is right.
    pub fn whole(&self) -> Vec<u8> {
        let mut frame = self.frame();
        let sum = checksum(&[&pseudo(&frame), &frame[34..]]);
        frame[40..42].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// The frame and the header that has its checksum completed.
    pub fn partial(&self) -> (Header, Vec<u8>) {
        let mut frame = self.frame();
        let sum = !checksum(&[&pseudo(&frame)]);
        frame[40..42].copy_from_slice(&sum.to_be_bytes());
        let header = Header {
            flags: NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 6,
            ..Header::default()
        };
        (header, frame)
    }

    /// The same, to be cut into datagrams of `mss` bytes.
    pub fn several(&self, mss: u16) -> (Header, Vec<u8>) {
        let (header, frame) = self.partial();
        let header = Header {
            gso_type: GSO_UDP_L4,
            gso_size: mss,
            hdr_len: u16::try_from(HEADERS).expect("small"),
            ..header
        };
        (header, frame)
    }

    fn frame(&self) -> Vec<u8> {
        let udp_bytes = u16::try_from(8 + self.payload.len()).expect("fits");
        let total = (20 + udp_bytes).to_be_bytes();
        let mut ip = [
            0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        ip[12..16].copy_from_slice(&GUEST);
        ip[16..20].copy_from_slice(&HOST);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let parts: [&[u8]; 9] = [
            &self.to,
            &GUEST_MAC,
            &[8, 0],
            &ip,
            &self.from_port.to_be_bytes(),
            &self.to_port.to_be_bytes(),
            &udp_bytes.to_be_bytes(),
            &[0; 2],
            self.payload,
        ];
        parts.concat()
    }
}

/// The pseudo header of a UDP frame's checksum.
fn pseudo(frame: &[u8]) -> Vec<u8> {
    [&frame[26..34], &[0, 17], &frame[38..40]].concat()
}

/// The internet checksum of these bytes; each part but the last has an even number of them.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// Whether a UDP frame's checksum is right.
pub fn is_intact(frame: &[u8]) -> bool {
    checksum(&[&pseudo(frame), &frame[34..]]) == 0
}

/// The payload of a UDP frame to this port of the guest's; none of any other frame.
pub fn payload_of(frame: &[u8], port: u16) -> Option<&[u8]> {
    let is_it = frame.get(12..14) == Some(&[8, 0])
        && frame.get(23) == Some(&17)
        && frame.get(36..38) == Some(&port.to_be_bytes());
    is_it.then(|| &frame[HEADERS..])
}
