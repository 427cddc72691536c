//! A whole host with some volumes, and a verified load on all of them.

use std::path::Path;
use std::time::Duration;

use super::disk::{Base, DiskSpec};
use super::finding::Report;
use super::kills::KillError;
use super::load::{Load, LoadSpec};
use crate::host::{BundleSpec, Host, VolumeSpec, own_binaries};

/// How long disks may take to be written once.
const FILL_PATIENCE: Duration = Duration::from_secs(120);

/// What runs where.
#[derive(Debug, Clone)]
pub struct Scene {
    /// Disks of the guest, each a volume.
    pub disks: u16,
    /// Queues of each.
    pub queues: u16,
    /// Packed rings.
    pub packed: bool,
    /// Chains are used in order.
    pub in_order: bool,
    /// The frontend keeps an in-flight region.
    pub inflight: bool,
    /// What it says after a reconnect.
    pub base: Base,
    /// Data unit of the volumes in bytes; none: plain.
    pub data_unit: Option<u32>,
    /// Size of each volume, as the command line takes it.
    pub size: &'static str,
    /// Requests under way on each queue.
    pub depth: usize,
    /// Sectors of a request at most.
    pub most_sectors: u32,
    /// Memory of the guest in bytes.
    pub memory_bytes: u64,
    /// The host's programs can be replaced.
    pub own_binaries: bool,
    /// A volume more, `spare`, that the load does not use.
    pub spare: bool,
    /// Connections may end, and are made again.
    pub may_reconnect: bool,
    /// Most writes are of what was written just before.
    pub rewrite: bool,
    /// One in so many turns of the load sends a message; 0: none.
    pub message_every: u64,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            disks: 2,
            queues: 1,
            packed: false,
            in_order: false,
            inflight: true,
            base: Base::Used,
            data_unit: Some(4096),
            size: "4MiB",
            depth: 8,
            most_sectors: 32,
            memory_bytes: 1 << 30,
            message_every: 50,
            rewrite: false,
            may_reconnect: false,
            own_binaries: false,
            spare: false,
        }
    }
}

/// A host whose volumes are under load.
#[derive(Debug)]
pub struct Fleet {
    /// The host.
    pub host: Host,
    /// The load.
    pub load: Load,
}

impl Fleet {
    /// Makes a host in a folder, starts it, and writes every volume once.
    ///
    /// # Errors
    /// See [`KillError`].
    pub fn start(dir: &Path, scene: &Scene, run: u64) -> Result<Self, KillError> {
        let mut host = if scene.own_binaries {
            Host::create_with(dir, &own_binaries(dir)?)?
        } else {
            Host::create(dir)?
        };
        let mut names: Vec<String> = (0..scene.disks).map(|n| format!("disk{n}")).collect();
        names.extend(scene.spare.then(|| "spare".to_owned()));
        for name in &names {
            host.create_volume(&VolumeSpec {
                data_unit: scene.data_unit,
                queues: scene.queues,
                ..VolumeSpec::new(name, scene.size, 4096)
            })?;
        }
        let volumes: Vec<&str> = names.iter().map(String::as_str).collect();
        let envelope = host.sign(&BundleSpec::new(1, &volumes))?;
        host.start()?;
        host.apply(&envelope)?;
        names.truncate(usize::from(scene.disks));
        let disks = names.iter().map(|name| DiskSpec {
            queues: scene.queues,
            packed: scene.packed,
            in_order: scene.in_order,
            inflight: scene.inflight,
            base: scene.base,
            ..DiskSpec::new(host.socket(name))
        });
        let mut spec = LoadSpec::new(disks.collect(), run);
        spec.memory_bytes = scene.memory_bytes;
        spec.habits.depth = scene.depth;
        spec.habits.rewrite = scene.rewrite;
        spec.habits.message_every = scene.message_every;
        spec.habits.most_sectors = scene.most_sectors;
        let mut load = Load::start(&spec)?;
        load.wait_filled(FILL_PATIENCE)?;
        Ok(Self { host, load })
    }

    /// Ends the load, reading everything: what it found. The host goes on.
    #[must_use]
    pub fn finish(self) -> (Report, Host) {
        (self.load.finish(), self.host)
    }
}
