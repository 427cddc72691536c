//! A connection's state, and what each request does to it (ADR 0002).
//!
//! Pure: requests in, replies and messages to workers out ([`Outbox`]). What has to wait for a
//! worker leaves the session *pending*: no further request is handled until the worker has
//! answered ([`Session::on_worker`]), and the reply goes out then.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::message::{MAX_REGIONS, Message, ProtocolError, Request, code, config_body, reply};
use super::vring::{Phase, Vring};
use super::{feature, protocol_feature};
use crate::blk::config_space::CONFIG_BYTES;
use crate::fds::as_event;
use crate::memory::{GuestMemory, RegionSpec};
use crate::worker::message::{DeviceId, FromWorker, QueueId, QueueStart, ToWorker};

/// What a session knows of its device; never changes while it is connected.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its number.
    pub id: DeviceId,
    /// Features it offers beside [`feature::TRANSPORT`].
    pub features: u64,
    /// Queues.
    pub queues: u16,
    /// Configuration space.
    pub config: [u8; CONFIG_BYTES],
}

/// What a request leads to.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Bytes for the frontend.
    pub replies: Vec<u8>,
    /// Messages for the workers that have these queues.
    pub to_workers: Vec<(QueueId, ToWorker)>,
}

/// What is waited for.
#[derive(Debug)]
enum Pending {
    /// The start of a queue.
    Start { index: u16 },
    /// The end of a queue, for GET_VRING_BASE.
    Base { index: u16 },
    /// Queues that take over a memory table.
    Memory { left: usize },
    /// Queues that stop for RESET_OWNER.
    Reset { left: usize },
    /// Queues that stop because the connection ended.
    Close { left: usize },
}

/// A request that waits for an answer, and what for.
#[derive(Debug)]
struct Waiting {
    what: Pending,
    code: u32,
    acknowledge: bool,
}

/// The state of a connection.
#[derive(Debug)]
pub struct Session {
    facts: Facts,
    /// SET_FEATURES.
    features: u64,
    /// SET_PROTOCOL_FEATURES.
    protocol_features: u64,
    memory: Arc<GuestMemory>,
    vrings: Vec<Vring>,
    waiting: Option<Waiting>,
    /// Why a queue retired last.
    fault: Option<String>,
}

/// How a request went.
enum Handled {
    /// Done; an acknowledgement goes out if it was asked for.
    Done,
    /// Done, and this is the reply.
    Reply(Vec<u8>),
    /// It waits for a worker.
    Pending(Pending),
}

type Outcome = Result<Handled, String>;

fn no_memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::none())
}

impl Session {
    /// A connection on which nothing was said yet.
    #[must_use]
    pub fn new(facts: Facts) -> Self {
        let vrings = (0..facts.queues).map(|_| Vring::default()).collect();
        Self {
            facts,
            features: 0,
            protocol_features: 0,
            memory: no_memory(),
            vrings,
            waiting: None,
            fault: None,
        }
    }

    /// Whether it waits for a worker: no request may be handled.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.waiting.is_some()
    }

    /// Queues that run, and queues that retired.
    #[must_use]
    pub fn queues(&self) -> (u16, u16) {
        let count = |phase: Phase| {
            let n = self.vrings.iter().filter(|v| v.phase == phase).count();
            u16::try_from(n).unwrap_or(u16::MAX)
        };
        (count(Phase::Running), count(Phase::Retired))
    }

    /// Why a queue retired last.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Handles a message.
    ///
    /// # Errors
    /// [`ProtocolError::Refused`] if it was refused and no acknowledgement was asked for: the
    /// connection has to end, since the frontend can't know.
    pub fn handle(&mut self, message: Message, out: &mut Outbox) -> Result<(), ProtocolError> {
        let code = message.header.code;
        let acknowledge =
            message.header.need_reply && self.protocol_features & protocol_feature::REPLY_ACK != 0;
        let handled = message
            .parse()
            .and_then(|request| self.perform(request, out));
        match handled {
            Ok(Handled::Done) => {
                if acknowledge {
                    out.replies.extend(reply(code, &0u64.to_le_bytes()));
                }
            }
            Ok(Handled::Reply(body)) => out.replies.extend(reply(code, &body)),
            Ok(Handled::Pending(what)) => {
                self.waiting = Some(Waiting {
                    what,
                    code,
                    acknowledge,
                });
            }
            Err(reason) => return Self::refuse(code, acknowledge, reason, out),
        }
        Ok(())
    }

    fn refuse(
        code: u32,
        acknowledge: bool,
        reason: String,
        out: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        match code {
            // An empty payload says no, and the connection goes on.
            code::GET_CONFIG => out.replies.extend(reply(code, &[])),
            // A driver's write to a field that can't be written: nothing happens.
            code::SET_CONFIG if !acknowledge => {}
            _ if acknowledge && !asks(code) => {
                tracing::debug!("request {code} was refused: {reason}");
                out.replies.extend(reply(code, &1u64.to_le_bytes()));
            }
            _ => return Err(ProtocolError::Refused { code, reason }),
        }
        Ok(())
    }

    fn perform(&mut self, request: Request, out: &mut Outbox) -> Outcome {
        match request {
            Request::GetFeatures => Ok(word(self.offered())),
            Request::SetFeatures(features) => self.set_features(features),
            Request::SetOwner => Ok(Handled::Done),
            Request::ResetOwner => Ok(self.reset(out)),
            Request::GetProtocolFeatures => Ok(word(protocol_feature::OFFERED)),
            Request::SetProtocolFeatures(features) => {
                if features & !protocol_feature::OFFERED != 0 {
                    return Err(format!("protocol features {features:#x} were not offered"));
                }
                self.protocol_features = features;
                Ok(Handled::Done)
            }
            Request::GetQueueNum => Ok(word(u64::from(self.facts.queues))),
            Request::GetConfig { offset, size } => self.config(offset, size),
            Request::SetConfig => Err("no field of the configuration can be written".to_owned()),
            Request::SetMemTable(regions) => {
                let regions: Vec<_> = regions.iter().map(|(s, fd)| (*s, fd.as_fd())).collect();
                let memory = GuestMemory::map(&regions).map_err(|e| e.to_string())?;
                Ok(self.set_memory(memory, out))
            }
            Request::GetMaxMemSlots => Ok(word(MAX_REGIONS)),
            Request::AddMemRegion(spec, fd) => self.add_region(&spec, &fd, out),
            Request::RemoveMemRegion(spec) => {
                let memory = self.memory.without_region(&spec);
                let memory = memory.ok_or("there is no such region")?;
                Ok(self.set_memory(memory, out))
            }
            Request::SetVringNum { index, size } => self.vring(index)?.set_size(size).map(done),
            Request::SetVringAddr(addresses) => {
                let vring = self.vring(addresses.index)?;
                vring.set_addresses(addresses).map(done)
            }
            Request::SetVringBase { index, base } => self.vring(index)?.set_base(base).map(done),
            Request::GetVringBase { index } => self.get_base(index, out),
            Request::SetVringKick { index, fd } => self.set_kick(index, fd, out),
            Request::SetVringCall { index, fd } => self.set_call(index, fd, out),
            Request::SetVringErr { index, fd } => self.set_error(index, fd, out),
            Request::SetVringEnable { index, enabled } => self.enable(index, enabled, out),
        }
    }

    fn offered(&self) -> u64 {
        self.facts.features | feature::TRANSPORT
    }

    fn set_features(&mut self, features: u64) -> Outcome {
        if features & !self.offered() != 0 {
            return Err(format!("features {features:#x} were not offered"));
        }
        let running = self.vrings.iter().any(Vring::is_started);
        if running && features != self.features {
            return Err("features can't change while a queue runs".to_owned());
        }
        self.features = features;
        Ok(Handled::Done)
    }

    fn config(&self, offset: u32, size: u32) -> Outcome {
        let range = || {
            let from = usize::try_from(offset).ok()?;
            let to = from.checked_add(usize::try_from(size).ok()?)?;
            self.facts.config.get(from..to).filter(|p| !p.is_empty())
        };
        let payload = range().ok_or_else(|| {
            format!("{size} bytes at {offset} are not in the configuration space")
        })?;
        Ok(Handled::Reply(config_body(offset, size, payload)))
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, String> {
        let queues = self.facts.queues;
        usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or_else(|| format!("there is no queue {index}, the device has {queues}"))
    }

    fn queue(&self, index: u32) -> QueueId {
        QueueId {
            device: self.facts.id,
            index: u16::try_from(index).unwrap_or(u16::MAX),
        }
    }

    /// The queues that a worker has.
    fn started(&self) -> Vec<QueueId> {
        (0u32..)
            .zip(&self.vrings)
            .filter(|(_, vring)| vring.is_started())
            .map(|(index, _)| self.queue(index))
            .collect()
    }

    fn add_region(&mut self, spec: &RegionSpec, fd: &OwnedFd, out: &mut Outbox) -> Outcome {
        if self.memory.len() as u64 >= MAX_REGIONS {
            return Err(format!("there are {MAX_REGIONS} regions, no more fit"));
        }
        let memory = self.memory.with_region(spec, fd.as_fd());
        let memory = memory.map_err(|e| e.to_string())?;
        Ok(self.set_memory(memory, out))
    }

    /// Gives every running queue other memory. The old is let go of when nothing uses it.
    fn set_memory(&mut self, memory: GuestMemory, out: &mut Outbox) -> Handled {
        self.memory = Arc::new(memory);
        let queues = self.started();
        for queue in &queues {
            let memory = Arc::clone(&self.memory);
            let queue = *queue;
            out.to_workers
                .push((queue, ToWorker::SetMemory { queue, memory }));
        }
        pending_if(queues.len(), |left| Pending::Memory { left })
    }

    fn stop_all(&self, out: &mut Outbox) -> usize {
        let queues = self.started();
        for queue in &queues {
            let queue = *queue;
            out.to_workers.push((queue, ToWorker::Stop { queue }));
        }
        queues.len()
    }

    /// RESET_OWNER, which old frontends send when their guest is reset: every queue stops.
    fn reset(&mut self, out: &mut Outbox) -> Handled {
        let left = self.stop_all(out);
        pending_if(left, |left| Pending::Reset { left })
    }

    /// The connection ended: every queue stops. Whether something has to be waited for.
    pub fn close(&mut self, out: &mut Outbox) -> bool {
        // A stop that was under way is among those that are waited for: each queue answers every
        // stop, so that two answers of one queue can't be told apart; asking again would.
        let already = match self.waiting.take().map(|w| w.what) {
            Some(Pending::Reset { left } | Pending::Close { left }) => Some(left),
            Some(Pending::Base { index }) => {
                let queues = self.started();
                let others = queues.iter().filter(|q| q.index != index);
                for queue in others {
                    let queue = *queue;
                    out.to_workers.push((queue, ToWorker::Stop { queue }));
                }
                Some(queues.len())
            }
            _ => None,
        };
        let left = already.unwrap_or_else(|| self.stop_all(out));
        if left == 0 {
            self.forget();
            return false;
        }
        self.waiting = Some(Waiting {
            what: Pending::Close { left },
            code: 0,
            acknowledge: false,
        });
        true
    }

    /// Lets go of memory and descriptors.
    fn forget(&mut self) {
        self.memory = no_memory();
        self.vrings.clear();
        self.waiting = None;
    }

    fn get_base(&mut self, index: u32, out: &mut Outbox) -> Outcome {
        let vring = self.vring(index)?;
        if !vring.is_started() {
            let base = vring.base;
            return Ok(Handled::Reply(base_body(index, base)));
        }
        let queue = self.queue(index);
        out.to_workers.push((queue, ToWorker::Stop { queue }));
        Ok(Handled::Pending(Pending::Base { index: queue.index }))
    }

    /// SET_VRING_KICK starts a queue. (The specification starts it at its first kick; a queue that
    /// is polled needs none.)
    fn set_kick(&mut self, index: u32, fd: Option<OwnedFd>, out: &mut Outbox) -> Outcome {
        let kick = fd.map(as_event).transpose().map_err(|e| e.to_string())?;
        let queue = self.queue(index);
        let always = self.features & feature::PROTOCOL_FEATURES == 0;
        let (features, memory) = (self.features, Arc::clone(&self.memory));
        let vring = self.vring(index)?;
        if vring.is_started() {
            let message = ToWorker::SetKick { queue, fd: kick };
            out.to_workers.push((queue, message));
            return Ok(Handled::Done);
        }
        let layout = vring.layout(&memory)?;
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        let failed = |e: std::io::Error| e.to_string();
        let start = QueueStart {
            queue,
            memory,
            layout,
            next_avail: vring.base,
            features,
            enabled: always || vring.enabled,
            kick,
            call: copy(&vring.call).map_err(failed)?,
            error: copy(&vring.error).map_err(failed)?,
        };
        vring.phase = Phase::Running;
        out.to_workers
            .push((queue, ToWorker::Start(Box::new(start))));
        Ok(Handled::Pending(Pending::Start { index: queue.index }))
    }

    fn set_call(&mut self, index: u32, fd: Option<OwnedFd>, out: &mut Outbox) -> Outcome {
        let fd = fd.map(as_event).transpose().map_err(|e| e.to_string())?;
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        if vring.is_started() {
            let fd = fd.as_ref().map(OwnedFd::try_clone).transpose();
            let fd = fd.map_err(|e| e.to_string())?;
            out.to_workers
                .push((queue, ToWorker::SetCall { queue, fd }));
        }
        vring.call = fd;
        Ok(Handled::Done)
    }

    fn set_error(&mut self, index: u32, fd: Option<OwnedFd>, out: &mut Outbox) -> Outcome {
        let fd = fd.map(as_event).transpose().map_err(|e| e.to_string())?;
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        if vring.is_started() {
            let fd = fd.as_ref().map(OwnedFd::try_clone).transpose();
            let fd = fd.map_err(|e| e.to_string())?;
            out.to_workers
                .push((queue, ToWorker::SetError { queue, fd }));
        }
        vring.error = fd;
        Ok(Handled::Done)
    }

    fn enable(&mut self, index: u32, enabled: bool, out: &mut Outbox) -> Outcome {
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        vring.enabled = enabled;
        if vring.is_started() {
            let message = ToWorker::SetEnabled { queue, enabled };
            out.to_workers.push((queue, message));
        }
        Ok(Handled::Done)
    }

    /// What a worker says about one of this device's queues. True: the connection had ended, and
    /// now nothing of it is left.
    ///
    /// # Errors
    /// As [`Session::handle`], for the request that waited for it.
    pub fn on_worker(
        &mut self,
        message: FromWorker,
        out: &mut Outbox,
    ) -> Result<bool, ProtocolError> {
        match message {
            FromWorker::Started { queue } => {
                let this =
                    |w: &Pending| matches!(w, Pending::Start { index } if *index == queue.index);
                self.answer(this, Ok(()), out)?;
            }
            FromWorker::StartFailed { queue, reason } => {
                self.set_phase(queue.index, Phase::Stopped);
                let this =
                    |w: &Pending| matches!(w, Pending::Start { index } if *index == queue.index);
                self.answer(this, Err(reason), out)?;
            }
            FromWorker::MemorySet { .. } => {
                self.one_less(|w| matches!(w, Pending::Memory { .. }), out)?
            }
            FromWorker::Stopped { queue, next_avail } => {
                return self.on_stopped(queue.index, next_avail, out);
            }
            FromWorker::Retired { queue, reason } => {
                self.set_phase(queue.index, Phase::Retired);
                self.fault = Some(reason);
            }
            FromWorker::Attached { .. } | FromWorker::Detached { .. } => {}
        }
        Ok(false)
    }

    fn set_phase(&mut self, index: u16, phase: Phase) {
        if let Some(vring) = self.vrings.get_mut(usize::from(index))
            && (phase != Phase::Retired || vring.is_started())
        {
            vring.phase = phase;
        }
    }

    fn on_stopped(
        &mut self,
        index: u16,
        next_avail: Option<u16>,
        out: &mut Outbox,
    ) -> Result<bool, ProtocolError> {
        self.set_phase(index, Phase::Stopped);
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            vring.base = next_avail.unwrap_or(vring.base);
            let base = vring.base;
            let this = |w: &Waiting| matches!(w.what, Pending::Base { index: i } if i == index);
            if self.waiting.take_if(|w| this(w)).is_some() {
                let body = base_body(u32::from(index), base);
                out.replies.extend(reply(code::GET_VRING_BASE, &body));
                return Ok(false);
            }
        }
        let closing = matches!(
            self.waiting.as_ref().map(|w| &w.what),
            Some(Pending::Close { .. })
        );
        let stops = |w: &Pending| matches!(w, Pending::Reset { .. } | Pending::Close { .. });
        self.one_less(stops, out)?;
        if closing && self.waiting.is_none() {
            self.forget();
            return Ok(true);
        }
        Ok(false)
    }

    /// One of several answers is there, if it is these that are waited for.
    fn one_less(
        &mut self,
        these: impl Fn(&Pending) -> bool,
        out: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        if let Some(waiting) = self.waiting.as_mut().filter(|w| these(&w.what))
            && let Pending::Memory { left } | Pending::Reset { left } | Pending::Close { left } =
                &mut waiting.what
        {
            *left -= 1;
            if *left == 0 {
                return self.answer(|_| true, Ok(()), out);
            }
        }
        Ok(())
    }

    /// Answers the request that waits, if it is `this`.
    fn answer(
        &mut self,
        this: impl Fn(&Pending) -> bool,
        result: Result<(), String>,
        out: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        let Some(waiting) = self.waiting.take_if(|w| this(&w.what)) else {
            return Ok(());
        };
        match result {
            Ok(()) if waiting.acknowledge => {
                out.replies.extend(reply(waiting.code, &0u64.to_le_bytes()));
                Ok(())
            }
            Ok(()) => Ok(()),
            Err(reason) => Self::refuse(waiting.code, waiting.acknowledge, reason, out),
        }
    }
}

/// Whether a request has a reply of its own.
fn asks(code: u32) -> bool {
    matches!(
        code,
        code::GET_FEATURES
            | code::GET_PROTOCOL_FEATURES
            | code::GET_QUEUE_NUM
            | code::GET_VRING_BASE
            | code::GET_MAX_MEM_SLOTS
    )
}

fn word(value: u64) -> Handled {
    Handled::Reply(value.to_le_bytes().to_vec())
}

fn done(_: ()) -> Handled {
    Handled::Done
}

fn base_body(index: u32, base: u16) -> Vec<u8> {
    [index.to_le_bytes(), u32::from(base).to_le_bytes()].concat()
}

fn pending_if(left: usize, pending: impl FnOnce(usize) -> Pending) -> Handled {
    if left == 0 {
        Handled::Done
    } else {
        Handled::Pending(pending(left))
    }
}
