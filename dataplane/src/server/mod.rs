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
mod moves;
mod offer;
mod patience;
mod placement;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};

use crate::blk::{BlkDevice, Ciphers, Level, Summary};
use crate::hand::{self, Hand};
use crate::port::mirror::MirrorFile;
use crate::rekey::{Rekeyer, ToRekeyer};
use crate::worker::message::{DeviceId, FromWorker, QueueId, ToWorker, ZoneChange};
use crate::worker::{Replies, WorkerConfig, WorkerHandle, start};
use connection::ToWorkers;
use device::State;
use fenced::Fences;
use freeze::Frozen;
use moves::Watch;
pub use moves::WorkerStatus;
pub use offer::Offer;
pub use placement::Moves;
use placement::Placement;

/// Tokens from here on are the manager's.
pub const MANAGER_TOKENS: usize = 1 << 40;
const REPLIES: Token = Token(0);
/// Steps of one device, frontends it sends away among them, before others have their turn.
const STEPS_PER_TURN: usize = 64;
/// Workers' answers taken before frontends have their turn.
const REPLIES_PER_TURN: usize = 256;
/// When something is tried again that nothing announces: a frontend that could not be accepted (no
/// descriptor is free), a volume that another host has.
const RETRY: Duration = Duration::from_millis(100);

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
    /// Adds its descriptors to the loop, with tokens from [`MANAGER_TOKENS`] on.
    ///
    /// # Errors
    /// Ends the server before it serves.
    fn register(&mut self, registry: &Registry) -> io::Result<()>;

    /// One of its descriptors is ready (edge-triggered: take everything there is).
    fn ready(&mut self, server: &mut Server, token: Token);

    /// Something became of a device.
    fn event(&mut self, server: &mut Server, event: Event);
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

    /// Serves until [`Server::stop`]; then every worker ends what is in flight.
    ///
    /// # Errors
    /// When the event loop fails.
    pub fn run(mut self, manager: &mut dyn Manager) -> io::Result<()> {
        manager.register(self.poll.registry())?;
        let mut events = Events::with_capacity(256);
        let mut tried = Instant::now();
        while !self.stop.get() {
            let since = tried.elapsed();
            let retry = (!self.retry.is_empty() && !self.is_frozen())
                .then_some(RETRY.saturating_sub(since));
            let attend = self.next_attendance();
            let attend = attend.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = [retry, attend].into_iter().flatten().min();
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            for event in &events {
                hand::take(Hand::NOTHING);
                match event.token() {
                    REPLIES => self.take_replies(),
                    token if token.0 >= MANAGER_TOKENS => manager.ready(&mut self, token),
                    token if fenced::is_fence(token) => self.fence_is_ready(event),
                    // Looked at when it goes on.
                    _ if self.is_frozen() => {}
                    token => {
                        let gone = event.is_write_closed() && device::is_connection(token);
                        self.ready(token, gone && !self.is_fresh(token));
                    }
                }
            }
            hand::take(Hand::NOTHING);
            if tried.elapsed() >= RETRY && !self.is_frozen() {
                tried = Instant::now();
                self.try_again();
            }
            self.attend();
            self.report(manager);
        }
        // Before the workers: what waits for its zone waits in them.
        self.rekeyer.end();
        self.workers.drain(..).for_each(WorkerHandle::end);
        Ok(())
    }

    /// Whether a connection was accepted since the loop's last wait, and not reported yet. What the loop heard then
    /// under its token is about the connection before it: that of a frontend that has come back, for which something else
    /// it heard has made room.
    fn is_fresh(&self, token: Token) -> bool {
        let of = device::id_of(token);
        let is_its = |event: &Event| matches!(event, Event::Connected { id } if *id == of);
        self.events.iter().any(is_its)
    }

    /// Tries everything again that nothing announces.
    fn try_again(&mut self) {
        for id in std::mem::take(&mut self.retry) {
            let mut out = ToWorkers::new();
            if let Some(device) = self.take_up(id) {
                device.retry(&mut out);
            }
            self.settle(id, out);
        }
    }

    /// Tells the manager what became of devices; what it does then may lead to more.
    fn report(&mut self, manager: &mut dyn Manager) {
        while !self.events.is_empty() {
            for event in std::mem::take(&mut self.events) {
                manager.event(self, event);
            }
        }
    }

    /// The device, which this thread works for from now on.
    fn take_up(&mut self, id: DeviceId) -> Option<&mut State> {
        let device = self.devices.get_mut(&id)?;
        hand::take(device.hand());
        Some(device)
    }

    fn ready(&mut self, token: Token, frontend_gone: bool) {
        let id = device::id_of(token);
        let mut out = ToWorkers::new();
        if let Some(device) = self.take_up(id) {
            device.ready(frontend_gone, &mut out);
        }
        self.settle(id, out);
    }

    fn take_replies(&mut self) {
        for _ in 0..REPLIES_PER_TURN {
            let Some(message) = self.replies.next() else {
                return;
            };
            if self.is_frozen() {
                self.take_reply_frozen(message);
            } else {
                self.take_one_reply(message);
            }
        }
        // The descriptor is still readable; watching it anew makes the loop come back.
        let fd = self.replies.as_fd().as_raw_fd();
        let registry = self.poll.registry();
        if let Err(error) = registry.reregister(&mut SourceFd(&fd), REPLIES, Interest::READABLE) {
            tracing::error!("the workers' answers can't be watched: {error}");
        }
    }

    fn take_one_reply(&mut self, message: FromWorker) {
        let Some(message) = self.take_reply(message) else {
            return;
        };
        let Some(id) = device_of(&message) else {
            return;
        };
        let mut out = ToWorkers::new();
        if let Some(device) = self.take_up(id) {
            device.on_worker(message, &mut out);
        }
        self.settle(id, out);
    }

    /// Sends what a step made for the workers, and takes the steps that became possible with it.
    fn settle(&mut self, id: DeviceId, mut out: ToWorkers) {
        for _ in 0..STEPS_PER_TURN {
            for (queue, message) in out.drain(..) {
                self.pass_on(queue, message);
            }
            let Some(device) = self.devices.get_mut(&id) else {
                return;
            };
            let more = device.advance(self.poll.registry(), &mut out, &mut self.events);
            if let Some(wipe) = device.wants_give_up() {
                if wipe {
                    device.shared().wipe();
                }
                for worker in &self.workers {
                    worker.send(ToWorker::GiveUp { id, wipe });
                }
            }
            if device.wants_detach() {
                for worker in &self.workers {
                    worker.send(ToWorker::Detach { id });
                }
                self.rekeyer.send(ToRekeyer::Forget { id });
            }
            if device.is_gone() {
                self.devices.remove(&id);
                return;
            }
            if !more && out.is_empty() {
                device.come_back(self.poll.registry());
                if device.wants_retry() && !self.retry.contains(&id) {
                    self.retry.push(id);
                }
                return;
            }
        }
        for (queue, message) in out.drain(..) {
            self.pass_on(queue, message);
        }
        if let Some(device) = self.devices.get_mut(&id) {
            device.come_back(self.poll.registry());
            device.come_back_to_listener(self.poll.registry());
        }
    }

    fn pass_on(&mut self, queue: QueueId, message: ToWorker) {
        let Some(message) = self.hold(queue, message) else {
            return;
        };
        let message = match message {
            ToWorker::TakeVolume { device: id } => {
                let device = self.disk(id);
                device.map(|device| ToRekeyer::Take { id, device })
            }
            ToWorker::LetGoOfVolume { device } => Some(ToRekeyer::LetGo { id: device }),
            message => return self.send_to_queue(queue, message),
        };
        if let Some(message) = message {
            self.rekeyer.send(message);
        }
    }
}

/// The device that a message is about.
fn device_of(message: &FromWorker) -> Option<DeviceId> {
    Some(match message {
        FromWorker::Attached { id, .. }
        | FromWorker::Detached { id, .. }
        | FromWorker::Health { id } => *id,
        FromWorker::Started { queue }
        | FromWorker::StartFailed { queue, .. }
        | FromWorker::Stopped { queue, .. }
        | FromWorker::MemorySet { queue }
        | FromWorker::Flushed { queue }
        | FromWorker::Changed { queue }
        | FromWorker::Stays { queue }
        | FromWorker::Retired { queue, .. } => queue.device,
        FromWorker::Moved(moved) => moved.queue.device,
        FromWorker::VolumeReady { device, .. } | FromWorker::VolumeReleased { device } => *device,
        FromWorker::Busy { .. } | FromWorker::Frozen { .. } | FromWorker::Thawed { .. } => {
            return None;
        }
    })
}
