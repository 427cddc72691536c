//! Where blocks live.
//!
//! A [`StorageSpec`] belongs to the device; a worker reaches a file through its own io_uring, in which
//! the file has a fixed number, and memory and nothing directly.

mod file;
mod ram;

pub use file::{FileSpec, StorageError};
pub use ram::RamSpec;

/// What a device's storage is.
#[derive(Debug)]
pub enum StorageSpec {
    /// A file or block device, through io_uring.
    File(FileSpec),
    /// Nothing, for measuring: reads leave the buffer as it is, writes are forgotten.
    Null,
    /// Memory of this process, for measuring.
    Ram(RamSpec),
}
