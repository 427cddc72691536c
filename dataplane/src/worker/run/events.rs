//! Eventfds of queues: kicks that are waited for, calls and errors that are signalled. All of it goes
//! through the ring, so that whatever a frontend does with its end makes nobody wait.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd, OwnedFd};

use super::{CALL, ERROR, KICK, Worker};
use crate::virtqueue::RingError;
use crate::worker::message::QueueId;
use crate::worker::queue::{Call, Kick, Queue};
use crate::worker::ring::{EntryId, Event, FixedFile};

/// How a queue goes to sleep.
pub(super) enum Armed {
    /// Its kick is waited for.
    Waits,
    /// Nothing is taken from it now, whatever is in it.
    Idle,
    /// It has no kick.
    Unkicked,
    /// There is something to do first.
    Work,
}

/// Queue number and serial of a token.
fn parts(token: u64) -> (u32, u32) {
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    // The kind lies above the number's 24 bits.
    (low((token >> 32) & 0x00ff_ffff), low(token))
}

fn token(kind: u64, number: u32, serial: u32) -> u64 {
    kind | (u64::from(number) << 32) | u64::from(serial)
}

impl Worker {
    fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    fn register(&mut self, fd: Option<OwnedFd>, loss: &str) -> Option<(FixedFile, OwnedFd)> {
        let fd = fd?;
        match self.pipeline.ring.register_file(fd.as_fd()) {
            Ok(file) => Some((file, fd)),
            Err(error) => {
                tracing::warn!("{loss}: {error}");
                None
            }
        }
    }

    pub(super) fn set_kick(&mut self, id: QueueId, fd: Option<OwnedFd>) {
        let Some(number) = self.numbers.get(&id).copied() else {
            return;
        };
        self.drop_kick(number);
        let kick = self.register(fd, "a kick can't be waited for, its queue is polled");
        if let Some(queue) = self.queue(number) {
            queue.kick = kick.map(|(file, fd)| Kick {
                file,
                wait: None,
                fd,
            });
        }
    }

    /// Takes the kick off the ring; its descriptor, for another worker.
    pub(super) fn drop_kick(&mut self, number: u32) -> Option<OwnedFd> {
        let kick = self.queue(number).and_then(|queue| queue.kick.take())?;
        self.drop_event(kick.file, kick.wait);
        Some(kick.fd)
    }

    pub(super) fn set_call(&mut self, id: QueueId, fd: Option<OwnedFd>) {
        let Some(number) = self.numbers.get(&id).copied() else {
            return;
        };
        // The frontend may have stopped looking at the old one before it was called for the last time.
        let mut due = self.drop_call(number).is_some();
        let call = self.register(fd, "a driver can't be called, it has to poll");
        if let Some(queue) = self.queue(number) {
            due |= queue.call_due;
            queue.call_due = due && call.is_none();
            queue.call = call.map(|(file, fd)| Call {
                file,
                signal: None,
                again: false,
                fd,
            });
        }
        // What the old one was not told of, or in vain, the new one is.
        if due {
            self.call(number);
        }
    }

    /// Takes the call off the ring; its descriptor, and whether a call was still to be made.
    pub(super) fn drop_call(&mut self, number: u32) -> Option<(OwnedFd, bool)> {
        let call = self.queue(number).and_then(|queue| queue.call.take())?;
        self.drop_event(call.file, call.signal);
        Some((call.fd, call.again || call.signal.is_some()))
    }

    fn drop_event(&mut self, file: FixedFile, in_ring: Option<(EntryId, u32)>) {
        if let Some((entry, _)) = in_ring {
            self.pipeline.ring.cancel(entry);
        }
        self.pipeline.ring.forget_file(file);
    }

    /// Calls the driver of a queue, or does so once the last call is through.
    #[inline]
    pub(super) fn call(&mut self, number: u32) {
        let serial = self.next_serial();
        let Some(call) = self.queue(number).and_then(|queue| queue.call.as_mut()) else {
            return;
        };
        if call.signal.is_some() {
            call.again = true;
            return;
        }
        let file = call.file;
        let ring = &mut self.pipeline.ring;
        let entry = (ring.takes_call())
            .then(|| ring.push_event(token(CALL, number, serial), file, Event::Signal))
            .flatten();
        self.called = true;
        self.call_is_due |= entry.is_none();
        if let Some(call) = self.queue(number).and_then(|queue| queue.call.as_mut()) {
            call.signal = entry.map(|entry| (entry, serial));
            call.again = entry.is_none();
        }
    }

    /// A call is through.
    #[inline]
    pub(super) fn has_called(&mut self, token: u64) {
        let (number, serial) = parts(token);
        let Some(call) = self.queue(number).and_then(|queue| queue.call.as_mut()) else {
            return;
        };
        if call.signal.is_some_and(|(_, of)| of == serial) {
            call.signal = None;
            if std::mem::take(&mut call.again) {
                self.call(number);
            }
        }
    }

    /// Makes the calls that found no room in the ring.
    pub(super) fn make_due_calls(&mut self) {
        if !std::mem::take(&mut self.call_is_due) {
            return;
        }
        for number in 0..u32::try_from(self.queues.len()).unwrap_or(u32::MAX) {
            let due = |call: &Call| call.again && call.signal.is_none();
            let call = self.queue(number).and_then(|queue| queue.call.as_ref());
            if call.is_some_and(due) {
                self.call(number);
            }
        }
    }

    /// Tells a frontend that its queue retired.
    pub(super) fn signal_error(&mut self, event: &OwnedFd) {
        match self.pipeline.ring.register_file(event.as_fd()) {
            Ok(file) => {
                self.pipeline.ring.push_event(ERROR, file, Event::Signal);
                self.pipeline.ring.forget_file(file);
            }
            Err(error) => tracing::warn!("a frontend can't be told of a retired queue: {error}"),
        }
    }

    /// A kick came, or its wait was given up.
    pub(super) fn kicked(&mut self, token: u64) {
        let (number, serial) = parts(token);
        if let Some(kick) = self.queue(number).and_then(|queue| queue.kick.as_mut())
            && kick.wait.is_some_and(|(_, of)| of == serial)
        {
            kick.wait = None;
            self.poll(number);
            // A queue that leaves waits for this.
            self.give_up_if_drained(number);
        }
    }

    /// Has a queue's driver kick, and waits for it in the ring.
    pub(super) fn arm(&mut self, number: u32) -> Armed {
        let place = self
            .queues
            .get_mut(number as usize)
            .and_then(Option::as_mut);
        let pipeline = &self.pipeline;
        let takes = |queue: &&mut Queue| {
            let takes = queue.is_served() || queue.is_recovered();
            takes && queue.has_room(pipeline)
        };
        let Some(queue) = place.filter(takes) else {
            return Armed::Idle;
        };
        if queue.recovers {
            return Armed::Work;
        }
        match queue.ring.arm() {
            Ok(true) => return Armed::Work,
            // The zeroes in the place of a ring that went away can look like one without requests.
            Ok(false) if queue.ring.is_lost() => {
                self.retire(number, RingError::MemoryLost);
                return Armed::Work;
            }
            Ok(false) => {}
            Err(error) => {
                self.retire(number, error);
                return Armed::Work;
            }
        }
        let Some((file, wait)) = queue.kick.as_ref().map(|kick| (kick.file, kick.wait)) else {
            return Armed::Unkicked;
        };
        if wait.is_some() {
            return Armed::Waits;
        }
        let serial = self.next_serial();
        let wait = token(KICK, number, serial);
        let ring = &mut self.pipeline.ring;
        let entry = (ring.takes_kick())
            .then(|| ring.push_event(wait, file, Event::Wait))
            .flatten();
        let Some(entry) = entry else {
            return Armed::Unkicked;
        };
        if let Some(kick) = self.queue(number).and_then(|queue| queue.kick.as_mut()) {
            kick.wait = Some((entry, serial));
        }
        Armed::Waits
    }
}
