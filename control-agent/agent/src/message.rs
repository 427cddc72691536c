//! What the state machine takes and gives: events, answers of peers in one form, and actions.

use std::os::fd::OwnedFd;

use bulkhead_protocol::admin::{AdminReply, AdminRequest, ProcessStatus};
use bulkhead_protocol::control::{
    AgentToDataplane, DataplaneToAgent, MirrorStatus, Networks, NicStatus, StorageStatus,
    SwitchStatus, VolumeStatus, WorkersStatus,
};
use bulkhead_protocol::keys::{AgentToKeyd, HostKeys, KeydToAgent, MAX_SHREDS, Undelivered};
use bulkhead_protocol::release::{ProgramStatus, Release};
use bulkhead_protocol::rot::ToRot;
use bulkhead_protocol::{NicId, VolumeId};

use crate::text::plain;

/// A connection of the operator's command line; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u64);

/// Whom the agent asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// The root of trust.
    Rot,
    /// The key service.
    Keyd,
    /// The data plane.
    Dataplane,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rot => "rot",
            Self::Keyd => "keyd",
            Self::Dataplane => "the data plane",
        })
    }
}

/// A peer's answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// Refused or failed, nothing changed; the reason, made plain.
    Refused(String),
    /// keyd accepted an envelope.
    Accepted {
        /// Epoch of the bundle, as keyd read it.
        epoch: u64,
        /// Grants that did not arrive.
        undelivered: Vec<Undelivered>,
        /// The host's key, and what was shredded.
        keys: HostKeys,
    },
    /// keyd approved a release.
    Approved(Release),
    /// rot has begun an upgrade; how it ends is said later.
    Upgrading,
    /// What the volumes are doing, and the data plane's workers.
    Volumes(Vec<VolumeStatus>, WorkersStatus),
    /// Which NICs and switches the data plane has.
    Networks(Networks),
    /// What the NICs are doing.
    Nics(Vec<NicStatus>, Vec<SwitchStatus>),
    /// The data plane serves a volume no more, although so many of its requests have not ended.
    GivenUp(u32),
    /// The storage of a volume does worse than before, or better. Nobody asked.
    Storage(VolumeId, StorageStatus),
    /// The mirror of a NIC has ended by itself, with what it has, and why if not because its file is full. Nobody asked.
    MirrorEnded(NicId, MirrorStatus, Option<String>),
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// rot announced a process; for keyd and the data plane the channel to it stands.
    Started(ProcessStatus),
    /// rot said which programs run.
    Programs(Vec<ProgramStatus>),
    /// A peer's channel is closed.
    Ended(Peer),
    /// A peer answered.
    Answered {
        /// Who.
        peer: Peer,
        /// What.
        request_id: u64,
        /// How.
        answer: Answer,
    },
    /// An operator asks.
    Asked {
        /// Who.
        client: ClientId,
        /// What.
        request: AdminRequest,
        /// The envelope, for [`AdminRequest::Apply`] and [`AdminRequest::Upgrade`], and for nothing else.
        envelope: Option<OwnedFd>,
    },
    /// An operator's connection is closed.
    Gone(ClientId),
}

/// Something to be sent.
#[derive(Debug)]
pub enum Action {
    /// To rot.
    Rot(ToRot),
    /// To keyd, with an envelope.
    Keyd(AgentToKeyd, OwnedFd),
    /// To the data plane, with the descriptors that belong to the message.
    Dataplane(AgentToDataplane, Vec<OwnedFd>),
    /// To an operator; the connection is closed afterwards.
    Reply(ClientId, AdminReply),
}

/// keyd's message as request id and answer.
#[must_use]
pub fn from_keyd(message: KeydToAgent) -> (u64, Answer) {
    match message {
        KeydToAgent::Accepted {
            request_id,
            epoch,
            undelivered,
            mut keys,
        } => {
            keys.unfinished = keys.unfinished.as_deref().map(plain);
            keys.shreds.truncate(MAX_SHREDS);
            let answer = Answer::Accepted {
                epoch,
                undelivered,
                keys,
            };
            (request_id, answer)
        }
        KeydToAgent::Refused { request_id, reason } => {
            (request_id, Answer::Refused(plain(&reason)))
        }
        KeydToAgent::ReleaseApproved {
            request_id,
            release,
        } => (request_id, Answer::Approved(release)),
    }
}

/// The data plane's message as request id and answer.
#[must_use]
pub fn from_dataplane(message: DataplaneToAgent) -> (u64, Answer) {
    match message {
        DataplaneToAgent::Done { request_id } => (request_id, Answer::Done),
        DataplaneToAgent::Refused { request_id, reason } => {
            (request_id, Answer::Refused(plain(&reason)))
        }
        DataplaneToAgent::Status {
            request_id,
            volumes,
            mut workers,
        } => {
            workers.problem = workers.problem.as_deref().map(plain);
            (request_id, Answer::Volumes(volumes, workers))
        }
        DataplaneToAgent::Networks {
            request_id,
            networks,
        } => (request_id, Answer::Networks(networks)),
        DataplaneToAgent::Nics {
            request_id,
            nics,
            switches,
        } => (request_id, Answer::Nics(nics, switches)),
        // No question has this number.
        DataplaneToAgent::Storage { volume, status } => (0, Answer::Storage(volume, status)),
        DataplaneToAgent::MirrorEnded {
            nic,
            status,
            problem,
        } => (0, Answer::MirrorEnded(nic, status, problem)),
        DataplaneToAgent::GivenUp {
            request_id,
            requests,
        } => (request_id, Answer::GivenUp(requests)),
    }
}
