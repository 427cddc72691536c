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
use crate::vhost_user::message::{MAX_REGIONS, VringAddresses};
use crate::vhost_user::vring::Phase;
use crate::virtqueue::QueueRegion;
use crate::worker::message::{QueueStart, ToWorker};

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
fn event(fd: Option<OwnedFd>) -> Result<Option<OwnedFd>, String> {
    fd.map(as_event).transpose().map_err(|e| e.to_string())
}

fn copy(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, String> {
    fd.map(OwnedFd::try_clone)
        .transpose()
        .map_err(|e: io::Error| e.to_string())
}

impl Session {
    pub(super) fn add_region(
        &mut self,
        spec: &RegionSpec,
        fd: &OwnedFd,
        out: &mut Outbox,
    ) -> Outcome {
        if self.memory.len() as u64 >= MAX_REGIONS {
            return Err(format!("there are {MAX_REGIONS} regions, no more fit"));
        }
        let memory = self.memory.with_region(spec, fd.as_fd());
        let memory = memory.map_err(|e| e.to_string())?;
        Ok(self.set_memory(memory, Change::Region, out))
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
    ) -> Handled {
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
        match out.to_workers.len() - before {
            0 => Handled::Done,
            left => Handled::Pending(Pending::Changes { left }),
        }
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
        if !vring.is_started() {
            let base = vring.base(features);
            return Ok(Handled::Reply(base_body(index, base)));
        }
        let owes = vring.owes;
        let index = self.queue(index).index;
        if owes && !self.holds_volume() {
            let until = Instant::now() + self.facts.device.health.patience().give_up;
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
        let (features, memory) = (self.features, Arc::clone(&self.memory));
        let vring = self.vring(index)?;
        if vring.is_started() {
            let message = ToWorker::SetKick { queue, fd: kick };
            out.to_workers.push((queue, message));
            return Ok(Handled::Pending(Pending::Changes { left: 1 }));
        }
        let layout = vring.layout(&memory)?;
        let (call, error) = (copy(vring.call.as_ref())?, copy(vring.error.as_ref())?);
        let (base, log) = (vring.base(features), vring.addresses.and_then(|a| a.log));
        let anew = vring.anew;
        let region = self.region_of(queue.index, layout.size)?;
        let owes = !anew && region.as_ref().is_some_and(QueueRegion::was_kept);
        self.take_volume(out);
        let start = QueueStart {
            queue,
            memory,
            layout,
            base,
            log,
            region,
            anew,
            features,
            enabled: self.serves(queue.index),
            kick,
            call,
            error,
        };
        let vring = self.vring(index)?;
        vring.phase = Phase::Running;
        vring.running = Some(layout);
        vring.owes = owes;
        out.to_workers
            .push((queue, ToWorker::Start(Box::new(start))));
        Ok(Handled::Pending(Pending::Start { index: queue.index }))
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
