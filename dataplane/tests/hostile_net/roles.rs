//! Guests that say to be routers, or DHCP servers, however they wrap it; and what looks like it and is none.

use std::sync::Arc;

use bulkhead_dataplane::port::DropReason::{RogueDhcp, RogueRouter, SpoofedMac};
use bulkhead_integration::packets::{ICMPV6, Packet, UDP};

use crate::arena::{A, Arena, B, End};
use crate::frames::{Shot, shoot};
use crate::rig::mac;
use crate::{BOTH, Case};

const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;
/// Padding of a destination header.
const OPTIONS: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
/// A first fragment, with more to follow.
const FIRST: &[u8] = &[0, 0, 1, 0, 0, 0, 9];

fn row(name: &'static str, end: End, make: fn() -> Packet) -> Case {
    let run = move |arena: &mut Arena| {
        let packet = Packet {
            dst: mac(B),
            src: mac(A),
            ..make()
        };
        let frame = packet.complete();
        shoot(arena, &Shot::new(&[0; 12], &frame), &frame)
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

fn message(kind: u8, extensions: &[(u8, &[u8])]) -> Packet {
    let mut message = vec![0; 24];
    message[0] = kind;
    // Two empty options of eight bytes, of no kind that anybody knows.
    (message[16], message[17]) = (0xfd, 1);
    let extensions = extensions.iter().map(|(kind, rest)| (*kind, rest.to_vec()));
    Packet {
        extensions: extensions.collect(),
        ..Packet::v6(ICMPV6, &message)
    }
}

fn datagram(packet: Packet, ports: (u16, u16), first: u8) -> Packet {
    Packet {
        ports,
        payload: vec![first; 240],
        ..packet
    }
}

/// The table.
pub(crate) fn cases() -> Vec<Case> {
    let router = End::Dropped(RogueRouter);
    let server = End::Dropped(RogueDhcp);
    // The check of MAC addresses comes first.
    let hidden = End::Dropped(SpoofedMac);
    vec![
        row("router_that_is_none", router, || message(134, &[])),
        row("router_that_redirects", router, || message(137, &[])),
        row("router_behind_options", router, || {
            message(134, &[(DESTINATION, OPTIONS)])
        }),
        row("router_in_a_fragment", hidden, || {
            message(134, &[(FRAGMENT, FIRST)])
        }),
        row("router_in_a_fragment_that_is_all", hidden, || {
            message(134, &[(FRAGMENT, &[0, 0, 0, 0, 0, 0, 9])])
        }),
        row("router_behind_options_of_the_next_fragment", hidden, || {
            message(
                134,
                &[(FRAGMENT, FIRST), (DESTINATION, &[9, 1, 4, 0, 0, 0, 0])],
            )
        }),
        row(
            "router_behind_more_headers_than_are_followed",
            hidden,
            || message(134, &[(DESTINATION, OPTIONS); 9]),
        ),
        row("router_of_ipv4", router, || Packet::v4(1, &[9; 16])),
        row("router_is_looked_for", End::Delivered, || {
            Packet::v6(ICMPV6, &[133, 0, 0, 0, 0, 0, 0, 0])
        }),
        row("large_echo_in_a_fragment", End::Delivered, || {
            message(128, &[(FRAGMENT, FIRST)])
        }),
        row("later_fragment", End::Delivered, || {
            message(134, &[(FRAGMENT, &[0, 0, 9, 0, 0, 0, 9])])
        }),
        row("dhcp_offer", server, || {
            datagram(Packet::v4(UDP, &[]), (67, 68), 2)
        }),
        row("dhcp_offer_from_any_port", server, || {
            datagram(Packet::v4(UDP, &[]), (40_000, 68), 2)
        }),
        row("dhcp_reply_to_a_relay", server, || {
            datagram(Packet::v4(UDP, &[]), (67, 67), 2)
        }),
        row("dhcp_discover", End::Delivered, || {
            datagram(Packet::v4(UDP, &[]), (68, 67), 1)
        }),
        row("dhcpv6_advertise", server, || {
            datagram(Packet::v6(UDP, &[]), (547, 546), 2)
        }),
        row("dhcpv6_reply_to_a_relay", server, || {
            datagram(Packet::v6(UDP, &[]), (547, 547), 13)
        }),
        row("dhcpv6_advertise_behind_options", server, || Packet {
            extensions: vec![(DESTINATION, OPTIONS.to_vec())],
            ..datagram(Packet::v6(UDP, &[]), (547, 546), 2)
        }),
        row("dhcpv6_solicit", End::Delivered, || {
            datagram(Packet::v6(UDP, &[]), (546, 547), 1)
        }),
    ]
}
