//! Offloads that their own frame contradicts: checksums and segments outside of it, of nothing, of something else.

use std::sync::Arc;

use bulkhead_dataplane::port::DropReason::{BadOffload, TooLong};
use bulkhead_integration::packets::{ARP, Ip, Packet, TCP, UDP};

use crate::arena::{A, B, End};
use crate::frames::{Shot, shoot};
use crate::rig::mac;
use crate::{BOTH, Case};

/// A header, field by field.
#[derive(Clone, Copy)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.flags, self.gso_type];
        for field in [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }
}

const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;
const UDP_FRAGMENTS: u8 = 3;
const TCPV6: u8 = 4;
const UDP_L4: u8 = 5;
const ECN: u8 = 0x80;

const BAD: End = End::Dropped(BadOffload);

fn packet(base: Packet) -> Packet {
    Packet {
        dst: mac(B),
        src: mac(A),
        ..base
    }
}

fn tcp(payload: usize) -> Packet {
    packet(Packet::v4(TCP, &vec![7; payload]))
}

fn tcp6(payload: usize) -> Packet {
    packet(Packet::v6(TCP, &vec![7; payload]))
}

fn udp(payload: usize) -> Packet {
    packet(Packet::v4(UDP, &vec![7; payload]))
}

/// A row that sends a packet with its checksum left, to be cut or not, after header and frame were changed.
fn row(
    name: &'static str,
    end: End,
    make: fn() -> Packet,
    alter: fn(&mut Header, &mut Vec<u8>),
) -> Case {
    let run = move |arena: &mut crate::arena::Arena| {
        let packet = make();
        let (mut frame, csum_start, csum_offset) = packet.partial();
        let is_four = matches!(packet.ip, Ip::V4(..));
        let mut header = Header {
            flags: NEEDS_CSUM,
            gso_type: match (packet.protocol, is_four) {
                (TCP, true) => TCPV4,
                (TCP, false) => TCPV6,
                _ => UDP_L4,
            },
            hdr_len: 54,
            gso_size: 1000,
            csum_start,
            csum_offset,
            num_buffers: 0,
        };
        alter(&mut header, &mut frame);
        shoot(arena, &Shot::new(&header.bytes(), &frame), &frame)
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

/// The same of a frame that is not cut.
fn csum(name: &'static str, end: End, start: u16, offset: u16) -> Case {
    let run = move |arena: &mut crate::arena::Arena| {
        let (frame, ..) = tcp(400).partial();
        let header = Header {
            flags: NEEDS_CSUM,
            gso_type: 0,
            hdr_len: 0,
            gso_size: 0,
            csum_start: start,
            csum_offset: offset,
            num_buffers: 0,
        };
        shoot(arena, &Shot::new(&header.bytes(), &frame), &frame)
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

fn csums() -> Vec<Case> {
    // The frame has 454 bytes.
    vec![
        csum("csum_right", End::Delivered, 34, 16),
        csum("csum_start_past_the_frame", BAD, 455, 16),
        csum("csum_start_at_the_frames_end", BAD, 454, 0),
        csum("csum_in_the_frames_last_byte", BAD, 453, 0),
        csum("csum_start_in_ethernet", BAD, 0, 16),
        csum("csum_start_before_the_packet", BAD, 13, 2),
        csum("csum_start_largest", BAD, u16::MAX, 0),
        csum("csum_offset_largest", BAD, 34, u16::MAX),
        csum("csum_both_largest", BAD, u16::MAX, u16::MAX),
        csum("csum_sum_wraps", BAD, u16::MAX - 7, 42),
        csum("csum_behind_the_head", BAD, 300, 16),
        csum("csum_in_the_heads_last_byte", BAD, 191, 0),
        csum("csum_in_the_heads_last_two", BAD, 190, 0),
        csum("csum_over_the_packets_type_of_service", BAD, 14, 0),
        csum("csum_over_the_packets_source", BAD, 14, 12),
        csum("csum_over_the_packets_protocol", BAD, 14, 8),
        csum("csum_over_a_port", BAD, 34, 2),
        csum("csum_of_tcp_where_udp_has_it", BAD, 34, 6),
        csum("csum_behind_the_transports_header", BAD, 54, 16),
    ]
}

fn kinds() -> Vec<Case> {
    vec![
        row("gso_right", End::Delivered, || tcp(5000), |_, _| {}),
        row("gso_of_udp_right", End::Delivered, || udp(5000), |_, _| {}),
        row("gso_without_csum", BAD, || tcp(5000), |h, _| h.flags = 0),
        row(
            "gso_with_data_valid_alone",
            BAD,
            || tcp(5000),
            |h, _| h.flags = 2,
        ),
        row(
            "gso_with_every_flag",
            End::Delivered,
            || tcp(5000),
            |h, _| h.flags = 0xff,
        ),
        row("gso_type_unknown", BAD, || tcp(5000), |h, _| h.gso_type = 2),
        row(
            "gso_type_largest",
            BAD,
            || tcp(5000),
            |h, _| h.gso_type = 0xff,
        ),
        row("gso_with_ecn", BAD, || tcp(5000), |h, _| h.gso_type |= ECN),
        row("gso_ecn_alone", BAD, || tcp(5000), |h, _| h.gso_type = ECN),
        row(
            "gso_of_udp_fragments",
            BAD,
            || udp(5000),
            |h, _| h.gso_type = UDP_FRAGMENTS,
        ),
        row(
            "gso_tcp4_of_ipv6",
            BAD,
            || tcp6(5000),
            |h, _| h.gso_type = TCPV4,
        ),
        row(
            "gso_tcp6_of_ipv4",
            BAD,
            || tcp(5000),
            |h, _| h.gso_type = TCPV6,
        ),
        row(
            "gso_tcp_of_udp",
            BAD,
            || udp(5000),
            |h, _| h.gso_type = TCPV4,
        ),
        row(
            "gso_udp_of_tcp",
            BAD,
            || tcp(5000),
            |h, _| h.gso_type = UDP_L4,
        ),
        row(
            "gso_of_arp",
            BAD,
            || tcp(5000),
            |_, f| {
                f[12..14].copy_from_slice(&ARP.to_be_bytes());
            },
        ),
        row("gso_of_a_fragment", BAD, || tcp(5000), |_, f| f[20] |= 0x20),
        row(
            "gso_of_a_later_fragment",
            BAD,
            || tcp(5000),
            |_, f| f[21] = 1,
        ),
        row(
            "gso_of_another_protocol",
            BAD,
            || tcp(5000),
            |_, f| f[23] = 47,
        ),
        row(
            "gso_of_another_version",
            BAD,
            || tcp(5000),
            |_, f| f[14] = 0x65,
        ),
        row(
            "gso_behind_three_tags",
            BAD,
            || Packet {
                tags: vec![(0x8100, 1); 3],
                ..tcp(5000)
            },
            |_, _| {},
        ),
        row(
            "gso_behind_too_many_extension_headers",
            BAD,
            || Packet {
                extensions: vec![(60, vec![0, 1, 4, 0, 0, 0, 0]); 9],
                ..tcp6(5000)
            },
            |_, _| {},
        ),
        row(
            "gso_behind_an_endless_extension_header",
            BAD,
            || Packet {
                extensions: vec![(60, vec![0, 1, 4, 0, 0, 0, 0])],
                ..tcp6(5000)
            },
            |_, f| f[55] = 0xff,
        ),
        row(
            "gso_behind_a_routing_header",
            BAD,
            || Packet {
                extensions: vec![(43, vec![0, 0, 1, 0, 0, 0, 0])],
                ..tcp6(5000)
            },
            |_, _| {},
        ),
    ]
}

fn sizes() -> Vec<Case> {
    vec![
        row("gso_size_zero", BAD, || tcp(5000), |h, _| h.gso_size = 0),
        row("gso_size_one", BAD, || tcp(5000), |h, _| h.gso_size = 1),
        row(
            "gso_size_of_less_than_any_segment",
            BAD,
            || tcp(5000),
            |h, _| h.gso_size = 47,
        ),
        row(
            "gso_size_over_the_mtu",
            End::Dropped(TooLong),
            || tcp(5000),
            |h, _| {
                h.gso_size = 1461;
            },
        ),
        row(
            "gso_size_largest",
            End::Dropped(TooLong),
            || tcp(5000),
            |h, _| {
                h.gso_size = u16::MAX;
            },
        ),
        row(
            "gso_size_larger_than_the_payload",
            End::Delivered,
            || tcp(500),
            |_, _| {},
        ),
        row(
            "gso_of_udp_into_too_many",
            BAD,
            || udp(5000),
            |h, _| h.gso_size = 39,
        ),
        row(
            "gso_of_udp_into_none",
            BAD,
            || udp(5000),
            |h, _| h.gso_size = 0,
        ),
        row("gso_without_payload", BAD, || tcp(0), |_, _| {}),
        row(
            "gso_of_headers_that_are_cut",
            BAD,
            || tcp(5000),
            |_, f| f.truncate(50),
        ),
        row(
            "gso_of_the_longest_packet",
            End::Delivered,
            || tcp(65_495),
            |_, _| {},
        ),
        row("gso_longer_than_any_packet", BAD, || tcp(65_496), |_, _| {}),
        row(
            "gso_of_a_tcp_header_of_no_words",
            BAD,
            || tcp(5000),
            |_, f| f[46] = 0,
        ),
        row(
            "gso_of_a_tcp_header_that_is_short",
            BAD,
            || tcp(5000),
            |_, f| f[46] = 0x40,
        ),
        row(
            "gso_of_a_tcp_header_past_the_frame",
            BAD,
            || tcp(10),
            |_, f| f[46] = 0xf0,
        ),
        row(
            "gso_of_ip_options_past_the_frame",
            BAD,
            || tcp(5),
            |_, f| {
                f[14] = 0x4f;
                f.truncate(60);
            },
        ),
        row(
            "gso_of_a_short_ip_header",
            BAD,
            || tcp(5000),
            |_, f| f[14] = 0x44,
        ),
        row(
            "gso_csum_start_elsewhere",
            BAD,
            || tcp(5000),
            |h, _| h.csum_start += 1,
        ),
        row(
            "gso_csum_start_at_the_packet",
            BAD,
            || tcp(5000),
            |h, _| h.csum_start = 14,
        ),
        row(
            "gso_csum_offset_elsewhere",
            BAD,
            || tcp(5000),
            |h, _| h.csum_offset = 6,
        ),
        row(
            "gso_csum_outside",
            BAD,
            || tcp(5000),
            |h, _| h.csum_start = u16::MAX,
        ),
        row(
            "hdr_len_zero",
            End::Delivered,
            || tcp(5000),
            |h, _| h.hdr_len = 0,
        ),
        row(
            "hdr_len_past_the_frame",
            End::Delivered,
            || tcp(5000),
            |h, _| {
                h.hdr_len = u16::MAX;
            },
        ),
        row(
            "num_buffers_largest",
            End::Delivered,
            || tcp(5000),
            |h, _| {
                h.num_buffers = u16::MAX;
            },
        ),
        row(
            "data_valid_of_a_guest",
            End::Delivered,
            || tcp(500),
            |h, _| {
                (h.flags, h.gso_type) = (2, 0);
            },
        ),
    ]
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = csums();
    all.extend(kinds());
    all.extend(sizes());
    all
}
