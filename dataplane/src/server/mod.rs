//! The control thread (ADR 0002): listeners, vhost-user connections and workers' answers in one
//! event loop; nothing in it blocks, whatever a frontend does or doesn't do, and a frontend that
//! never stops talking gets no more than its turn.
//!
//! A [`Manager`] (the production one is `crate::control`; `serve` has one that does nothing) adds its
//! own descriptors to the loop and is told what becomes of devices.
//!
//! One thing may: `flock` and `fstat` of a volume on a network file system whose server does not answer.
//!
//! System calls after the start, for those who filter them: `epoll_wait`, `epoll_ctl`, `accept4`,
//! `getsockopt` (SO_PEERCRED), `recvmsg`, `sendmsg` and `sendto` (replies with a descriptor, the backend
//! channel), `write`, `read`, `fstat`, `fstatfs`, `fcntl` (F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS),
//! `ioctl` (FIONBIO, BLKGETSIZE64), `memfd_create`, `ftruncate`, `flock`, `mmap`, `munmap`, `close`.
#![forbid(unsafe_code)]

mod alarm;
mod balance;
mod connection;
mod device;
mod fenced;
mod freeze;
mod manager;
mod moves;
mod offer;
mod patience;
mod placement;
mod turn;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Poll, Registry, Token};

use crate::blk::{BlkDevice, Ciphers};
use crate::port::mirror::MirrorFile;
use crate::rekey::{Rekeyer, ToRekeyer};
use crate::worker::message::{DeviceId, ToWorker, ZoneChange};
use crate::worker::{Replies, WorkerConfig, WorkerHandle, start};
use connection::ToWorkers;
use device::State;
use fenced::Fences;
use freeze::Frozen;
pub use manager::{DeviceStatus, Event, Manager};
use moves::Watch;
pub use moves::WorkerStatus;
pub use offer::Offer;
pub use placement::Moves;
use placement::Placement;

/// Tokens from here on are the manager's.
pub const MANAGER_TOKENS: usize = 1 << 40;
const REPLIES: Token = Token(0);

/// Who may connect to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The only uid whose process may (SO_PEERCRED); none: anybody who can open the socket.
    pub allowed_uid: Option<u32>,
}

/// How the server runs.
#[derive(Debug, Clone, Default)]
pub struct ServerConfig {
    /// One entry per worker, at least one.
    pub workers: Vec<WorkerConfig>,
    /// Move a queue from worker to worker each time so much time has passed, for tests.
    pub shuffle: Option<Duration>,
}

/// The event loop and everything in it.
#[derive(Debug)]
pub struct Server {
    poll: Poll,
    workers: Vec<WorkerHandle>,
    /// Of each worker, the one it is bound to.
    cpus: Vec<Option<usize>>,
    placement: Placement,
    watch: Watch,
    rekeyer: Rekeyer,
    fences: Fences,
    /// It has stopped for another process, or is about to.
    frozen: Option<Frozen>,
    replies: Replies,
    devices: HashMap<DeviceId, State>,
    last_id: u64,
    events: Vec<Event>,
    /// Devices with something to be tried again.
    retry: Vec<DeviceId>,
    stop: Cell<bool>,
}

impl Server {
    /// Starts the workers.
    ///
    /// # Errors
    /// What a worker or the event loop can't start with.
    pub fn new(config: &ServerConfig) -> io::Result<Self> {
        if config.workers.is_empty() {
            return Err(io::Error::other("a server needs at least one worker"));
        }
        crate::memory::sigbus::install()?;
        crate::fds::know_eventfds()?;
        let poll = Poll::new()?;
        let (workers, replies) = start(&config.workers)?;
        let mailboxes = workers.iter().map(WorkerHandle::mailbox).collect();
        let lock_in = config.workers.iter().any(|worker| worker.lock_in);
        let fence = config
            .workers
            .iter()
            .find_map(|worker| worker.fence.clone());
        let rekeyer = match Rekeyer::start(mailboxes, replies.sender(), lock_in, fence) {
            Ok(rekeyer) => rekeyer,
            Err(error) => {
                workers.into_iter().for_each(WorkerHandle::end);
                return Err(error);
            }
        };
        poll.registry().register(
            &mut SourceFd(&replies.as_fd().as_raw_fd()),
            REPLIES,
            Interest::READABLE,
        )?;
        Ok(Self {
            poll,
            watch: Watch::new(&workers, config.shuffle),
            workers,
            cpus: config.workers.iter().map(|worker| worker.cpu).collect(),
            placement: Placement::default(),
            rekeyer,
            fences: Fences::default(),
            frozen: None,
            replies,
            devices: HashMap::new(),
            last_id: 0,
            events: Vec::new(),
            retry: Vec::new(),
            stop: Cell::new(false),
        })
    }

    /// Where descriptors are added to the loop later on.
    ///
    /// # Errors
    /// What duplicating the epoll descriptor fails with.
    pub fn registry(&self) -> io::Result<Registry> {
        self.poll.registry().try_clone()
    }

    /// Takes a device away: its connection is closed once nothing is in flight, and
    /// [`Event::Detached`] follows.
    pub fn detach(&mut self, id: DeviceId) {
        let mut out = ToWorkers::new();
        if let Some(device) = self.devices.get_mut(&id) {
            device.detach(&mut out);
        }
        self.settle(id, out);
    }

    /// Gives a device another capacity while it runs. A connected frontend is told, and its guest
    /// sees it.
    ///
    /// # Errors
    /// [`ResizeError`](crate::blk::ResizeError) in words, or that there is no such device; nothing
    /// changed.
    pub fn resize(&mut self, id: DeviceId, capacity_sectors: u64) -> Result<(), String> {
        let device = self.devices.get_mut(&id);
        let device = device.ok_or("the device is not attached")?;
        device.resize(capacity_sectors)?;
        self.settle(id, ToWorkers::new());
        Ok(())
    }

    /// Gives a device other keys for the same bytes while it runs: a re-key begins, or one that is done is
    /// over.
    ///
    /// # Errors
    /// That there is no such device; nothing changed.
    pub fn set_ciphers(&mut self, id: DeviceId, ciphers: &Ciphers) -> Result<(), String> {
        let state = self.devices.get(&id).ok_or("the device is not attached")?;
        let device = state
            .disk()
            .ok_or("it is a network card, and has no keys")?;
        // Workers first: what the rekeyer tells them of the new keys comes after the keys.
        for worker in &self.workers {
            worker.send(ToWorker::Zone {
                id,
                change: ZoneChange::Ciphers(ciphers.clone()),
            });
        }
        device.set_ciphers(ciphers.clone());
        device.measure_storage();
        match (&ciphers.rekey, state.has_volume()) {
            (Some(_), true) => self.rekeyer.send(ToRekeyer::Begin { id, device }),
            (Some(_), false) => self.rekeyer.send(ToRekeyer::Look { id, device }),
            (None, true) => {
                device.set_closing(true);
                self.rekeyer.send(ToRekeyer::Close { id, device });
            }
            // The record says that it is done, which harms nobody.
            (None, false) => {}
        }
        Ok(())
    }

    /// Whether a device's volume is this host's: held, or being taken or let go of.
    #[must_use]
    pub fn has_volume(&self, id: DeviceId) -> bool {
        self.devices.get(&id).is_some_and(State::has_volume)
    }

    /// Has it found out how far the re-key of a device is that another host may have gone on with.
    pub fn look_at_rekey(&self, id: DeviceId) {
        if let Some(device) = self.disk(id) {
            self.rekeyer.send(ToRekeyer::Look { id, device });
        }
    }

    fn disk(&self, id: DeviceId) -> Option<Arc<BlkDevice>> {
        self.devices.get(&id).and_then(State::disk)
    }

    /// A network card's link was taken up or down, or something else of its configuration space has changed: its
    /// frontend is told.
    pub fn config_changed(&mut self, id: DeviceId) {
        if let Some(device) = self.devices.get_mut(&id) {
            device.config_changed();
        }
        self.settle(id, ToWorkers::new());
    }

    /// Has a card's frames copied to this file from now on, or no longer. What was recorded for the one before is
    /// still written.
    ///
    /// # Errors
    /// That there is no such card; nothing changed.
    pub fn set_mirror(
        &mut self,
        id: DeviceId,
        mirror: Option<Arc<MirrorFile>>,
    ) -> Result<(), String> {
        let state = self.devices.get(&id).ok_or("the card is not attached")?;
        let card = state
            .shared()
            .net()
            .ok_or("it is a disk, and has no frames")?;
        card.set_mirror(mirror);
        for worker in &self.workers {
            worker.send(ToWorker::LookAtMirror { id });
        }
        Ok(())
    }

    /// Whether new frontends are kept out from now on.
    pub fn refuse_new(&mut self, id: DeviceId, refuse: bool) {
        if let Some(device) = self.devices.get_mut(&id) {
            device.refuse_new = refuse;
        }
        self.settle(id, ToWorkers::new());
    }

    /// How many workers there are.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.len()
    }

    /// Whether a frontend is connected.
    #[must_use]
    pub fn is_connected(&self, id: DeviceId) -> bool {
        self.devices.get(&id).is_some_and(State::is_connected)
    }

    /// What a device is doing.
    #[must_use]
    pub fn status(&self, id: DeviceId) -> DeviceStatus {
        self.devices.get(&id).map(State::status).unwrap_or_default()
    }

    /// Ends [`Server::run`] after the event that is being handled.
    pub fn stop(&self) {
        self.stop.set(true);
    }
}
