//! Messages between the agent and the data plane: which file a granted volume lives in,
//! and what the volumes are doing. Nothing here can widen what keyd granted.

use minicbor::{Decode, Encode};

use crate::identity::{SocketName, VolumeId};
use crate::workers::Workers;

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
}

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

/// How the storage of a volume does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StorageStatus {
    /// In a word.
    #[n(0)]
    pub state: StorageState,
    /// Requests under way for longer than `slow_after_ms`; once it was given up, all that are left.
    #[n(1)]
    pub old_requests: u32,
    /// Age of the oldest of them in milliseconds.
    #[n(2)]
    pub oldest_ms: u64,
    /// What is too long, in milliseconds.
    #[n(3)]
    pub slow_after_ms: u64,
    /// Requests that took longer than that since the volume was attached, those under way included.
    #[n(4)]
    pub slow_total: u64,
    /// How long stored requests took since it was attached; none before one ended.
    #[n(5)]
    pub latency: Option<Latency>,
}

/// What the storage of a volume is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum StorageState {
    /// It answers in time.
    #[n(0)]
    Fine,
    /// Some requests are under way for too long.
    #[n(1)]
    Slow,
    /// Some requests are under way for so long that they may never end.
    #[n(2)]
    Hung,
    /// The volume was detached without waiting for its storage: requests are still with the kernel, and it
    /// can't be attached again before they have ended.
    #[n(3)]
    GivenUp,
}

/// How long requests took, in microseconds, each rounded up to a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Latency {
    /// Half of them took no longer.
    #[n(0)]
    pub median_us: u64,
    /// 99 of 100 took no longer.
    #[n(1)]
    pub p99_us: u64,
    /// 999 of 1,000 took no longer.
    #[n(2)]
    pub p999_us: u64,
}

impl std::fmt::Display for StorageStatus {
    /// As in `slow: 12 requests older than 1 s, oldest 14 s`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (requests, word) = (self.old_requests, plural(self.old_requests));
        let (limit, oldest) = (Seconds(self.slow_after_ms), Seconds(self.oldest_ms));
        match self.state {
            StorageState::Fine => f.write_str("answers in time"),
            StorageState::Slow => {
                write!(
                    f,
                    "slow: {requests} {word} older than {limit}, oldest {oldest}"
                )
            }
            StorageState::Hung => {
                write!(
                    f,
                    "hung: {requests} {word} older than {limit}, oldest {oldest}"
                )
            }
            StorageState::GivenUp => write!(
                f,
                "given up: {requests} {word} still with the kernel, oldest {oldest}; can be attached again \
                 when they have ended"
            ),
        }
    }
}

fn plural(requests: u32) -> &'static str {
    if requests == 1 { "request" } else { "requests" }
}

/// Milliseconds, for people.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0 / 1000, self.0 % 1000) {
            (seconds @ 10.., _) | (seconds, 0) => write!(f, "{seconds} s"),
            (seconds, rest) => write!(f, "{seconds}.{} s", rest / 100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_in_words() {
        let slow = StorageStatus {
            state: StorageState::Slow,
            old_requests: 12,
            oldest_ms: 14_321,
            slow_after_ms: 1000,
            slow_total: 40,
            latency: None,
        };
        assert_eq!(
            slow.to_string(),
            "slow: 12 requests older than 1 s, oldest 14 s"
        );
        let one = StorageStatus {
            state: StorageState::Hung,
            old_requests: 1,
            oldest_ms: 1_250,
            ..slow
        };
        assert_eq!(
            one.to_string(),
            "hung: 1 request older than 1 s, oldest 1.2 s"
        );
        let left = StorageStatus {
            state: StorageState::GivenUp,
            ..slow
        };
        assert!(
            left.to_string()
                .starts_with("given up: 12 requests still with the kernel")
        );
    }
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
