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

impl StorageSpec {
    /// Its length in bytes, as it is now.
    ///
    /// # Errors
    /// What asking the kernel fails with.
    pub fn bytes(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => file.current_bytes(),
            Self::Null => Ok(i64::MAX.unsigned_abs()),
            Self::Ram(ram) => Ok(ram.bytes()),
        }
    }
}
