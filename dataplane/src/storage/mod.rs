//! Where blocks live.

use std::os::fd::OwnedFd;

/// What a device's storage is; every worker makes its own way to it.
#[derive(Debug)]
pub enum StorageSpec {
    /// A file or block device, through io_uring.
    File(FileSpec),
    /// Reads give zeroes, writes are taken and forgotten.
    Null,
    /// Memory of this process.
    Ram(RamSpec),
}
/// A file or block device.
#[derive(Debug)]
pub struct FileSpec {
    /// Opened for what the device does with it.
    pub fd: OwnedFd,
}
/// Memory of this process.
#[derive(Debug)]
pub struct RamSpec {}
