//! Who asked, and what they are told. Answers are collected while a request or an event is handled and
//! sent afterwards; those to a process that was restarted meanwhile are dropped.
#![forbid(unsafe_code)]

use bulkhead_protocol::control::{DataplaneToAgent, StorageStatus};
use bulkhead_protocol::keys::DataplaneToKeyd;
use bulkhead_protocol::{ServedId, VolumeId};

use crate::log_limit::LogLimit;

/// A message of keyd's, by the generation of keyd that sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keyd(pub(super) u64);

/// A request of the agent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agent {
    /// Generation of the agent that sent it.
    pub(super) generation: u64,
    /// As it stands in the request.
    pub(super) request_id: u64,
}

impl Agent {
    pub(super) fn done(self) -> DataplaneToAgent {
        DataplaneToAgent::Done {
            request_id: self.request_id,
        }
    }

    pub(super) fn refused(self, reason: String) -> DataplaneToAgent {
        static LIMIT: LogLimit = LogLimit::new();
        if LIMIT.allows() {
            tracing::warn!("a request of the agent is refused: {reason}");
        }
        DataplaneToAgent::Refused {
            request_id: self.request_id,
            reason,
        }
    }
}

/// Answers to be sent.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) to_keyd: Vec<(Keyd, DataplaneToKeyd)>,
    pub(super) to_agent: Vec<(Agent, DataplaneToAgent)>,
    /// For the agent that is there now.
    pub(super) unasked: Vec<DataplaneToAgent>,
}

impl Answers {
    pub(super) fn done(&mut self, agent: Agent) {
        self.to_agent.push((agent, agent.done()));
    }

    /// How the storage of a volume does.
    pub(super) fn storage(&mut self, volume: VolumeId, status: StorageStatus) {
        self.unasked
            .push(DataplaneToAgent::Storage { volume, status });
    }

    /// Detached, with requests that the kernel has not given back.
    pub(super) fn given_up(&mut self, agent: Agent, requests: u32) {
        let message = DataplaneToAgent::GivenUp {
            request_id: agent.request_id,
            requests,
        };
        self.to_agent.push((agent, message));
    }

    pub(super) fn refused(&mut self, agent: Agent, reason: String) {
        self.to_agent.push((agent, agent.refused(reason)));
    }

    pub(super) fn granted(&mut self, keyd: Keyd, id: ServedId) {
        match id {
            ServedId::Volume(volume) => tracing::info!(%volume, "volume granted"),
            ServedId::Nic(nic) => tracing::info!(%nic, "NIC granted"),
        }
        self.to_keyd.push((keyd, DataplaneToKeyd::Granted { id }));
    }

    pub(super) fn grant_refused(&mut self, keyd: Keyd, id: ServedId, reason: String) {
        tracing::warn!("the grant of {id} is refused: {reason}");
        let refused = DataplaneToKeyd::GrantRefused { id, reason };
        self.to_keyd.push((keyd, refused));
    }

    pub(super) fn revoked(&mut self, keyd: Keyd, id: ServedId) {
        match id {
            ServedId::Volume(volume) => tracing::info!(%volume, "volume revoked"),
            ServedId::Nic(nic) => tracing::info!(%nic, "NIC revoked"),
        }
        self.to_keyd.push((keyd, DataplaneToKeyd::Revoked { id }));
    }
}
