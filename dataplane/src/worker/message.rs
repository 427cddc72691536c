//! Messages between the control thread and the workers: the only thing they share besides
//! the devices' read-only description and counters.
//!
//! A worker answers every [`ToWorker::Start`], [`ToWorker::Stop`], [`ToWorker::Move`],
//! [`ToWorker::SetMemory`], [`ToWorker::Attach`] and [`ToWorker::Detach`] with exactly one [`FromWorker`], in the order in
//! which it finished them; a stop is finished once nothing of its queue is in flight.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::blk::Ciphers;
use crate::device::Device;
use crate::fence::Fence;
use crate::memory::GuestMemory;
use crate::rekey::Ticket;
use crate::virtqueue::{ParkedQueue, QueueRegion};

/// Number of an attached device; never used again within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u64);

/// A queue of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId {
    /// The device.
    pub device: DeviceId,
    /// The queue's number in it, from 0.
    pub index: u16,
}

/// Where a ring lies in guest memory, fixed while the queue runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries: 1 to 32768, of a split ring a power of two (virtio 1.2, 2.7 and 2.8).
    pub size: u16,
    /// Guest address of the descriptor table; packed: of the descriptor ring.
    pub desc: u64,
    /// Guest address of the avail ring; packed: of the driver event area.
    pub avail: u64,
    /// Guest address of the used ring; packed: of the device event area.
    pub used: u64,
}

/// A queue to be served.
#[derive(Debug)]
pub struct QueueStart {
    /// Which.
    pub queue: QueueId,
    /// The memory that the guest and we share.
    pub memory: Arc<GuestMemory>,
    /// Where its ring lies.
    pub layout: RingLayout,
    /// Where the ring goes on, as SET_VRING_BASE has it.
    pub base: u32,
    /// Address of the used ring in the dirty log; none: writes to the ring are not marked.
    pub log: Option<u64>,
    /// Where what is in flight is kept for a successor.
    pub region: Option<QueueRegion>,
    /// Nothing is in flight, and `base` says where the ring goes on: it was stopped on this connection. Else the
    /// region says both, if somebody has kept it: who served the ring before may have died.
    pub anew: bool,
    /// Negotiated virtio features.
    pub features: u64,
    /// Nothing is served while false (SET_VRING_ENABLE).
    pub enabled: bool,
    /// The driver kicks here; none: the queue is polled all the time.
    pub kick: Option<OwnedFd>,
    /// We call here; none: the driver polls.
    pub call: Option<OwnedFd>,
    /// A retired queue is signalled here.
    pub error: Option<OwnedFd>,
}

/// A queue on its way from one worker to another: everything that the first had of it.
#[derive(Debug)]
pub struct MovedQueue {
    /// Which.
    pub queue: QueueId,
    /// Its ring.
    pub ring: ParkedQueue,
    /// Negotiated virtio features.
    pub features: u64,
    /// Nothing is served while false.
    pub enabled: bool,
    /// The driver kicks here.
    pub kick: Option<OwnedFd>,
    /// We call here.
    pub call: Option<OwnedFd>,
    /// The driver is to be called: it may not have been for what was published last.
    pub call_due: bool,
    /// A retired queue is signalled here.
    pub error: Option<OwnedFd>,
}

/// From the control thread to a worker.
#[derive(Debug)]
pub enum ToWorker {
    /// Take a device: a disk's storage descriptor is registered. Answered by [`FromWorker::Attached`].
    Attach {
        /// Its number.
        id: DeviceId,
        /// What it is.
        device: Device,
    },
    /// Forget a device whose queues were all stopped. Answered by [`FromWorker::Detached`], after
    /// which this worker holds neither its storage nor its key.
    Detach {
        /// Its number.
        id: DeviceId,
    },
    /// A device whose queues were all told to stop is not waited for any longer: what the kernel has of it is
    /// cancelled where that is possible, and nothing more is said to its guest. Not answered: its queues have
    /// stopped when the kernel has given everything back.
    GiveUp {
        /// Its number.
        id: DeviceId,
        /// It does not come back: its keys are wiped.
        wipe: bool,
    },
    /// Serve a queue. Answered by [`FromWorker::Started`] or [`FromWorker::StartFailed`].
    Start(Box<QueueStart>),
    /// The volume is this host's: take what was in flight when the queue started, though it is not enabled. Not
    /// answered; a stop follows.
    Finish {
        /// Which.
        queue: QueueId,
    },
    /// Take no more requests, finish what is in flight, give the queue up. Answered by
    /// [`FromWorker::Stopped`], also for a queue that does not run or is retired. What was in flight when the
    /// queue started and was not taken again is left in its region, unless it is told to [`ToWorker::Finish`].
    Stop {
        /// Which.
        queue: QueueId,
    },
    /// Take no more requests, finish what is in flight, and give the queue to the control thread for another
    /// worker. Answered by [`FromWorker::Moved`], or by [`FromWorker::Stays`] if the queue does not run, is
    /// being stopped, retires, or is told to [`ToWorker::Stay`] before that.
    Move {
        /// Which.
        queue: QueueId,
    },
    /// Give up the move under way, if one is, and serve the queue on. Not answered by itself.
    Stay {
        /// Which.
        queue: QueueId,
    },
    /// Serve a queue that another worker had. Not answered; if it can't be served, it is retired.
    Resume(Box<MovedQueue>),
    /// Serve this queue from other memory from now on: its rings are looked up again; what is in
    /// flight keeps the memory it has. Answered by [`FromWorker::MemorySet`].
    SetMemory {
        /// Which.
        queue: QueueId,
        /// The memory.
        memory: Arc<GuestMemory>,
    },
    /// SET_VRING_ENABLE of a running queue. This and the following are answered by
    /// [`FromWorker::Changed`], also for a queue that does not run.
    SetEnabled {
        /// Which.
        queue: QueueId,
        /// Whether requests are taken.
        enabled: bool,
    },
    /// Whether writes to the ring of a running queue are marked in the dirty log.
    SetLog {
        /// Which.
        queue: QueueId,
        /// Address of the used ring in the log; none: no marks.
        log: Option<u64>,
    },
    /// Another kick descriptor for a running queue.
    SetKick {
        /// Which.
        queue: QueueId,
        /// The descriptor; none: polled.
        fd: Option<OwnedFd>,
    },
    /// Another call descriptor for a running queue.
    SetCall {
        /// Which.
        queue: QueueId,
        /// The descriptor; none: the driver polls.
        fd: Option<OwnedFd>,
    },
    /// Another error descriptor for a running queue.
    SetError {
        /// Which.
        queue: QueueId,
        /// The descriptor.
        fd: Option<OwnedFd>,
    },
    /// Tell the network where a card's guest is now. Not answered.
    Announce {
        /// A queue of the card that runs.
        queue: QueueId,
    },
    /// A card's mirror is another one from now on, or none. Not answered.
    LookAtMirror {
        /// The card.
        id: DeviceId,
    },
    /// Make everything that was written to the queue's device stable. Answered by
    /// [`FromWorker::Flushed`].
    Flush {
        /// The queue, which was stopped: its worker does it.
        queue: QueueId,
    },
    /// Something about the keys of a device, or the zone in which they change.
    Zone {
        /// Which device.
        id: DeviceId,
        /// What.
        change: ZoneChange,
    },
    /// A volume with a re-key, or with the record of one, is this host's now: what is under which key is to
    /// be found out before it is served. Not for a worker but for the rekeyer; answered by
    /// [`FromWorker::VolumeReady`].
    TakeVolume {
        /// Its device.
        device: DeviceId,
    },
    /// It is to be let go of: nobody re-keys it from now on. For the rekeyer; answered by
    /// [`FromWorker::VolumeReleased`].
    LetGoOfVolume {
        /// Its device.
        device: DeviceId,
    },
    /// Queues were told to leave, and none comes: once nothing is in flight any more, let go of the fence. Answered by
    /// [`FromWorker::Frozen`], unless a [`ToWorker::Thaw`] comes before that.
    Freeze,
    /// Queues are to be served again: keep this fence, and no other. Answered by [`FromWorker::Thawed`].
    Thaw {
        /// None where there is none.
        fence: Option<Fence>,
    },
    /// End: what is in flight is waited for, then the thread returns.
    End,
}

impl ToWorker {
    /// The queue that it changes.
    #[must_use]
    pub fn changes(&self) -> Option<QueueId> {
        match self {
            Self::SetMemory { queue, .. }
            | Self::SetEnabled { queue, .. }
            | Self::SetLog { queue, .. }
            | Self::SetKick { queue, .. }
            | Self::SetCall { queue, .. }
            | Self::SetError { queue, .. } => Some(*queue),
            _ => None,
        }
    }

    /// The device that it is about.
    #[must_use]
    pub fn device(&self) -> Option<DeviceId> {
        match self {
            Self::Attach { id, .. }
            | Self::Detach { id }
            | Self::GiveUp { id, .. }
            | Self::LookAtMirror { id }
            | Self::Zone { id, .. }
            | Self::TakeVolume { device: id }
            | Self::LetGoOfVolume { device: id } => Some(*id),
            Self::Start(start) => Some(start.queue.device),
            Self::Resume(moved) => Some(moved.queue.device),
            Self::Finish { queue }
            | Self::Stop { queue }
            | Self::Move { queue }
            | Self::Stay { queue }
            | Self::SetMemory { queue, .. }
            | Self::SetEnabled { queue, .. }
            | Self::SetLog { queue, .. }
            | Self::SetKick { queue, .. }
            | Self::SetCall { queue, .. }
            | Self::SetError { queue, .. }
            | Self::Announce { queue }
            | Self::Flush { queue } => Some(queue.device),
            Self::Freeze | Self::Thaw { .. } | Self::End => None,
        }
    }
}

/// What a re-key changes in a worker. Not answered.
#[derive(Debug)]
pub enum ZoneChange {
    /// Keep requests off these bytes of the device. The ticket is dropped once none that overlaps them is in
    /// flight.
    Lock {
        /// From the frontier on.
        zone: Range<u64>,
        /// To be dropped.
        ticket: Ticket,
    },
    /// Everything below is under the key; requests that were kept off go on.
    Unlock {
        /// In bytes from the start of the device.
        frontier_bytes: u64,
    },
    /// Nobody knows what these bytes hold: requests for them fail until the volume is taken anew.
    Fail {
        /// Which.
        zone: Range<u64>,
    },
    /// Other keys for the same bytes.
    Ciphers(Ciphers),
}

/// From a worker to the control thread.
#[derive(Debug)]
pub enum FromWorker {
    /// The device is known to this worker, or why not.
    Attached {
        /// Which device.
        id: DeviceId,
        /// The worker that says so.
        worker: usize,
        /// Why it can't be served.
        result: Result<(), String>,
    },
    /// The worker holds nothing of the device.
    Detached {
        /// Which device.
        id: DeviceId,
        /// The worker that says so.
        worker: usize,
    },
    /// The queue is served.
    Started {
        /// Which.
        queue: QueueId,
    },
    /// The queue is not served: its ring does not lie in the memory.
    StartFailed {
        /// Which.
        queue: QueueId,
        /// What is wrong.
        reason: String,
    },
    /// The queue is given up and nothing of it is in flight.
    Stopped {
        /// Which.
        queue: QueueId,
        /// Where the ring goes on, for GET_VRING_BASE; none if it did not run.
        base: Option<u32>,
        /// Chains of an earlier process were not taken again: the in-flight region says where the ring goes on.
        left: bool,
    },
    /// Here it is, and this worker has nothing of it any more.
    Moved(Box<MovedQueue>),
    /// It stays where it is.
    Stays {
        /// Which.
        queue: QueueId,
    },
    /// The queue is served from the new memory, or was retired because its ring does not lie in it.
    MemorySet {
        /// Which.
        queue: QueueId,
    },
    /// The device's storage was flushed, or can't be: its flushes fail from now on.
    Flushed {
        /// The queue that was named.
        queue: QueueId,
    },
    /// What of a volume is under which key is known, and its queues may be served; or why not. From the
    /// rekeyer.
    VolumeReady {
        /// Its device.
        device: DeviceId,
        /// For the operator.
        result: Result<(), String>,
    },
    /// Nobody re-keys the volume any more. From the rekeyer.
    VolumeReleased {
        /// Its device.
        device: DeviceId,
    },
    /// Nothing is in flight in this worker (or the rekeyer, whose number is [`usize::MAX`]), and its ring has let go of
    /// the fence.
    Frozen {
        /// Which.
        worker: usize,
    },
    /// Its ring keeps the fence that it was given; or it can't, and why.
    Thawed {
        /// Which.
        worker: usize,
        /// Whether.
        result: Result<(), String>,
    },
    /// The worker has had work for a while. Comes once after [`Load::watch`](super::load::Load::watch).
    Busy {
        /// Which.
        worker: usize,
    },
    /// What was said about the queue holds from now on.
    Changed {
        /// Which.
        queue: QueueId,
    },
    /// The device's storage does better or worse than it did: what is under way for too long stands in its
    /// [`Health`](crate::blk::Health). Comes unasked.
    Health {
        /// Which device.
        id: DeviceId,
    },
    /// The driver broke the ring, or guest memory went away: the queue takes no more requests
    /// until it is stopped and started again. Comes unasked.
    Retired {
        /// Which.
        queue: QueueId,
        /// What it did.
        reason: String,
    },
}
