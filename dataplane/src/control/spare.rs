//! Descriptors kept for the messages of rot, keyd and the agent: each of these brings some (its sender's pidfd, a key,
//! a file), and is lost where the process has none free. Frontends decide how many they open, and must not decide what
//! the others can still say.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_protocol::channel::MAX_FDS;

/// The most that a message of the agent's brings: a pidfd and the queues of a card.
pub(super) const MOST_OF_AGENT: usize = MAX_FDS + 1;
/// The same of the others: a pidfd and two keys, or three of rot's.
pub(super) const MOST_OF_OTHERS: usize = 3;

/// Descriptors that are there to be closed before a message is received.
#[derive(Debug)]
pub(super) struct Spare(Vec<Option<OwnedFd>>);

impl Spare {
    /// Room for so many, and none yet.
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| None).collect())
    }

    /// Makes room for a message's descriptors.
    pub(super) fn make_room(&mut self) {
        self.0.iter_mut().for_each(|place| *place = None);
    }

    /// Takes back what room is left, before anybody else can. Where that is less than before, the next call may find
    /// more.
    pub(super) fn take_back(&mut self, any: BorrowedFd<'_>) {
        for place in &mut self.0 {
            if place.is_none() {
                *place = any.try_clone_to_owned().ok();
            }
        }
    }
}
