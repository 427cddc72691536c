//! Whom a frame says to be from, beside its Ethernet header: in IP, in ARP, in neighbour discovery. What it says in a
//! way that two receivers could read differently, or that can't be seen, is unclear, and whoever checks refuses it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use super::parse::{FrameInfo, IPV6_BYTES, Mac, Network, Transport, bytes, extensions, word};

/// The addresses that a frame claims as its sender's, beside the source of its Ethernet header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Claims {
    /// ARP's sender, or the link-layer address of a neighbour discovery message.
    pub mac: Option<Mac>,
    /// The source of an IPv4 packet, ARP's sender.
    pub v4: Option<Ipv4Addr>,
    /// The source of an IPv6 packet.
    pub v6: Option<Ipv6Addr>,
    /// The target of a neighbour advertisement, whose MAC address it says to know.
    pub target: Option<Ipv6Addr>,
    /// It can't be told: malformed, or hidden behind extension headers or in a fragment, where neighbour discovery must not
    /// be (RFC 6980).
    pub unclear: bool,
}

/// What a frame claims; of `head` as [`super::parse::parse`] saw it, of a frame that goes on behind it or not. Only who checks it
/// asks.
#[must_use]
pub fn claims(head: &[u8], goes_on: bool, info: &FrameInfo) -> Claims {
    let l3 = usize::from(info.link.l3);
    let mut claims = Claims::default();
    match info.network {
        Network::Arp => {
            claims.mac = bytes(head, l3 + 8);
            claims.v4 = bytes(head, l3 + 14).map(|ip: [u8; 4]| Ipv4Addr::from(ip));
        }
        Network::Ipv4 => {
            claims.v4 = bytes(head, l3 + 12).map(|ip: [u8; 4]| Ipv4Addr::from(ip));
        }
        Network::Ipv6 => {
            claims.v6 = address(head, l3 + 8);
            match info.transport {
                Transport::Icmpv6 => {
                    // What lies behind the packet's end is not read by its receiver either.
                    let payload = usize::from(word(head, l3 + 4).unwrap_or(0));
                    let end = l3 + IPV6_BYTES + payload;
                    let message = head.get(..end).unwrap_or(head);
                    let is_whole = end <= head.len() || !goes_on;
                    neighbour(message, is_whole, usize::from(info.l4), &mut claims);
                }
                Transport::Fragment => claims.unclear = hides_neighbour(head, info),
                Transport::Hidden => claims.unclear = true,
                _ => {}
            }
        }
        Network::Malformed => claims.unclear = true,
        Network::Other => {}
    }
    claims
}

fn address(head: &[u8], at: usize) -> Option<Ipv6Addr> {
    bytes(head, at).map(|ip: [u8; 16]| Ipv6Addr::from(ip))
}

/// Whether a fragment may begin a message of neighbour discovery, which must not be in fragments (RFC 6980). Those that
/// follow one that passed say nothing of themselves.
fn hides_neighbour(head: &[u8], info: &FrameInfo) -> bool {
    let l4 = usize::from(info.l4);
    // The fragment header is the eight bytes in front.
    let header = l4.checked_sub(8).and_then(|at| bytes::<8>(head, at));
    let Some([next, _, high, low, ..]) = header else {
        return true;
    };
    if u16::from_be_bytes([high, low]) >> 3 > 0 {
        return false;
    }
    let mut behind = FrameInfo::of_link(info.link);
    extensions(head, l4, next, &mut behind);
    match behind.transport {
        Transport::Icmpv6 => {
            let kind = head.get(usize::from(behind.l4));
            kind.is_none_or(|kind| NEIGHBOUR_DISCOVERY.contains(kind))
        }
        Transport::Fragment | Transport::Hidden => true,
        _ => false,
    }
}

/// Its ICMPv6 types: from router solicitation to redirect.
const NEIGHBOUR_DISCOVERY: RangeInclusive<u8> = 133..=137;

/// Neighbour discovery (RFC 4861, 4): the link-layer address of its sender, and whose neighbour it says to be.
fn neighbour(message: &[u8], is_whole: bool, l4: usize, claims: &mut Claims) {
    const SOURCE: u8 = 1;
    const TARGET: u8 = 2;
    let Some(kind) = message.get(l4).copied() else {
        claims.unclear = true;
        return;
    };
    let (mut at, option) = match kind {
        // Router solicitation and advertisement.
        133 => (l4 + 8, SOURCE),
        134 => (l4 + 16, SOURCE),
        // Neighbour solicitation and advertisement.
        135 => (l4 + 24, SOURCE),
        136 => {
            claims.target = address(message, l4 + 8);
            (l4 + 24, TARGET)
        }
        // Whom a redirect names is somebody else.
        _ => return,
    };
    claims.unclear = !is_whole || message.len() < at;
    while at < message.len() {
        let (Some([kind, units]), Some(mac)) = (bytes(message, at), bytes(message, at + 2)) else {
            claims.unclear = true;
            return;
        };
        // An option of no length ends nowhere, and of two that name a sender each receiver takes another.
        if units == 0 || (kind == option && claims.mac.is_some()) {
            claims.unclear = true;
            return;
        }
        if kind == option {
            claims.mac = Some(mac);
        }
        at += usize::from(units) * 8;
    }
}
