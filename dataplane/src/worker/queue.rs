//! A queue that a worker serves: its ring, its eventfds, and what ended since the last publish.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::message::{MovedQueue, QueueId, QueueStart};
use super::ring::{EntryId, FixedFile};
use crate::blk::Counts;
use crate::blk::pipeline::{Local, Outcome, Pipeline};
use crate::blk::request::Status;
use crate::device::Device;
use crate::hand::Hand;
use crate::net::lane::Lane;
use crate::qos::Qos;
use crate::virtqueue::{QueueFeatures, Recovered, RingError, Virtqueue};

/// Where the driver kicks.
#[derive(Debug)]
pub struct Kick {
    /// The eventfd in the worker's ring.
    pub file: FixedFile,
    /// The wait for it that is in the ring, with its serial number, if one is.
    pub wait: Option<(EntryId, u32)>,
    /// The eventfd, for the next worker that serves the queue.
    pub fd: OwnedFd,
}

/// Where the driver is called.
#[derive(Debug)]
pub struct Call {
    /// The eventfd in the worker's ring.
    pub file: FixedFile,
    /// The signal that is in the ring, with its serial number, if one is.
    pub signal: Option<(EntryId, u32)>,
    /// Another signal is to follow: more was published since.
    pub again: bool,
    /// The eventfd, for the next worker that serves the queue.
    pub fd: OwnedFd,
}

/// What a queue is for, and what it has beside its ring.
#[derive(Debug)]
pub enum Kind {
    /// Requests of a disk.
    Blk(Blk),
    /// Frames of a network card.
    Net(Lane),
}

/// What a disk's queue has.
#[derive(Debug)]
pub struct Blk {
    /// The way to its device.
    pub local: Rc<Local>,
    /// Negotiated features.
    pub features: u64,
    index: u16,
    /// What ended and is not counted yet.
    tally: Counts,
}

/// A queue.
#[derive(Debug)]
pub struct Queue {
    /// Which.
    pub id: QueueId,
    /// What it is for.
    pub kind: Kind,
    /// The ring.
    pub ring: Virtqueue,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// No more requests are taken; it is given up once nothing is in flight.
    pub stopping: bool,
    /// No more requests are taken; it goes to another worker once nothing is in flight.
    pub leaving: bool,
    /// The driver broke it: no requests are taken, and none are given back.
    pub retired: bool,
    /// What was in flight when it started is taken first, and nothing else before all of it is.
    pub recovers: bool,
    /// Some of it was not taken again.
    pub left: bool,
    /// It is taken even if the queue is not enabled, or stops.
    pub finishes: bool,
    /// What it found in its region when it started.
    pub recovered: Recovered,
    /// Where the driver kicks; none: it is polled.
    pub kick: Option<Kick>,
    /// Where the driver is called; none: it polls.
    pub call: Option<Call>,
    /// The driver is to be called as soon as it says where.
    pub call_due: bool,
    /// Where the frontend hears that it retired.
    pub error: Option<OwnedFd>,
    /// Negotiated features.
    pub features: u64,
    /// What a worker that serves it has in hand.
    pub hand: Hand,
    /// Its device's seat ([`super::turns::Turns`]).
    pub seat: u32,
    /// It is looked at in each turn of its device; else its kick is waited for.
    pub polled: bool,
    /// When it was first found empty ([`super::clock::now`]); 0: it had requests when it was looked at last.
    pub empty_since: u64,
    /// Ticks for which it is polled while it is empty.
    pub grace: u64,
}

impl Blk {
    /// Of a queue that starts.
    #[must_use]
    pub fn new(local: Rc<Local>, index: u16, features: u64) -> Self {
        Self {
            local,
            features,
            index,
            tally: Counts::default(),
        }
    }

    /// Notes the end of a request whose status is written.
    #[inline(always)]
    pub fn ended(&mut self, ring: &mut Virtqueue, head: u16, outcome: Outcome) {
        if outcome.status == Status::Ok {
            self.tally.requests_ok += 1;
        } else {
            self.tally.requests_failed += 1;
        }
        self.tally.read_bytes += u64::from(outcome.read_bytes);
        self.tally.written_bytes += u64::from(outcome.stored_bytes);
        // The status is the byte behind what was written; of a failed request it is all there is.
        ring.push_used(head, outcome.written.saturating_add(1));
    }

    /// Shows the driver what ended, within a batch that [`Queue::publish`] ends; not if its memory went away.
    #[inline]
    pub fn show(&mut self, ring: &mut Virtqueue) {
        if !ring.is_lost() {
            self.count();
            ring.show();
        }
    }

    /// Counts what ended.
    #[inline]
    fn count(&mut self) {
        let tally = std::mem::take(&mut self.tally);
        if let Some(metrics) = self.local.device.metrics.queue(self.index) {
            metrics.add(tally);
        }
    }
}

/// Where rings begin: split ones, and packed ones with both wrap counters at 1.
const BEGINNINGS: [u32; 2] = [0, 0x8000_8000];

impl Queue {
    /// A queue as it starts, without kick and call. Where somebody served its ring before (its region was kept, or it
    /// goes on elsewhere than a ring begins, as that of a guest which moved here), its driver is to be called: it may
    /// not have been for what it was shown last. With EVENT_IDX it asks once, and would wait for ever.
    ///
    /// # Errors
    /// [`RingError`]: its ring can't lie where it was said to, or its region is not for it.
    pub fn new(start: QueueStart, kind: Kind) -> Result<Self, RingError> {
        let features = QueueFeatures::of(start.features);
        let mut ring = Virtqueue::new(&start.memory, start.layout, start.base, features)?;
        ring.set_log(start.log);
        let mut recovered = Recovered::Fresh;
        match start.region {
            Some(region) if start.anew => ring.track(region)?,
            Some(region) => recovered = ring.recover(region)?,
            None => {}
        }
        if ring.is_lost() {
            return Err(RingError::MemoryLost);
        }
        let (id, features) = (start.queue, start.features);
        let recovers = ring.left_again() > 0;
        let goes_on = !BEGINNINGS.contains(&start.base);
        let queue = Self::with_ring(id, kind, ring, features);
        Ok(Self {
            enabled: start.enabled,
            recovers,
            recovered,
            call_due: recovered != Recovered::Fresh || goes_on,
            error: start.error,
            ..queue
        })
    }

    /// A queue that another worker had, without its eventfds.
    ///
    /// # Errors
    /// [`RingError`]: its ring can't lie where it did.
    pub fn resume(moved: MovedQueue, kind: Kind) -> Result<Self, RingError> {
        let ring = moved.ring.resume()?;
        let recovers = ring.left_again() > 0;
        let queue = Self::with_ring(moved.queue, kind, ring, moved.features);
        Ok(Self {
            enabled: moved.enabled,
            recovers,
            ..queue
        })
    }

    fn with_ring(id: QueueId, kind: Kind, ring: Virtqueue, features: u64) -> Self {
        Self {
            id,
            kind,
            ring,
            enabled: false,
            stopping: false,
            leaving: false,
            retired: false,
            recovers: false,
            left: false,
            finishes: false,
            recovered: Recovered::Fresh,
            kick: None,
            call: None,
            call_due: false,
            error: None,
            features,
            hand: Hand::NOTHING,
            seat: 0,
            polled: false,
            empty_since: 0,
            grace: 0,
        }
    }

    /// Whether nothing of it is under way here any more: what was in flight when it started may go to another worker
    /// with it, but is done or left before it stops.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        let left = if self.stopping {
            0
        } else {
            self.ring.left_again()
        };
        usize::from(self.ring.in_flight()) == left
    }

    /// For another worker: nothing is under way, and kick and call are off this worker's ring.
    #[must_use]
    pub fn park(self) -> MovedQueue {
        MovedQueue {
            queue: self.id,
            ring: self.ring.park(),
            features: self.features,
            enabled: self.enabled,
            kick: None,
            call: None,
            call_due: self.call_due,
            error: self.error,
        }
    }

    /// Whether requests are taken from it.
    #[must_use]
    #[inline]
    pub fn is_served(&self) -> bool {
        let stands = self.stopping | self.leaving | self.retired | self.recovers;
        self.enabled & !stands
    }

    /// Whether what was in flight when it started is to be taken.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        let may = self.recovers && !self.leaving && !self.retired;
        may && (self.finishes || (self.enabled && !self.stopping))
    }

    /// Leaves what was in flight when it started, and was not taken since, to whoever serves it next.
    pub fn leave_again(&mut self) {
        if std::mem::take(&mut self.recovers) {
            self.left |= self.ring.left_again() > 0;
            self.ring.leave_again();
        }
    }

    /// Its disk; none: it is a network card's.
    #[must_use]
    #[inline]
    pub fn local(&self) -> Option<&Rc<Local>> {
        match &self.kind {
            Kind::Blk(blk) => Some(&blk.local),
            Kind::Net(_) => None,
        }
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> Device {
        match &self.kind {
            Kind::Blk(blk) => Device::from(&blk.local.device),
            Kind::Net(lane) => Device::from(lane.device()),
        }
    }

    /// The limits that what is taken from it counts against.
    #[must_use]
    #[inline]
    pub fn qos(&self) -> &Qos {
        match &self.kind {
            Kind::Blk(blk) => blk.local.device.qos(),
            Kind::Net(lane) => lane.device().tx_qos(),
        }
    }

    /// Whether something is taken from it in turns: from one to receive with it is when a frame comes, except for
    /// what was in flight when it started.
    #[must_use]
    #[inline]
    pub fn has_turns(&self) -> bool {
        match &self.kind {
            Kind::Blk(_) => true,
            Kind::Net(lane) => lane.sends() || self.recovers,
        }
    }

    /// Whether there is room for something more that is taken from it. What waits in a clogged one is taken when its
    /// zone ends, which a message says; without room, when something has ended.
    #[must_use]
    pub fn has_room(&self, pipeline: &Pipeline) -> bool {
        self.local()
            .is_none_or(|local| !local.is_clogged() && pipeline.room_for(local) > 0)
    }

    /// Whose it is, for the log.
    #[must_use]
    pub fn owner(&self) -> String {
        match &self.kind {
            Kind::Blk(blk) => {
                let serial = String::from_utf8_lossy(&blk.local.device.geometry.serial);
                serial.trim_end_matches('\0').to_owned()
            }
            Kind::Net(lane) => lane.device().to_string(),
        }
    }

    /// Shows the driver what ended; whether it wants to be called. A retired queue shows nothing.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match &mut self.kind {
            Kind::Blk(blk) => blk.count(),
            Kind::Net(lane) => lane.count(),
        }
        !self.retired && self.ring.publish()
    }
}
