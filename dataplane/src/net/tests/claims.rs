//! Whom a frame says to be from, wherever it says so.

use std::net::{Ipv4Addr, Ipv6Addr};

use bulkhead_integration::packets::{A, B, ICMPV6, Packet, TCP, UDP};

use super::{key, tcp};
use crate::net::claims::{Claims, claims};
use crate::net::parse::{Mac, Network, parse};

const HOST: Ipv6Addr = Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, 1);
const OTHER: [u8; 16] = [0xfd, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

fn of(bytes: &[u8]) -> Claims {
    claims(bytes, false, &parse(bytes, key()).expect("Ethernet"))
}

fn of_message(message: &[u8]) -> Claims {
    of(&Packet::v6(ICMPV6, message).complete())
}

/// A message of neighbour discovery with a target and options.
fn neighbour(kind: u8, options: &[(u8, Mac)]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    match kind {
        134 => message.extend([0; 8]),
        135 | 136 => message.extend(OTHER),
        _ => {}
    }
    for (option, mac) in options {
        message.extend([*option, 1]);
        message.extend(mac);
    }
    message
}

#[test]
fn arp_claims_its_senders_addresses() {
    let mut bytes = [B, A].concat();
    bytes.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2]);
    bytes.extend(A);
    bytes.extend([10, 0, 0, 9]);
    bytes.extend(B);
    bytes.extend([10, 0, 0, 2]);
    let expected = Claims {
        mac: Some(A),
        v4: Some(Ipv4Addr::new(10, 0, 0, 9)),
        ..Claims::default()
    };
    assert_eq!(of(&bytes), expected);
    // One that ends before, and one of other addresses.
    assert!(of(&bytes[..41]).unclear);
    let mut other = bytes.clone();
    other[18] = 8;
    assert!(of(&other).unclear);
    // RARP.
    bytes[12..14].copy_from_slice(&[0x80, 0x35]);
    let info = parse(&bytes, key()).expect("Ethernet");
    assert_eq!((info.network, of(&bytes)), (Network::Arp, expected));
}

#[test]
fn packets_claim_their_source() {
    let four = of(&tcp(10).complete());
    assert_eq!(four.v4, Some(Ipv4Addr::new(10, 0, 0, 1)));
    assert_eq!((four.v6, four.unclear), (None, false));
    let six = of(&Packet::v6(UDP, &[]).complete());
    assert_eq!((six.v6, six.unclear), (Some(HOST), false));
}

#[test]
fn neighbour_discovery_claims_its_link_layer_address_and_its_target() {
    for (kind, option) in [(133, 1), (134, 1), (135, 1), (136, 2)] {
        let found = of_message(&neighbour(kind, &[(option, B), (3 - option, A)]));
        assert_eq!((found.mac, found.v6), (Some(B), Some(HOST)), "{kind}");
        let target = (kind == 136).then(|| Ipv6Addr::from(OTHER));
        assert_eq!((found.target, found.unclear), (target, false), "{kind}");
        let without = of_message(&neighbour(kind, &[]));
        assert_eq!((without.mac, without.unclear), (None, false), "{kind}");
    }
    let echo = of_message(&[128, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!((echo.mac, echo.unclear), (None, false));
}

#[test]
fn what_of_neighbour_discovery_can_not_be_told_is_unclear() {
    let good = neighbour(136, &[(2, A)]);
    assert!(!of_message(&good).unclear);
    // Two senders, an option of no length, one that is not whole, a message that is not.
    assert!(of_message(&neighbour(136, &[(2, A), (2, B)])).unclear);
    let mut endless = good.clone();
    endless[25] = 0;
    assert!(of_message(&endless).unclear);
    assert!(of_message(&good[..30]).unclear);
    assert!(of_message(&good[..20]).unclear);
    assert!(of_message(&[]).unclear);
    // One whose end does not lie in the head: an option may follow that is not seen.
    let mut long = Packet::v6(ICMPV6, &[good, vec![14, 1, 0, 0, 0, 0, 0, 0]].concat()).complete();
    let info = parse(&long, key()).expect("Ethernet");
    assert!(
        !claims(&long, true, &info).unclear,
        "what follows is behind the packet's end"
    );
    long[18..20].copy_from_slice(&60u16.to_be_bytes());
    assert!(claims(&long, true, &info).unclear);
}

#[test]
fn neighbour_discovery_in_fragments_is_unclear_and_other_fragments_are_not() {
    // With its offset, what its header says is in it, and that.
    let fragment = |offset: u16, next: u8, body: &[u8]| {
        let [high, low] = (offset << 3 | 1).to_be_bytes();
        let mut bytes = Packet {
            extensions: vec![(44, vec![0, high, low, 0, 0, 0, 1])],
            ..Packet::v6(ICMPV6, body)
        }
        .complete();
        bytes[54] = next;
        of(&bytes).unclear
    };
    for kind in 133..=137 {
        let message = [kind, 0, 0, 0, 0, 0, 0, 0];
        assert!(fragment(0, ICMPV6, &message));
        assert!(!fragment(1, ICMPV6, &message), "the beginning counts");
        // Behind an extension header, which may be longer than the fragment.
        let behind = [&[ICMPV6, 0, 1, 4, 0, 0, 0, 0], &message[..]].concat();
        assert!(fragment(0, 60, &behind));
        assert!(fragment(0, 60, &[ICMPV6, 9, 1, 4, 0, 0, 0, 0]));
    }
    assert!(fragment(0, ICMPV6, &[]), "anything may follow");
    assert!(
        fragment(0, 44, &[UDP, 0, 0, 1, 0, 0, 0, 1]),
        "a fragment in it"
    );
    let echo = [128, 0, 0, 0, 0, 1, 0, 1];
    assert!(!fragment(0, ICMPV6, &echo));
    for other in [TCP, UDP, 50, 132] {
        assert!(!fragment(0, other, &[136; 16]), "{other}");
    }
}
