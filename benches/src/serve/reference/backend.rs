//! What `vhost-user-backend` asks of a device.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::ops::DerefMut;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT as _};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Error as QueueError, QueueOwnedT as _};
use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::request;
use super::store::{Disk, Scratch};

/// Bytes of the configuration space, zero-padded: SPDK's frontend asks for all of them.
const CONFIG_BYTES: usize = 256;
/// Longest queue.
const MAX_QUEUE_SIZE: usize = 1024;
/// Data segments of a request: with header and status, what a queue of 128 has room for.
const SEG_MAX: u32 = 126;

/// A device with one frontend.
#[derive(Debug)]
pub struct Backend {
    disk: Arc<Disk>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// One for each queue, which is one for each thread.
    scratch: Vec<Mutex<Scratch>>,
    exit_events: Mutex<Vec<RawFd>>,
}

impl Backend {
    /// A device whose frontend shares `memory`.
    pub fn new(disk: Arc<Disk>, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        let scratch = (0..disk.queues).map(|_| Mutex::default()).collect();
        Self {
            disk,
            memory,
            scratch,
            exit_events: Mutex::default(),
        }
    }

    /// Closes what `vhost-user-backend` 0.24 leaves open: it takes the raw descriptor of each exit event
    /// and never closes it. To be called when its threads have ended.
    pub fn close_exit_events(&self) {
        let mut open = self
            .exit_events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for fd in open.drain(..) {
            if let Err(e) = nix::unistd::close(fd) {
                tracing::warn!("can't close an exit event: {e}");
            }
        }
    }

    /// Serves all that a queue has, and all that comes meanwhile.
    fn drain(&self, vring: &mut VringState, scratch: &mut Scratch) -> Result<(), QueueError> {
        loop {
            vring.disable_notification()?;
            let chains: Vec<_> = vring.get_queue_mut().iter(self.memory.memory())?.collect();
            for chain in &chains {
                let written = request::serve(&self.disk, chain, scratch);
                vring.add_used(chain.head_index(), written)?;
            }
            if !chains.is_empty()
                && vring.needs_notification()?
                && let Err(e) = vring.signal_used_queue()
            {
                tracing::warn!("can't call the driver: {e}");
            }
            if !vring.enable_notification()? {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        usize::from(self.disk.queues)
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ];
        if self.disk.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        }
        if self.disk.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        bits.iter().fold(protocol, |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The queues know themselves.
    fn set_event_idx(&self, _: bool) {}

    /// The same memory as in [`Backend::new`], already changed.
    fn update_memory(&self, _: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4). Nothing for what lies outside, which makes
    /// the crate answer with an error.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = Vec::with_capacity(CONFIG_BYTES);
        space.extend(self.disk.sectors().to_le_bytes());
        space.extend(0u32.to_le_bytes()); // size_max
        space.extend(SEG_MAX.to_le_bytes());
        space.extend([0; 4]); // geometry
        space.extend(self.disk.block_bytes.to_le_bytes());
        space.extend([0; 10]); // topology, writeback
        space.extend(self.disk.queues.to_le_bytes());
        space.resize(CONFIG_BYTES, 0);
        let from = offset as usize;
        let part = space.get(from..from.saturating_add(size as usize));
        part.map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.disk.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let pair = new_event_consumer_and_notifier(flags)
            .inspect_err(|e| tracing::error!("no exit event: {e}"))
            .ok()?;
        let mut open = self
            .exit_events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        open.push(pair.0.as_raw_fd());
        Some(pair)
    }

    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex],
        thread: usize,
    ) -> io::Result<()> {
        let (Some(vring), Some(scratch)) =
            (vrings.get(usize::from(event)), self.scratch.get(thread))
        else {
            return Ok(());
        };
        let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // Held until the queue is empty, so that a queue that was stopped has ended what it took.
        let mut vring = vring.get_mut();
        match self.drain(vring.deref_mut(), &mut scratch) {
            Ok(()) | Err(QueueError::QueueNotReady) => Ok(()),
            Err(e) => {
                // An error from here would end the thread of this queue for good.
                tracing::warn!("a queue can't be served: {e}");
                Ok(())
            }
        }
    }
}
