//! Checksums and segments in software, read by a checker that was written from the RFCs.

use bulkhead_integration::packets::{Packet, Seen, TCP, UDP, check};

use super::{key, of_guest, pattern, segment, unsummed};
use crate::net::frame::{Frame, Offload};
use crate::net::header::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Header};
use crate::net::offload::{Checksums, SegmentHead, Segments, Staging, complete};

/// Packets of every kind, with tags, options and extension headers.
fn packets(protocol: u8, payload: &[u8]) -> Vec<Packet> {
    let four = Packet::v4(protocol, payload);
    let six = Packet::v6(protocol, payload);
    let tagged = Packet {
        tags: vec![(0x88a8, 5), (0x8100, 6)],
        extensions: vec![(0, vec![1; 12])],
        options: vec![1; 12],
        ..four.clone()
    };
    let behind = Packet {
        extensions: vec![(0, vec![0, 1, 4, 0, 0, 0, 0])],
        options: vec![1; 40],
        ..six.clone()
    };
    vec![four, six, tagged, behind]
}

#[test]
fn a_checksum_is_completed_over_head_and_body() {
    for length in [0, 1, 2, 99, 100, 101, 1460, 9001] {
        for packet in [
            packets(TCP, &pattern(length)),
            packets(UDP, &pattern(length)),
        ]
        .concat()
        {
            let (header, bytes) = unsummed(&packet);
            of_guest(&header, &bytes, &[12, 20, 7], |frame| {
                let frame = frame.expect("good");
                let mut staging = Staging::default();
                let staged = staging.stage(&frame).expect("it fits");
                let Offload::NeedsCsum(csum) = frame.offload else {
                    panic!("{:?}", frame.offload);
                };
                complete(staged, csum);
                assert_eq!(staged, packet.complete(), "{length}");
            });
        }
    }
}

/// A checksum of zero would say that there is none.
#[test]
fn a_checksum_that_would_be_zero_is_not() {
    let mut packet = Packet::v4(UDP, &[0, 0]);
    let before = packet.complete();
    packet.payload = before[40..42].to_vec();
    let (header, mut bytes) = unsummed(&packet);
    let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
    let Offload::NeedsCsum(csum) = frame.offload else {
        panic!("{:?}", frame.offload);
    };
    complete(&mut bytes, csum);
    assert_eq!(bytes[40..42], [0xff, 0xff]);
    check(&bytes).expect("good");
}

/// The segments of a frame; completed afterwards, if they were left.
fn cut(header: &Header, bytes: &[u8], checksums: Checksums) -> Vec<Vec<u8>> {
    let frame = Frame::of_bytes(header, bytes, key()).expect("good");
    let Offload::Gso(gso) = frame.offload else {
        panic!("{:?}", frame.offload);
    };
    let mut segments = Segments::new(bytes, gso, frame.link.l3, checksums).expect("it can be cut");
    let mut head = SegmentHead::default();
    let mut all = Vec::new();
    while let Some((head, payload)) = segments.next(&mut head) {
        let mut whole = [head, payload].concat();
        if checksums == Checksums::Left {
            assert!(check(&whole).is_err(), "it is not complete");
            complete(&mut whole, gso.csum);
        }
        all.push(whole);
    }
    assert_eq!(all.len(), frame.packets());
    all
}

/// Segments of the packet, each looked at by itself; all of them the same whoever completes their checksums.
fn seen(packet: &Packet, gso_type: u8, mss: u16) -> Vec<Seen> {
    let (header, bytes) = segment(packet, gso_type, mss);
    let whole = cut(&header, &bytes, Checksums::Complete);
    assert_eq!(whole, cut(&header, &bytes, Checksums::Left));
    let link = packet.link();
    let each = whole.iter().map(|frame| {
        assert!(frame.starts_with(&link));
        check(frame).unwrap_or_else(|problem| panic!("{problem}: {frame:02x?}"))
    });
    each.collect()
}

#[test]
fn segments_of_tcp_are_the_stream() {
    const FIN: u8 = 1;
    const PSH: u8 = 8;
    const ACK: u8 = 0x10;
    const CWR: u8 = 0x80;
    for (length, mss) in [
        (1, 1400),
        (1400, 1400),
        (1401, 1400),
        (65_000, 1460),
        (5001, 777),
    ] {
        for packet in packets(TCP, &pattern(length)) {
            let packet = Packet {
                flags: FIN | PSH | ACK | CWR,
                ..packet
            };
            let is_four = matches!(packet.ip, bulkhead_integration::packets::Ip::V4(..));
            let gso_type = if is_four { GSO_TCPV4 } else { GSO_TCPV6 };
            let segments = seen(&packet, gso_type, mss);
            assert_eq!(segments.len(), length.div_ceil(usize::from(mss)));
            let mut stream: Vec<u8> = Vec::new();
            for (number, segment) in (0u16..).zip(&segments) {
                let is_last = usize::from(number) + 1 == segments.len();
                let at = u32::try_from(stream.len()).expect("small");
                assert_eq!(segment.sequence, packet.sequence.wrapping_add(at));
                let id = if is_four { packet.id + number } else { 0 };
                assert_eq!((segment.ports, segment.id), (packet.ports, id));
                let flags =
                    ACK | if is_last { FIN | PSH } else { 0 } | if number == 0 { CWR } else { 0 };
                assert_eq!(segment.flags, flags, "{number}");
                assert!(is_last || segment.payload.len() == usize::from(mss));
                stream.extend(&segment.payload);
            }
            assert_eq!(stream, packet.payload);
        }
    }
}

#[test]
fn each_datagram_of_udp_is_one_of_its_own() {
    for (length, mss) in [(1, 1000), (1000, 1000), (60_001, 1472), (128, 1)] {
        for packet in packets(UDP, &pattern(length)) {
            let segments = seen(&packet, GSO_UDP_L4, mss);
            let sent: Vec<&[u8]> = packet.payload.chunks(usize::from(mss)).collect();
            let got: Vec<&[u8]> = segments.iter().map(|one| &one.payload[..]).collect();
            assert_eq!(got, sent);
        }
    }
}
