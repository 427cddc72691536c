//! What keyd vouches for: each volume and each NIC of a bundle, as the data plane is to serve it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_bundle::{HostBundle, Nic, Volume};
use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::limits::GroupGrant;
use bulkhead_protocol::net::NicGrant;

/// What keyd vouches for about a volume of a bundle.
pub(crate) fn grant_of(bundle: &HostBundle, volume: &Volume) -> VolumeGrant {
    VolumeGrant {
        volume: volume.id,
        socket: volume.socket.name.clone(),
        allowed_uid: volume.allowed_uid,
        size_bytes: volume.size_bytes,
        logical_block_bytes: volume.logical_block_bytes,
        data_unit_bytes: volume.data_unit_bytes,
        read_only: volume.read_only,
        serial: volume.serial.clone(),
        queues: volume.queues,
        discard: volume.discard,
        epoch: bundle.epoch,
        rekey: volume.rekey.as_ref().map(|rekey| rekey.id),
        limits: volume.limits,
        group: bundle.group_of(volume).map(|group| GroupGrant {
            name: group.name.clone(),
            limits: group.limits,
        }),
    }
}

/// The same about a NIC. That the names of people, the owner of its socket file and its switch's uplink are
/// right is as much as the signatures say; the last is granted, since the data plane holds an uplink against it.
pub(crate) fn nic_grant_of(bundle: &HostBundle, nic: &Nic) -> NicGrant {
    NicGrant {
        nic: nic.id,
        socket: nic.socket.name.clone(),
        allowed_uid: nic.allowed_uid,
        mac: nic.mac,
        mtu: nic.mtu,
        queue_pairs: nic.queue_pairs,
        port: nic.port.clone(),
        uplink: bundle.uplink_of(nic).cloned(),
        limits: nic.limits,
        checks: nic.checks.clone(),
        mirror: nic.mirror.clone(),
        epoch: bundle.epoch,
    }
}
