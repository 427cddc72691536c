//! What of a grant a served NIC takes in as it is: how much it may do, and what it may claim to be.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::net::{NicGrant, TrafficLimits};

use crate::net::{NetDevice, Shape};
use crate::port::Guard;

/// Whether a grant says the same as another of what is served: the epoch, the limits, the checks and the mirror
/// aside.
pub(super) fn is_same(one: &NicGrant, other: &NicGrant) -> bool {
    let as_other = NicGrant {
        epoch: other.epoch,
        limits: other.limits,
        checks: other.checks.clone(),
        mirror: other.mirror.clone(),
        ..one.clone()
    };
    as_other == *other
}

/// The card that a grant describes.
pub(super) fn shape(grant: &NicGrant) -> Shape {
    Shape {
        mac: grant.mac.bytes(),
        mtu: grant.mtu,
        queue_pairs: grant.queue_pairs,
    }
}

/// What its guest may send as.
pub(super) fn guard(grant: &NicGrant) -> Guard {
    Guard::new(grant.mac.bytes(), &grant.checks)
}

/// Has a device keep to what a grant says of limits and checks.
pub(super) fn apply(device: &NetDevice, grant: &NicGrant) {
    device.guard.set(guard(grant));
    device.tx_qos().set(&as_limits(&grant.limits.tx), None);
    device.rx_qos().set(&as_limits(&grant.limits.rx), None);
}

/// A frame is what a request is of a disk.
fn as_limits(traffic: &TrafficLimits) -> Limits {
    Limits {
        requests: traffic.packets,
        bytes: traffic.bytes,
    }
}
