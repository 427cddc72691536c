//! A volume, a NIC and a bundle for this crate's own tests, which change of them what matters.

use bulkhead_bundle::{HostBundle, Nic, SocketSpec, Volume};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::net::{NicLimits, PortSpec, SpoofChecks};
use bulkhead_protocol::{DiscardPolicy, NicId, VolumeId};

/// An encrypted volume of 1 MiB; each number is another, with a file and a listener of its own.
pub(crate) fn volume(number: u8) -> Volume {
    Volume {
        id: VolumeId([number; 16]),
        name: format!("disk{number}"),
        path: format!("disk{number}.img"),
        size_bytes: 1 << 20,
        data_unit_bytes: Some(512),
        logical_block_bytes: 512,
        read_only: false,
        serial: String::new(),
        discard: DiscardPolicy::Ignore,
        queues: 1,
        socket: SocketSpec {
            name: format!("vm{number}").parse().expect("name"),
            uid: 1,
            gid: 1,
            mode: 0o600,
        },
        allowed_uid: 1,
        force_removal: false,
        sealed_keys: Vec::new(),
        rekey: None,
        limits: Limits::default(),
        group: None,
    }
}

/// A bundle with these volumes.
pub(crate) fn bundle(volumes: Vec<Volume>) -> HostBundle {
    HostBundle {
        host: "host-a".to_owned(),
        epoch: 1,
        supersedes: Vec::new(),
        not_before: 0,
        expires: 1,
        volumes,
        force_remove: Vec::new(),
        shred: Vec::new(),
        groups: Vec::new(),
        workers: None,
        switches: Vec::new(),
        nics: Vec::new(),
        force_remove_nics: Vec::new(),
    }
}

/// A NIC on the switch `lan`.
pub(crate) fn nic(number: u8) -> Nic {
    Nic {
        id: NicId([0x80 + number; 16]),
        name: format!("net{number}"),
        mac: format!("52:54:00:00:00:{number:02x}")
            .parse()
            .expect("a MAC"),
        mtu: 1500,
        queue_pairs: 1,
        port: PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        },
        socket: SocketSpec {
            name: format!("vm{number}-net").parse().expect("a name"),
            uid: 1000,
            gid: 1000,
            mode: 0o660,
        },
        allowed_uid: 1000,
        force_removal: false,
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
    }
}
