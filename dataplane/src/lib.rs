//! The data plane.

pub mod blk;
pub mod memory;
pub mod storage;
pub mod virtqueue;
pub mod worker;
