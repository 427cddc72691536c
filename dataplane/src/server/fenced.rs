//! Earlier processes whose last requests may not have ended: no volume is taken before they have.
//!
//! What a frontend says is handled meanwhile, queues start, and take up what was in flight; only what would stop a
//! queue waits: its guest could use the memory for something else while an old request writes there.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use mio::event::Event as Ready;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::connection::ToWorkers;
use super::{Event, MANAGER_TOKENS, Server};
use crate::worker::message::DeviceId;

/// Tokens from here to the manager's are those of fences.
const FENCE_TOKENS: usize = MANAGER_TOKENS / 2;

/// Fences that are still up: the number of each, and the pipe that hangs up.
#[derive(Debug)]
pub(super) struct Fences {
    up: Vec<(u64, OwnedFd)>,
    since: Instant,
}

impl Default for Fences {
    fn default() -> Self {
        Self {
            up: Vec::new(),
            since: Instant::now(),
        }
    }
}

fn token_of(number: u64) -> Token {
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    Token(FENCE_TOKENS + number % (MANAGER_TOKENS - FENCE_TOKENS))
}

/// Whether a token is that of a fence.
pub(super) fn is_fence(token: Token) -> bool {
    (FENCE_TOKENS..MANAGER_TOKENS).contains(&token.0)
}

impl Fences {
    /// Whether one is up.
    pub(super) fn is_up(&self) -> bool {
        !self.up.is_empty()
    }

    fn add(&mut self, number: u64, end: OwnedFd, registry: &Registry) -> io::Result<()> {
        let fd = end.as_raw_fd();
        registry.register(&mut SourceFd(&fd), token_of(number), Interest::READABLE)?;
        self.up.push((number, end));
        Ok(())
    }

    /// One has hung up: its number.
    fn take(&mut self, token: Token, registry: &Registry) -> Option<u64> {
        let at = self.up.iter().position(|(n, _)| token_of(*n) == token)?;
        let (number, end) = self.up.swap_remove(at);
        let _ = registry.deregister(&mut SourceFd(&end.as_raw_fd()));
        Some(number)
    }
}

impl Server {
    /// Takes no volume before this fence of an earlier process hangs up ([`crate::fence`]); [`Event::FenceGone`]
    /// says when. Numbers are different for each fence.
    ///
    /// # Errors
    /// When the loop can't watch it.
    pub fn wait_for_fence(&mut self, number: u64, end: OwnedFd) -> io::Result<()> {
        self.fences.add(number, end, self.poll.registry())
    }

    /// Something happened to a fence: it hung up, or somebody writes into it.
    pub(super) fn fence_is_ready(&mut self, ready: &Ready) {
        if !ready.is_read_closed() {
            return;
        }
        let Some(number) = self.fences.take(ready.token(), self.poll.registry()) else {
            return;
        };
        self.events.push(Event::FenceGone { number });
        if self.fences.is_up() {
            return;
        }
        let waited_ms = self.fences.since.elapsed().as_millis();
        tracing::info!(
            "the last request of the process before this one has ended: {waited_ms} ms after the start"
        );
        let ids: Vec<DeviceId> = self.devices.keys().copied().collect();
        for id in ids {
            let mut out = ToWorkers::new();
            if let Some(device) = self.take_up(id) {
                device.fence_is_gone(&mut out);
            }
            self.settle(id, out);
        }
    }
}
