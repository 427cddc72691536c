//! What the control thread says to a worker: devices that come and go, queues that change.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::rc::Rc;

use super::{Served, Worker};
use crate::blk::pipeline::Local;
use crate::device::Device;
use crate::hand::{self, Hand};
use crate::worker::message::{DeviceId, FromWorker, QueueId, ToWorker, ZoneChange};
use crate::worker::queue::Queue;

impl Worker {
    #[inline]
    pub(super) fn take_messages(&mut self) -> bool {
        if self.receiver.is_empty() {
            return false;
        }
        while let Ok(message) = self.receiver.try_recv() {
            hand::take(self.hand_for(&message));
            self.take_message(message);
        }
        true
    }

    /// For whom a message is.
    fn hand_for(&self, message: &ToWorker) -> Hand {
        if let ToWorker::Attach { device, .. } = message {
            return device.hand().get();
        }
        let hand = message.device().and_then(|id| self.hands.get(&id));
        hand.copied().unwrap_or_default()
    }

    fn take_message(&mut self, message: ToWorker) {
        self.cards.look_again();
        if let Some(queue) = message.changes() {
            self.look_again(queue);
        }
        match message {
            ToWorker::Attach { id, device } => self.attach(id, device),
            ToWorker::Detach { id } => self.detach(id),
            ToWorker::GiveUp { id, wipe } => {
                if let Some(local) = self.local(id).map(Rc::clone) {
                    self.pipeline.give_up(&local, wipe);
                    self.leave_all_again(&local);
                }
            }
            ToWorker::Start(start) => self.start(*start),
            ToWorker::Finish { queue } => self.finish(queue),
            ToWorker::Stop { queue } => self.stop(queue),
            ToWorker::Move { queue } => self.begin_move(queue),
            ToWorker::Stay { queue } => self.stay(queue),
            ToWorker::Resume(moved) => self.resume(*moved),
            ToWorker::SetMemory { queue, memory } => {
                if let Some(number) = self.numbers.get(&queue).copied() {
                    let set = self.queue(number).map(|q| q.ring.set_memory(&memory));
                    if let Some(Err(error)) = set {
                        self.retire(number, error);
                    }
                    // Requests that ended at once hold on to the memory before.
                    self.batch.release();
                    self.cards.release();
                }
                self.reply(FromWorker::MemorySet { queue });
            }
            ToWorker::SetEnabled { queue, enabled } => self.change(queue, |q| q.enabled = enabled),
            ToWorker::SetLog { queue, log } => self.change(queue, |q| q.ring.set_log(log)),
            ToWorker::SetCall { queue, fd } => {
                self.set_call(queue, fd);
                self.reply(FromWorker::Changed { queue });
            }
            ToWorker::SetError { queue, fd } => self.change(queue, |q| q.error = fd),
            ToWorker::SetKick { queue, fd } => {
                self.set_kick(queue, fd);
                self.reply(FromWorker::Changed { queue });
            }
            ToWorker::Announce { queue } => self.announce(queue),
            ToWorker::LookAtMirror { id } => self.look_at_mirror(id),
            ToWorker::Flush { queue } => self.flush(queue),
            ToWorker::Freeze => self.freezing = true,
            ToWorker::Thaw { fence } => self.thaw(fence),
            ToWorker::Zone { id, change } => self.change_zone(id, change),
            // Not for a worker: the server gives them to the rekeyer.
            ToWorker::TakeVolume { .. } | ToWorker::LetGoOfVolume { .. } => {}
            ToWorker::End => {
                self.ending = true;
                let all: Vec<QueueId> = self.numbers.keys().copied().collect();
                for queue in all {
                    self.stop(queue);
                }
            }
        }
    }

    /// What the rekeyer says about a device. One that is gone has no zone.
    fn change_zone(&mut self, id: DeviceId, change: ZoneChange) {
        let Some(local) = self.local(id).map(Rc::clone) else {
            return;
        };
        match change {
            ZoneChange::Lock { zone, ticket } => self.pipeline.lock_zone(&local, zone, ticket),
            ZoneChange::Unlock { frontier_bytes } => {
                self.pipeline.unlock_zone(&local, frontier_bytes);
            }
            ZoneChange::Fail { zone } => self.pipeline.fail_zone(&local, zone),
            ZoneChange::Ciphers(ciphers) => self.pipeline.set_ciphers(&local, &ciphers),
        }
    }

    fn change(&mut self, id: QueueId, f: impl FnOnce(&mut Queue)) {
        if let Some(number) = self.numbers.get(&id).copied()
            && let Some(queue) = self.queue(number)
        {
            f(queue);
        }
        self.reply(FromWorker::Changed { queue: id });
    }

    fn attach(&mut self, id: DeviceId, device: Device) {
        self.hands.insert(id, device.hand().get());
        let served = match device {
            Device::Blk(device) => Local::open(device, &mut self.pipeline.ring)
                .map(|local| Served::Blk(Rc::new(local)))
                .map_err(|e| format!("the worker can't take the volume's storage: {e}")),
            Device::Net(device) => self.cards.join(device).map(Served::Net),
        };
        let result = served.map(|served| {
            self.devices.insert(id, served);
        });
        self.reply(FromWorker::Attached {
            id,
            worker: self.index,
            result,
        });
    }

    fn detach(&mut self, id: DeviceId) {
        self.turns.leave(id);
        self.hands.remove(&id);
        match self.devices.remove(&id) {
            Some(Served::Blk(local)) => {
                self.pipeline.forget(self.index, &local);
                local.close(&mut self.pipeline.ring);
            }
            Some(Served::Net(card)) => self.cards.leave(card),
            None => {}
        }
        self.reply(FromWorker::Detached {
            id,
            worker: self.index,
        });
    }
}
