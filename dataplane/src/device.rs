//! What is served, of either kind, and what those ask of it that serve all kinds alike: the session, the
//! server's loop, and a worker's turns.
//!
//! What only a block device has (a volume that is taken and let go of, a storage whose health is watched, a
//! cache mode) a network card simply has none of, and says so here, so that nobody else has to ask which kind it is.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Duration;

use crate::blk::{self, BlkDevice, Health};
use crate::hand::SharedHand;
use crate::net::{self, NetDevice};
use crate::qos::Qos;
use crate::storage::FileSpec;
use crate::stored::StoredCache;
use crate::vhost_user::protocol_feature;

/// Bytes of a configuration space that a frontend may ask for, zero-padded.
pub const CONFIG_BYTES: usize = 256;

/// A device.
#[derive(Debug, Clone)]
pub enum Device {
    /// A disk (virtio 1.2, 5.2).
    Blk(Arc<BlkDevice>),
    /// A network card (5.1).
    Net(Arc<NetDevice>),
}

impl From<Arc<BlkDevice>> for Device {
    fn from(device: Arc<BlkDevice>) -> Self {
        Self::Blk(device)
    }
}

impl From<Arc<NetDevice>> for Device {
    fn from(device: Arc<NetDevice>) -> Self {
        Self::Net(device)
    }
}

impl From<&Arc<BlkDevice>> for Device {
    fn from(device: &Arc<BlkDevice>) -> Self {
        Self::Blk(Arc::clone(device))
    }
}

impl From<&Arc<NetDevice>> for Device {
    fn from(device: &Arc<NetDevice>) -> Self {
        Self::Net(Arc::clone(device))
    }
}

impl Device {
    /// The disk, if it is one.
    #[must_use]
    pub fn blk(&self) -> Option<&Arc<BlkDevice>> {
        match self {
            Self::Blk(device) => Some(device),
            Self::Net(_) => None,
        }
    }

    /// The network card, if it is one.
    #[must_use]
    pub fn net(&self) -> Option<&Arc<NetDevice>> {
        match self {
            Self::Blk(_) => None,
            Self::Net(device) => Some(device),
        }
    }

    /// Queues that a back-end serves: of a network card without the one for control, which stays in the frontend.
    #[must_use]
    pub fn queues(&self) -> u16 {
        match self {
            Self::Blk(device) => device.geometry.queues,
            Self::Net(device) => device.queues(),
        }
    }

    /// Features that it offers beside [`feature::TRANSPORT`](crate::vhost_user::feature::TRANSPORT).
    #[must_use]
    pub fn features(&self) -> u64 {
        match self {
            Self::Blk(device) => blk::config_space::features(&device.geometry),
            Self::Net(device) => net::config_space::features(device),
        }
    }

    /// Protocol features that it offers.
    #[must_use]
    pub fn protocol_features(&self) -> u64 {
        match self {
            Self::Blk(_) => protocol_feature::OFFERED,
            Self::Net(_) => protocol_feature::OFFERED_NET,
        }
    }

    /// Its configuration space, as it is now.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        match self {
            Self::Blk(device) => blk::config_space::read(device),
            Self::Net(device) => net::config_space::read(device),
        }
    }

    /// Writes to its configuration space.
    ///
    /// # Errors
    /// Nothing can be written there; nothing has changed.
    pub fn write_config(&self, offset: u32, payload: &[u8]) -> Result<(), String> {
        match self {
            Self::Blk(device) => blk::config_space::write(device, offset, payload),
            Self::Net(_) => Err(format!(
                "{} bytes at {offset} of the configuration space can't be written: of a network card nothing can",
                payload.len()
            )),
        }
    }

    /// What of its configuration space changes while it is served, as one number: a frontend that knows this
    /// number knows the space. Of a disk its capacity in sectors.
    #[must_use]
    pub fn told(&self) -> u64 {
        match self {
            Self::Blk(device) => device.capacity_sectors(),
            Self::Net(device) => device.told(),
        }
    }

    /// A driver negotiated these features.
    pub fn negotiated(&self, features: u64) {
        if let Self::Blk(device) = self {
            device.negotiated(features);
        }
    }

    /// What a reset of the device puts back.
    pub fn reset(&self) {
        match self {
            Self::Blk(device) => device.reset(),
            Self::Net(_) => {}
        }
    }

    /// The cache mode that outlives a connection; a network card has none, and always the same in its place.
    #[must_use]
    pub fn cache_mode(&self) -> StoredCache {
        match self {
            Self::Blk(device) => device.cache_mode(),
            Self::Net(_) => StoredCache {
                writeback: true,
                chosen: false,
            },
        }
    }

    /// The file that is held while queues run; none: nothing is to be held.
    #[must_use]
    pub fn file(&self) -> Option<&FileSpec> {
        self.blk().and_then(|device| device.storage.file())
    }

    /// How its storage does; none: it has none.
    #[must_use]
    pub fn health(&self) -> Option<&Health> {
        self.blk().map(|device| &device.health)
    }

    /// How long is waited for what is under way of it, before it is given up.
    #[must_use]
    pub fn give_up_after(&self) -> Duration {
        let patience = self.health().map(Health::patience);
        patience.unwrap_or_default().give_up
    }

    /// It was given up and does not come back: lets go of its keys for good.
    pub(crate) fn wipe(&self) {
        if let Self::Blk(device) = self {
            device.wipe();
        }
    }

    /// How much of it its guest may use in a second; of a network card, what it sends.
    #[must_use]
    #[inline]
    pub fn qos(&self) -> &Qos {
        match self {
            Self::Blk(device) => device.qos(),
            Self::Net(device) => device.tx_qos(),
        }
    }

    /// What a thread that works for it has in hand.
    #[must_use]
    pub fn hand(&self) -> &SharedHand {
        match self {
            Self::Blk(device) => &device.hand,
            Self::Net(device) => &device.hand,
        }
    }

    /// Adds time that a worker spent on it ([`clock::now`](crate::worker::clock::now)).
    pub fn add_worker_ticks(&self, ticks: u64) {
        match self {
            Self::Blk(device) => device.metrics.add_worker_ticks(ticks),
            Self::Net(device) => device.metrics.add_worker_ticks(ticks),
        }
    }
}
