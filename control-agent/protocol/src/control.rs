//! Messages between the agent and the data plane: which file a granted volume lives in,
//! and what the volumes are doing. Nothing here can widen what keyd granted.

use minicbor::{Decode, Encode};

use crate::identity::{SocketName, VolumeId};

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
    /// Stop serving: requests in flight end first, the key is wiped, the connection closes.
    #[n(1)]
    Detach {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume.
        #[n(1)]
        volume: VolumeId,
    },
    /// From now on accept no new frontend for this volume. Refused if one is connected and
    /// `force` is not set, so that "is it in use" can't change between asking and removing.
    #[n(2)]
    PrepareRemove {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which volume.
        #[n(1)]
        volume: VolumeId,
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
        /// Which volume.
        #[n(1)]
        volume: VolumeId,
    },
    /// What are the volumes doing?
    #[n(4)]
    Status {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
    },
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
    },
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
