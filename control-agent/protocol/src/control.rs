//! Messages between the agent and the data plane: which file a granted volume lives in, which interfaces a
//! granted NIC is connected to, and what both are doing. Nothing here can widen what keyd granted.

use minicbor::{Decode, Encode};

use crate::identity::{NicId, ServedId, SocketName, SwitchName, VolumeId};
use crate::workers::Workers;

mod nics;
mod storage;

/// From the agent to the data plane. Each is answered by one [`DataplaneToAgent`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum AgentToDataplane {
    /// Serve a granted volume from this file on this listener. Descriptor: the opened file or
    /// block device. Refused unless keyd granted exactly this volume for exactly this socket.
    /// Attaching what is attached answers Done and keeps the file it has.
    #[n(0)]
    Attach {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume.
        #[n(1)]
        volume: VolumeId,
        /// On which listener.
        #[n(2)]
        socket: SocketName,
    },
    /// Stop serving: requests in flight end first, the key is wiped, the connection closes, and the descriptors that
    /// were given for it.
    #[n(1)]
    Detach {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume or NIC.
        #[n(1)]
        id: ServedId,
    },
    /// From now on accept no new frontend for it. Refused if one is connected and
    /// `force` is not set, so that "is it in use" can't change between asking and removing.
    #[n(2)]
    PrepareRemove {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume or NIC.
        #[n(1)]
        id: ServedId,
        /// Also if a frontend is connected (it stays connected until Detach).
        #[n(2)]
        force: bool,
    },
    /// Undo of [`AgentToDataplane::PrepareRemove`].
    #[n(3)]
    CancelRemove {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume or NIC.
        #[n(1)]
        id: ServedId,
    },
    /// What are the volumes doing?
    #[n(4)]
    Status {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
    },
    /// Serve a granted NIC on this listener. Descriptors: as many as [`PortFacts::descriptors`] says for its
    /// port and its pairs. Refused unless keyd granted exactly this NIC for exactly this socket, and, on a
    /// switch, unless that is attached. Attaching what is attached answers Done and keeps what it has.
    #[n(5)]
    AttachNic {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which NIC.
        #[n(1)]
        nic: NicId,
        /// On which listener.
        #[n(2)]
        socket: SocketName,
        /// What its port's descriptors are.
        #[n(3)]
        facts: PortFacts,
    },
    /// Have a switch, with its uplink. Descriptors: as for a NIC with one pair on the uplink's kind of port. Refused
    /// unless a grant names the switch with exactly such an uplink. It is gone as soon as no grant names it so any
    /// more. Attaching what is attached answers Done and keeps what it has.
    #[n(6)]
    AttachSwitch {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which switch.
        #[n(1)]
        switch: SwitchName,
        /// What its uplink's descriptors are.
        #[n(2)]
        facts: PortFacts,
    },
    /// Copy the frames of an attached NIC into this file, as its grant allows. Descriptor: the file, new and
    /// empty, to be appended to. It ends with the grant's mirror, with the NIC, or when it is full.
    #[n(7)]
    Mirror {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which NIC.
        #[n(1)]
        nic: NicId,
    },
    /// Which NICs and switches are attached?
    #[n(8)]
    Networks {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
    },
    /// What are the NICs doing, and the switches? Answered for at most [`NICS_PER_MESSAGE`] NICs.
    #[n(9)]
    Nics {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Those whose id is above this one; none: from the first.
        #[n(1)]
        after: Option<NicId>,
    },
}

/// What the agent says of the descriptors that it gives for a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum PortFacts {
    /// There are none: a switch without uplink, a NIC on a switch, or the null port.
    #[n(0)]
    Nothing,
    /// One queue of a TAP for each pair, with the virtio header of 12 bytes.
    #[n(1)]
    Tap {
        /// UDP segments may come from it in one piece.
        #[n(0)]
        has_uso: bool,
    },
    /// One AF_XDP socket for each pair, not bound yet; behind them what keeps the interface's program attached.
    #[n(2)]
    AfXdp {
        /// The interface's index, to bind to.
        #[n(0)]
        interface_index: u32,
    },
}

impl PortFacts {
    /// Descriptors that come with them, for so many queue pairs.
    #[must_use]
    pub fn descriptors(self, queue_pairs: u16) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Tap { .. } => usize::from(queue_pairs),
            Self::AfXdp { .. } => usize::from(queue_pairs) + 1,
        }
    }
}

/// From the data plane to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum DataplaneToAgent {
    /// Done.
    #[n(0)]
    Done {
        /// Of the request.
        #[n(0)]
        request_id: u64,
    },
    /// Refused; nothing changed.
    #[n(1)]
    Refused {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// For the operator.
        #[n(1)]
        reason: String,
    },
    /// Answer to [`AgentToDataplane::Status`].
    #[n(2)]
    Status {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// One entry per granted volume.
        #[n(1)]
        volumes: Vec<VolumeStatus>,
        /// The data plane's workers.
        #[n(2)]
        workers: WorkersStatus,
    },
    /// The storage of a volume does worse than before, or better again. Answers nothing: it comes unasked, once
    /// for each change.
    #[n(3)]
    Storage {
        /// Which volume.
        #[n(0)]
        volume: VolumeId,
        /// How its storage does now.
        #[n(1)]
        status: StorageStatus,
    },
    /// Answer to [`AgentToDataplane::Detach`], where the storage does not answer: nothing is served any more,
    /// the connection is closed and the key wiped, but some requests are still with the kernel. Until they have
    /// ended, the volume and its file can't be attached again, or old writes could overwrite new ones.
    #[n(4)]
    GivenUp {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// Requests that are still with the kernel.
        #[n(1)]
        requests: u32,
    },
    /// Answer to [`AgentToDataplane::Networks`].
    #[n(5)]
    Networks {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// What is attached.
        #[n(1)]
        networks: Networks,
    },
    /// Answer to [`AgentToDataplane::Nics`].
    #[n(6)]
    Nics {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// One entry per granted NIC, by id.
        #[n(1)]
        nics: Vec<NicStatus>,
        /// All switches that are attached.
        #[n(2)]
        #[cbor(default)]
        switches: Vec<SwitchStatus>,
    },
    /// The mirror of a NIC has ended by itself. Answers nothing: it comes unasked, once.
    #[n(7)]
    MirrorEnded {
        /// Which NIC.
        #[n(0)]
        nic: NicId,
        /// What it has recorded.
        #[n(1)]
        status: MirrorStatus,
        /// Why its file can't be written to (for people); none: it is full.
        #[n(2)]
        problem: Option<String>,
    },
}

pub use nics::{
    DropCount, MirrorStatus, NICS_PER_MESSAGE, Networks, NicStatus, PairCounts, SwitchStatus,
    Traffic,
};
#[cfg(test)]
pub(crate) use nics::{nic_status_at_its_longest, switch_status_at_its_longest};

pub use storage::{Latency, StorageState, StorageStatus};

/// The workers of a data plane.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WorkersStatus {
    /// As they were asked for at its start.
    #[n(0)]
    pub workers: Workers,
    /// By the host's own arguments (rot's), before which no bundle goes.
    #[n(1)]
    pub by_host: bool,
    /// What the bundle asks for by now: it comes with the data plane's next start.
    #[n(2)]
    pub pending: Option<Workers>,
    /// What could not be done as it was asked for (for people).
    #[n(3)]
    pub problem: Option<String>,
    /// What each of them has to do.
    #[n(4)]
    pub loads: Vec<WorkerLoad>,
    /// Queues that have gone from one worker to another since the data plane's start.
    #[n(5)]
    pub queue_moves: u64,
    /// Such moves that were given up, because the queue's storage took too long, or its frontend said something.
    #[n(6)]
    pub queue_moves_given_up: u64,
}

/// What a worker has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WorkerLoad {
    /// The CPU that it is bound to; none: any.
    #[n(0)]
    pub cpu: Option<u16>,
    /// How much of its time it was busy lately, in thousandths.
    #[n(1)]
    pub busy_permille: u16,
    /// Queues that it serves.
    #[n(2)]
    pub queues: u32,
}

/// What one volume is doing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VolumeStatus {
    /// Which volume.
    #[n(0)]
    pub volume: VolumeId,
    /// It has its file.
    #[n(1)]
    pub attached: bool,
    /// A frontend is connected.
    #[n(2)]
    pub connected: bool,
    /// Its key is held (false for a plain volume).
    #[n(3)]
    pub encrypted: bool,
    /// Queues that run.
    #[n(4)]
    pub running_queues: u16,
    /// Queues retired after a driver error.
    #[n(5)]
    pub retired_queues: u16,
    /// Requests completed with VIRTIO_BLK_S_OK.
    #[n(6)]
    pub requests_ok: u64,
    /// Requests completed with an error status.
    #[n(7)]
    pub requests_failed: u64,
    /// Bytes read for the guest.
    #[n(8)]
    pub read_bytes: u64,
    /// Bytes written for the guest.
    #[n(9)]
    pub written_bytes: u64,
    /// Why the device failed, if it did (for people).
    #[n(10)]
    pub fault: Option<String>,
    /// Capacity that the frontend sees, in bytes; zero while it is not attached.
    #[n(11)]
    pub capacity_bytes: u64,
    /// This host holds the volume: nobody else's data plane may write to it meanwhile.
    #[n(12)]
    pub holds_volume: bool,
    /// Queues were started and are not served yet, because somebody else holds the volume: another
    /// host that a guest migrates from, or an export.
    #[n(13)]
    pub waits_for_volume: bool,
    /// How far its re-key is; none without one in the grant.
    #[n(14)]
    pub rekey: Option<RekeyProgress>,
    /// How its storage does; none while it is not attached and nothing of it is left.
    #[n(15)]
    pub storage: Option<StorageStatus>,
    /// How long its limits have let nothing pass since it was attached, whether or not a request waited, in
    /// milliseconds, added up over the workers that serve it.
    #[n(16)]
    pub throttled_ms: u64,
}

/// How far the re-key of a volume is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RekeyProgress {
    /// Bytes that are encrypted with the new key, as far as it is known: zero until the volume was
    /// held once since it was attached, unless it is [`RekeyState::Done`].
    #[n(0)]
    pub done_bytes: u64,
    /// Bytes of the volume.
    #[n(1)]
    pub total_bytes: u64,
    /// What it is doing.
    #[n(2)]
    pub state: RekeyState,
}

impl RekeyProgress {
    /// How far it is, in percent, rounded down; a volume of no bytes is done.
    #[must_use]
    pub fn percent(&self) -> u64 {
        let (done, total) = (u128::from(self.done_bytes), u128::from(self.total_bytes));
        match total {
            0 => 100,
            _ => u64::try_from((done * 100 / total).min(100)).unwrap_or(100),
        }
    }
}

/// What a re-key is doing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum RekeyState {
    /// It goes on while this host holds the volume, and does not hold it now.
    #[n(0)]
    Waiting,
    /// It advances.
    #[n(1)]
    Running,
    /// Nothing is encrypted with the previous key any more: a bundle without it can be applied.
    #[n(2)]
    Done,
    /// It stopped (for people: why, and what to do). What is served stays served.
    #[n(3)]
    Failed {
        /// For the operator.
        #[n(0)]
        reason: String,
    },
}
