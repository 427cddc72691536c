//! What a bundle has to be to make sense, beyond its encoding. Signing and verification both
//! call [`validate`], so that nothing is signed that a host then refuses for its content.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

pub use bulkhead_files::name::{MAX_NAME_BYTES, check_name};
use bulkhead_protocol::VolumeId;

use crate::RECOVERY_RECIPIENT;
use crate::schema::{HostBundle, SocketSpec, Volume};

mod keys;
mod limits;
mod net;

/// Longest path in bytes.
pub const MAX_PATH_BYTES: usize = 1024;
/// Longest serial in bytes (`VIRTIO_BLK_ID_BYTES`).
pub const MAX_SERIAL_BYTES: usize = 20;
/// Most request queues of a volume.
pub const MAX_QUEUES: u16 = 64;
/// Longest fingerprint, encapsulated key or ciphertext in a sealed key, in bytes.
pub const MAX_SEALED_BYTES: usize = 4096;

/// A part of a bundle that has fields: one of a list by its index and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The bundle itself.
    Bundle,
    /// A volume.
    Volume(usize, String),
    /// A group of volumes.
    Group(usize, String),
    /// The workers.
    Workers,
    /// A switch.
    Switch(usize, String),
    /// A network card.
    Nic(usize, String),
}

impl Part {
    /// How a sentence about it begins; empty for the bundle.
    pub(crate) fn prefix(&self) -> String {
        match self {
            Self::Bundle => String::new(),
            Self::Volume(_, name) => format!("volume {name:?}: "),
            Self::Group(_, name) => format!("group {name:?}: "),
            Self::Workers => "workers: ".to_owned(),
            Self::Switch(_, name) => format!("switch {name:?}: "),
            Self::Nic(_, name) => format!("NIC {name:?}: "),
        }
    }
}

/// One reason why a bundle makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidationError {
    /// What the field belongs to.
    pub part: Part,
    /// The field meant, as the source has it.
    pub field: &'static str,
    /// What is wrong and what to do.
    pub problem: String,
}

impl std::error::Error for ValidationError {}

impl fmt::Display for ValidationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = self.part.prefix();
        write!(f, "{prefix}{}: {}", self.field, self.problem)
    }
}

/// What is wrong with a field.
type Problem = (&'static str, String);

/// Checks everything that can be said about a bundle without a host.
///
/// # Errors
/// The first [`ValidationError`].
pub fn validate(bundle: &HostBundle) -> Result<(), ValidationError> {
    check_bundle(bundle).map_err(|problem| of(Part::Bundle, problem))?;
    for (index, volume) in bundle.volumes.iter().enumerate() {
        check_volume(volume, &bundle.host)
            .map_err(|problem| of(Part::Volume(index, volume.name.clone()), problem))?;
    }
    limits::check(bundle)?;
    check_unique(bundle)?;
    net::check(bundle)
}

/// A problem with a field of this part.
fn of(part: Part, (field, problem): Problem) -> ValidationError {
    ValidationError {
        part,
        field,
        problem,
    }
}

/// Whether a text can name a host: a name, and not that of the recovery recipient.
///
/// # Errors
/// What is wrong with it.
pub fn check_host_name(name: &str) -> Result<(), String> {
    check_name(name)?;
    if name == RECOVERY_RECIPIENT {
        return Err(format!(
            "{name:?} is the name of the recovery recipient; no host can have it"
        ));
    }
    Ok(())
}

fn check_bundle(bundle: &HostBundle) -> Result<(), Problem> {
    check_host_name(&bundle.host).map_err(|e| ("host", e))?;
    if bundle.epoch == 0 {
        return Err(("epoch", "the lowest epoch is 1".to_owned()));
    }
    if bundle.expires <= bundle.not_before {
        return Err((
            "expires",
            format!(
                "{} is not after not_before, {}: the bundle would never be valid",
                bundle.expires, bundle.not_before
            ),
        ));
    }
    check_removed(bundle, "force_remove", &bundle.force_remove, "removed")?;
    check_removed(bundle, "shred", &bundle.shred, "destroyed")
}

/// Ids of volumes that go: each once, and none that stays.
fn check_removed(
    bundle: &HostBundle,
    field: &'static str,
    ids: &[VolumeId],
    fate: &str,
) -> Result<(), Problem> {
    for (index, id) in ids.iter().enumerate() {
        if ids.iter().take(index).any(|other| other == id) {
            return Err((field, format!("volume {id} is named twice")));
        }
        if let Some(volume) = bundle.volume(*id) {
            return Err((
                field,
                format!(
                    "volume {id} ({:?}) is also among the volumes: it can't be both kept and {fate}",
                    volume.name
                ),
            ));
        }
    }
    Ok(())
}

fn check_volume(volume: &Volume, host: &str) -> Result<(), Problem> {
    check_name(&volume.name).map_err(|e| ("name", e))?;
    check_path(&volume.path).map_err(|e| ("path", e))?;
    check_geometry(volume)?;
    let printable = |c: char| c.is_ascii_graphic() || c == ' ';
    if volume.serial.len() > MAX_SERIAL_BYTES || !volume.serial.chars().all(printable) {
        return Err((
            "serial",
            format!("at most {MAX_SERIAL_BYTES} printable ASCII characters"),
        ));
    }
    if volume.queues == 0 || volume.queues > MAX_QUEUES {
        return Err((
            "queues",
            format!("{} is not between 1 and {MAX_QUEUES}", volume.queues),
        ));
    }
    check_mode(&volume.socket)?;
    keys::check(volume, host)
}

fn check_mode(socket: &SocketSpec) -> Result<(), Problem> {
    let mode = socket.mode;
    if mode > 0o777 {
        let problem = format!("mode 0o{mode:o} has more than permission bits (0o777)");
        return Err(("socket", problem));
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
        return Err(format!("a path has 1 to {MAX_PATH_BYTES} bytes"));
    }
    if path.chars().any(char::is_control) {
        return Err("a path has no control characters".to_owned());
    }
    let relative = path.strip_prefix('/').unwrap_or(path);
    if relative
        .split('/')
        .any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(format!(
            "{path:?} has an empty component, `.` or `..`: write the path out"
        ));
    }
    Ok(())
}

fn check_geometry(volume: &Volume) -> Result<(), Problem> {
    let block = volume.logical_block_bytes;
    if !matches!(block, 512 | 4096) {
        return Err(("logical_block", format!("{block} is neither 512 nor 4096")));
    }
    if let Some(unit) = volume.data_unit_bytes {
        if !matches!(unit, 512 | 4096) {
            return Err(("data_unit", format!("{unit} is neither 512 nor 4096")));
        }
        if unit > block {
            return Err((
                "data_unit",
                format!(
                    "{unit} is larger than the logical block of {block} bytes: \
                     a write of one block would have to read first"
                ),
            ));
        }
    }
    let size = volume.size_bytes;
    // The data unit divides the logical block, so that a multiple of this is one of that.
    if size == 0 || !size.is_multiple_of(u64::from(block)) {
        return Err((
            "size",
            format!("{size} bytes are not a positive multiple of the logical block of {block}"),
        ));
    }
    if i64::try_from(size).is_err() {
        return Err(("size", "no file is that large (2^63 bytes)".to_owned()));
    }
    Ok(())
}

fn check_unique(bundle: &HostBundle) -> Result<(), ValidationError> {
    unique(bundle, "id", |v| v.id, |v| v.id.to_string())?;
    unique(bundle, "name", |v| v.name.as_str(), |v| v.name.clone())?;
    unique(
        bundle,
        "socket",
        |v| v.socket.name.as_str(),
        |v| v.socket.name.to_string(),
    )?;
    unique(bundle, "path", |v| v.path.as_str(), |v| v.path.clone())
}

fn unique<'a, K: Eq + Hash>(
    bundle: &'a HostBundle,
    field: &'static str,
    key: impl Fn(&'a Volume) -> K,
    show: impl Fn(&Volume) -> String,
) -> Result<(), ValidationError> {
    let mut seen: HashMap<K, &Volume> = HashMap::with_capacity(bundle.volumes.len());
    for (index, volume) in bundle.volumes.iter().enumerate() {
        if let Some(other) = seen.insert(key(volume), volume) {
            let problem = format!(
                "{:?} is also that of volume {:?} ({}): each volume has its own",
                show(volume),
                other.name,
                other.id
            );
            let part = Part::Volume(index, volume.name.clone());
            return Err(of(part, (field, problem)));
        }
    }
    Ok(())
}
