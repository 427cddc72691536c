//! The event loop's turns: what is ready, what workers answered, what is tried again, and what becomes possible with it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Token};

use super::connection::ToWorkers;
use super::device::{self, State};
use super::{Event, MANAGER_TOKENS, Manager, REPLIES, Server, fenced};
use crate::hand::{self, Hand};
use crate::rekey::ToRekeyer;
use crate::worker::WorkerHandle;
use crate::worker::message::{DeviceId, FromWorker, QueueId, ToWorker};
/// Steps of one device, frontends it sends away among them, before others have their turn.
const STEPS_PER_TURN: usize = 64;
/// Workers' answers taken before frontends have their turn.
const REPLIES_PER_TURN: usize = 256;
/// When something is tried again that nothing announces: a frontend that could not be accepted (no
/// descriptor is free), a volume that another host has.
const RETRY: Duration = Duration::from_millis(100);

impl Server {
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
    pub(super) fn report(&mut self, manager: &mut dyn Manager) {
        while !self.events.is_empty() {
            for event in std::mem::take(&mut self.events) {
                manager.event(self, event);
            }
        }
    }

    /// The device, which this thread works for from now on.
    pub(super) fn take_up(&mut self, id: DeviceId) -> Option<&mut State> {
        let device = self.devices.get_mut(&id)?;
        hand::take(device.hand());
        Some(device)
    }

    pub(super) fn ready(&mut self, token: Token, frontend_gone: bool) {
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

    pub(super) fn take_one_reply(&mut self, message: FromWorker) {
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
    pub(super) fn settle(&mut self, id: DeviceId, mut out: ToWorkers) {
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

    pub(super) fn pass_on(&mut self, queue: QueueId, message: ToWorker) {
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
