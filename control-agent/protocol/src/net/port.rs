//! Where the frames of a network card go: a switch with or without an uplink, an interface of the host, nowhere.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use minicbor::{Decode, Encode};

use super::InterfaceName;
use crate::identity::SwitchName;

/// Longest MTU in bytes that a port of AF_XDP can have: what one of its frames, a page, holds beside a header, VLAN tags and
/// what the kernel keeps free in front.
pub const MAX_AF_XDP_MTU: u16 = 3818;
/// Queues of an interface that can have an AF_XDP socket: the first so many.
pub const AF_XDP_QUEUES: u16 = 64;

/// What a NIC's frames go out of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub enum PortSpec {
    /// A switch of this host, among other NICs.
    #[n(0)]
    Switch {
        /// Which.
        #[n(0)]
        switch: SwitchName,
    },
    /// A TAP interface of its own, with a queue for each of its pairs.
    #[n(1)]
    Tap {
        /// Which; it is there before, or made by the agent.
        #[n(0)]
        interface: InterfaceName,
    },
    /// Receive queues of an interface, through AF_XDP sockets.
    #[n(2)]
    AfXdp {
        /// Which.
        #[n(0)]
        interface: InterfaceName,
        /// The queue of its first pair; each further pair has the next one.
        #[n(1)]
        queue: u16,
    },
    /// Nowhere: what is sent is dropped.
    #[n(3)]
    Null,
}

/// What connects a switch to the world. It has one queue, since one worker serves a switch.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub enum Uplink {
    /// A TAP interface.
    #[n(0)]
    Tap {
        /// Which.
        #[n(0)]
        interface: InterfaceName,
    },
    /// A receive queue of an interface, through an AF_XDP socket.
    #[n(1)]
    AfXdp {
        /// Which.
        #[n(0)]
        interface: InterfaceName,
        /// Which of its queues.
        #[n(1)]
        queue: u16,
    },
}

impl Uplink {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Tap { .. } => Ok(()),
            Self::AfXdp { queue, .. } => check_queues(*queue, 1),
        }
    }
}

impl fmt::Display for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap { interface } => write!(f, "TAP {interface}"),
            Self::AfXdp { interface, queue } => write!(f, "AF_XDP {interface} queue {queue}"),
        }
    }
}

impl PortSpec {
    /// Descriptors that an attach of a NIC with so many pairs carries: one for each pair where the
    /// host's kernel is on the other side.
    #[must_use]
    pub fn descriptors(&self, queue_pairs: u16) -> usize {
        match self {
            Self::Switch { .. } | Self::Null => 0,
            Self::Tap { .. } | Self::AfXdp { .. } => usize::from(queue_pairs),
        }
    }

    /// Checks it with what else a NIC is: its switch's uplink, its MTU and how many queue pairs it has.
    ///
    /// # Errors
    /// The field of the source that is out of bounds, and what would be right.
    pub fn check(
        &self,
        uplink: Option<&Uplink>,
        mtu: u16,
        queue_pairs: u16,
    ) -> Result<(), (&'static str, String)> {
        if let Self::AfXdp { queue, .. } = self {
            check_queues(*queue, queue_pairs).map_err(|problem| ("port", problem))?;
        }
        let whose = match (self, uplink) {
            (Self::AfXdp { .. }, _) => "its port",
            (Self::Switch { .. }, Some(Uplink::AfXdp { .. })) => "its switch's uplink",
            _ => return Ok(()),
        };
        if mtu > MAX_AF_XDP_MTU {
            let problem = format!(
                "{mtu} is more than the {MAX_AF_XDP_MTU} that {whose} can have: AF_XDP takes no longer frames, \
                 a TAP does"
            );
            return Err(("mtu", problem));
        }
        Ok(())
    }
}

fn check_queues(first: u16, count: u16) -> Result<(), String> {
    let last = u32::from(first) + u32::from(count).saturating_sub(1);
    if last >= AF_XDP_QUEUES.into() {
        return Err(format!(
            "queue {last}: only the first {AF_XDP_QUEUES} of an interface, 0 to {}, can be an AF_XDP port's",
            AF_XDP_QUEUES - 1
        ));
    }
    Ok(())
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch { switch } => write!(f, "switch {switch}"),
            Self::Tap { interface } => write!(f, "TAP {interface}"),
            Self::AfXdp { interface, queue } => write!(f, "AF_XDP {interface} from queue {queue}"),
            Self::Null => f.write_str("null"),
        }
    }
}
