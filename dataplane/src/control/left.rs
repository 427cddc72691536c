//! Volumes that were taken away although their storage does not answer (ADR 0024): what the kernel still has of
//! them, and why their files can't be attached meanwhile. An old write may land at any time until it has ended;
//! one that lands after a newer one of the same blocks would undo it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_protocol::VolumeId;
use bulkhead_protocol::control::{StorageState, StorageStatus};

use super::answer::Answers;
use super::status::storage;
use super::volumes::{Serving, Then, Volumes};
use crate::blk::BlkDevice;
use crate::server::Server;
use crate::storage::FileSpec;
use crate::worker::message::DeviceId;

/// What is left of a device.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) volume: VolumeId,
    id: DeviceId,
    device: Arc<BlkDevice>,
}

impl Left {
    /// How its storage does.
    pub(super) fn status(&self) -> StorageStatus {
        StorageStatus {
            state: StorageState::GivenUp,
            ..storage(&self.device)
        }
    }

    fn refusal(&self) -> String {
        format!(
            "its storage did not answer when volume {} was detached, and old writes could overwrite new ones: {}",
            self.volume,
            self.status()
        )
    }
}

impl Volumes {
    /// A device that is being taken away is waited for no longer.
    pub(super) fn given_up(
        &mut self,
        server: &mut Server,
        device: DeviceId,
        requests: u32,
        answers: &mut Answers,
    ) {
        let is_it =
            |serving: &Serving| matches!(serving, Serving::Detaching(id, ..) if *id == device);
        let mut table = self.table.iter_mut();
        let Some((volume_id, volume)) = table.find(|(_, volume)| is_it(&volume.serving)) else {
            return;
        };
        let (id, waiting) = (*volume_id, std::mem::take(&mut volume.waiting));
        if let Serving::Detaching(_, served, then) =
            std::mem::replace(&mut volume.serving, Serving::No)
        {
            tracing::warn!(volume = %id, requests, "volume detached, with requests still with the kernel");
            let left = Left {
                volume: id,
                id: device,
                device: served,
            };
            answers.storage(id, left.status());
            self.left.push(left);
            self.let_go(id, then, requests, answers);
        }
        for task in waiting {
            self.ask(server, id, task, answers);
        }
    }

    /// As when nothing is left of the device, but that its keys can't be had back.
    fn let_go(&mut self, id: VolumeId, then: Then, requests: u32, answers: &mut Answers) {
        match then {
            Then::Wipe(agent) => {
                self.wipe(id);
                answers.given_up(agent, requests);
            }
            Then::Forget(keyd) => self.forget(keyd, id, answers),
            Then::Replace(keyd, new) => self.replace(keyd, *new, answers),
            Then::Restore(agent, reason) => answers.refused(agent, reason),
            Then::GiveUp(reason) => {
                self.wipe(id);
                tracing::error!(volume = %id, "it can't be served on: {reason}");
            }
        }
    }

    /// Nothing is left of a device; whether something was.
    pub(super) fn ended(&mut self, device: DeviceId, answers: &mut Answers) -> bool {
        let Some(at) = self.left.iter().position(|left| left.id == device) else {
            return false;
        };
        let left = self.left.swap_remove(at);
        tracing::info!(volume = %left.volume, "the last request of a volume that was given up has ended");
        answers.storage(left.volume, storage(&left.device));
        true
    }

    /// Refuses a volume of which something is left.
    pub(super) fn refuse_left(&self, volume: VolumeId) -> Result<(), String> {
        let left = self.left.iter().find(|left| left.volume == volume);
        left.map_or(Ok(()), |left| Err(left.refusal()))
    }

    /// Refuses a file to which something may still be written.
    pub(super) fn refuse_left_file(&self, file: &FileSpec) -> Result<(), String> {
        let is_it = |left: &&Left| {
            let of = left.device.storage.file();
            of.is_some_and(|of| of.identity == file.identity)
        };
        let left = self.left.iter().find(is_it);
        left.map_or(Ok(()), |left| Err(left.refusal()))
    }
}
