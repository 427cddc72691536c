//! Where blocks live.
//!
//! A [`StorageSpec`] belongs to the device. Each worker that serves the device makes a [`Storage`] from it,
//! which is its own way to the blocks: [`uring`] for files and block devices, [`in_memory`] for files on tmpfs,
//! [`ram`] and [`null`] for measuring, and [`error`], [`delay`] and [`volatile_cache`] for tests. Production makes files only.

pub mod delay;
pub mod error;
mod file;
mod hold;
mod in_memory;
mod null;
mod ram;
mod topology;
mod transfer;
mod uring;
pub mod volatile_cache;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

pub use delay::DelaySpec;
pub use error::ErrorSpec;
pub use file::{FileSpec, StorageError};
pub use ram::RamSpec;
pub use topology::Topology;
pub use transfer::{Action, Buffer, Completion, Done, Transfer};
pub use volatile_cache::VolatileCache;

use crate::worker::ring::Ring;

/// What a device's storage is.
#[derive(Debug)]
pub enum StorageSpec {
    /// A file or block device, through io_uring; what lies in memory anyway, by system calls.
    File(FileSpec),
    /// Nothing, for measuring: reads leave the buffer as it is, writes are forgotten.
    Null,
    /// Memory of this process, for measuring.
    Ram(Arc<RamSpec>),
    /// Another storage that fails as told, for tests.
    Error(Arc<ErrorSpec>),
    /// Another storage that takes its time, for tests.
    Delay(Arc<DelaySpec>),
    /// Memory with a write cache that is lost in a power cut, for tests.
    Volatile(Arc<VolatileCache>),
}

/// What a transfer must look like for a storage to take guest memory as it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Addresses are multiples of it.
    pub memory_align_bytes: u32,
    /// Lengths of each segment are multiples of it.
    pub length_align_bytes: u32,
}

impl Limits {
    /// Anything will do.
    pub const NONE: Self = Self {
        memory_align_bytes: 1,
        length_align_bytes: 1,
    };
}

/// What became of a transfer at its start.
#[derive(Debug)]
pub enum Begin {
    /// It is in the worker's ring, which will give it back.
    Later,
    /// The storage has it, and gives it back by [`Storage::poll`].
    Held,
    /// It ended.
    Done(Transfer, Done),
    /// There is no room for it now: to be tried again.
    Full(Transfer),
}

/// What became of a transfer that a storage held.
#[derive(Debug)]
pub enum Polled {
    /// It ended.
    Ended(Completion),
    /// It went on into the worker's ring.
    Passed,
}

/// A worker's way to a device's blocks. Nothing in it waits.
pub trait Storage: Debug {
    /// What guest memory it takes as it lies.
    fn limits(&self) -> Limits {
        Limits::NONE
    }

    /// Begins a transfer.
    fn begin(&self, ring: &mut Ring, token: u64, transfer: Transfer) -> Begin;

    /// A transfer that it held and holds no longer, if there is one now.
    fn poll(&self, _ring: &mut Ring) -> Option<Polled> {
        None
    }

    /// A transfer that it holds, back with ECANCELED, if there is one.
    fn cancel(&self) -> Option<Completion> {
        None
    }

    /// Takes what it has in the worker's ring out of it; nothing of it is in flight any more.
    fn close(&self, _ring: &mut Ring) {}
}

impl StorageSpec {
    /// A worker's way to it.
    ///
    /// # Errors
    /// What the worker's ring refuses the file with.
    pub fn open(&self, ring: &mut Ring) -> io::Result<Box<dyn Storage>> {
        Ok(match self {
            Self::File(file) if file.in_memory => {
                Box::new(in_memory::InMemoryStorage::open(file, ring)?)
            }
            Self::File(file) => Box::new(uring::UringStorage::open(file, ring)?),
            Self::Null => Box::new(null::NullStorage),
            Self::Ram(ram) => Box::new(ram::RamStorage::new(ram)),
            Self::Error(spec) => Box::new(error::ErrorStorage::open(spec, ring)?),
            Self::Delay(spec) => Box::new(delay::DelayStorage::open(spec, ring)?),
            Self::Volatile(cache) => Box::new(volatile_cache::VolatileStorage::new(cache)),
        })
    }

    /// Its length in bytes, as it is now.
    ///
    /// # Errors
    /// What asking the kernel fails with.
    pub fn bytes(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.current_bytes(),
            Self::Null => Ok(i64::MAX.unsigned_abs()),
            Self::Ram(ram) => Ok(ram.bytes()),
            Self::Error(spec) => spec.inner.bytes(),
            Self::Delay(spec) => spec.inner.bytes(),
            Self::Volatile(cache) => Ok(cache.bytes()),
        }
    }

    /// What it likes best.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.file().map(|file| file.topology).unwrap_or_default()
    }

    /// Its file, if that is what it is.
    #[must_use]
    pub fn file(&self) -> Option<&FileSpec> {
        match self {
            Self::File(file) => Some(file),
            Self::Error(spec) => spec.inner.file(),
            Self::Delay(spec) => spec.inner.file(),
            Self::Null | Self::Ram(_) | Self::Volatile(_) => None,
        }
    }
}
