//! Whether a guest sends as itself: each frame's source addresses against those that its NIC may have. And whether it is
//! to others only what it is trusted to be.
//!
//! Two checks, each of which a NIC can be without:
//!
//! | check | what must be the NIC's own |
//! | --- | --- |
//! | MAC address | the Ethernet source; ARP's sender; the link-layer address that neighbour discovery gives |
//! | IP addresses | the source of an IPv4 or IPv6 packet; ARP's sender; the target of a neighbour advertisement |
//!
//! Beside the listed IP addresses a guest may use those with which it looks for its own: 0.0.0.0 (DHCP, ARP probes),
//! :: (duplicate address detection), and the link-local address that is made from its MAC address (RFC 4291, appendix
//! A). Others, such as link-local addresses that it chose at random, must be listed.
//!
//! Where the MAC address is checked, nothing passes whose link-layer address can't be told: ARP of another form, what
//! lies behind more tags or extension headers than are followed, or behind a SNAP header, neighbour discovery in fragments
//! (of which most receivers take no notice, RFC 6980). Nor does MAC control: an interface would have the next bridge stop
//! sending, to everybody behind it.
//!
//! A NIC with a list of IP addresses sends nothing whose claim can't be told: broken headers, neighbour discovery
//! in fragments or behind more extension headers than are followed. Ethernet frames that carry neither IP nor ARP pass.
//!
//! Who is not trusted as a router sends no router advertisements and redirects, and who is not trusted as a DHCP server
//! none of its answers (RFC 6105, RFC 7610): [`crate::net::roles`] says what these are. That is so by default, and
//! whatever else is checked. What can't be told is for those alone who are trusted as both.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_protocol::net::{IpPrefix, SpoofChecks};

use super::DropReason;
use crate::net::claims::Claims;
use crate::net::frame::Frame;
use crate::net::parse::{FrameInfo, Mac, Network, Transport, ethertype, protocol};
use crate::net::roles::Role;

/// Where an IPv6 header says what follows it (RFC 8200, 3).
const IPV6_NEXT_AT: usize = 6;

/// A prefix as it is compared: the bits that count, and what they are.
#[derive(Debug, Clone, Copy)]
struct Range<T> {
    mask: T,
    value: T,
}

/// What a NIC's guest may send as.
#[derive(Debug, Default)]
pub struct Guard {
    mac: Option<Mac>,
    /// None: any IP address.
    addresses: Option<Addresses>,
    /// It is to be no router.
    no_router: bool,
    /// It is to be no DHCP server.
    no_dhcp: bool,
}

#[derive(Debug)]
struct Addresses {
    v4: Vec<Range<u32>>,
    v6: Vec<Range<u128>>,
    /// The link-local address that the NIC's MAC address gives.
    link_local: Ipv6Addr,
}

impl Guard {
    /// For a NIC with this MAC address.
    #[must_use]
    pub fn new(mac: Mac, checks: &SpoofChecks) -> Self {
        let sources = &checks.sources;
        Self {
            mac: checks.mac.then_some(mac),
            addresses: (!sources.is_empty()).then(|| Addresses::new(mac, sources)),
            no_router: !checks.trusted.router,
            no_dhcp: !checks.trusted.dhcp,
        }
    }

    /// Whether a frame of its guest's may go on.
    ///
    /// # Errors
    /// [`DropReason::SpoofedMac`], [`DropReason::SpoofedIp`], [`DropReason::Reserved`], [`DropReason::RogueRouter`],
    /// [`DropReason::RogueDhcp`].
    #[inline]
    pub fn check(&self, frame: &Frame<'_>) -> Result<(), DropReason> {
        if self.mac.is_some_and(|mac| frame.link.src() != mac) {
            return Err(DropReason::SpoofedMac);
        }
        let is_done = self.addresses.is_none() && (self.mac.is_none() || names_no_sender(frame));
        if !is_done {
            self.check_claims(frame)?;
        }
        frame.role().map_or(Ok(()), |role| self.check_role(role))
    }

    #[cold]
    fn check_role(&self, role: Role) -> Result<(), DropReason> {
        let is_router = matches!(role, Role::Router | Role::Unclear);
        let is_server = matches!(role, Role::DhcpServer | Role::Unclear);
        if is_router && self.no_router {
            return Err(DropReason::RogueRouter);
        }
        if is_server && self.no_dhcp {
            return Err(DropReason::RogueDhcp);
        }
        Ok(())
    }

    #[inline(never)]
    fn check_claims(&self, frame: &Frame<'_>) -> Result<(), DropReason> {
        let info = frame.info();
        let claims = frame.claims_of(&info);
        if let Some(addresses) = &self.addresses
            && info.network != Network::Other
        {
            addresses.check(&claims)?;
        }
        match self.mac {
            Some(_) if info.link.ethertype == ethertype::MAC_CONTROL => Err(DropReason::Reserved),
            Some(mac) if may_claim_mac(&info) => {
                let is_own = claims.mac.is_none_or(|claimed| claimed == mac);
                (is_own && !claims.unclear)
                    .then_some(())
                    .ok_or(DropReason::SpoofedMac)
            }
            _ => Ok(()),
        }
    }
}

/// Whether a frame may go wherever its list of addresses lets it, as can be told of most of them without looking
/// further: it is IPv4, IPv6 with TCP or UDP right behind its header, or neither IP nor ARP nor for the link alone. It is
/// never true of one of which [`may_claim_mac`] is.
#[inline]
fn names_no_sender(frame: &Frame<'_>) -> bool {
    let link = &frame.link;
    match link.ethertype {
        ethertype::ARP
        | ethertype::RARP
        | ethertype::VLAN
        | ethertype::PROVIDER_VLAN
        | ethertype::MAC_CONTROL => false,
        ethertype::IPV6 => {
            let next = frame.head.get(usize::from(link.l3) + IPV6_NEXT_AT);
            matches!(next, Some(&(protocol::TCP | protocol::UDP)))
        }
        // The length of an IEEE 802.3 frame, in which something may be hidden.
        other => other >= ethertype::FIRST,
    }
}

/// Whether a frame can name a link-layer address as its sender's. Of what is malformed here some receivers can make
/// out more: Linux takes ARP of another hardware type, and follows any number of tags and of extension headers.
#[inline]
fn may_claim_mac(info: &FrameInfo) -> bool {
    match info.network {
        Network::Arp => true,
        Network::Malformed => !matches!(info.link.ethertype, ethertype::IPV4 | ethertype::IPV6),
        Network::Ipv4 | Network::Other => false,
        Network::Ipv6 => matches!(
            info.transport,
            Transport::Icmpv6 | Transport::Fragment | Transport::Hidden
        ),
    }
}

impl Addresses {
    fn new(mac: Mac, prefixes: &[IpPrefix]) -> Self {
        let mut addresses = Self {
            v4: Vec::new(),
            v6: Vec::new(),
            link_local: link_local(mac),
        };
        for prefix in prefixes {
            let bits = u32::from(prefix.bits());
            match prefix.address() {
                IpAddr::V4(address) => addresses.v4.push(Range {
                    mask: u32::MAX.checked_shl(32 - bits).unwrap_or(0),
                    value: address.to_bits(),
                }),
                IpAddr::V6(address) => addresses.v6.push(Range {
                    mask: u128::MAX.checked_shl(128 - bits).unwrap_or(0),
                    value: address.to_bits(),
                }),
            }
        }
        addresses
    }

    fn check(&self, claims: &Claims) -> Result<(), DropReason> {
        let may = !claims.unclear
            && claims.v4.is_none_or(|address| self.has_v4(address))
            && claims.v6.is_none_or(|address| self.has_v6(address))
            && claims.target.is_none_or(|address| self.has_v6(address));
        if may {
            Ok(())
        } else {
            Err(DropReason::SpoofedIp)
        }
    }

    fn has_v4(&self, address: Ipv4Addr) -> bool {
        let bits = address.to_bits();
        address.is_unspecified() || self.v4.iter().any(|range| bits & range.mask == range.value)
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        let bits = address.to_bits();
        address.is_unspecified()
            || address == self.link_local
            || self.v6.iter().any(|range| bits & range.mask == range.value)
    }
}

/// The link-local address of a MAC address (RFC 4291, appendix A): its bits, with one turned, around ff-fe.
fn link_local([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use bulkhead_protocol::net::Trusted;

    use super::*;
    use crate::net::HashKey;
    use crate::net::header::Header;
    use crate::net::roles;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    /// Frames with noise behind some EtherTypes, behind a tag or not, much of which is taken for packets.
    fn noise() -> impl Strategy<Value = Vec<u8>> {
        const KINDS: &[u16] = &[
            0x0800, 0x0806, 0x8035, 0x86dd, 0x8100, 0x88a8, 0x8808, 0x88b5, 40,
        ];
        let kind = || prop::sample::select(KINDS).prop_map(u16::to_be_bytes);
        let protocol = prop::sample::select(&[0, 6, 17, 43, 44, 58, 60][..]);
        let behind = prop::collection::vec(any::<u8>(), 0..120);
        let parts = (kind(), kind(), any::<bool>(), protocol, behind);
        parts.prop_map(|(outer, inner, is_packet, protocol, mut behind)| {
            if is_packet && behind.len() > 9 {
                behind[0] = if outer == [8, 0] { 0x45 } else { 0x60 };
                (behind[6], behind[9]) = (protocol, protocol);
            }
            let tag: &[u8] = &[0, 5, inner[0], inner[1]];
            let is_tagged = matches!(outer, [0x81, 0] | [0x88, 0xa8]);
            let tag = if is_tagged { tag } else { &[] };
            [&[2, 0, 0, 0, 0, 2], &MAC[..], &outer, tag, &behind].concat()
        })
    }

    proptest! {
        #[test]
        fn what_is_passed_quickly_would_be_passed_after_a_whole_look(bytes in noise()) {
            let frame = Frame::of_bytes(&Header::default(), &bytes, HashKey::new(1));
            let frame = frame.expect("a frame");
            let trusted = Trusted { router: true, dhcp: true };
            let checks = SpoofChecks { trusted, ..SpoofChecks::default() };
            let guard = Guard::new(MAC, &checks);
            let whole = guard.check_claims(&frame);
            prop_assert!(whole.is_ok() || !names_no_sender(&frame), "{:?}", frame.info());
            prop_assert_eq!(guard.check(&frame), whole);
            let has_role = roles::role(&bytes, false, &frame.info()).is_some();
            prop_assert!(!has_role || !roles::is_ordinary(&bytes, &frame.link));
        }
    }
}
