//! What a frontend says about the dirty log and the in-flight region: memory that it shares beside
//! its guest's.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Handled, Outbox, Outcome, Pending, Session, Vring};
use crate::memory::SharedArea;
use crate::stored::{Fd, StoredInflight, StoredLog};
use crate::vhost_user::feature;
use crate::vhost_user::message::Inflight;
use crate::virtqueue::{Format, QueueFeatures, QueueRegion};
use crate::worker::message::ToWorker;

/// Largest queue of an in-flight region.
const MAX_QUEUE_SIZE: u16 = 32768;

/// SET_INFLIGHT_FD, or regions of our own.
#[derive(Debug)]
pub(super) struct Regions {
    area: Arc<SharedArea>,
    /// What they are laid out for.
    format: Format,
    /// Its file, for a successor, and what it was said to be.
    pub(super) file: StoredInflight<Fd>,
}

impl Regions {
    /// Maps a region that has room for its queues.
    fn map(file: StoredInflight<Fd>, format: Format) -> Result<Self, String> {
        let area = SharedArea::map(file.fd.as_fd(), file.offset, file.bytes)
            .map_err(|e| format!("the in-flight region can't be mapped: {e}"))?;
        let area = Arc::new(area);
        Ok(Self { area, format, file })
    }
}

/// How its file is made; the sandbox allows no other.
pub(crate) fn inflight_flags() -> MFdFlags {
    MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING
}

/// An area in which nobody can take a page away.
fn sealed(bytes: u64) -> nix::Result<OwnedFd> {
    let fd = memfd_create("inflight", inflight_flags())?;
    let length = i64::try_from(bytes).map_err(|_| nix::errno::Errno::EFBIG)?;
    nix::unistd::ftruncate(&fd, length)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

impl Session {
    /// SET_LOG_BASE: where marks go from now on.
    pub(super) fn set_log(&mut self, bytes: u64, offset: u64, fd: OwnedFd) -> Outcome {
        let fd = Arc::new(fd);
        self.map_log(StoredLog { fd, bytes, offset })?;
        Ok(super::word(0))
    }

    pub(super) fn map_log(&mut self, file: StoredLog<Fd>) -> Result<(), String> {
        let area = SharedArea::map(file.fd.as_fd(), file.offset, file.bytes)
            .map_err(|e| format!("the dirty log can't be mapped: {e}"))?;
        self.log.set_area(Some(area));
        self.log_file = Some(file);
        Ok(())
    }

    /// VHOST_F_LOG_ALL, which changes while queues run. It is answered when every worker has gone
    /// past it: what is written from then on is marked.
    pub(super) fn log_all(&mut self, features: u64, out: &mut Outbox) -> Handled {
        self.features = features;
        self.log.enable(features & feature::LOG_ALL != 0);
        let mut left = 0;
        for queue in self.started() {
            let enabled = self.serves(queue.index);
            out.to_workers
                .push((queue, ToWorker::SetEnabled { queue, enabled }));
            left += 1;
        }
        match left {
            0 => Handled::Done,
            left => Handled::Pending(Pending::Changes { left }),
        }
    }

    fn format(&self) -> Format {
        QueueFeatures::of(self.features).format()
    }

    fn inflight_bytes(&self, queues: u16, queue_size: u16) -> Result<u64, String> {
        if queues == 0 || queues > self.facts.queues {
            return Err(format!(
                "{queues} queues in the in-flight region, the device has {}",
                self.facts.queues
            ));
        }
        if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
            return Err(format!(
                "the queue size {queue_size} is not one from 1 to {MAX_QUEUE_SIZE}"
            ));
        }
        Ok(self.format().region_bytes(queue_size) * u64::from(queues))
    }

    /// GET_INFLIGHT_FD: a fresh region, all zeroes.
    pub(super) fn get_inflight(&self, asked: Inflight) -> Outcome {
        let bytes = self.inflight_bytes(asked.queues, asked.queue_size)?;
        let fd = sealed(bytes).map_err(|e| format!("no in-flight region can be made: {e}"))?;
        let made = Inflight {
            bytes,
            offset: 0,
            ..asked
        };
        Ok(Handled::ReplyWithFd(made.body(), fd))
    }

    /// SET_INFLIGHT_FD: the region for queues that start from now on. None runs: it would keep the one that it has,
    /// and a successor look for what is in flight in the other.
    pub(super) fn set_inflight(&mut self, given: Inflight, fd: OwnedFd) -> Outcome {
        if self.vrings.iter().any(Vring::is_started) {
            return Err("the in-flight region can't change while a queue runs".to_owned());
        }
        self.set_regions(StoredInflight {
            fd: Arc::new(fd),
            bytes: given.bytes,
            offset: given.offset,
            queues: given.queues,
            queue_size: given.queue_size,
            private: false,
        })?;
        Ok(Handled::Done)
    }

    /// The device was reset, and no queue runs: nothing of any is in flight.
    pub(super) fn forget_in_flight(&self) {
        let Some(regions) = &self.regions else {
            return;
        };
        for index in 0..regions.file.queues {
            let of = QueueRegion::new(&regions.area, self.format(), index, regions.file.queue_size);
            if let Some(region) = of {
                region.forget();
            }
        }
    }

    pub(super) fn set_regions(&mut self, file: StoredInflight<Fd>) -> Result<(), String> {
        let needed = self.inflight_bytes(file.queues, file.queue_size)?;
        if file.bytes < needed {
            return Err(format!(
                "an in-flight region of {} bytes is too short: {needed} are needed",
                file.bytes
            ));
        }
        self.regions = Some(Regions::map(file, self.format())?);
        Ok(())
    }

    /// What is in flight is to be known to a successor, whatever the frontend keeps.
    pub fn keep_in_flight(&mut self) {
        self.keeps = true;
    }

    /// Makes regions of our own for a queue that is about to start, where they are to be kept and the frontend keeps none. They
    /// end with the connection: a frontend that comes back does not know of them.
    pub(super) fn make_regions(&mut self) -> Result<(), String> {
        let fits = |regions: &Regions| !regions.file.private || regions.format == self.format();
        if !self.keeps || self.regions.as_ref().is_some_and(fits) {
            return Ok(());
        }
        let (queues, queue_size) = (self.facts.queues, MAX_QUEUE_SIZE);
        // Pages come as they are used.
        let bytes = self.inflight_bytes(queues, queue_size)?;
        let fd = sealed(bytes).map_err(|e| format!("no in-flight region can be made: {e}"))?;
        self.set_regions(StoredInflight {
            fd: Arc::new(fd),
            bytes,
            offset: 0,
            queues,
            queue_size,
            private: true,
        })
    }

    /// The region of a queue that starts.
    pub(super) fn region_of(&self, index: u16, size: u16) -> Result<Option<QueueRegion>, String> {
        let Some(regions) = &self.regions else {
            return Ok(None);
        };
        if index >= regions.file.queues {
            // A successor would not know where it goes on.
            let known = (!self.keeps).then_some(None);
            let queues = regions.file.queues;
            return known.ok_or_else(|| {
                format!("the in-flight region has {queues} queues, and none numbered {index}")
            });
        }
        if size > regions.file.queue_size {
            return Err(format!(
                "the in-flight region is for queues of {} entries, this one has {size}",
                regions.file.queue_size
            ));
        }
        let region = QueueRegion::new(&regions.area, self.format(), index, regions.file.queue_size);
        let private = regions.file.private;
        let region = region.map(|region| match private {
            true => region.shortened(size),
            false => region,
        });
        region.map(Some).ok_or_else(|| {
            "the in-flight region has no room for the queue at a multiple of 8 bytes".to_owned()
        })
    }
}
