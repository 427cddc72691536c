//! What a frame makes its sender to those who get it: a router that they are to send through, or a server that
//! gives them addresses. Only some guests are to be that, and whoever checks asks.
//!
//! | role | by |
//! | --- | --- |
//! | router | ICMPv6 router advertisements and redirects (RFC 4861, 4.2 and 4.5), those of ICMPv4 (RFC 1256, RFC 792) |
//! | DHCP server | datagrams for DHCP's clients, and a server's for a relay (RFC 2131, 4.1; RFC 8415, 7.2 and 7.3) |
//!
//! Of fragments the first says it, which has all headers (RFC 7112): one that has not is unclear, as is what lies behind
//! more extension headers or tags than are followed (RFC 7113, 3). The others can't make a role of what had none:
//! receivers take no fragments that overlap (RFC 5722).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::parse::{
    FrameInfo, Link, Network, Transport, bytes, ethertype, extensions, protocol, word,
};

/// What only some are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It routes.
    Router,
    /// It answers for DHCP.
    DhcpServer,
    /// Any of these: it can't be told.
    Unclear,
}

/// Where a transport begins, and what it means if it is not in the frame's head.
#[derive(Clone, Copy)]
struct At<'a> {
    head: &'a [u8],
    l4: usize,
    is_ipv6: bool,
    missing: Option<Role>,
}

/// Whether a frame gives its sender none, as can be told of most without looking further: TCP, or UDP to a port of no
/// interest, right behind IP's plain header; or no IP, and nothing that it could be hidden in.
#[must_use]
#[inline]
pub fn is_ordinary(head: &[u8], link: &Link) -> bool {
    let behind = head.get(usize::from(link.l3)..).unwrap_or_default();
    match link.ethertype {
        ethertype::IPV4 => behind.first_chunk().is_some_and(|ip: &[u8; 24]| {
            let [version, _, _, _, _, _, f0, f1, _, next, .., p0, p1] = *ip;
            let is_plain = version == 0x45 && u16::from_be_bytes([f0, f1]) & 0x3fff == 0;
            is_plain && is_ordinary_port(next, [p0, p1])
        }),
        ethertype::IPV6 => behind.first_chunk().is_some_and(|ip: &[u8; 44]| {
            let [_, _, _, _, _, _, next, .., p0, p1] = *ip;
            is_ordinary_port(next, [p0, p1])
        }),
        ethertype::VLAN | ethertype::PROVIDER_VLAN => false,
        // The length of an IEEE 802.3 frame, in which something may be hidden.
        other => other >= ethertype::FIRST,
    }
}

#[inline]
fn is_ordinary_port(next: u8, port: [u8; 2]) -> bool {
    match next {
        protocol::TCP => true,
        protocol::UDP => !matches!(u16::from_be_bytes(port), 67 | 68 | 546 | 547),
        _ => false,
    }
}

/// The role that a frame gives its sender; of `head` as [`super::parse::parse`] saw it, of a frame that goes on behind it
/// or not.
#[must_use]
#[inline(never)]
pub fn role(head: &[u8], goes_on: bool, info: &FrameInfo) -> Option<Role> {
    let at = At {
        head,
        l4: usize::from(info.l4),
        is_ipv6: info.network == Network::Ipv6,
        missing: goes_on.then_some(Role::Unclear),
    };
    match (info.network, info.transport) {
        (Network::Ipv4, Transport::Fragment) => ipv4_fragment(at, usize::from(info.link.l3)),
        (Network::Ipv6, Transport::Fragment) => ipv6_fragment(at, info.link),
        (_, transport) if matches!(info.network, Network::Ipv4 | Network::Ipv6) => {
            of_transport(at, transport)
        }
        // Broken headers nobody takes. What is malformed otherwise some receivers can make out.
        (Network::Malformed, _)
            if !matches!(
                info.link.ethertype,
                ethertype::IPV4 | ethertype::IPV6 | ethertype::ARP | ethertype::RARP
            ) =>
        {
            Some(Role::Unclear)
        }
        _ => None,
    }
}

fn of_transport(at: At<'_>, transport: Transport) -> Option<Role> {
    match transport {
        Transport::Udp => dhcp(at),
        Transport::Icmpv6 if at.is_ipv6 => icmp(at, [134, 137]),
        Transport::Other(protocol::ICMP) if !at.is_ipv6 => icmp(at, [9, 5]),
        Transport::Hidden | Transport::Fragment => Some(Role::Unclear),
        _ => None,
    }
}

fn icmp(at: At<'_>, kinds: [u8; 2]) -> Option<Role> {
    match at.head.get(at.l4) {
        Some(kind) if kinds.contains(kind) => Some(Role::Router),
        Some(_) => None,
        None => at.missing,
    }
}

fn dhcp(at: At<'_>) -> Option<Role> {
    let Some(port) = word(at.head, at.l4 + 2) else {
        return at.missing;
    };
    // Of BOOTP the operation, of DHCPv6 the kind of message.
    let first = at.head.get(at.l4 + 8).copied();
    let is_server = match (at.is_ipv6, port) {
        (false, 68) | (true, 546) => true,
        // To a server, or to a relay from one.
        (false, 67) => first != Some(1),
        // Advertise, reply, reconfigure, what a relay is to pass on.
        (true, 547) => matches!(first, None | Some(2 | 7 | 10 | 13)),
        _ => false,
    };
    is_server.then_some(Role::DhcpServer)
}

fn ipv4_fragment(at: At<'_>, l3: usize) -> Option<Role> {
    if word(at.head, l3 + 6)? & 0x1fff != 0 {
        return None;
    }
    let first = At {
        missing: Some(Role::Unclear),
        ..at
    };
    match *at.head.get(l3 + 9)? {
        protocol::UDP => of_transport(first, Transport::Udp),
        protocol::ICMP => of_transport(first, Transport::Other(protocol::ICMP)),
        _ => None,
    }
}

fn ipv6_fragment(at: At<'_>, link: Link) -> Option<Role> {
    // The fragment header is the eight bytes in front.
    let header = at.l4.checked_sub(8).and_then(|from| bytes(at.head, from));
    let Some([next, _, high, low, ..]): Option<[u8; 8]> = header else {
        return Some(Role::Unclear);
    };
    if u16::from_be_bytes([high, low]) & !7 != 0 {
        return None;
    }
    let mut inner = FrameInfo::of_link(link);
    extensions(at.head, at.l4, next, &mut inner);
    let first = At {
        l4: usize::from(inner.l4),
        missing: Some(Role::Unclear),
        ..at
    };
    of_transport(first, inner.transport)
}
