//! Serving with Bulkhead's own data plane: workers, control thread and lock-in as in production.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_crypto::xts::{KEY_BYTES, KeyError};
use bulkhead_crypto::{DataUnit, SecretArena, SecretMemory, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Ciphers, Geometry, Rekey};
use bulkhead_dataplane::sandbox::{self, SandboxError};
use bulkhead_dataplane::serve::{self, Served};
use bulkhead_dataplane::server::ServerConfig;
use bulkhead_dataplane::storage::{
    DelaySpec, ErrorSpec, FileSpec, RamSpec, StorageError, StorageSpec, VolatileCache,
};
use bulkhead_dataplane::worker::WorkerConfig;

use super::devices::{Backing, Device, DiskSpec, Xts};
use super::net::Card;
use super::rekey::RekeyError;

/// Bytes of a sector, always (virtio 1.2, 5.2).
const SECTOR_BYTES: u64 = 512;

/// Why the data plane can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A key.
    #[error("the key can't be used: {0}")]
    Key(#[from] KeyError),
    /// Memory for keys or for a disk.
    #[error("no memory for {0}: {1}")]
    Memory(&'static str, #[source] io::Error),
    /// A re-key.
    #[error(transparent)]
    Rekey(#[from] RekeyError),
    /// A file.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// One of those above, and the device that it is about.
    #[error("the disk at {socket}: {source}")]
    Device {
        /// Its socket.
        socket: String,
        /// Why.
        source: Box<ServeError>,
    },
    /// The lock-in.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Workers, event loop, a device.
    #[error("can't serve: {0}")]
    Run(#[from] io::Error),
}

impl ServeError {
    fn of(self, socket: &str) -> Self {
        Self::Device {
            socket: socket.to_owned(),
            source: Box::new(self),
        }
    }
}

/// Workers that lock themselves in: one on each of `cpus`, or so many on any. With `shuffle`, a queue is
/// moved from one to another each time so many milliseconds have passed.
#[must_use]
pub fn config(cpus: &[usize], workers: u16, shuffle: Option<u16>) -> ServerConfig {
    let worker = |cpu| WorkerConfig {
        cpu,
        lock_in: true,
        ..WorkerConfig::default()
    };
    let workers = if cpus.is_empty() {
        vec![worker(None); usize::from(workers)]
    } else {
        cpus.iter().map(|cpu| worker(Some(*cpu))).collect()
    };
    ServerConfig {
        workers,
        shuffle: shuffle.map(|ms| Duration::from_millis(ms.into())),
    }
}

/// Serves the devices until a signal ends the process. Locks the whole process in: nothing can be opened
/// afterwards.
///
/// `made` is called with what will be served, `ready` once everything runs.
///
/// # Errors
/// See [`ServeError`].
pub fn run(
    (disks, cards): (Vec<Device>, Vec<Card>),
    config: &ServerConfig,
    made: impl FnOnce(&[Served]),
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let arena =
        SecretArena::new((disks.len() * 2).max(1)).map_err(|e| ServeError::Memory("keys", e))?;
    let served: Result<Vec<_>, _> = disks.into_iter().map(|d| prepare(d, &arena)).collect();
    let mut served = served?;
    served.extend(cards.into_iter().map(offered));
    made(&served);
    sandbox::lock_process()?;
    let locked = || {
        ready();
        sandbox::lock_control_thread().map_err(io::Error::other)
    };
    Ok(serve::run(config, served, locked)?)
}

fn offered(card: Card) -> Served {
    Served {
        device: card.device.into(),
        listener: card.listener,
        label: card.socket.display().to_string(),
    }
}

fn prepare(device: Device, arena: &Arc<SecretArena>) -> Result<Served, ServeError> {
    let label = device.socket.display().to_string();
    let device_of_disk = block_device(device.disk, arena);
    Ok(Served {
        device: device_of_disk.map_err(|e| e.of(&label))?.into(),
        listener: device.listener,
        label,
    })
}

/// A disk as the data plane has it, its key expanded into `arena`.
///
/// # Errors
/// [`ServeError::Key`], [`ServeError::Memory`], [`ServeError::Storage`].
pub fn block_device(
    disk: DiskSpec,
    arena: &Arc<SecretArena>,
) -> Result<Arc<BlkDevice>, ServeError> {
    let geometry = Geometry {
        logical_block_bytes: disk.logical_block_bytes,
        read_only: disk.read_only,
        serial: disk.serial,
        queues: disk.queues,
        discard: disk.discard,
    };
    let capacity_sectors = disk.bytes()? / SECTOR_BYTES;
    let storage = storage(disk.backing, &geometry)?;
    let ciphers = disk.xts.map(|xts| ciphers(&xts, arena)).transpose()?;
    Ok(BlkDevice::with_ciphers(
        geometry,
        capacity_sectors,
        storage,
        ciphers,
    ))
}

fn storage(backing: Backing, geometry: &Geometry) -> Result<StorageSpec, ServeError> {
    let no_memory = |e| ServeError::Memory("a disk", e);
    Ok(match backing {
        Backing::Null { .. } => StorageSpec::Null,
        Backing::Ram { bytes } => {
            StorageSpec::Ram(Arc::new(RamSpec::new(bytes).map_err(no_memory)?))
        }
        Backing::File { file, .. } => StorageSpec::File(FileSpec::from_fd(
            file.into(),
            geometry.read_only,
            geometry.logical_block_bytes,
        )?),
        Backing::VolatileCache { file, .. } => {
            let stable = RamSpec::of_file(file).map_err(no_memory)?;
            StorageSpec::Volatile(VolatileCache::new(stable))
        }
        Backing::Delay { most, inner } => {
            StorageSpec::Delay(DelaySpec::new(storage(*inner, geometry)?, most))
        }
        Backing::Hang {
            after,
            lasts,
            inner,
        } => {
            let spec = DelaySpec::new(storage(*inner, geometry)?, Duration::ZERO);
            spec.stop_later(after, lasts);
            StorageSpec::Delay(spec)
        }
        Backing::Error { fault, inner } => {
            let spec = ErrorSpec::new(storage(*inner, geometry)?);
            spec.inject(fault);
            StorageSpec::Error(spec)
        }
    })
}

fn ciphers(xts: &Xts, arena: &Arc<SecretArena>) -> Result<Ciphers, ServeError> {
    let cipher = expand(&xts.key, xts.unit, arena)?;
    let Some(rekey) = &xts.rekey else {
        return Ok(Ciphers::single(cipher));
    };
    let previous = expand(&rekey.previous, xts.unit, arena)?;
    Ok(Ciphers {
        cipher: Arc::new(cipher),
        volume: Some(rekey.volume),
        rekey: Some(Rekey {
            id: rekey.id,
            previous: Arc::new(previous),
        }),
    })
}

fn expand(
    key: &SecretMemory,
    unit: DataUnit,
    arena: &Arc<SecretArena>,
) -> Result<Cipher, ServeError> {
    let short = || ServeError::Memory("a key", io::ErrorKind::InvalidData.into());
    let key: &[u8; KEY_BYTES] = key.as_bytes().try_into().map_err(|_| short())?;
    Ok(Cipher {
        key: XtsKey::new(arena, key)?,
        unit,
    })
}
