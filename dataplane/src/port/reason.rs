//! Why a frame was dropped: a closed list, with the names that counters and `status` show.
//!
//! A network drops frames; an operator must be able to say why. So whoever drops one names a reason, and there is
//! no counter of "errors".
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Why a frame went no further. Counted where it was dropped: those of the first group with the queue that sent it,
/// those of the second with the queue that would have received it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// No Ethernet frame, or a header that does not say what it must (virtio 1.2, 5.1.6).
    Malformed,
    /// An offload that its own frame contradicts (virtio 1.2, 5.1.6.2), or that is too much for everybody: a segment that
    /// becomes many packets and is flooded.
    BadOffload,
    /// Longer than any frame or segment, or than the MTU where nothing cuts it.
    TooLong,
    /// The source is not the NIC's MAC address.
    SpoofedMac,
    /// The source is none of the NIC's IP addresses, in an IP header, ARP or neighbour discovery.
    SpoofedIp,
    /// A router's advertisement or redirect, or what can't be told from one, from a guest that is not trusted to be one.
    RogueRouter,
    /// A DHCP server's answer, from a guest that is not trusted to be one.
    RogueDhcp,
    /// A destination that bridges do not forward (IEEE 802.1Q, 8.6.3), such as that of spanning tree.
    Reserved,
    /// The destination is where it came from.
    Hairpin,
    /// There is nowhere to send it to.
    NoPort,
    /// The interface behind the port takes no more for now.
    PortBusy,
    /// The interface behind the port refused it.
    PortError,
    /// The receiver's driver offered too few buffers.
    NoRoom,
    /// The receiver's driver offered buffers that no frame can be written to.
    BadBuffers,
    /// The receiver's limits were used up.
    Limited,
    /// The receiver's link is down, or its driver is not there.
    LinkDown,
}

impl DropReason {
    /// All of them; a reason's place here is its number.
    pub const ALL: [Self; 16] = [
        Self::Malformed,
        Self::BadOffload,
        Self::TooLong,
        Self::SpoofedMac,
        Self::SpoofedIp,
        Self::RogueRouter,
        Self::RogueDhcp,
        Self::Reserved,
        Self::Hairpin,
        Self::NoPort,
        Self::PortBusy,
        Self::PortError,
        Self::NoRoom,
        Self::BadBuffers,
        Self::Limited,
        Self::LinkDown,
    ];
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Its number, below [`DropReason::COUNT`]: the place of its counter.
    #[must_use]
    #[inline]
    pub fn number(self) -> usize {
        self as usize
    }

    /// Its name in `status` and in metrics. These names stay as they are from release to release.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::BadOffload => "bad_offload",
            Self::TooLong => "too_long",
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedIp => "spoofed_ip",
            Self::RogueRouter => "rogue_router",
            Self::RogueDhcp => "rogue_dhcp",
            Self::Reserved => "reserved",
            Self::Hairpin => "hairpin",
            Self::NoPort => "no_port",
            Self::PortBusy => "port_busy",
            Self::PortError => "port_error",
            Self::NoRoom => "no_room",
            Self::BadBuffers => "bad_buffers",
            Self::Limited => "limited",
            Self::LinkDown => "link_down",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_reason_has_its_own_number_and_name() {
        let numbers: Vec<usize> = DropReason::ALL.iter().map(|one| one.number()).collect();
        assert_eq!(numbers, (0..DropReason::COUNT).collect::<Vec<_>>());
        let names: HashSet<&str> = DropReason::ALL.iter().map(|one| one.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
        assert!(names.iter().all(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        }));
    }
}
