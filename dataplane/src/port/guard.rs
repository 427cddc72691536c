//! Whether a guest sends as itself: each frame's source addresses against those that its NIC may have.
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
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_protocol::net::{IpPrefix, SpoofChecks};

use super::DropReason;
use crate::net::claims::Claims;
use crate::net::frame::Frame;
use crate::net::parse::{FrameInfo, Mac, Network, Transport, ethertype};

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
        }
    }

    /// Whether a frame of its guest's may go on.
    ///
    /// # Errors
    /// [`DropReason::SpoofedMac`], [`DropReason::SpoofedIp`], [`DropReason::Reserved`].
    #[inline]
    pub fn check(&self, frame: &Frame<'_>) -> Result<(), DropReason> {
        let info = &frame.info;
        if self.mac.is_some_and(|mac| info.src != mac) {
            return Err(DropReason::SpoofedMac);
        }
        if let Some(addresses) = &self.addresses
            && info.network != Network::Other
        {
            addresses.check(&frame.claims())?;
        }
        match self.mac {
            Some(mac) if may_claim_mac(info) => self.check_claimed_mac(mac, frame),
            _ => Ok(()),
        }
    }

    #[inline(never)]
    fn check_claimed_mac(&self, mac: Mac, frame: &Frame<'_>) -> Result<(), DropReason> {
        if frame.info.ethertype == ethertype::MAC_CONTROL {
            return Err(DropReason::Reserved);
        }
        let claims = frame.claims();
        let is_own = claims.mac.is_none_or(|claimed| claimed == mac);
        if is_own && !claims.unclear {
            Ok(())
        } else {
            Err(DropReason::SpoofedMac)
        }
    }
}

/// Whether a frame is to be looked at again: it can name a link-layer address as its sender's, or is for the link alone.
/// Of what is malformed here some receivers can make out more: Linux takes ARP of another hardware type, and follows any
/// number of tags and of extension headers.
#[inline]
fn may_claim_mac(info: &FrameInfo) -> bool {
    match info.network {
        Network::Arp => true,
        Network::Malformed => !matches!(info.ethertype, ethertype::IPV4 | ethertype::IPV6),
        Network::Other => info.ethertype == ethertype::MAC_CONTROL,
        Network::Ipv4 => false,
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
