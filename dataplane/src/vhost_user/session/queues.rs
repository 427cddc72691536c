//! What a request does to a queue, and what a memory table does to all of them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::{Handled, Outbox, Outcome, Pending, Session, base_body};
use crate::fds::as_event;
use crate::memory::{GuestMemory, RegionSpec};
use crate::stored::Fd;
use crate::vhost_user::message::{MAX_REGIONS, VringAddresses};
use crate::vhost_user::vring::Phase;
use crate::worker::message::{QueueStart, RingLayout, ToWorker};

/// Earlier tables of regions that requests in flight may still use.
const MAX_EARLIER_TABLES: usize = 64;

/// How memory changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// To another table: what is not in it is gone.
    Table,
    /// By one region. A frontend that changes a region takes it out and puts another in: in between, a
    /// running queue's ring may be nowhere.
    Region,
}

/// An eventfd of the frontend, made safe to write to.
fn event(fd: Option<OwnedFd>) -> Result<Option<Fd>, String> {
    let event = fd.map(as_event).transpose().map_err(|e| e.to_string())?;
    Ok(event.map(Arc::new))
}

/// One for a worker.
fn copy(fd: Option<&Fd>) -> Result<Option<OwnedFd>, String> {
    fd.map(|fd| fd.try_clone())
        .transpose()
        .map_err(|e: io::Error| e.to_string())
}

impl Session {
    pub(super) fn add_region(
        &mut self,
        spec: RegionSpec,
        fd: OwnedFd,
        out: &mut Outbox,
    ) -> Outcome {
        if self.memory.len() as u64 >= MAX_REGIONS {
            return Err(format!("there are {MAX_REGIONS} regions, no more fit"));
        }
        let memory = self.memory.with_region(&spec, fd.as_fd());
        let memory = memory.map_err(|e| e.to_string())?;
        self.files.push((spec, Arc::new(fd)));
        self.set_memory(memory, Change::Region, out)
    }

    /// SET_MEM_TABLE.
    pub(super) fn set_table(
        &mut self,
        regions: Vec<(RegionSpec, OwnedFd)>,
        out: &mut Outbox,
    ) -> Outcome {
        self.forget_earlier_tables()?;
        let memory: Vec<_> = regions.iter().map(|(s, fd)| (*s, fd.as_fd())).collect();
        let memory = GuestMemory::map(&memory).map_err(|e| e.to_string())?;
        let memory = memory.with_log(&self.log);
        let files = regions.into_iter().map(|(spec, fd)| (spec, Arc::new(fd)));
        self.files = files.collect();
        self.set_memory(memory, Change::Table, out)
    }

    pub(super) fn remove_region(&mut self, spec: &RegionSpec, out: &mut Outbox) -> Outcome {
        let memory = self.memory.without_region(spec);
        let memory = memory.ok_or("there is no such region")?;
        let same = |other: &RegionSpec| {
            (other.guest_addr, other.user_addr, other.bytes)
                == (spec.guest_addr, spec.user_addr, spec.bytes)
        };
        self.files.retain(|(other, _)| !same(other));
        self.set_memory(memory, Change::Region, out)
    }

    /// Each earlier table keeps its mappings for as long as a request in flight uses it, behind a
    /// storage that hangs for ever; the process has only so many mappings.
    pub(super) fn forget_earlier_tables(&mut self) -> Result<(), String> {
        self.earlier.retain(|table| table.strong_count() > 0);
        if self.earlier.len() < MAX_EARLIER_TABLES {
            return Ok(());
        }
        Err(format!(
            "{MAX_EARLIER_TABLES} earlier memory tables are still used by requests in flight"
        ))
    }

    /// Gives every running queue other memory. The old is let go of when nothing uses it.
    ///
    /// A queue whose ring is not in it retires, or rests in the memory it has until a later region
    /// brings the ring back ([`Change`]).
    pub(super) fn set_memory(
        &mut self,
        memory: GuestMemory,
        change: Change,
        out: &mut Outbox,
    ) -> Outcome {
        let earlier = std::mem::replace(&mut self.memory, Arc::new(memory));
        if change == Change::Table {
            self.earlier.push(Arc::downgrade(&earlier));
        }
        let before = out.to_workers.len();
        for queue in self.started() {
            let features = self.features;
            let Some(vring) = self.vrings.get_mut(usize::from(queue.index)) else {
                continue;
            };
            let there = vring.ring_is_in(&self.memory, features);
            if vring.dormant {
                if there && vring.phase == Phase::Running {
                    self.wake(queue.index, out)?;
                }
                continue;
            }
            if there || change == Change::Table {
                let memory = Arc::clone(&self.memory);
                out.to_workers
                    .push((queue, ToWorker::SetMemory { queue, memory }));
            }
            let rests = !there && change == Change::Region;
            if rests != vring.rests {
                vring.rests = rests;
                let enabled = self.serves(queue.index);
                out.to_workers
                    .push((queue, ToWorker::SetEnabled { queue, enabled }));
            }
        }
        Ok(match out.to_workers.len() - before {
            0 => Handled::Done,
            left => Handled::Pending(Pending::Changes { left }),
        })
    }

    /// SET_VRING_ADDR. Of a running queue only whether it logs may change.
    pub(super) fn set_addresses(&mut self, addresses: VringAddresses, out: &mut Outbox) -> Outcome {
        let queue = self.queue(addresses.index);
        let vring = self.vring(addresses.index)?;
        let same = vring.addresses == Some(addresses);
        vring.set_addresses(addresses)?;
        if same || !vring.is_started() {
            return Ok(Handled::Done);
        }
        let log = addresses.log;
        out.to_workers
            .push((queue, ToWorker::SetLog { queue, log }));
        Ok(Handled::Pending(Pending::Changes { left: 1 }))
    }

    pub(super) fn get_base(&mut self, index: u32, out: &mut Outbox) -> Outcome {
        let features = self.features;
        let vring = self.vring(index)?;
        if vring.dormant && vring.phase == Phase::Running {
            return Err("where it goes on is not known while its ring is in no region".to_owned());
        }
        if !vring.is_started() {
            let base = vring.base(features);
            return Ok(Handled::Reply(base_body(index, base)));
        }
        let owes = vring.owes;
        let index = self.queue(index).index;
        if owes && !self.holds_volume() {
            let until = Instant::now() + self.facts.device.give_up_after();
            return Ok(Handled::Pending(Pending::Owed { index, until }));
        }
        Ok(Handled::Pending(self.finish_and_stop(index, out)))
    }

    /// A queue stops once what was in flight when it started has been done, which the next who serves the ring,
    /// elsewhere maybe, could not know.
    pub(super) fn finish_and_stop(&self, index: u16, out: &mut Outbox) -> Pending {
        let queue = self.queue(u32::from(index));
        let owes = self
            .vrings
            .get(usize::from(index))
            .is_some_and(|vring| vring.owes);
        if owes && self.may_finish() {
            out.to_workers.push((queue, ToWorker::Finish { queue }));
        }
        out.to_workers.push((queue, ToWorker::Stop { queue }));
        Pending::Base { index }
    }

    /// SET_VRING_KICK starts a queue. (The specification starts it at its first kick; a queue that
    /// is polled needs none.)
    pub(super) fn set_kick(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        out: &mut Outbox,
    ) -> Outcome {
        let kick = event(fd)?;
        let queue = self.queue(index);
        let memory = Arc::clone(&self.memory);
        let vring = self.vring(index)?;
        if vring.is_started() {
            let fd = copy(kick.as_ref())?;
            vring.kick = kick;
            out.to_workers
                .push((queue, ToWorker::SetKick { queue, fd }));
            return Ok(Handled::Pending(Pending::Changes { left: 1 }));
        }
        let layout = vring.layout(&memory)?;
        vring.kick = kick;
        let made = self.make_regions();
        let start = match made.and_then(|()| self.start_of(queue.index, layout)) {
            Ok(start) => start,
            Err(reason) => {
                self.vring(index)?.kick = None;
                return Err(reason);
            }
        };
        self.take_volume(out);
        self.begin(start, out);
        Ok(Handled::Pending(Pending::Start { index: queue.index }))
    }

    /// What a worker is told to begin with a queue. Whether it is served is said when it begins.
    pub(super) fn start_of(&self, index: u16, layout: RingLayout) -> Result<QueueStart, String> {
        let vring = self.vrings.get(usize::from(index));
        let vring = vring.ok_or("there is no such queue")?;
        let goes_on = vring.is_started();
        Ok(QueueStart {
            queue: self.queue(u32::from(index)),
            memory: Arc::clone(&self.memory),
            layout,
            base: vring.base(self.features),
            log: vring.addresses.and_then(|a| a.log),
            region: self.region_of(index, layout.size)?,
            // A predecessor's queue that ran goes on, wherever it was when it began.
            anew: vring.anew && !goes_on,
            features: self.features,
            enabled: false,
            kick: copy(vring.kick.as_ref())?,
            call: copy(vring.call.as_ref())?,
            error: copy(vring.error.as_ref())?,
        })
    }

    /// Has a worker begin with a queue.
    pub(super) fn begin(&mut self, mut start: QueueStart, out: &mut Outbox) {
        let queue = start.queue;
        if let Some(vring) = self.vrings.get_mut(usize::from(queue.index)) {
            vring.phase = Phase::Running;
            vring.running = Some(start.layout);
            let kept = start.region.as_ref().filter(|region| region.was_kept());
            vring.owes = !start.anew && kept.is_some();
            // What it had is over, also for whoever finds it before the worker has begun anew.
            if start.anew
                && let Some(kept) = kept
            {
                kept.forget();
            }
            (vring.rests, vring.dormant) = (false, false);
        }
        start.enabled = self.serves(queue.index);
        out.to_workers
            .push((queue, ToWorker::Start(Box::new(start))));
    }

    /// The ring of a predecessor's queue is in a region again.
    fn wake(&mut self, index: u16, out: &mut Outbox) -> Result<(), String> {
        let vring = self.vrings.get(usize::from(index));
        if let Some(layout) = vring.and_then(|vring| vring.running) {
            let start = self.start_of(index, layout)?;
            self.begin(start, out);
        }
        Ok(())
    }

    pub(super) fn set_call(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        out: &mut Outbox,
    ) -> Outcome {
        let call = event(fd)?;
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        let fd = copy(call.as_ref())?;
        vring.call = call;
        if !vring.is_started() {
            return Ok(Handled::Done);
        }
        out.to_workers
            .push((queue, ToWorker::SetCall { queue, fd }));
        Ok(Handled::Pending(Pending::Changes { left: 1 }))
    }

    pub(super) fn set_error(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        out: &mut Outbox,
    ) -> Outcome {
        let error = event(fd)?;
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        let fd = copy(error.as_ref())?;
        vring.error = error;
        if !vring.is_started() {
            return Ok(Handled::Done);
        }
        out.to_workers
            .push((queue, ToWorker::SetError { queue, fd }));
        Ok(Handled::Pending(Pending::Changes { left: 1 }))
    }

    pub(super) fn enable(&mut self, index: u32, enabled: bool, out: &mut Outbox) -> Outcome {
        let queue = self.queue(index);
        let vring = self.vring(index)?;
        vring.enabled = enabled;
        if !vring.is_started() {
            return Ok(Handled::Done);
        }
        let enabled = self.serves(queue.index);
        out.to_workers
            .push((queue, ToWorker::SetEnabled { queue, enabled }));
        Ok(Handled::Pending(Pending::Changes { left: 1 }))
    }
}
