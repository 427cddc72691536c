//! What a session waits for: workers' answers, and the reply that goes out with the last of them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::{Handled, Outbox, Pending, Session, Vring, Waiting, base_body};
use crate::memory::GuestMemory;
use crate::vhost_user::message::{ProtocolError, code, reply};
use crate::vhost_user::vring::Phase;
use crate::worker::message::{FromWorker, ToWorker};

impl Session {
    fn stop_all(&self, out: &mut Outbox) -> usize {
        let queues = self.started();
        for queue in &queues {
            let queue = *queue;
            out.to_workers.push((queue, ToWorker::Stop { queue }));
        }
        queues.len()
    }

    /// RESET_DEVICE, SET_STATUS 0, and RESET_OWNER, which old frontends send when their guest is
    /// reset: every queue stops, and is as if nothing had been said about it but where to call.
    pub(super) fn reset(&mut self, out: &mut Outbox) -> Handled {
        match self.stop_all(out) {
            0 => {
                self.forget_queues();
                Handled::Done
            }
            left => Handled::Pending(Pending::Reset { left }),
        }
    }

    /// Call and error descriptors are the frontend's and not a part of the device's state: QEMU gives
    /// the latter once in a connection, and resets the device each time it stops it.
    fn forget_queues(&mut self) {
        for vring in &mut self.vrings {
            *vring = Vring {
                call: vring.call.take(),
                error: vring.error.take(),
                ..Vring::default()
            };
        }
        self.forget_in_flight();
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
        if left == 0 && !self.is_letting_go() {
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
        self.memory = Arc::new(GuestMemory::none());
        self.files.clear();
        self.earlier.clear();
        self.log.set_area(None);
        self.log_file = None;
        self.regions = None;
        self.backend = None;
        self.vrings.clear();
        self.waiting = None;
    }

    /// What a worker says about one of this device's queues. True: the connection had ended, and
    /// now nothing of it is left.
    ///
    /// # Errors
    /// As [`Session::handle`], for the request that waited for it; [`ProtocolError::MemoryLost`].
    pub fn on_worker(
        &mut self,
        message: FromWorker,
        out: &mut Outbox,
    ) -> Result<bool, ProtocolError> {
        match message {
            FromWorker::Started { queue } => {
                self.ran = true;
                if self.starts_again() {
                    self.one_resumed();
                    self.one_less(out)?;
                } else {
                    self.on_started(queue.index, Ok(()), out)?;
                }
                self.serve_if_ready(out);
            }
            FromWorker::StartFailed { queue, reason } => {
                self.set_phase(queue.index, Phase::Stopped);
                self.flush_volume(queue.index, out);
                if self.starts_again() {
                    return Err(ProtocolError::Resume(reason));
                }
                self.on_started(queue.index, Err(reason), out)?;
            }
            FromWorker::MemorySet { .. } | FromWorker::Changed { .. } => {
                self.one_less(out)?;
            }
            FromWorker::Stopped { queue, base, left } => {
                self.on_stopped(queue.index, (base, left), out);
                return self.settle(out);
            }
            FromWorker::Flushed { .. } => {
                self.let_go_of_volume(out);
                return self.settle(out);
            }
            FromWorker::VolumeReady { result, .. } => {
                self.on_volume_ready(result, out);
                return self.settle(out);
            }
            FromWorker::VolumeReleased { .. } => {
                self.on_volume_released(out);
                return self.settle(out);
            }
            FromWorker::Retired { queue, reason } => {
                self.set_phase(queue.index, Phase::Retired);
                self.fault = Some(reason);
                if self.memory.is_lost() {
                    return Err(ProtocolError::MemoryLost);
                }
            }
            // Not for a session: the server's own.
            FromWorker::Attached { .. }
            | FromWorker::Detached { .. }
            | FromWorker::Health { .. }
            | FromWorker::Busy { .. }
            | FromWorker::Frozen { .. }
            | FromWorker::Thawed { .. }
            | FromWorker::Moved(_)
            | FromWorker::Stays { .. } => {}
        }
        Ok(false)
    }

    fn set_phase(&mut self, index: u16, phase: Phase) {
        if let Some(vring) = self.vrings.get_mut(usize::from(index))
            && (phase != Phase::Retired || vring.is_started())
        {
            vring.phase = phase;
            if phase == Phase::Stopped {
                vring.running = None;
                vring.kick = None;
                (vring.rests, vring.dormant) = (false, false);
            }
        }
    }

    fn on_started(
        &mut self,
        index: u16,
        result: Result<(), String>,
        out: &mut Outbox,
    ) -> Result<(), ProtocolError> {
        let this = |w: &Pending| matches!(w, Pending::Start { index: i } if *i == index);
        self.answer(this, result, out)
    }

    fn on_stopped(&mut self, index: u16, (base, left): (Option<u32>, bool), out: &mut Outbox) {
        self.set_phase(index, Phase::Stopped);
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            vring.base = base.or(vring.base);
            // With chains left the region knows more than the base.
            vring.anew = (vring.anew || base.is_some()) && !left;
            vring.owes = false;
        }
        if let Some(Pending::Reset { left } | Pending::Close { left }) =
            self.waiting.as_mut().map(|w| &mut w.what)
        {
            *left = left.saturating_sub(1);
        }
        self.flush_volume(index, out);
    }

    /// Answers what waited for queues to stop, once they have and the volume is let go of. True: the
    /// connection had ended, and now nothing of it is left.
    fn settle(&mut self, out: &mut Outbox) -> Result<bool, ProtocolError> {
        if self.is_letting_go() {
            return Ok(false);
        }
        match self.waiting.as_ref().map(|w| &w.what) {
            Some(&Pending::Base { index }) => {
                let features = self.features;
                let vring = self.vrings.get(usize::from(index));
                if let Some(vring) = vring.filter(|vring| !vring.is_started()) {
                    let body = base_body(u32::from(index), vring.base(features));
                    out.replies.extend(reply(code::GET_VRING_BASE, &body));
                    self.waiting = None;
                }
            }
            Some(Pending::Reset { left: 0 }) => {
                self.forget_queues();
                self.answer(|_| true, Ok(()), out)?;
            }
            Some(Pending::Close { left: 0 }) => {
                self.forget();
                return Ok(true);
            }
            _ => {}
        }
        Ok(false)
    }

    /// One of several answers to a change is there.
    fn one_less(&mut self, out: &mut Outbox) -> Result<(), ProtocolError> {
        if let Some(Pending::Changes { left }) = self.waiting.as_mut().map(|w| &mut w.what) {
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
