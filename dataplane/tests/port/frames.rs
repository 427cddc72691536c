//! Frames for tests, byte by byte, with their checksums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_dataplane::net::header::{GSO_TCPV4, Header, NEEDS_CSUM};

/// A MAC address of a number.
pub fn mac(number: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0, number]
}

/// The address of everyone.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame and the header that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub header: Header,
    pub bytes: Vec<u8>,
}

impl From<Vec<u8>> for Packet {
    fn from(bytes: Vec<u8>) -> Self {
        let header = Header::default();
        Self { header, bytes }
    }
}

/// An Ethernet frame.
pub fn ethernet(dst: [u8; 6], src: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&dst[..], &src, &ethertype.to_be_bytes(), payload].concat()
}

/// One in a VLAN.
pub fn tagged(vlan: u16, dst: [u8; 6], src: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let inner = [&vlan.to_be_bytes()[..], &ethertype.to_be_bytes(), payload].concat();
    ethernet(dst, src, 0x8100, &inner)
}

/// A packet of IP that carries `payload`.
pub fn ip(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> (u16, Vec<u8>) {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => (0x0800, ipv4(src, dst, protocol, payload)),
        (IpAddr::V6(src), IpAddr::V6(dst)) => (0x86dd, ipv6(src, dst, protocol, payload)),
        _ => panic!("addresses of one family"),
    }
}

pub fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("a packet");
    let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header.extend(src.octets());
    header.extend(dst.octets());
    let sum = !folded(sum(&header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&header, payload].concat()
}

pub fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("a packet");
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length.to_be_bytes());
    header.extend([next, 255]);
    header.extend(src.octets());
    header.extend(dst.octets());
    [&header, payload].concat()
}

/// An ARP request (1) or reply (2) in its Ethernet frame.
pub fn arp(operation: u16, src: [u8; 6], sender: ([u8; 6], Ipv4Addr), target: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend(operation.to_be_bytes());
    body.extend(sender.0);
    body.extend(sender.1.octets());
    body.extend([0; 6]);
    body.extend(target.octets());
    ethernet(BROADCAST, src, 0x0806, &body)
}

/// A UDP datagram over IPv4 in its Ethernet frame, of `bytes` bytes altogether, each with a value of its own.
pub fn datagram(dst: u8, src: u8, bytes: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..251).cycle().take(bytes - 42).collect();
    let length = u16::try_from(payload.len() + 8).expect("a datagram");
    let mut udp = vec![0x12, 0x34, 0x56, 0x78];
    udp.extend(length.to_be_bytes());
    // No checksum, as IPv4 allows.
    udp.extend([0, 0]);
    udp.extend(payload);
    let address = |number| Ipv4Addr::new(10, 0, 0, number);
    let packet = ipv4(address(src), address(dst), 17, &udp);
    ethernet(mac(dst), mac(src), 0x0800, &packet)
}

/// A TCP segment over IPv4 that is to be cut, of `bytes` bytes altogether: its checksum is the pseudo header's.
pub fn segment(dst: u8, src: u8, bytes: usize, mss: u16) -> Packet {
    let (from, to) = (Ipv4Addr::new(10, 0, 0, src), Ipv4Addr::new(10, 0, 0, dst));
    let payload: Vec<u8> = (0..241).cycle().take(bytes - 54).collect();
    let mut tcp = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1];
    tcp.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(payload);
    let length = u16::try_from(tcp.len()).expect("a segment");
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &[0, 6],
        &length.to_be_bytes(),
    ]
    .concat();
    tcp[16..18].copy_from_slice(&folded(sum(&pseudo)).to_be_bytes());
    let packet = ipv4(from, to, 6, &tcp);
    Packet {
        header: Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54,
            gso_size: mss,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        },
        bytes: ethernet(mac(dst), mac(src), 0x0800, &packet),
    }
}

fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    bytes.chunks(2).map(word).sum()
}

fn folded(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xffff);
    u16::try_from((once >> 16) + (once & 0xffff)).expect("folded twice")
}
