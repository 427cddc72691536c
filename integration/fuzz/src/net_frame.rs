//! `net_frame`: a driver's chain with any header and any frame, cut anywhere, against a model that decides by the
//! specification's sentences (virtio 1.2, 5.1.6.2); and its guest changes all of it as soon as it was looked at.

use std::cell::RefCell;

use bulkhead_dataplane::memory::GuestBuffer;
use bulkhead_dataplane::net::frame::{Frame, HEAD_BYTES, HeadBuffer, Offload};
use bulkhead_dataplane::net::parse::{Network, Transport};
use bulkhead_dataplane::net::roles::{is_ordinary, role};
use bulkhead_dataplane::net::{GsoKind, HashKey, HeaderSize};
use bulkhead_dataplane::port::DropReason;

use crate::guest::Guest;
use crate::input::Input;
use crate::wire::{Layers, layers, word};

/// Bytes of the longest frame, and of the longest packet in one that is cut.
const MOST_FRAME: usize = 14 + 8 + 65_535;
const MOST_PACKET: usize = 65_535;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

pub fn run(data: &[u8]) {
    GUEST.with_borrow(|guest| {
        let mut input = Input::new(data);
        let size = if input.flag() {
            HeaderSize::Long
        } else {
            HeaderSize::Short
        };
        let mut bytes = Vec::new();
        let buffer = chain(guest, &mut input, &mut bytes);
        let mut copy = HeadBuffer::default();
        let frame = Frame::of_chain(&buffer, size, HashKey::new(7), &mut copy);
        let right = model(&bytes, size.bytes());
        match (frame, right) {
            (Ok(frame), Ok(right)) => {
                // What was decided holds, whatever the guest does now.
                guest.clear();
                let head = &bytes[size.bytes()..];
                assert_eq!(frame.head, &head[..head.len().min(HEAD_BYTES)]);
                assert_eq!(frame.bytes(), head.len());
                check_info(&frame);
                check_offload(&frame, right);
                let _ = frame.claims();
                check_role(&frame);
            }
            (Err(given), Err(right)) => assert_eq!(given, right),
            (given, right) => panic!("{given:?}, and right is {right:?}"),
        }
    });
}

/// A chain whose ranges have these bytes: those of the input, some of them many times over.
fn chain(guest: &Guest, input: &mut Input<'_>, bytes: &mut Vec<u8>) -> GuestBuffer {
    let mut buffer = GuestBuffer::default();
    buffer.reset(&guest.lease);
    let mut at = 0u64;
    while !input.is_empty() {
        let length = match input.u8() {
            short @ ..=199 => u32::from(short),
            long => u32::from(input.u16()) >> (long & 3),
        };
        // Two regions touch here: a range may lie in both.
        if at + u64::from(length) > 0x1_0000 {
            break;
        }
        let mut content = input.bytes(length as usize).to_vec();
        content.resize(length as usize, 0xa5);
        // As far as a region goes, and the rest behind.
        let room = usize::try_from(0x8000u64.saturating_sub(at)).expect("small");
        let (front, back) = content.split_at(room.min(content.len()));
        guest.write(at, front);
        guest.write(at + front.len() as u64, back);
        buffer.push(at, length).expect("in memory");
        bytes.extend(content);
        at += u64::from(length);
    }
    buffer
}

/// What a frame asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    Nothing,
    Checksum(usize, usize),
    /// Protocol, size of a segment, bytes of headers.
    Segments(u8, usize, usize),
}

fn le(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) | usize::from(bytes[at + 1]) << 8
}

fn model(bytes: &[u8], header: usize) -> Result<Asks, DropReason> {
    if bytes.len() > header + MOST_FRAME {
        return Err(DropReason::TooLong);
    }
    if bytes.len() < header + 14 {
        return Err(DropReason::Malformed);
    }
    let frame = &bytes[header..];
    let head = &frame[..frame.len().min(HEAD_BYTES)];
    let needs_checksum = bytes[0] & 1 != 0;
    let (gso_type, size) = (bytes[1], le(bytes, 4));
    if !needs_checksum {
        return if gso_type == 0 {
            Ok(Asks::Nothing)
        } else {
            Err(DropReason::BadOffload)
        };
    }
    let (start, offset) = (le(bytes, 6), le(bytes, 8));
    let found = layers(head).expect("Ethernet");
    if start + offset + 2 > head.len() || !may_stand_at(&found, start, offset) {
        return Err(DropReason::BadOffload);
    }
    if gso_type == 0 {
        return Ok(Asks::Checksum(start, offset));
    }
    segments(&found, head, frame.len(), gso_type, size)
        .filter(|_| found.transport.is_some_and(|(l4, _)| l4 == start))
        .filter(|asks| match asks {
            Asks::Segments(6, ..) => offset == 16,
            _ => offset == 6,
        })
        .ok_or(DropReason::BadOffload)
}

/// Whether two bytes may be written there after the frame was judged: a transport's checksum, or behind all that is
/// looked at.
fn may_stand_at(found: &Layers, start: usize, offset: usize) -> bool {
    match (found.transport, found.ip, found.ethertype) {
        (Some((l4, 6)), ..) => (start, offset) == (l4, 16),
        (Some((l4, 17)), ..) => (start, offset) == (l4, 6),
        (Some((l4, 1 | 58)), ..) => (start, offset) == (l4, 2),
        (Some((l4, _)), ..) => start >= l4,
        // Fragments, too many extension headers, ARP and RARP, IP that is none, lengths of 802.3.
        (None, 4 | 6, _) | (None, _, 0x0800 | 0x86dd | 0x0806 | 0x8035 | 0..0x600) => false,
        (None, ..) => start >= found.l3,
    }
}

fn segments(
    found: &Layers,
    head: &[u8],
    frame_bytes: usize,
    gso_type: u8,
    size: usize,
) -> Option<Asks> {
    let (l4, protocol) = found.transport?;
    let good = [(1, 4, 6), (4, 6, 6), (5, 4, 17), (5, 6, 17)];
    if found.routed || !good.contains(&(gso_type, found.ip, protocol)) {
        return None;
    }
    let transport = if protocol == 6 {
        usize::from(word(head, l4 + 12)? >> 12) * 4
    } else {
        8
    };
    let headers = l4 + transport;
    if headers > head.len() || (protocol == 6 && transport < 20) {
        return None;
    }
    let payload = frame_bytes - headers;
    let can = if protocol == 6 {
        size >= 48
    } else {
        size > 0 && payload.div_ceil(size) <= 128
    };
    let fits = frame_bytes - found.l3 <= MOST_PACKET;
    (payload > 0 && can && fits).then_some(Asks::Segments(protocol, size, headers))
}

fn check_info(frame: &Frame<'_>) {
    let right = layers(frame.head).expect("Ethernet");
    let (info, link) = (frame.info(), frame.link);
    assert_eq!(info.link, link);
    assert_eq!(
        (link.dst(), link.src()),
        (
            frame.head[..6].try_into().expect("six"),
            frame.head[6..12].try_into().expect("six")
        )
    );
    assert_eq!((link.tag, link.ethertype), (right.tag, right.ethertype));
    assert_eq!(usize::from(link.l3), right.l3);
    let ip = match info.network {
        Network::Ipv4 => 4,
        Network::Ipv6 => 6,
        _ => 0,
    };
    assert_eq!((ip, info.routed), (right.ip, right.routed));
    assert_eq!(info.transport == Transport::Fragment, right.fragment);
    let transport = match info.transport {
        Transport::Tcp => Some(6),
        Transport::Udp => Some(17),
        Transport::Icmpv6 => Some(58),
        Transport::Other(other) => Some(other),
        Transport::Fragment | Transport::Hidden | Transport::None => None,
    };
    assert_eq!(
        transport.map(|protocol| (usize::from(info.l4), protocol)),
        right.transport
    );
}

/// The short way to tell that a frame gives its sender no role says no more than the long one.
fn check_role(frame: &Frame<'_>) {
    let found = role(frame.head, !frame.body.is_empty(), &frame.info());
    assert!(!is_ordinary(frame.head, &frame.link) || found.is_none());
    assert_eq!(frame.role(), found);
}

fn check_offload(frame: &Frame<'_>, right: Asks) {
    let asks = match frame.offload {
        Offload::None => Asks::Nothing,
        Offload::Valid => panic!("a driver can't say so"),
        Offload::NeedsCsum(csum) => Asks::Checksum(csum.start.into(), csum.offset.into()),
        Offload::Gso(gso) => {
            let protocol = match gso.kind {
                GsoKind::Tcp4 | GsoKind::Tcp6 => 6,
                GsoKind::Udp4 | GsoKind::Udp6 => 17,
            };
            Asks::Segments(protocol, gso.mss.into(), gso.header_bytes.into())
        }
    };
    assert_eq!(asks, right);
}
