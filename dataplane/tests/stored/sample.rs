//! Volumes to be remembered.

use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_dataplane::stored::{
    Fd, FdNumber, Reply, Step, StoredCache, StoredConnection, StoredInflight, StoredLog, StoredNic,
    StoredPhase, StoredPort, StoredRegion, StoredRing, StoredSwitch, StoredVolume, StoredVring,
    StoredXdp, StoredXdpQueue,
};
use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};
use bulkhead_protocol::net::{NicGrant, NicLimits, PortSpec, SpoofChecks, TrafficLimits, Uplink};
use bulkhead_protocol::{DiscardPolicy, NicId, RekeyId, VolumeId};
use nix::sys::memfd::{MFdFlags, memfd_create};

pub fn fd() -> Fd {
    Arc::new(memfd_create("test", MFdFlags::MFD_CLOEXEC).expect("memfd"))
}

/// Whether two are the same file.
pub fn same(one: impl AsFd, other: impl AsFd) -> bool {
    let inode = |fd: &dyn AsFd| nix::sys::stat::fstat(fd.as_fd()).expect("stat").st_ino;
    inode(&one) == inode(&other)
}

pub fn grant(queues: u16) -> VolumeGrant {
    let limits = Limits {
        requests: Some(Rate::with_default_burst(10_000)),
        ..Limits::default()
    };
    VolumeGrant {
        volume: VolumeId([7; 16]),
        socket: "disk".parse().expect("a name"),
        allowed_uid: 1000,
        size_bytes: 1 << 30,
        logical_block_bytes: 4096,
        data_unit_bytes: Some(4096),
        read_only: false,
        serial: "serial".to_owned(),
        queues,
        discard: DiscardPolicy::Ignore,
        epoch: 3,
        rekey: Some(RekeyId([9; 16])),
        limits,
        group: Some(GroupGrant {
            name: "tenant-a".parse().expect("a name"),
            limits,
        }),
    }
}

/// Nobody is connected to it. Each descriptor is a new one.
pub fn idle<F>(queues: u16, fd: &mut impl FnMut() -> F) -> StoredVolume<F> {
    StoredVolume {
        grant: grant(queues),
        file: fd(),
        listener: fd(),
        key: Some(fd()),
        previous_key: Some(fd()),
        refuses_new: false,
        cache: StoredCache {
            writeback: false,
            chosen: true,
        },
        connection: None,
    }
}

pub fn connection<F>(queues: u16, regions: u64, fd: &mut impl FnMut() -> F) -> StoredConnection<F> {
    let ring = StoredRing {
        desc: u64::MAX - 1,
        avail: u64::MAX - 2,
        used: u64::MAX - 3,
    };
    StoredConnection {
        socket: fd(),
        features: u64::MAX,
        protocol_features: u64::MAX,
        status: 0xff,
        memory: (0..regions)
            .map(|i| StoredRegion {
                guest_addr: i << 40,
                bytes: 1 << 36,
                user_addr: u64::MAX - i,
                file_offset: 1 << 40,
                fd: fd(),
            })
            .collect(),
        vrings: (0..queues)
            .map(|_| StoredVring {
                size: 32768,
                addresses: Some(ring),
                log: Some(u64::MAX),
                base: Some(0x8000_8000),
                enabled: true,
                phase: StoredPhase::Running,
                running: Some(ring),
                kick: Some(fd()),
                call: Some(fd()),
                error: Some(fd()),
                anew: true,
            })
            .collect(),
        inflight: Some(StoredInflight {
            fd: fd(),
            bytes: 1 << 30,
            offset: 1 << 40,
            queues,
            queue_size: 32768,
            private: true,
        }),
        log: Some(StoredLog {
            fd: fd(),
            bytes: 1 << 30,
            offset: 1 << 40,
        }),
        backend: Some(fd()),
        step: Step::Applied {
            bytes: 20,
            reply: Reply::Owed,
        },
        told_sectors: Some(1 << 40),
    }
}

/// As it is written, with everything that there can be.
pub fn full(queues: u16, regions: u64) -> StoredVolume<FdNumber> {
    let mut next = u32::MAX - 10_000;
    let mut number = || {
        next += 1;
        FdNumber(next)
    };
    let mut volume = idle(queues, &mut number);
    volume.connection = Some(connection(queues, regions, &mut number));
    volume
}

/// Nobody is connected to it. Each descriptor is a new one.
pub fn idle_nic<F>(pairs: u16, fd: &mut impl FnMut() -> F) -> StoredNic<F> {
    let rate = Some(Rate::with_default_burst(10_000));
    let limits = TrafficLimits {
        packets: rate,
        bytes: rate,
    };
    StoredNic {
        grant: NicGrant {
            nic: NicId([8; 16]),
            socket: "nic".parse().expect("a name"),
            allowed_uid: 1000,
            mac: "52:54:00:12:34:56".parse().expect("an address"),
            mtu: 1500,
            queue_pairs: pairs,
            port: PortSpec::Tap {
                interface: "tap0".parse().expect("a name"),
            },
            uplink: None,
            limits: NicLimits {
                tx: limits,
                rx: limits,
            },
            checks: SpoofChecks {
                mac: true,
                sources: vec!["192.0.2.0/24".parse().expect("a prefix")],
                ..SpoofChecks::default()
            },
            mirror: None,
            epoch: 3,
        },
        listener: fd(),
        port: StoredPort {
            taps: (0..pairs).map(|_| fd()).collect(),
            has_uso: true,
            ..StoredPort::nothing()
        },
        refuses_new: true,
        connection: None,
    }
}

/// A card with everything that there can be.
pub fn nic(pairs: u16, regions: u64) -> StoredNic<FdNumber> {
    let mut next = 0;
    let mut number = || {
        next += 1;
        FdNumber(next)
    };
    let mut nic = idle_nic(pairs, &mut number);
    nic.connection = Some(connection(2 * pairs, regions, &mut number));
    nic
}

/// A card on queues of an interface.
pub fn xdp_nic(pairs: u16) -> StoredNic<FdNumber> {
    let mut next = 0;
    let mut number = || {
        next += 1;
        FdNumber(next)
    };
    let mut nic = idle_nic(0, &mut number);
    nic.grant.queue_pairs = pairs;
    nic.grant.port = PortSpec::AfXdp {
        interface: "eth1".parse().expect("a name"),
        queue: 3,
    };
    let queues = (0..pairs).map(|_| StoredXdpQueue {
        socket: number(),
        memory: number(),
    });
    nic.port = StoredPort {
        xdp: Some(StoredXdp {
            queues: queues.collect(),
            link: number(),
        }),
        ..StoredPort::nothing()
    };
    nic
}

/// A switch with an uplink.
pub fn switch() -> StoredSwitch<FdNumber> {
    StoredSwitch {
        name: "lan".parse().expect("a name"),
        uplink: Some(Uplink::Tap {
            interface: "tap1".parse().expect("a name"),
        }),
        port: StoredPort {
            taps: vec![FdNumber(1)],
            ..StoredPort::nothing()
        },
    }
}
