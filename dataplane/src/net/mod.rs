//! virtio-net (virtio 1.2, 5.1): the network card.
//!
//! | module | owns |
//! | --- | --- |
//! | [`header`] | the header in front of every frame |
//! | [`parse`] | what a frame's first bytes say |
//! | [`frame`] | a frame on its way, and its offloads, held against it |
//! | [`receive`] | a frame into a driver's receive buffers |
//! | [`checksum`], [`offload`] | checksums and segments in software |

pub mod checksum;
pub mod frame;
pub mod header;
pub mod offload;
pub mod parse;
pub mod receive;

pub use frame::{Body, Csum, Frame, Gso, GsoKind, HeadBuffer, Offload};
pub use header::HeaderSize;
pub use parse::{FrameInfo, HashKey, Mac};
