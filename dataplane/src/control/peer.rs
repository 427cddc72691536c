//! A process that may be restarted while we serve: its channel, by generation.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;

use bulkhead_protocol::Channel;
use bulkhead_protocol::rot::Role;
use mio::{Registry, Token};

use super::link::Link;

/// A process that may be restarted.
#[derive(Debug)]
pub(super) struct Peer<Out> {
    pub(super) link: Option<Link<Out>>,
    /// The highest that was heard of.
    generation: u64,
}

impl<Out> Default for Peer<Out> {
    fn default() -> Self {
        Self {
            link: None,
            generation: 0,
        }
    }
}

impl<Out: minicbor::Encode<()>> Peer<Out> {
    /// Takes the channel to a successor; the one to its predecessor is closed.
    ///
    /// # Errors
    /// When it is no successor, or its channel can't be watched.
    pub(super) fn meet(
        &mut self,
        generation: u64,
        socket: OwnedFd,
        process: OwnedFd,
        name: &'static str,
        (registry, token): (&Registry, Token),
    ) -> Result<(), String> {
        if generation <= self.generation {
            return Err(format!(
                "generation {generation} of {name} is not after {}",
                self.generation
            ));
        }
        if let Some(old) = self.link.take() {
            old.close(registry);
        }
        self.generation = generation;
        let channel = Channel::from(socket);
        let link = Link::new(channel, Some(process), name, generation, (registry, token));
        self.link = Some(link.map_err(|e| format!("the channel to {name} can't be watched: {e}"))?);
        Ok(())
    }

    /// Closes a channel that is of no more use.
    pub(super) fn lose(&mut self, role: Role, reason: &str, registry: &Registry) {
        tracing::warn!("{role} is gone, what is served stays: {reason}");
        if let Some(link) = self.link.take() {
            link.close(registry);
        }
    }

    /// See [`Link::look_again`].
    pub(super) fn look_again(&self, registry: &Registry, token: Token) {
        if let Some(link) = &self.link {
            link.look_again(registry, token);
        }
    }

    /// The link to the process of that generation, if it is still the one.
    pub(super) fn link_of(&mut self, generation: u64) -> Option<&mut Link<Out>> {
        self.link.as_mut().filter(|l| l.generation == generation)
    }
}
