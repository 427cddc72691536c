//! A channel to another process, and how much nonsense came over it.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{Channel, ChannelError, Received};
use minicbor::Decode;

/// Messages that make no sense before a peer loses its channel.
pub(crate) const MAX_GARBAGE: u32 = 16;
/// Longest text of another process that is logged or passed on, in characters.
const MAX_TEXT_CHARS: usize = 300;

/// A peer's channel.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) channel: Channel,
    pub(crate) generation: u64,
    name: &'static str,
    garbage: u32,
}

/// What came of reading a link.
pub(crate) enum Read<M> {
    /// A message.
    Message(Received<M>),
    /// None for now, or one that made no sense.
    Nothing,
    /// The peer is gone, or sent too much that makes no sense.
    Broken,
}

impl Link {
    /// The link to rot.
    pub(crate) fn to_rot(channel: Channel) -> std::io::Result<Self> {
        Self::new(channel, "rot", 0)
    }

    /// The link to a peer.
    pub(crate) fn to_peer(channel: Channel, role: Role, generation: u64) -> std::io::Result<Self> {
        Self::new(channel, role.name(), generation)
    }

    fn new(channel: Channel, name: &'static str, generation: u64) -> std::io::Result<Self> {
        channel.set_nonblocking(true)?;
        Ok(Self {
            channel,
            generation,
            name,
            garbage: 0,
        })
    }

    /// Reads one message.
    pub(crate) fn read<M: for<'b> Decode<'b, ()>>(&mut self) -> Read<M> {
        match self.channel.receive() {
            Ok(received) => Read::Message(received),
            Err(ChannelError::WouldBlock) => Read::Nothing,
            Err(error @ (ChannelError::Closed | ChannelError::Io(_))) => {
                tracing::debug!("{}: {error}", self.name);
                Read::Broken
            }
            Err(error) => {
                self.complain(&error.to_string());
                if self.is_garbled() {
                    Read::Broken
                } else {
                    Read::Nothing
                }
            }
        }
    }

    /// Writes down that a message made no sense.
    pub(crate) fn complain(&mut self, problem: &str) {
        self.garbage = self.garbage.saturating_add(1);
        tracing::warn!(
            "a message from {} is dropped: {}",
            self.name,
            plain(problem)
        );
    }

    /// Whether too much of what it sent made no sense.
    pub(crate) fn is_garbled(&self) -> bool {
        self.garbage >= MAX_GARBAGE
    }
}

/// A text of another process as one short line.
pub(crate) fn plain(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MAX_TEXT_CHARS).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_sends_nothing_but_noise_loses_its_channel() {
        let (ours, theirs) = Channel::pair().expect("pair");
        let mut link = Link::to_peer(ours, Role::Agent, 1).expect("link");
        for _ in 0..MAX_GARBAGE - 1 {
            nix::unistd::write(&theirs, &[0xff, 0xff]).expect("write");
            assert!(matches!(link.read::<u8>(), Read::Nothing));
        }
        theirs.send(&1u8, &[]).expect("send");
        assert!(matches!(link.read::<u8>(), Read::Message(_)));
        nix::unistd::write(&theirs, &[0xff, 0xff]).expect("write");
        assert!(matches!(link.read::<u8>(), Read::Broken));
    }

    #[test]
    fn foreign_text_is_one_short_line() {
        assert_eq!(plain("a\nb\u{1b}[2Jc"), "a b [2Jc");
        assert_eq!(plain(&"é".repeat(1000)).chars().count(), MAX_TEXT_CHARS);
    }
}
