//! Messages between the operator's command line and the agent, over the admin socket.

use minicbor::{Decode, Encode};

#[cfg(doc)]
use crate::control::NICS_PER_MESSAGE;
use crate::control::{NicStatus, SwitchStatus, VolumeStatus, WorkersStatus};
use crate::identity::{GroupName, NicId, SocketName, SwitchName, VolumeId};
use crate::keys::{EnvelopeDigest, HostKeys};
use crate::limits::{GroupGrant, Limits};
use crate::net::{Mac, NicLimits, PortSpec, Uplink};
use crate::release::{ProgramStatus, Release};
use crate::rot::{Measurement, Role};

/// From the CLI to the agent; one request per connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum AdminRequest {
    /// Verify an envelope and make the host what it says. Descriptor: the envelope.
    #[n(0)]
    Apply {
        /// Only verify and plan.
        #[n(0)]
        dry_run: bool,
    },
    /// What runs here?
    #[n(1)]
    Status,
    /// Run what lies in rot's `--bin-dir`, if it is what this statement says. Descriptor: the
    /// release statement.
    #[n(2)]
    Upgrade,
    /// What do the network cards do? Answered for at most [`NICS_PER_MESSAGE`] of them.
    #[n(3)]
    Nics {
        /// Those whose id is above this one; none: from the first.
        #[n(0)]
        after: Option<NicId>,
    },
}

/// From the agent to the CLI.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum AdminReply {
    /// The host is what the bundle says (or would be: dry run).
    #[n(0)]
    Applied {
        /// Epoch of the bundle.
        #[n(0)]
        epoch: u64,
        /// Each step taken, as a line for the operator.
        #[n(1)]
        steps: Vec<String>,
        /// Steps that failed and are tried again, with the reason.
        #[n(2)]
        pending: Vec<String>,
    },
    /// Refused; the running state is as before.
    #[n(1)]
    Refused {
        /// For the operator: what, where, what to do.
        #[n(0)]
        reason: String,
    },
    /// Answer to [`AdminRequest::Status`].
    #[n(2)]
    Status {
        /// The answer.
        #[n(0)]
        status: HostStatus,
    },
    /// The release runs.
    #[n(3)]
    Upgraded {
        /// Which.
        #[n(0)]
        release: Release,
    },
    /// The agent itself is upgraded and ends now: the status of the next one tells how it went.
    #[n(4)]
    UpgradeBegun {
        /// Which.
        #[n(0)]
        release: Release,
    },
    /// Neither in force nor refused: keyd may have accepted the bundle, and is asked until it says.
    #[n(5)]
    Open {
        /// For the operator: what is not known, and what becomes of it.
        #[n(0)]
        reason: String,
    },
    /// Answer to [`AdminRequest::Nics`].
    #[n(6)]
    Nics {
        /// Network cards of the bundle, by id.
        #[n(0)]
        nics: Vec<NicEntry>,
        /// There are more.
        #[n(1)]
        more: bool,
        /// The switches of the bundle.
        #[n(2)]
        switches: Vec<SwitchEntry>,
    },
}

/// What runs on a host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HostStatus {
    /// Its name, as bundles target it.
    #[n(0)]
    pub host: String,
    /// Epoch of the bundle applied last.
    #[n(1)]
    pub epoch: Option<u64>,
    /// Lowest epoch that would be refused no more: the next must be above it.
    #[n(2)]
    pub epoch_floor: u64,
    /// Digest of the envelope applied last.
    #[n(3)]
    pub digest: Option<EnvelopeDigest>,
    /// One entry per process that rot introduced to the agent: not rot, and not the agent itself.
    #[n(4)]
    pub processes: Vec<ProcessStatus>,
    /// One entry per volume of the bundle.
    #[n(5)]
    pub volumes: Vec<VolumeEntry>,
    /// Steps that failed and are tried again, with the reason.
    #[n(6)]
    pub pending: Vec<String>,
    /// The host's key, and what was shredded; none until keyd has said.
    #[n(7)]
    pub keys: Option<Box<HostKeys>>,
    /// The groups of the bundle.
    #[n(8)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub groups: Vec<GroupGrant>,
    /// The data plane's workers; none while it does not answer.
    #[n(9)]
    pub workers: Option<Box<WorkersStatus>>,
    /// The programs that run, as rot measured them.
    #[n(10)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub programs: Vec<ProgramStatus>,
    /// How many network cards the bundle has; [`AdminRequest::Nics`] tells of them.
    #[n(11)]
    pub nics: Option<u32>,
}

/// A process on the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProcessStatus {
    /// Which.
    #[n(0)]
    pub role: Role,
    /// Its process id.
    #[n(1)]
    pub pid: u32,
    /// How many times it was started, from 1.
    #[n(2)]
    pub generation: u64,
    /// What rot measured.
    #[n(3)]
    pub measurement: Measurement,
}

/// A volume of the applied bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VolumeEntry {
    /// Which.
    #[n(0)]
    pub volume: VolumeId,
    /// The name people gave it.
    #[n(1)]
    pub name: String,
    /// Its listener.
    #[n(2)]
    pub socket: SocketName,
    /// Path of the socket file, for the frontend's command line.
    #[n(3)]
    pub socket_path: String,
    /// What the data plane says; none while it does not answer.
    #[n(4)]
    pub state: Option<VolumeStatus>,
    /// Bytes that this host encrypted under its present key, as far as the agent counted them; none
    /// for a plain volume, or before the first count.
    #[n(5)]
    pub key_bytes: Option<u64>,
    /// How much it may do.
    #[n(6)]
    #[cbor(skip_if = "Limits::is_none")]
    pub limits: Limits,
    /// The group whose limits hold for it, too.
    #[n(7)]
    pub group: Option<GroupName>,
}

/// A switch of the applied bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SwitchEntry {
    /// Its name.
    #[n(0)]
    pub name: SwitchName,
    /// What connects it to the world.
    #[n(1)]
    pub uplink: Option<Uplink>,
    /// What the data plane says; none while it does not answer, or does not have it.
    #[n(2)]
    pub state: Option<SwitchStatus>,
}

/// A network card of the applied bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NicEntry {
    /// Which.
    #[n(0)]
    pub nic: NicId,
    /// The name people gave it.
    #[n(1)]
    pub name: String,
    /// Its listener.
    #[n(2)]
    pub socket: SocketName,
    /// Path of the socket file, for the frontend's command line.
    #[n(3)]
    pub socket_path: String,
    /// Its address.
    #[n(4)]
    pub mac: Mac,
    /// Its MTU in bytes.
    #[n(5)]
    pub mtu: u16,
    /// Its queue pairs.
    #[n(6)]
    pub queue_pairs: u16,
    /// What its frames go out of.
    #[n(7)]
    pub port: PortSpec,
    /// How much it may send and get.
    #[n(8)]
    #[cbor(skip_if = "NicLimits::is_none")]
    pub limits: NicLimits,
    /// What the data plane says; none while it does not answer.
    #[n(9)]
    pub state: Option<NicStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Channel;
    use crate::control::{Latency, RekeyProgress, RekeyState, StorageState, StorageStatus};
    use crate::limits::Rate;
    use crate::net::TrafficLimits;
    use crate::release::Component;

    /// A volume with much to be said of it.
    fn entry(number: u8) -> VolumeEntry {
        let most = u64::MAX / 2;
        let rate = Some(Rate {
            per_second: 1 << 40,
            burst: 1 << 50,
        });
        let state = VolumeStatus {
            volume: VolumeId([number; 16]),
            attached: true,
            connected: true,
            encrypted: true,
            running_queues: 64,
            retired_queues: 64,
            requests_ok: most,
            requests_failed: most,
            read_bytes: most,
            written_bytes: most,
            fault: Some("x".repeat(100)),
            capacity_bytes: most,
            holds_volume: true,
            waits_for_volume: false,
            rekey: Some(RekeyProgress {
                done_bytes: most,
                total_bytes: most,
                state: RekeyState::Running,
            }),
            storage: Some(StorageStatus {
                state: StorageState::Hung,
                old_requests: u32::MAX,
                oldest_ms: most,
                slow_after_ms: most,
                slow_total: most,
                latency: Some(Latency {
                    median_us: most,
                    p99_us: most,
                    p999_us: most,
                }),
            }),
            throttled_ms: most,
        };
        VolumeEntry {
            volume: state.volume,
            name: "n".repeat(64),
            socket: "s".repeat(64).parse().expect("a name"),
            socket_path: "p".repeat(107),
            state: Some(state),
            key_bytes: Some(most),
            limits: Limits {
                requests: rate,
                bytes: rate,
            },
            group: Some("g".repeat(64).parse().expect("a name")),
        }
    }

    #[test]
    fn the_status_of_256_volumes_fits_into_a_message() {
        let status = HostStatus {
            host: "h".repeat(64),
            epoch: Some(u64::MAX),
            epoch_floor: u64::MAX,
            digest: Some([7; 48].into()),
            processes: Vec::new(),
            volumes: (0..=255).map(entry).collect(),
            pending: vec!["p".repeat(600); 4],
            keys: None,
            groups: Vec::new(),
            workers: None,
            programs: Component::ALL
                .map(|component| ProgramStatus {
                    component,
                    measurement: [7; 48].into(),
                    version: Some(u64::MAX),
                    failed: Some("f".repeat(300)),
                })
                .into(),
            nics: Some(256),
        };
        fits(&AdminReply::Status { status });
    }

    fn fits(reply: &AdminReply) {
        let (a, b) = Channel::pair().expect("pair");
        a.send(reply, &[]).expect("it fits");
        assert_eq!(b.receive::<AdminReply>().expect("received").message, *reply);
    }

    #[test]
    fn the_status_of_a_page_of_nics_fits_into_a_message() {
        let rate = Some(Rate {
            per_second: 1 << 40,
            burst: 1 << 50,
        });
        let limits = TrafficLimits {
            packets: rate,
            bytes: rate,
        };
        let entry = |number: usize| NicEntry {
            nic: NicId([u8::try_from(number).unwrap_or(0); 16]),
            name: "n".repeat(64),
            socket: "s".repeat(64).parse().expect("a name"),
            socket_path: "p".repeat(107),
            mac: "52:54:00:00:00:01".parse().expect("a MAC"),
            mtu: u16::MAX,
            queue_pairs: 16,
            port: PortSpec::Switch {
                switch: "s".repeat(64).parse().expect("a name"),
            },
            limits: NicLimits {
                tx: limits,
                rx: limits,
            },
            state: Some(crate::control::nic_status_at_its_longest()),
        };
        let switch = |number: usize| {
            let name: SwitchName = format!("{number:064}").parse().expect("a name");
            SwitchEntry {
                name: name.clone(),
                uplink: Some(Uplink::AfXdp {
                    interface: "i".repeat(15).parse().expect("a name"),
                    queue: u16::MAX,
                }),
                state: Some(crate::control::switch_status_at_its_longest(name)),
            }
        };
        fits(&AdminReply::Nics {
            nics: (0..crate::control::NICS_PER_MESSAGE).map(entry).collect(),
            more: true,
            switches: (0..crate::net::MAX_SWITCHES).map(switch).collect(),
        });
    }
}
