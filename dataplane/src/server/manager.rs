//! Who decides what is served, what it is told of devices, and what it can see of one.
#![forbid(unsafe_code)]

use std::io;

use mio::{Registry, Token};

use super::Server;
use crate::blk::{Level, Summary};
use crate::worker::message::DeviceId;
/// What a device is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceStatus {
    /// A frontend is connected.
    pub connected: bool,
    /// Queues that are served.
    pub running_queues: u16,
    /// Queues whose driver broke them.
    pub retired_queues: u16,
    /// Why the last of them retired.
    pub fault: Option<String>,
    /// Queues run, and the volume is this host's.
    pub holds_volume: bool,
    /// Queues run and are not served, because another host has the volume.
    pub waits_for_volume: bool,
}

/// What became of a device.
#[derive(Debug)]
pub enum Event {
    /// Every worker can serve it, or why not (it is gone then, and its listener closed).
    Attached {
        /// Which.
        id: DeviceId,
        /// Whether.
        result: Result<(), String>,
    },
    /// It goes, and its storage does not answer: nothing of it is served, its connection is closed and its workers
    /// have no key of it, but requests are still with the kernel. [`Event::Detached`] follows when they have
    /// ended. Until then nobody may write to its storage by another way.
    GivenUp {
        /// Which.
        id: DeviceId,
        /// Requests that are left.
        requests: u32,
    },
    /// Nothing of it is left: no queue, no descriptor, no key in any worker.
    Detached {
        /// Which.
        id: DeviceId,
    },
    /// Its storage does worse than before, or better for a while.
    Health {
        /// Whose.
        id: DeviceId,
        /// How it does.
        level: Level,
        /// What is under way for too long.
        summary: Summary,
    },
    /// What a predecessor served of it goes on: its queues have started, and wait for the fence at most. Or the
    /// connection could not be taken over, and is closed.
    Resumed {
        /// Which.
        id: DeviceId,
    },
    /// Nothing is in flight any more, and everything is stored, as [`Server::freeze`] asked.
    Frozen,
    /// It serves again, as [`Server::thaw`] asked.
    Thawed,
    /// Nothing of an earlier process that kept this fence is under way any more.
    FenceGone {
        /// As it was given to [`Server::wait_for_fence`].
        number: u64,
    },
    /// A frontend connected.
    Connected {
        /// To which.
        id: DeviceId,
    },
    /// It is gone, and its queues are stopped.
    Disconnected {
        /// From which.
        id: DeviceId,
    },
}

/// Who decides what is served.
pub trait Manager {
    /// Adds its descriptors to the loop, with tokens from [`super::MANAGER_TOKENS`] on.
    ///
    /// # Errors
    /// Ends the server before it serves.
    fn register(&mut self, registry: &Registry) -> io::Result<()>;

    /// One of its descriptors is ready (edge-triggered: take everything there is).
    fn ready(&mut self, server: &mut Server, token: Token);

    /// Something became of a device.
    fn event(&mut self, server: &mut Server, event: Event);
}
