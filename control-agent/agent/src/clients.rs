//! The operators' connections: few, each with one request, dropped when it says nothing.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::{Channel, ChannelError, Received};

use crate::message::ClientId;

/// Most connections at once.
pub(crate) const MAX_CLIENTS: usize = 16;
/// How long a connection may say nothing.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Client {
    channel: Channel,
    /// When it is dropped; none once it has asked.
    ask_by: Option<Instant>,
}

/// What came from a connection.
#[derive(Debug)]
pub(crate) enum FromClient {
    /// Nothing more for now.
    Nothing,
    /// Its request, with an envelope if it is one to apply.
    Request(AdminRequest, Option<OwnedFd>),
    /// The connection is no more.
    Gone,
}

/// The connections.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    connected: BTreeMap<ClientId, Client>,
    next: u64,
}

impl Clients {
    /// Takes a connection; none if there are too many, and it was told so.
    pub(crate) fn add(&mut self, channel: Channel, now: Instant) -> Option<(ClientId, &Channel)> {
        if self.connected.len() >= MAX_CLIENTS {
            let reason =
                format!("{MAX_CLIENTS} operators are connected already: try again in a moment");
            reply_on(&channel, AdminReply::Refused { reason });
            return None;
        }
        let id = ClientId(self.next);
        self.next += 1;
        let client = Client {
            channel,
            ask_by: Some(now + PATIENCE),
        };
        Some((id, &self.connected.entry(id).or_insert(client).channel))
    }

    /// Reads from a connection, and drops it if it is closed, speaks out of turn or makes no sense.
    pub(crate) fn receive(&mut self, id: ClientId) -> FromClient {
        let Some(client) = self.connected.get_mut(&id) else {
            return FromClient::Gone;
        };
        let asked = client.ask_by.is_none();
        let reason = match client.channel.receive::<AdminRequest>() {
            Err(ChannelError::WouldBlock) => return FromClient::Nothing,
            Ok(received) if !asked => match with_descriptors(received) {
                Ok((request, envelope)) => {
                    client.ask_by = None;
                    return FromClient::Request(request, envelope);
                }
                Err(error) => Some(error.to_string()),
            },
            Ok(_) => Some("a connection has one request".to_owned()),
            Err(ChannelError::Closed) => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = reason {
            tracing::warn!("an operator's request is refused: {reason}");
            let reason = format!("the request is not understood: {reason}");
            reply_on(&client.channel, AdminReply::Refused { reason });
        }
        self.connected.remove(&id);
        FromClient::Gone
    }

    /// Sends the reply and closes the connection, if it is still there.
    pub(crate) fn reply(&mut self, id: ClientId, reply: AdminReply) {
        if let Some(client) = self.connected.remove(&id) {
            reply_on(&client.channel, reply);
        }
    }

    /// Drops the connections that said nothing for too long, and names them.
    pub(crate) fn drop_silent(&mut self, now: Instant) -> Vec<ClientId> {
        let late = |client: &Client| client.ask_by.is_some_and(|at| at <= now);
        let silent: Vec<ClientId> = self
            .connected
            .extract_if(.., |_, client| late(client))
            .map(|(id, _)| id)
            .collect();
        if !silent.is_empty() {
            tracing::debug!("dropped {} silent operator connection(s)", silent.len());
        }
        silent
    }

    /// When [`Clients::drop_silent`] is due next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.connected.values().filter_map(|c| c.ask_by).min()
    }
}

fn with_descriptors(
    mut received: Received<AdminRequest>,
) -> Result<(AdminRequest, Option<OwnedFd>), ChannelError> {
    let envelope = match received.message {
        AdminRequest::Apply { .. } | AdminRequest::Upgrade => {
            let [envelope] = received.take_fds()?;
            Some(envelope)
        }
        AdminRequest::Status | AdminRequest::Nics { .. } => {
            let [] = received.take_fds()?;
            None
        }
    };
    Ok((received.message, envelope))
}

/// A reply that does not fit, or that nobody takes, is the operator's loss alone.
fn reply_on(channel: &Channel, reply: AdminReply) {
    let sent = match channel.send(&reply, &[]) {
        Err(ChannelError::TooLarge) => {
            let reason = "the answer is longer than a message can be; the agent's log has more";
            let reason = reason.to_owned();
            channel.send(&AdminReply::Refused { reason }, &[])
        }
        sent => sent,
    };
    if let Err(error) = sent {
        tracing::debug!(fd = ?channel.as_fd(), "an operator did not take the reply: {error}");
    }
}
