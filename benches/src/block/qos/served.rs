//! The data plane in this process: the same workers and sessions, not locked in. It serves until the process ends,
//! asleep when nobody is connected.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, SecretMemory};
use bulkhead_dataplane::blk::BlkDevice;
use bulkhead_dataplane::serve::{self, Served as Device};
use bulkhead_dataplane::server::ServerConfig;
use bulkhead_dataplane::worker::WorkerConfig;

use crate::block::BlockError;
use crate::block::bench::{Bench, in_file};
use crate::serve::dataplane::block_device;
use crate::serve::devices::{Backing, DiskSpec, Xts};

/// How long it may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// Size of a disk.
const DISK_BYTES: u64 = 1 << 30;

/// A disk without storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disk {
    /// Plain.
    Null,
    /// Encrypted.
    Encrypted,
}

/// Disks that are served.
#[derive(Debug)]
pub(super) struct Served {
    /// In the order asked for.
    pub(super) devices: Vec<Arc<BlkDevice>>,
    /// Where each listens.
    pub(super) sockets: Vec<String>,
}

impl Served {
    /// Serves disks with a worker on each of `cpus`.
    ///
    /// # Errors
    /// [`BlockError::Program`], [`BlockError::File`].
    pub(super) fn start(
        bench: &Bench,
        name: &str,
        cpus: &[usize],
        disks: &[Disk],
    ) -> Result<Self, BlockError> {
        let arena = SecretArena::new(disks.len() * 2).map_err(failed)?;
        let mut served = Self {
            devices: Vec::new(),
            sockets: Vec::new(),
        };
        let mut offered = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            let path = bench.on_disk(&format!("{name}-{number}"));
            let device = block_device(spec(*disk)?, &arena).map_err(failed)?;
            offered.push(Device {
                device: (&device).into(),
                listener: UnixListener::bind(&path).map_err(in_file(&path))?,
                label: path.display().to_string(),
            });
            served.devices.push(device);
            served.sockets.push(path.display().to_string());
        }
        let worker = |cpu: &usize| WorkerConfig {
            cpu: Some(*cpu),
            lock_in: false,
            ..WorkerConfig::default()
        };
        let config = ServerConfig {
            workers: cpus.iter().map(worker).collect(),
            shuffle: None,
        };
        run(config, offered)?;
        Ok(served)
    }
}

fn run(config: ServerConfig, devices: Vec<Device>) -> Result<(), BlockError> {
    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        let told = ready.clone();
        let began = || {
            let _ = told.send(Ok(()));
            Ok(())
        };
        if let Err(error) = serve::run(&config, devices, began) {
            let _ = ready.send(Err(error));
        }
    });
    let began = is_ready.recv_timeout(PATIENCE);
    began.map_err(failed)?.map_err(failed)
}

fn spec(disk: Disk) -> Result<DiskSpec, BlockError> {
    let xts = match disk {
        Disk::Null => None,
        Disk::Encrypted => {
            let mut key = SecretMemory::new(KEY_BYTES).map_err(failed)?;
            for (at, byte) in key.as_mut_bytes().iter_mut().enumerate() {
                *byte = u8::try_from(at).unwrap_or(0);
            }
            Some(Xts {
                unit: DataUnit::B4096,
                key,
                rekey: None,
            })
        }
    };
    Ok(DiskSpec {
        backing: Backing::Null { bytes: DISK_BYTES },
        xts,
        logical_block_bytes: 4096,
        queues: 1,
        read_only: false,
        discard: false,
        serial: [0; 20],
    })
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> BlockError {
    BlockError::Program {
        what: "the data plane in this process".to_owned(),
        source: std::io::Error::other(error),
    }
}
