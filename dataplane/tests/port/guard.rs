//! Whether a guest sends as itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_dataplane::net::frame::{Frame, Offload};
use bulkhead_dataplane::net::header::{Header, NEEDS_CSUM};
use bulkhead_dataplane::port::DropReason;
use bulkhead_dataplane::port::DropReason::{RogueDhcp, RogueRouter, SpoofedIp, SpoofedMac};
use bulkhead_dataplane::port::guard::Guard;
use bulkhead_protocol::net::{SpoofChecks, Trusted};

use crate::frames::{arp, ethernet, ip, mac, tagged};
use crate::rig::key;

fn guard(mac_is_checked: bool, prefixes: &[&str]) -> Guard {
    let prefix = |text: &&str| text.parse().expect("a prefix");
    let checks = SpoofChecks {
        mac: mac_is_checked,
        sources: prefixes.iter().map(prefix).collect(),
        ..SpoofChecks::default()
    };
    Guard::new(mac(1), &checks)
}

/// Of a NIC with the MAC address 1 and the IP addresses 10.0.0.1, 10.1.0.0/16 and 2001:db8::1.
fn strict() -> Guard {
    guard(true, &["10.0.0.1/32", "10.1.0.0/16", "2001:db8::1/128"])
}

fn check(guard: &Guard, bytes: &[u8]) -> Result<(), DropReason> {
    guard.check(&Frame::of_bytes(&Header::default(), bytes, key()).expect("a frame"))
}

/// A frame of the NIC's with a packet from an address.
fn from(address: &str) -> Vec<u8> {
    let src: IpAddr = address.parse().expect("an address");
    let dst = if src.is_ipv4() {
        "10.9.9.9"
    } else {
        "2001:db8::9"
    };
    packet(
        src,
        dst.parse().expect("an address"),
        17,
        &[0, 1, 0, 2, 0, 8, 0, 0],
    )
}

fn packet(src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (ethertype, packet) = ip(src, dst, protocol, payload);
    ethernet(mac(2), mac(1), ethertype, &packet)
}

fn v4(address: &str) -> Ipv4Addr {
    address.parse().expect("an address")
}

/// A neighbour advertisement (136) or solicitation (135) with a link-layer address.
fn neighbour(kind: u8, src: &str, target: &str, link: Option<[u8; 6]>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x60, 0, 0, 0];
    message.extend(target.parse::<Ipv6Addr>().expect("an address").octets());
    if let Some(link) = link {
        message.extend([if kind == 136 { 2 } else { 1 }, 1]);
        message.extend(link);
    }
    let [src, dst] = [src, "ff02::1"].map(|address| address.parse().expect("an address"));
    packet(src, dst, 58, &message)
}

#[test]
fn the_ethernet_source_must_be_the_nics() {
    let foreign = ethernet(mac(2), mac(3), 0x88b5, &[0; 50]);
    let own = ethernet(mac(2), mac(1), 0x88b5, &[0; 50]);
    for guard in [guard(true, &[]), strict()] {
        assert_eq!(check(&guard, &foreign), Err(SpoofedMac));
        assert_eq!(check(&guard, &own), Ok(()));
        let tagged = tagged(5, mac(2), mac(3), 0x88b5, &[0; 50]);
        assert_eq!(check(&guard, &tagged), Err(SpoofedMac));
    }
    assert_eq!(check(&guard(false, &[]), &foreign), Ok(()));
    assert_eq!(check(&Guard::default(), &foreign), Ok(()));
}

#[test]
fn a_packet_comes_from_a_listed_address() {
    let cases = [
        ("10.0.0.1", Ok(())),
        ("10.0.0.2", Err(SpoofedIp)),
        ("10.1.2.3", Ok(())),
        ("10.2.0.0", Err(SpoofedIp)),
        ("255.255.255.255", Err(SpoofedIp)),
        ("0.0.0.0", Ok(())),
        ("2001:db8::1", Ok(())),
        ("2001:db8::2", Err(SpoofedIp)),
        ("::", Ok(())),
        // Of its MAC address, and of another.
        ("fe80::ff:fe00:1", Ok(())),
        ("fe80::ff:fe00:2", Err(SpoofedIp)),
    ];
    for (address, expected) in cases {
        assert_eq!(check(&strict(), &from(address)), expected, "{address}");
        assert_eq!(
            check(&guard(true, &[]), &from(address)),
            Ok(()),
            "{address}"
        );
        let untagged = from(address);
        let ethertype = u16::from_be_bytes([untagged[12], untagged[13]]);
        let in_vlan = tagged(9, mac(2), mac(1), ethertype, &untagged[14..]);
        assert_eq!(check(&strict(), &in_vlan), expected, "{address} in a VLAN");
    }
    let any_v4 = guard(true, &["0.0.0.0/0"]);
    assert_eq!(check(&any_v4, &from("8.8.8.8")), Ok(()));
    assert_eq!(check(&any_v4, &from("2001:db8::1")), Err(SpoofedIp));
    let any_v6 = guard(true, &["::/0"]);
    assert_eq!(check(&any_v6, &from("2001:db8::77")), Ok(()));
    assert_eq!(check(&any_v6, &from("10.0.0.1")), Err(SpoofedIp));
}

#[test]
fn addresses_are_looked_at_without_the_mac_check_too() {
    let guard = guard(false, &["10.0.0.1/32"]);
    let mut foreign = from("10.0.0.1");
    foreign[6..12].copy_from_slice(&mac(9));
    assert_eq!(check(&guard, &foreign), Ok(()));
    assert_eq!(check(&guard, &from("10.0.0.2")), Err(SpoofedIp));
}

#[test]
fn arp_says_nothing_about_others() {
    let arp = |sender: u8, address| arp(2, mac(1), (mac(sender), v4(address)), v4("10.0.0.9"));
    for guard in [guard(true, &[]), strict()] {
        assert_eq!(check(&guard, &arp(1, "10.0.0.1")), Ok(()));
        assert_eq!(check(&guard, &arp(1, "0.0.0.0")), Ok(()), "a probe");
        assert_eq!(check(&guard, &arp(2, "10.0.0.1")), Err(SpoofedMac));
    }
    assert_eq!(check(&strict(), &arp(1, "10.0.0.2")), Err(SpoofedIp));
    assert_eq!(check(&guard(true, &[]), &arp(1, "10.0.0.2")), Ok(()));
    // Of a hardware type that Linux takes for Ethernet's too, or behind more tags than are followed.
    let foreign = arp(2, "10.0.0.1");
    let mut other_type = foreign.clone();
    other_type[15] = 6;
    let tags = [0x81, 0, 0, 5, 0x81, 0, 0, 5, 0x81, 0, 0, 5];
    let behind_tags = [&foreign[..12], &tags, &foreign[12..]].concat();
    for hidden in [other_type, behind_tags] {
        assert_eq!(check(&guard(true, &[]), &hidden), Err(SpoofedMac));
        assert_eq!(check(&Guard::default(), &hidden), Ok(()));
    }
    // Cut short: nobody can tell what it says.
    let short = &arp(1, "10.0.0.1")[..30];
    assert_eq!(check(&strict(), short), Err(SpoofedIp));
}

#[test]
fn neighbour_discovery_says_nothing_about_others() {
    let own = "2001:db8::1";
    let cases = [
        (neighbour(136, own, own, Some(mac(1))), Ok(()), Ok(())),
        (neighbour(136, own, own, None), Ok(()), Ok(())),
        (
            neighbour(136, own, own, Some(mac(2))),
            Err(SpoofedMac),
            Err(SpoofedMac),
        ),
        (
            neighbour(136, own, "2001:db8::2", Some(mac(1))),
            Err(SpoofedIp),
            Ok(()),
        ),
        (
            neighbour(135, own, "2001:db8::2", Some(mac(1))),
            Ok(()),
            Ok(()),
        ),
        (
            neighbour(135, own, "2001:db8::2", Some(mac(3))),
            Err(SpoofedMac),
            Err(SpoofedMac),
        ),
        (
            neighbour(135, "2001:db8::3", own, Some(mac(1))),
            Err(SpoofedIp),
            Ok(()),
        ),
        // Duplicate address detection.
        (neighbour(135, "::", own, None), Ok(()), Ok(())),
    ];
    for (at, (bytes, with_addresses, with_mac)) in cases.iter().enumerate() {
        assert_eq!(check(&strict(), bytes), *with_addresses, "case {at}");
        assert_eq!(check(&guard(true, &[]), bytes), *with_mac, "case {at}");
        assert_eq!(check(&Guard::default(), bytes), Ok(()), "case {at}");
    }
}

#[test]
fn what_cannot_be_told_does_not_pass_where_it_matters() {
    let own: IpAddr = "2001:db8::1".parse().expect("an address");
    let all: IpAddr = "ff02::1".parse().expect("an address");
    // An advertisement in the first of two fragments.
    let mut fragment = vec![58, 0, 0, 1, 0, 0, 0, 7];
    fragment.extend(&neighbour(136, "2001:db8::1", "2001:db8::2", Some(mac(1)))[54..]);
    let fragment = packet(own, all, 44, &fragment);
    assert_eq!(check(&strict(), &fragment), Err(SpoofedIp));
    assert_eq!(check(&guard(true, &[]), &fragment), Err(SpoofedMac));
    // One of UDP says nothing but its source.
    let datagram = packet(
        own,
        all,
        44,
        &[17, 0, 0, 1, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8],
    );
    assert_eq!(check(&strict(), &datagram), Ok(()));
    // An advertisement behind more extension headers than are followed.
    let mut extensions = [[60u8, 0, 1, 4, 0, 0, 0, 0]; 9].concat();
    extensions[64] = 58;
    extensions.extend(&neighbour(136, "2001:db8::1", "2001:db8::1", Some(mac(2)))[54..]);
    let hidden = packet(own, all, 60, &extensions);
    assert_eq!(check(&guard(true, &[]), &hidden), Err(SpoofedMac));
    assert_eq!(check(&Guard::default(), &hidden), Ok(()));
    // Says that it is IPv4, and is not.
    let broken = ethernet(mac(2), mac(1), 0x0800, &[0x65; 60]);
    assert_eq!(check(&strict(), &broken), Err(SpoofedIp));
    assert_eq!(check(&guard(true, &[]), &broken), Ok(()));
    // No IP, no claim.
    assert_eq!(
        check(&strict(), &ethernet(mac(2), mac(1), 0x88b5, &[0; 50])),
        Ok(())
    );
}

#[test]
fn ip_and_arp_behind_a_snap_header_do_not_pass_a_check() {
    let snap = |length: u16, sap: u8, oui: u8, inner: &[u8]| {
        let llc = [sap, sap, 3, 0, 0, oui];
        ethernet(mac(2), mac(1), length, &[&llc, inner].concat())
    };
    let foreign = arp(2, mac(1), (mac(9), v4("10.0.0.9")), v4("10.0.0.2"));
    let inner = [
        &foreign[12..],
        &from("10.0.0.1")[12..],
        &from("2001:db8::1")[12..],
        &[0x81, 0, 0, 5, 8, 0, 0x45],
    ];
    for inner in inner {
        // Also of a length that can't be, and with the other bits of an address.
        for hidden in [
            snap(36, 0xaa, 0, inner),
            snap(0, 0xab, 0, inner),
            snap(0x5ff, 0xaa, 0xf8, inner),
        ] {
            assert_eq!(check(&guard(true, &[]), &hidden), Err(SpoofedMac));
            assert_eq!(
                check(&guard(false, &["10.0.0.1/32"]), &hidden),
                Err(SpoofedIp)
            );
            assert_eq!(check(&Guard::default(), &hidden), Ok(()));
            // In a VLAN.
            let tagged = [&hidden[..12], &[0x81, 0, 0, 0], &hidden[12..]].concat();
            assert_eq!(check(&guard(true, &[]), &tagged), Err(SpoofedMac));
        }
    }
    // Spanning tree, a discovery protocol of a vendor's, and what is no SNAP.
    let others = [
        ethernet(mac(2), mac(1), 38, &[0x42, 0x42, 3, 0, 0, 0, 8, 6, 0, 0]),
        ethernet(
            mac(2),
            mac(1),
            38,
            &[0xaa, 0xaa, 3, 0, 0, 0xc, 0x20, 0, 1, 1],
        ),
        ethernet(mac(2), mac(1), 0x600, &[0xaa, 0xaa, 3, 0, 0, 0, 8, 6, 0, 0]),
    ];
    for other in others {
        assert_eq!(check(&strict(), &other), Ok(()));
    }
}

/// A frame that passes, with a header that has two bytes of it made into a checksum afterwards.
fn completed_at(bytes: &[u8], start: usize, at: usize) -> Result<Offload, DropReason> {
    let field = |value: usize| u16::try_from(value).expect("small");
    let header = Header {
        flags: NEEDS_CSUM,
        csum_start: field(start),
        csum_offset: field(at - start),
        ..Header::default()
    };
    Frame::of_bytes(&header, bytes, key()).map(|frame| frame.offload)
}

#[test]
fn no_checksum_makes_a_frame_that_passed_into_another() {
    let (own, other) = ("2001:db8::1", "2001:db8::2");
    let advertised = |target, link| neighbour(136, own, target, Some(mac(link)));
    let spoken = |sender, address| arp(2, mac(1), (mac(sender), v4(address)), v4("10.0.0.9"));
    let hidden = |kind: u16| {
        let arp = &spoken(9, "10.0.0.9")[14..];
        tagged(0, mac(2), mac(1), kind, arp)
    };
    let snap = |kind: u8| {
        let llc = [0xaa, 0xaa, 3, 0, 0, 0, 8, kind, 0, 1];
        ethernet(mac(2), mac(1), 40, &[&llc, &[0; 40][..]].concat())
    };
    let fragment = |inner: u8| {
        let body = [inner, 0, 0, 1, 0, 0, 0, 7, 136, 0, 0, 0, 0, 0, 0, 0];
        let [from, to] = [own, other].map(|address| address.parse().expect("an address"));
        packet(from, to, 44, &body)
    };
    // A message of ICMP, and a datagram to a port.
    let said = |src: &str, protocol, kind| {
        let [from, to] = [src, src].map(|address| address.parse().expect("an address"));
        packet(from, to, protocol, &[kind, 0, 0, 0, 0, 0, 0, 0])
    };
    let asked = |port| {
        let from = v4("10.0.0.1").into();
        packet(from, from, 17, &[0, 1, 0, port, 0, 8, 0, 0])
    };
    // One that passes, one that doesn't, and where they differ.
    let pairs = [
        (from("10.0.0.1"), from("10.0.0.2"), 28),
        (from(own), from(other), 36),
        (spoken(1, "10.0.0.1"), spoken(1, "10.0.0.2"), 30),
        (spoken(1, "10.0.0.1"), spoken(9, "10.0.0.1"), 26),
        (advertised(own, 1), advertised(other, 1), 76),
        (advertised(own, 1), advertised(own, 9), 84),
        (hidden(0x88b5), hidden(0x0806), 16),
        (snap(7), snap(6), 20),
        (fragment(17), fragment(58), 54),
        (said("10.0.0.1", 1, 8), said("10.0.0.1", 1, 5), 34),
        (said(own, 58, 128), said(own, 58, 134), 54),
        (asked(2), asked(68), 36),
    ];
    for (number, (passes, spoofed, at)) in pairs.iter().enumerate() {
        assert_eq!(check(&strict(), passes), Ok(()), "pair {number}");
        assert!(check(&strict(), spoofed).is_err(), "pair {number}");
        for start in 14..=*at {
            let offload = completed_at(passes, start, *at);
            assert_eq!(
                offload,
                Err(DropReason::BadOffload),
                "pair {number}, {start}"
            );
        }
    }
}

#[test]
fn no_guest_has_others_pause() {
    // To the bridges' address and to anybody's.
    for to in [[1, 0x80, 0xc2, 0, 0, 1], mac(2)] {
        let pause = ethernet(to, mac(1), 0x8808, &[0, 1, 0xff, 0xff]);
        assert_eq!(check(&guard(true, &[]), &pause), Err(DropReason::Reserved));
        assert_eq!(check(&Guard::default(), &pause), Ok(()));
    }
}

#[test]
fn only_who_is_trusted_routes_and_serves_dhcp() {
    let [host, all] = ["2001:db8::1", "ff02::1"].map(|a| a.parse().expect("an address"));
    let mut advertisement = vec![0; 16];
    advertisement[0] = 134;
    let advertisement = packet(host, all, 58, &advertisement);
    let [client, server] = ["10.0.0.1", "10.0.0.9"].map(|a| a.parse().expect("an address"));
    let offer = packet(client, server, 17, &[0, 67, 0, 68, 0, 9, 0, 0, 2]);
    // Behind nine headers of options.
    let mut hidden = [60, 0, 1, 4, 0, 0, 0, 0].repeat(9);
    hidden.extend([58; 16]);
    let hidden = packet(host, all, 60, &hidden);
    for (router, dhcp) in [(false, false), (true, false), (false, true), (true, true)] {
        let checks = SpoofChecks {
            mac: false,
            sources: Vec::new(),
            trusted: Trusted { router, dhcp },
        };
        let guard = Guard::new(mac(1), &checks);
        let unless = |is: bool, reason| if is { Ok(()) } else { Err(reason) };
        assert_eq!(check(&guard, &advertisement), unless(router, RogueRouter));
        assert_eq!(check(&guard, &offer), unless(dhcp, RogueDhcp));
        let unclear = unless(router, RogueRouter).and(unless(dhcp, RogueDhcp));
        assert_eq!(check(&guard, &hidden), unclear, "{router} {dhcp}");
    }
    // Whoever is trusted is so as itself.
    let checks = SpoofChecks {
        trusted: Trusted {
            router: true,
            dhcp: true,
        },
        ..SpoofChecks::default()
    };
    let other = Guard::new(mac(7), &checks);
    assert_eq!(check(&other, &advertisement), Err(SpoofedMac));
}
