//! FLUSH, and the flush behind what else has to be stable.
//!
//! A device has one flush in flight at a time, whichever worker's: the kernel tells of a lost write once for
//! an open file, to the first flush that ends, and one beside it would then succeed without truth. One that
//! comes meanwhile waits for the next, which is for all that wait in its worker; another worker's that
//! began later will do as well, so that a worker with many can't keep the others from theirs. A failed one
//! fails all that come later, until the volume is attached anew.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::crash_point;
use std::rc::Rc;

use super::flight::{Landed, Local, Stage};
use super::{Pipeline, report, was_cancelled};
use crate::storage::Transfer;

impl Pipeline {
    /// Has a request wait for a flush that begins from now on; or ends it, where none can succeed.
    pub(super) fn want_flush(&mut self, index: u32) -> Option<Landed> {
        let flight = self.flights.get_mut(index as usize)?;
        let local = flight.local.clone()?;
        flight.stage = Stage::Flush;
        if local.device.flush_failed() {
            flight.failed = true;
            return self.finish(index);
        }
        flight.flushes_before = local.device.flushes_begun();
        self.unflushed.push_back(index);
        self.start_flush(&local);
        None
    }

    /// Begins a flush for all requests here that wait for one of this device; false while another is in
    /// flight.
    fn start_flush(&mut self, local: &Rc<Local>) -> bool {
        if !local.device.take_flush_turn() {
            return false;
        }
        let mut leader = None;
        for _ in 0..self.unflushed.len() {
            let Some(index) = self.unflushed.pop_front() else {
                break;
            };
            if self.is_of(index, local) {
                leader = Some(index);
                self.flushing.push(index);
            } else {
                self.unflushed.push_back(index);
            }
        }
        match leader {
            // The last one may have failed between the look and the turn.
            Some(_) if local.device.flush_failed() => self.flushed(local, Err(libc::EIO)),
            Some(leader) => {
                local.settling.set(local.device.settle_wanted());
                local.flush_number.set(local.device.begin_flush());
                crash_point!("flush.begun");
                self.submit(leader, 0, Transfer::flush());
            }
            None => local.device.give_flush_turn(),
        }
        true
    }

    fn is_of(&self, index: u32, local: &Rc<Local>) -> bool {
        let flight = self.flights.get(index as usize);
        let of = flight.and_then(|flight| flight.local.as_ref());
        of.is_some_and(|of| Rc::ptr_eq(of, local))
    }

    /// A flush ended, and with it every request that it was for.
    pub(super) fn flushed(&mut self, local: &Rc<Local>, result: Result<(), i32>) {
        crash_point!("flush.done");
        match result {
            Ok(()) => {
                local.device.settle(local.settling.get());
                local.device.flush_succeeded(local.flush_number.get());
            }
            Err(errno) if was_cancelled(local, errno) => {}
            Err(errno) => {
                // Latched before the next flush can begin.
                local.device.latch_flush_failure();
                report(crate::blk::request::Operation::Flush, errno);
            }
        }
        local.device.give_flush_turn();
        let mut at = 0;
        while let Some(&index) = self.flushing.get(at) {
            if !self.is_of(index, local) {
                at += 1;
                continue;
            }
            self.flushing.swap_remove(at);
            if let Some(flight) = self.flights.get_mut(index as usize) {
                flight.failed |= result.is_err();
            }
            self.wait_in_line(index);
        }
    }

    /// Begins the flushes that waited for another worker's, or ends the wait where that was for them too;
    /// whether there was one.
    pub(super) fn resume_flushes(&mut self) -> bool {
        let mut any = false;
        for _ in 0..self.unflushed.len() {
            let Some(&index) = self.unflushed.front() else {
                break;
            };
            let flight = self.flights.get_mut(index as usize);
            let Some((flight, local)) = flight.and_then(|f| f.local.clone().map(|l| (f, l))) else {
                self.unflushed.pop_front();
                continue;
            };
            if local.device.flushed_since(flight.flushes_before) {
                flight.failed |= local.device.flush_failed();
                self.unflushed.pop_front();
                self.wait_in_line(index);
                any = true;
            } else if self.start_flush(&local) {
                any = true;
            } else {
                self.unflushed.rotate_left(1);
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blk::device::{BlkDevice, Geometry};
    use crate::blk::pipeline::{Begun, Start};
    use crate::blk::request::{Operation, Status};
    use crate::storage::{RamSpec, StorageSpec, VolatileCache};
    use crate::virtqueue::Chain;
    use crate::worker::ring::Ring;
    use crate::worker::staging::Staging;

    /// Another worker that has a flush in flight all the time, and never lets go of the turn.
    #[test]
    fn a_flush_of_another_worker_that_began_later_will_do() {
        let geometry = Geometry {
            logical_block_bytes: 512,
            read_only: false,
            serial: [0; 20],
            queues: 2,
            discard: false,
        };
        let storage =
            StorageSpec::Volatile(VolatileCache::new(RamSpec::new(4096).expect("memory")));
        let device = BlkDevice::new(geometry, 8, storage, None);
        let staging = Staging::new().expect("memory");
        let ring = Ring::new(&staging).expect("ring");
        let mut pipeline = Pipeline::new(ring, staging);
        let local = Local::open(std::sync::Arc::clone(&device), &mut pipeline.ring);
        let local = Rc::new(local.expect("open"));

        assert!(device.take_flush_turn());
        let first = device.begin_flush();
        let start = Start {
            queue: 0,
            head: 7,
            operation: Operation::Flush,
            local: &local,
            durable: false,
        };
        let begun = pipeline.begin(start, &mut Chain::default());
        assert_eq!(begun, Begun::Pending);
        let mut resume = || {
            let mut landed = Vec::new();
            pipeline.resume(|one| landed.push((one.head, one.outcome.status)));
            landed
        };
        // It began before, and says nothing of what was written since.
        device.flush_succeeded(first);
        assert_eq!(resume(), []);
        let second = device.begin_flush();
        assert_eq!(resume(), []);
        device.flush_succeeded(second);
        assert_eq!(resume(), [(7, Status::Ok)]);
    }
}
