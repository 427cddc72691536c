//! The data plane.

pub mod blk;
pub mod log_limit;
pub mod memory;
pub mod storage;
pub mod virtqueue;
pub mod worker;
