//! A connection's state, and what each request does to it (ADR 0002).
//!
//! Requests in, replies and messages to workers out ([`Outbox`]), without a socket or a thread. Whatever a worker has to do
//! leaves the session *pending*: no further request is handled until the worker has answered
//! ([`Session::on_worker`]), and the reply goes out then. So an acknowledgement means that it was
//! done, and a frontend can't fill a worker's channel.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod migration;
mod net;
mod queues;
mod remembered;
mod volume;
mod waiting;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::message::{MAX_REGIONS, Message, ProtocolError, Request, code, config_body, reply};
use super::vring::{Phase, Vring};
use super::{BackendChannel, feature, protocol_feature};
use crate::device::Device;
use crate::memory::{DirtyLog, GuestMemory, RegionSpec};
use crate::stored::{Fd, StoredLog};
use crate::worker::message::{DeviceId, QueueId, ToWorker};
use migration::Regions;
pub(crate) use migration::inflight_flags;
use volume::Hold;

/// What a session knows of its device.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its number.
    pub id: DeviceId,
    /// Features it offers beside [`feature::TRANSPORT`].
    pub features: u64,
    /// Queues.
    pub queues: u16,
    /// The device: its configuration space, and the volume that is taken while queues run, if it has one.
    pub device: Device,
}

impl Facts {
    /// Of a device, as it is.
    #[must_use]
    pub fn of(id: DeviceId, device: Device) -> Self {
        Self {
            id,
            features: device.features(),
            queues: device.queues(),
            device,
        }
    }
}

/// What a request leads to.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Bytes for the frontend.
    pub replies: Vec<u8>,
    /// A descriptor that goes with them.
    pub reply_fd: Option<OwnedFd>,
    /// Messages for the workers that have these queues.
    pub to_workers: Vec<(QueueId, ToWorker)>,
}

/// What is waited for.
#[derive(Debug)]
enum Pending {
    /// The start of a queue.
    Start { index: u16 },
    /// The volume, since a queue that is to stop for GET_VRING_BASE has requests from before it started; no longer
    /// than until then.
    Owed { index: u16, until: Instant },
    /// The end of a queue, for GET_VRING_BASE.
    Base { index: u16 },
    /// Messages that change running queues: memory, eventfds, whether they are served.
    Changes { left: usize },
    /// Queues that stop for RESET_OWNER.
    Reset { left: usize },
    /// Queues that stop because the connection ended.
    Close { left: usize },
    /// A predecessor's queues that start.
    Resume { left: usize },
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
    /// The files of its regions, for a successor.
    files: Vec<(RegionSpec, Fd)>,
    vrings: Vec<Vring>,
    /// Earlier tables of regions, as long as requests in flight use them.
    earlier: Vec<Weak<GuestMemory>>,
    /// Where writes to guest memory are marked.
    log: Arc<DirtyLog>,
    /// SET_LOG_BASE.
    log_file: Option<StoredLog<Fd>>,
    /// SET_INFLIGHT_FD, or our own.
    regions: Option<Regions>,
    /// A successor is to know what is in flight.
    keeps: bool,
    /// SET_BACKEND_REQ_FD.
    backend: Option<BackendChannel>,
    /// The configuration space that the frontend knows ([`Device::told`]).
    told: Option<u64>,
    /// SET_STATUS.
    status: u8,
    hold: Hold,
    /// Requests of an earlier process may still be under way: the volume is not taken.
    fenced: bool,
    /// A queue has started since the volume was flushed last.
    ran: bool,
    /// Flushes of the volume under way, before it is let go of.
    flushes: u32,
    /// The rekeyer was asked to take the volume, and not to let go of it since.
    asked_rekeyer: bool,
    /// Why the volume could not be taken although nobody else has it.
    refusal: Option<String>,
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
    /// Done, and this is the reply, with a descriptor.
    ReplyWithFd(Vec<u8>, OwnedFd),
    /// It waits for a worker.
    Pending(Pending),
}

type Outcome = Result<Handled, String>;

impl Session {
    /// A connection on which nothing was said yet.
    #[must_use]
    pub fn new(facts: Facts) -> Self {
        let vrings = (0..facts.queues).map(|_| Vring::default()).collect();
        let log = Arc::default();
        Self {
            facts,
            features: 0,
            protocol_features: 0,
            memory: Arc::new(GuestMemory::none().with_log(&log)),
            files: Vec::new(),
            vrings,
            earlier: Vec::new(),
            log,
            log_file: None,
            regions: None,
            keeps: false,
            backend: None,
            told: None,
            status: 0,
            hold: Hold::default(),
            fenced: false,
            ran: false,
            flushes: 0,
            asked_rekeyer: false,
            refusal: None,
            waiting: None,
            fault: None,
        }
    }

    /// Whether it waits for a worker: no request may be handled.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether the message that was handled last is not done yet. (A session also waits for its own sake: the
    /// volume is ready, and its queues are told.)
    #[must_use]
    pub fn is_answering(&self) -> bool {
        self.waiting.as_ref().is_some_and(|w| w.code != 0)
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

    /// Whether a queue has retired.
    #[must_use]
    pub fn is_retired(&self, index: u16) -> bool {
        let vring = self.vrings.get(usize::from(index));
        vring.is_some_and(|vring| vring.phase == Phase::Retired)
    }

    /// Why a queue retired last.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Why something is not served: the volume, or else the queue that retired last.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.refusal.as_deref().or(self.fault())
    }

    /// Handles a message.
    ///
    /// # Errors
    /// [`ProtocolError::Refused`] if it was refused and no acknowledgement was asked for: the
    /// connection has to end, since the frontend can't know.
    pub fn handle(&mut self, message: Message, out: &mut Outbox) -> Result<(), ProtocolError> {
        let (code, asked) = (message.header.code, message.header.need_reply);
        let handled = message
            .parse()
            .and_then(|request| self.perform(request, out));
        // After it, so that the negotiation of acknowledgements is itself acknowledged, as
        // libvhost-user does.
        let acknowledge = asked && self.protocol_features & protocol_feature::REPLY_ACK != 0;
        match handled {
            Ok(Handled::Done) => {
                if acknowledge {
                    out.replies.extend(reply(code, &0u64.to_le_bytes()));
                }
            }
            Ok(Handled::Reply(body)) => out.replies.extend(reply(code, &body)),
            Ok(Handled::ReplyWithFd(body, fd)) => {
                out.replies.extend(reply(code, &body));
                out.reply_fd = Some(fd);
            }
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
            Request::SetFeatures(features) => self.set_features(features, out),
            Request::SetOwner => Ok(Handled::Done),
            Request::ResetOwner => Ok(self.reset(out)),
            Request::GetProtocolFeatures => Ok(word(self.facts.device.protocol_features())),
            Request::SetProtocolFeatures(features) => {
                if features & !self.facts.device.protocol_features() != 0 {
                    return Err(format!("protocol features {features:#x} were not offered"));
                }
                self.protocol_features = features;
                Ok(Handled::Done)
            }
            Request::GetQueueNum => Ok(word(u64::from(self.facts.queues))),
            Request::GetConfig { offset, size } => self.config(offset, size),
            Request::SetConfig { offset, payload } => {
                self.facts.device.write_config(offset, &payload).map(done)
            }
            Request::SetMemTable(regions) => self.set_table(regions, out),
            Request::GetMaxMemSlots => Ok(word(MAX_REGIONS)),
            Request::AddMemRegion(spec, fd) => self.add_region(spec, fd, out),
            Request::RemoveMemRegion(spec) => self.remove_region(&spec, out),
            Request::SetVringNum { index, size } => {
                let features = self.features;
                self.vring(index)?.set_size(size, features).map(done)
            }
            Request::SetVringAddr(addresses) => self.set_addresses(addresses, out),
            Request::SetVringBase { index, base } => {
                let features = self.features;
                self.vring(index)?.set_base(base, features).map(done)
            }
            Request::GetVringBase { index } => self.get_base(index, out),
            Request::SetVringKick { index, fd } => self.set_kick(index, fd, out),
            Request::SetVringCall { index, fd } => self.set_call(index, fd, out),
            Request::SetVringErr { index, fd } => self.set_error(index, fd, out),
            Request::SetVringEnable { index, enabled } => self.enable(index, enabled, out),
            Request::SendRarp(mac) => self.announce(mac, out),
            Request::NetSetMtu(mtu) => self.check_mtu(mtu),
            other => self.perform_shared(other, out),
        }
    }

    /// Requests about what is shared beside memory and queues, and about the device as a whole.
    fn perform_shared(&mut self, request: Request, out: &mut Outbox) -> Outcome {
        match request {
            Request::SetLogBase { bytes, offset, fd } => self.set_log(bytes, offset, fd),
            Request::SetBackendReqFd(fd) => {
                self.backend = Some(BackendChannel::new(Arc::new(fd))?);
                Ok(Handled::Done)
            }
            Request::GetInflightFd(asked) => self.get_inflight(asked),
            Request::SetInflightFd(given, fd) => self.set_inflight(given, fd),
            Request::ResetDevice => {
                self.facts.device.reset();
                self.status = 0;
                Ok(self.reset(out))
            }
            Request::SetStatus(status) => self.set_status(status, out),
            Request::GetStatus => Ok(word(u64::from(self.status))),
            // SET_LOG_FD: whoever reads the log looks at it when it needs it.
            _ => Ok(Handled::Done),
        }
    }

    /// SET_STATUS; 0 resets the device (virtio 1.2, 2.1), but not its cache mode: QEMU also sends it when
    /// it pauses a guest, which goes on in the mode that it has chosen.
    fn set_status(&mut self, status: u64, out: &mut Outbox) -> Outcome {
        self.status = u8::try_from(status)
            .map_err(|_| format!("the status {status:#x} has more than 8 bits"))?;
        if self.status == 0 {
            return Ok(self.reset(out));
        }
        Ok(Handled::Done)
    }

    /// The configuration space changed: a frontend that listens, and whose business it is, is told.
    pub fn config_changed(&mut self) {
        let asked_for = self.facts.device.protocol_features() & protocol_feature::CONFIG != 0;
        if let Some(backend) = self.backend.as_mut().filter(|_| asked_for) {
            backend.config_changed();
        }
        self.note_told();
    }

    /// What the frontend was told of, if it was: it has the capacity of now.
    fn note_told(&mut self) {
        if self.backend.is_some() && !self.backend_is_due() {
            self.told = Some(self.facts.device.told());
        }
    }

    /// Whether the frontend has not been told of a change.
    #[must_use]
    pub fn backend_is_due(&self) -> bool {
        self.backend.as_ref().is_some_and(BackendChannel::is_due)
    }

    /// Tells the frontend of a change that it could not be told of.
    pub fn retry_backend(&mut self) {
        if let Some(backend) = &mut self.backend {
            backend.flush();
        }
        self.note_told();
    }

    fn offered(&self) -> u64 {
        self.facts.features | feature::TRANSPORT
    }

    fn set_features(&mut self, features: u64, out: &mut Outbox) -> Outcome {
        if features & !self.offered() != 0 {
            return Err(format!("features {features:#x} were not offered"));
        }
        let running = self.vrings.iter().any(Vring::is_started);
        if running && (features ^ self.features) & !feature::LOG_ALL != 0 {
            return Err("features can't change while a queue runs".to_owned());
        }
        self.facts.device.negotiated(features);
        if features == self.features {
            return Ok(Handled::Done);
        }
        Ok(self.log_all(features, out))
    }

    fn config(&mut self, offset: u32, size: u32) -> Outcome {
        let range = || {
            let from = usize::try_from(offset).ok()?;
            let to = from.checked_add(usize::try_from(size).ok()?)?;
            Some(from..to)
        };
        let told = self.facts.device.told();
        let space = self.facts.device.config();
        let payload = range().and_then(|range| space.get(range).filter(|p| !p.is_empty()));
        let payload = payload.ok_or_else(|| {
            format!("{size} bytes at {offset} are not in the configuration space")
        })?;
        self.told = Some(told);
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

    /// Whether requests are to be taken from a queue.
    fn serves(&self, index: u16) -> bool {
        let vring = self.vrings.get(usize::from(index));
        self.holds_volume() && vring.is_some_and(|vring| vring.is_served(self.features))
    }

    /// The queues that a worker has.
    fn started(&self) -> Vec<QueueId> {
        (0u32..)
            .zip(&self.vrings)
            .filter(|(_, vring)| vring.is_started())
            .map(|(index, _)| self.queue(index))
            .collect()
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
            | code::GET_INFLIGHT_FD
            | code::GET_STATUS
    )
}

fn word(value: u64) -> Handled {
    Handled::Reply(value.to_le_bytes().to_vec())
}

fn done(_: ()) -> Handled {
    Handled::Done
}

fn base_body(index: u32, base: u32) -> Vec<u8> {
    [index.to_le_bytes(), base.to_le_bytes()].concat()
}
