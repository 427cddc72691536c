//! virtio-blk (virtio 1.2, 5.2): the device, its configuration space, typed requests and their
//! way to the storage and back.

mod cipher;
pub mod config_space;
mod device;
mod health;
mod metrics;
pub mod pipeline;
pub mod request;
pub mod transform;

pub use cipher::{Cipher, Ciphers, Rekey};
pub(crate) use cipher::{Keys, part};
pub use device::{BlkDevice, Geometry, ResizeError, SECTOR_BYTES};
pub(crate) use health::{Found, REKEYER};
pub use health::{Health, LATENCY_BUCKETS, Latency, Level, Patience, Summary};
pub(crate) use metrics::Counter;
pub use metrics::{Counts, Metrics, QueueMetrics};
