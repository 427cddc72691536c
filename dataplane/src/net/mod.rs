//! virtio-net (virtio 1.2, 5.1): the network card, its configuration space and counters, and its frames.
//!
//! | module | owns |
//! | --- | --- |
//! | `device` | what a network card is, and what of it changes while it is served |
//! | [`config_space`] | features, and the configuration space |
//! | `metrics` | counters of queues, and drops by reason |
//! | `lane` | how a worker serves cards |
//! | [`header`] | the header in front of every frame |
//! | `flow_hash` | which frames are of one flow |
//! | `link` | Ethernet's header |
//! | [`parse`] | what a frame's first bytes say |
//! | [`claims`] | whom a frame says to be from |
//! | [`roles`] | what a frame makes its sender to others: a router, a server of addresses |
//! | [`frame`] | a frame on its way |
//! | `head` | the head of a driver's frame, copied |
//! | `asked` | a frame's offloads, held against it |
//! | [`receive`] | a frame into a driver's receive buffers |
//! | [`checksum`], [`offload`] | checksums and segments in software |

mod asked;
pub mod checksum;
pub mod claims;
pub mod config_space;
pub mod current;
mod device;
mod flow_hash;
pub mod frame;
mod head;
pub mod header;
pub(crate) mod lane;
mod link;
mod metrics;
pub mod offload;
pub mod parse;
pub mod receive;
pub mod roles;

pub use device::{Direction, MAX_QUEUE_PAIRS, MIN_MTU, NetDevice, Shape, part_of};
pub use flow_hash::HashKey;
pub use frame::{Body, Csum, Frame, Gso, GsoKind, HeadBuffer, Offload};
pub use header::HeaderSize;
pub use metrics::{Counts, Metrics, QueueMetrics};
pub use parse::{FrameInfo, Mac};

#[cfg(test)]
mod tests;
