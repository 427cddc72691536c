//! Frames of chains, and offloads that their own frame contradicts.

use bulkhead_integration::packets::{ICMPV6, Packet, TCP, UDP};

use super::{key, of_guest, pattern, segment, tcp, tcp_segment, unsummed};
use crate::net::frame::{
    Csum, Frame, Gso, GsoKind, HEAD_BYTES, MOST_DATAGRAMS, MOST_FRAME_BYTES, Offload,
};
use crate::net::header::{
    DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Header, HeaderSize, NEEDS_CSUM,
};
use crate::port::DropReason;

/// What is made of an offload, of a frame in guest memory and of one in ours.
fn offload(header: &Header, bytes: &[u8]) -> Result<Offload, DropReason> {
    let of_ours = Frame::of_bytes(header, bytes, key()).map(|frame| frame.offload);
    let of_guest = of_guest(header, bytes, &[], |frame| frame.map(|frame| frame.offload));
    assert_eq!(of_guest, of_ours);
    of_guest
}

const BAD: Result<Offload, DropReason> = Err(DropReason::BadOffload);

#[test]
fn header_and_frame_may_be_split_anywhere() {
    let bytes = tcp(600).complete();
    let header = Header::default();
    for pieces in [
        &[][..],
        &[12],
        &[1; 40],
        &[5, 7, 14, 20, 20],
        &[11, 2],
        &[204],
        &[205, 1],
    ] {
        of_guest(&header, &bytes, pieces, |frame| {
            let frame = frame.expect("good");
            assert_eq!(frame.head, &bytes[..HEAD_BYTES]);
            assert_eq!(frame.bytes(), bytes.len());
            let mut whole = vec![0; bytes.len()];
            assert_eq!(frame.copy_to(&mut whole), Some(bytes.len()));
            assert_eq!(whole, bytes);
            assert_eq!(frame.copy_to(&mut whole[1..]), None, "no room");
        });
    }
}

#[test]
fn a_frame_that_fits_into_its_head_has_no_body() {
    let bytes = pattern(HEAD_BYTES);
    of_guest(&Header::default(), &bytes, &[], |frame| {
        assert!(frame.expect("good").body.is_empty());
    });
}

#[test]
fn without_a_whole_header_and_ethernet_there_is_no_frame() {
    for length in 0..14 {
        of_guest(&Header::default(), &pattern(length), &[3], |frame| {
            assert_eq!(frame.err(), Some(DropReason::Malformed), "{length}");
        });
    }
    let guest = super::Guest::new();
    for (size, least) in [(HeaderSize::Short, 24), (HeaderSize::Long, 26)] {
        for length in [0, 9, 10, 11, 12, least - 1, least] {
            let buffer = guest.buffer(&vec![0; length], &[4]);
            let mut copy = super::HeadBuffer::default();
            let frame = Frame::of_chain(&buffer, size, key(), &mut copy);
            assert_eq!(frame.is_ok(), length >= least, "{size:?}, {length}");
        }
    }
}

#[test]
fn nothing_is_longer_than_the_longest_frame() {
    let mut bytes = pattern(MOST_FRAME_BYTES + 1);
    of_guest(&Header::default(), &bytes, &[], |frame| {
        assert_eq!(frame.err(), Some(DropReason::TooLong));
    });
    let refused = Frame::of_bytes(&Header::default(), &bytes, key());
    assert_eq!(refused.err(), Some(DropReason::TooLong));
    bytes.pop();
    assert_eq!(offload(&Header::default(), &bytes), Ok(Offload::None));
}

#[test]
fn a_checksum_lies_inside_of_the_head() {
    let (header, bytes) = unsummed(&tcp(600));
    let csum = Csum {
        start: 34,
        offset: 16,
    };
    assert_eq!(offload(&header, &bytes), Ok(Offload::NeedsCsum(csum)));
    let at = |csum_start: u16, csum_offset: u16| Header {
        csum_start,
        csum_offset,
        ..header
    };
    for (start, offset) in [
        (0, 0),
        (13, 20),
        (u16::MAX, u16::MAX),
        (u16::MAX, 1),
        (34, u16::MAX),
        (650, 2),
        (190, 1),
        (191, 0),
    ] {
        assert_eq!(
            offload(&at(start, offset), &bytes),
            BAD,
            "{start}, {offset}"
        );
    }
}

#[test]
fn a_checksum_stands_where_its_transport_has_it_or_behind_all_that_is_looked_at() {
    let at = |csum_start: u16, csum_offset: u16| Header {
        flags: NEEDS_CSUM,
        csum_start,
        csum_offset,
        ..Header::default()
    };
    for (protocol, offset) in [(TCP, 16), (UDP, 6), (ICMPV6, 2)] {
        let bytes = Packet::v6(protocol, &pattern(600)).complete();
        for start in [14, 53, 54, 55, 60] {
            for other in [0, 2, 4, 6, 16, 18, 40] {
                let is_its = (start, other) == (54, offset);
                let found = offload(&at(start, other), &bytes);
                assert_eq!(found.is_ok(), is_its, "{protocol}: {start}, {other}");
            }
        }
    }
    let icmp = Packet::v4(1, &pattern(600)).complete();
    for (start, other, is_its) in [
        (34, 2, true),
        (34, 0, false),
        (35, 0, false),
        (36, 4, false),
    ] {
        let found = offload(&at(start, other), &icmp);
        assert_eq!(found.is_ok(), is_its, "ICMP: {start}, {other}");
    }
    // Of GRE, where its header may have it, and of what isn't IP; up to the head's end.
    let gre = Packet::v4(47, &pattern(600)).complete();
    let mut opaque = gre.clone();
    opaque[12..14].copy_from_slice(&[0x88, 0x64]);
    for (bytes, least) in [(&gre, 34), (&opaque, 14)] {
        for (start, offset, is_good) in [
            (least, 4, true),
            (least - 1, 40, false),
            (190, 0, true),
            (190, 1, false),
            (191, 0, false),
            (192, 0, false),
        ] {
            let found = offload(&at(start, offset), bytes);
            assert_eq!(found.is_ok(), is_good, "{least}: {start}, {offset}");
        }
        // Of a short frame.
        assert!(offload(&at(58, 0), &bytes[..60]).is_ok());
        assert_eq!(offload(&at(59, 0), &bytes[..60]), BAD);
        assert_eq!(offload(&at(60, 0), &bytes[..60]), BAD);
    }
    // Nobody can tell where it belongs.
    let fragment = Packet {
        extensions: vec![(44, vec![0, 0, 1, 0, 0, 0, 1])],
        ..Packet::v6(UDP, &pattern(600))
    };
    let deep = Packet {
        extensions: vec![(60, vec![0, 1, 4, 0, 0, 0, 0]); 9],
        ..Packet::v6(UDP, &pattern(600))
    };
    for packet in [fragment, deep] {
        let bytes = packet.complete();
        assert_eq!(offload(&at(150, 6), &bytes), BAD);
    }
    for ethertype in [0x0806, 0x8035, 0x05dc] {
        let mut bytes = gre.clone();
        bytes[12..14].copy_from_slice(&u16::to_be_bytes(ethertype));
        assert_eq!(offload(&at(60, 0), &bytes), BAD, "{ethertype:#x}");
    }
}

#[test]
fn only_an_interface_of_the_host_says_that_data_is_valid() {
    let header = Header {
        flags: DATA_VALID,
        ..Header::default()
    };
    let bytes = tcp(10).complete();
    let ours = Frame::of_bytes(&header, &bytes, key()).expect("good");
    assert_eq!(ours.offload, Offload::Valid);
    of_guest(&header, &bytes, &[], |frame| {
        assert_eq!(frame.expect("good").offload, Offload::None);
    });
}

#[test]
fn segments_are_what_their_own_headers_say() {
    let options = Packet {
        tags: vec![(0x88a8, 5), (0x8100, 6)],
        extensions: vec![(0, vec![1; 40])],
        options: vec![1; 40],
        ..Packet::v4(TCP, &pattern(5000))
    };
    let behind = Packet {
        extensions: vec![
            (0, vec![0, 1, 4, 0, 0, 0, 0]),
            (60, vec![0, 1, 4, 0, 0, 0, 0]),
        ],
        ..Packet::v6(UDP, &pattern(5000))
    };
    for (packet, gso_type, kind, header_bytes) in [
        (tcp(5000), GSO_TCPV4, GsoKind::Tcp4, 54),
        (options, GSO_TCPV4, GsoKind::Tcp4, 22 + 60 + 60),
        (
            Packet::v6(TCP, &pattern(5000)),
            GSO_TCPV6,
            GsoKind::Tcp6,
            74,
        ),
        (
            Packet::v4(UDP, &pattern(5000)),
            GSO_UDP_L4,
            GsoKind::Udp4,
            42,
        ),
        (behind, GSO_UDP_L4, GsoKind::Udp6, 14 + 40 + 16 + 8),
    ] {
        let (header, bytes) = segment(&packet, gso_type, 1400);
        let csum = Csum {
            start: header.csum_start,
            offset: header.csum_offset,
        };
        let gso = Gso {
            kind,
            mss: 1400,
            header_bytes,
            csum,
        };
        let found = offload(&header, &bytes);
        assert_eq!(found, Ok(Offload::Gso(gso)));
        let told = found.expect("good").header();
        assert_eq!((told.gso_type, told.gso_size), (gso_type, 1400));
        assert_eq!((told.flags, told.hdr_len), (NEEDS_CSUM, header_bytes));
        // Every other kind is a lie, with and without the mark for congestion, which is not offered.
        for other in (0u8..=255).filter(|other| ![GSO_NONE, gso_type].contains(other)) {
            let header = Header {
                gso_type: other,
                ..header
            };
            assert_eq!(offload(&header, &bytes), BAD, "{other}");
        }
    }
}

#[test]
fn segments_that_can_not_be_cut_are_refused() {
    let (good, bytes) = tcp_segment(5000, 1400);
    assert!(offload(&good, &bytes).is_ok());
    for bad in [
        Header { flags: 0, ..good },
        Header {
            flags: DATA_VALID,
            ..good
        },
        Header {
            gso_size: 0,
            ..good
        },
        Header {
            gso_size: 47,
            ..good
        },
        Header {
            csum_start: 33,
            ..good
        },
        Header {
            csum_offset: 6,
            ..good
        },
    ] {
        assert_eq!(offload(&bad, &bytes), BAD, "{bad:?}");
    }
    // No payload, a TCP header that is too short, or longer than the frame.
    assert_eq!(offload(&good, &bytes[..54]), BAD);
    for words in [0, 4, 15] {
        let mut wrong = bytes[..70].to_vec();
        wrong[46] = words << 4;
        assert_eq!(offload(&good, &wrong), BAD, "{words}");
    }
    // The head ends inside of it.
    assert_eq!(offload(&good, &bytes[..46]), BAD);
    // A fragment has no segments, nor has what lies behind a third tag.
    let mut fragment = bytes.clone();
    fragment[20] = 0x20;
    assert_eq!(offload(&good, &fragment), BAD);
    let tagged = Packet {
        tags: vec![(0x8100, 1); 3],
        ..tcp(5000)
    };
    let (header, bytes) = segment(&tagged, GSO_TCPV4, 1400);
    assert_eq!(offload(&header, &bytes), BAD);
}

#[test]
fn a_frame_becomes_no_more_than_a_sender_pays_for() {
    let udp = Packet::v4(UDP, &pattern(1280));
    for (mss, good) in [(10, true), (9, false), (1, false), (1281, true)] {
        let (header, bytes) = segment(&udp, GSO_UDP_L4, mss);
        assert_eq!(offload(&header, &bytes).is_ok(), good, "{mss}");
    }
    assert_eq!(1280 / MOST_DATAGRAMS, 10);
    let (header, bytes) = tcp_segment(65_535 - 40, 48);
    assert!(offload(&header, &bytes).is_ok());
    // Longer than IP's length field.
    let (header, bytes) = tcp_segment(65_536 - 40, 48);
    assert_eq!(offload(&header, &bytes), BAD);
}

#[test]
fn what_a_routing_header_sends_elsewhere_is_not_cut() {
    let packet = Packet {
        extensions: vec![(43, [vec![2, 4, 1], vec![0; 20]].concat())],
        ..Packet::v6(TCP, &pattern(5000))
    };
    let (header, bytes) = segment(&packet, GSO_TCPV6, 1400);
    assert_eq!(offload(&header, &bytes), BAD);
    let (header, bytes) = unsummed(&packet);
    assert!(matches!(
        offload(&header, &bytes),
        Ok(Offload::NeedsCsum(_))
    ));
}

#[test]
fn an_mtu_is_compared_with_what_is_on_the_wire() {
    let (header, bytes) = tcp_segment(5000, 1460);
    let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
    assert_eq!((frame.packet_bytes(), frame.packets()), (1500, 4));
    let (header, bytes) = tcp_segment(100, 1460);
    let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
    assert_eq!((frame.packet_bytes(), frame.packets()), (140, 1));
    let tagged = Packet {
        tags: vec![(0x8100, 1)],
        ..Packet::v6(ICMPV6, &pattern(100))
    };
    let bytes = tagged.complete();
    let frame = Frame::of_bytes(&Header::default(), &bytes, key()).expect("good");
    assert_eq!((frame.packet_bytes(), frame.packets()), (140, 1));
}
