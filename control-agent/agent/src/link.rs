//! A peer's channel, and how much nonsense came over it.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_protocol::{Channel, ChannelError, Received};
use minicbor::{Decode, Encode};

use crate::message::Peer;

/// Messages that make no sense before a peer loses its channel.
pub(crate) const MAX_GARBAGE: u32 = 16;

/// A peer's channel.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) channel: Channel,
    pub(crate) generation: u64,
    garbage: u32,
}

/// What came of reading a link.
pub(crate) enum Read<M> {
    /// A message.
    Message(Received<M>),
    /// One that made no sense; there may be others.
    Dropped,
    /// Nothing more for now.
    Drained,
    /// The peer is gone, or sent too much that makes no sense.
    Broken,
}

impl Link {
    /// A link that has heard nothing yet.
    pub(crate) fn new(channel: Channel, generation: u64) -> Self {
        Self {
            channel,
            generation,
            garbage: 0,
        }
    }

    /// Whether it broke for what it sent.
    pub(crate) fn is_garbled(&self) -> bool {
        self.garbage >= MAX_GARBAGE
    }

    /// Reads one message.
    pub(crate) fn read<M: for<'b> Decode<'b, ()>>(&mut self, peer: Peer) -> Read<M> {
        match self.channel.receive() {
            Ok(received) => Read::Message(received),
            Err(ChannelError::WouldBlock) => Read::Drained,
            Err(ChannelError::Closed | ChannelError::Io(_)) => Read::Broken,
            Err(error) => self.refuse(peer, &error),
        }
    }

    /// Drops a message that makes no sense; too many of them break the link.
    pub(crate) fn refuse<M>(&mut self, peer: Peer, error: &ChannelError) -> Read<M> {
        self.garbage += 1;
        tracing::warn!("a message from {peer} is dropped: {error}");
        if self.garbage < MAX_GARBAGE {
            Read::Dropped
        } else {
            Read::Broken
        }
    }
}

/// A message that can't be sent is one that gets no answer: its question ends with the channel,
/// or with its deadline.
pub(crate) fn send<M: Encode<()>>(link: Option<&Link>, peer: Peer, message: &M, fds: &[OwnedFd]) {
    let Some(link) = link else { return };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    note(peer, link.channel.send(message, &fds));
}

/// Writes down that a message was not sent.
pub(crate) fn note(peer: Peer, sent: Result<(), ChannelError>) {
    if let Err(error) = sent {
        tracing::warn!("a message to {peer} could not be sent: {error}");
    }
}
