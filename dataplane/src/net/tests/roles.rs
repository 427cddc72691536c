//! What a frame makes its sender to others, however it is wrapped.

use bulkhead_integration::packets::{ICMPV6, Packet, UDP};

use super::{key, tcp};
use crate::net::parse::parse;
use crate::net::roles::{Role, is_ordinary, role};

const ADVERTISEMENT: u8 = 134;
const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;

fn of(bytes: &[u8]) -> Option<Role> {
    of_part(bytes, false)
}

/// Of the first bytes of a frame that goes on.
fn of_part(bytes: &[u8], goes_on: bool) -> Option<Role> {
    let info = parse(bytes, key()).expect("Ethernet");
    let found = role(bytes, goes_on, &info);
    // The short way says no more than the long one.
    assert!(!is_ordinary(bytes, &info.link) || found.is_none());
    found
}

fn message(kind: u8) -> Packet {
    let mut message = vec![0; 24];
    message[0] = kind;
    Packet::v6(ICMPV6, &message)
}

fn behind(packet: Packet, extensions: &[(u8, &[u8])]) -> Vec<u8> {
    let extensions = extensions.iter().map(|(kind, rest)| (*kind, rest.to_vec()));
    Packet {
        extensions: extensions.collect(),
        ..packet
    }
    .complete()
}

fn datagram(packet: Packet, port: u16, first: &[u8]) -> Vec<u8> {
    Packet {
        ports: (1, port),
        payload: first.to_vec(),
        ..packet
    }
    .complete()
}

#[test]
fn routers_are_known_by_their_messages() {
    for (kind, expected) in [
        (133, None),
        (ADVERTISEMENT, Some(Role::Router)),
        (135, None),
        (136, None),
        (137, Some(Role::Router)),
        (128, None),
    ] {
        assert_eq!(of(&message(kind).complete()), expected, "{kind}");
    }
    let four = |kind: u8| {
        let mut payload = vec![0; 16];
        payload[0] = kind;
        of(&Packet::v4(1, &payload).complete())
    };
    assert_eq!([9, 5].map(four), [Some(Role::Router); 2]);
    assert_eq!([8, 0, 10, ADVERTISEMENT].map(four), [None; 4]);
    // ICMPv6 in IPv4, ICMP in IPv6: nobody takes them.
    let mut odd = vec![ADVERTISEMENT; 16];
    assert_eq!(of(&Packet::v4(ICMPV6, &odd).complete()), None);
    odd.fill(9);
    assert_eq!(of(&Packet::v6(1, &odd).complete()), None);
}

#[test]
fn dhcp_servers_are_known_by_whom_they_answer() {
    let four = || Packet::v4(UDP, &[]);
    let six = || Packet::v6(UDP, &[]);
    let server = Some(Role::DhcpServer);
    for (bytes, expected) in [
        (datagram(four(), 67, &[1; 240]), None),
        (datagram(four(), 67, &[2; 240]), server),
        (datagram(four(), 67, &[]), server),
        (datagram(four(), 68, &[1; 240]), server),
        (datagram(four(), 546, &[2; 4]), None),
        (datagram(four(), 53, &[2; 4]), None),
        (datagram(six(), 546, &[1; 4]), server),
        (datagram(six(), 547, &[1; 4]), None),
        (datagram(six(), 547, &[12; 4]), None),
        (datagram(six(), 547, &[2; 4]), server),
        (datagram(six(), 547, &[7; 4]), server),
        (datagram(six(), 547, &[10; 4]), server),
        (datagram(six(), 547, &[13; 4]), server),
        (datagram(six(), 68, &[2; 4]), None),
    ] {
        assert_eq!(of(&bytes), expected, "{bytes:02x?}");
    }
    let mut to_a_client = tcp(10);
    to_a_client.ports = (67, 68);
    assert_eq!(of(&to_a_client.complete()), None);
}

#[test]
fn most_frames_are_ordinary() {
    let is = |bytes: &[u8]| is_ordinary(bytes, &parse(bytes, key()).expect("Ethernet").link);
    assert!(is(&tcp(10).complete()) && is(&Packet::v6(UDP, &[0; 9]).complete()));
    assert!(is(&datagram(Packet::v4(UDP, &[]), 53, &[])));
    assert!(!is(&datagram(Packet::v4(UDP, &[]), 68, &[])));
    assert!(!is(&datagram(Packet::v6(UDP, &[]), 546, &[])));
    assert!(!is(&message(128).complete()));
    let tags = vec![(0x8100, 7); 3];
    assert!(!is(&Packet { tags, ..tcp(10) }.complete()));
}

#[test]
fn extension_headers_and_tags_hide_nothing() {
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let router = Some(Role::Router);
    let one = behind(message(ADVERTISEMENT), &[(DESTINATION, options)]);
    assert_eq!(of(&one), router);
    let eight = [(DESTINATION, options); 8];
    assert_eq!(of(&behind(message(ADVERTISEMENT), &eight)), router);
    let many = [(DESTINATION, options); 9];
    assert_eq!(of(&behind(message(128), &many)), Some(Role::Unclear));
    // The head that is looked at ends before the message.
    assert_eq!(of_part(&one[..62], true), Some(Role::Unclear));
    assert_eq!(of_part(&one[..62], false), None, "there is none");
    for tags in 0..4 {
        let tagged = Packet {
            tags: vec![(0x8100, 7); tags],
            ..message(ADVERTISEMENT)
        };
        let expected = if tags <= 2 {
            Role::Router
        } else {
            Role::Unclear
        };
        assert_eq!(of(&tagged.complete()), Some(expected), "{tags}");
    }
}

#[test]
fn of_fragments_the_first_says_it_or_is_unclear() {
    // Reserved, offset and whether more follow, identification.
    let first: &[u8] = &[0, 0, 1, 0, 0, 0, 9];
    let later: &[u8] = &[0, 0, 9, 0, 0, 0, 9];
    let atomic: &[u8] = &[0, 0, 0, 0, 0, 0, 9];
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    // Eight bytes, and it says that there are 64.
    let long: &[u8] = &[7, 1, 4, 0, 0, 0, 0];
    let (router, unclear) = (Some(Role::Router), Some(Role::Unclear));
    let advertisement = |extensions: &[_]| of(&behind(message(ADVERTISEMENT), extensions));
    assert_eq!(advertisement(&[(FRAGMENT, first)]), router);
    assert_eq!(advertisement(&[(FRAGMENT, atomic)]), router);
    assert_eq!(advertisement(&[(FRAGMENT, later)]), None);
    assert_eq!(
        advertisement(&[(FRAGMENT, first), (DESTINATION, options)]),
        router
    );
    assert_eq!(
        advertisement(&[(FRAGMENT, first), (DESTINATION, long)]),
        unclear
    );
    assert_eq!(
        advertisement(&[(FRAGMENT, first), (FRAGMENT, atomic)]),
        unclear
    );
    let echo = of(&behind(message(128), &[(FRAGMENT, first)]));
    assert_eq!(echo, None, "large packets are no routers");
    // IPv4, with and without an offset.
    let offer = datagram(Packet::v4(UDP, &[]), 68, &[2; 240]);
    for (flags, expected) in [
        ([0x20, 0], Some(Role::DhcpServer)),
        ([0x20, 1], None),
        ([0, 1], None),
    ] {
        let mut fragment = offer.clone();
        fragment[20..22].copy_from_slice(&flags);
        assert_eq!(of(&fragment), expected, "{flags:?}");
    }
    let mut cut = offer;
    cut.truncate(36);
    cut[20] = 0x20;
    assert_eq!(of(&cut), unclear, "its ports are in another");
}
