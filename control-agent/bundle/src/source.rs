//! The source of a bundle: TOML that people write, in one file or several (`include`), turned
//! into a [`HostBundle`]. Every error names file, line and field, those of [`validate`] as well.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use bulkhead_protocol::keys::EnvelopeDigest;
use bulkhead_protocol::{DiscardPolicy, NicId, SocketName, VolumeId};
use minicbor::bytes::ByteArray;
use toml::de::DeValue;

use crate::reader::{Document, SourceError, Table};
use crate::schema::{HostBundle, Nic, SocketSpec, Volume};
use crate::text;
use crate::validate::{Part, ValidationError, validate};

mod keys;
mod limits;
mod net;
mod time;

pub use net::nic_to_toml;

/// Where the fields of a volume, a group, a switch or a NIC stand.
struct Place {
    file: String,
    lines: HashMap<String, usize>,
    path: String,
}

impl Place {
    fn of(file: &str, table: &Table<'_, '_>, path: String) -> Self {
        Self {
            file: file.to_owned(),
            lines: table.lines(),
            path,
        }
    }
}

/// What a file may hold that a bundle includes.
#[derive(Default)]
struct Parts {
    volumes: Vec<Volume>,
    volume_places: Vec<Place>,
    nics: Vec<Nic>,
    nic_places: Vec<Place>,
}

/// Reads a bundle's source and the files it includes, and validates what they say together.
///
/// # Errors
/// The first mistake, with file, line and field.
pub fn load(path: &Path) -> Result<HostBundle, SourceError> {
    let file = path.display().to_string();
    let text = read(path, &file)?;
    let document = Document {
        file: &file,
        text: &text,
    };
    let parsed = document.parse()?;
    let root = Table::root(document, &parsed);
    let mut parts = Parts::default();
    parts.read(&root, &file)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    for name in root.strings("include")? {
        let included = directory.join(name);
        parts.load(&included).map_err(|error| match error {
            // A file that can't be read is a mistake in the line that names it.
            e if e.line.is_none() => root.error("include", format!("{}: {}", e.file, e.problem)),
            e => e,
        })?;
    }
    let (groups, group_places) = list(&root, &file, "group", limits::group)?;
    let (switches, switch_places) = list(&root, &file, "switch", net::switch)?;
    let bundle = HostBundle {
        host: root.string("host")?.to_owned(),
        epoch: root.integer("epoch", u64::MAX)?,
        supersedes: digests(&root)?,
        not_before: time::time(&root, "not_before")?,
        expires: time::time(&root, "expires")?,
        volumes: parts.volumes,
        force_remove: parsed_list::<VolumeId>(&root, "force_remove")?,
        shred: parsed_list::<VolumeId>(&root, "shred")?,
        groups,
        workers: limits::workers(&root)?,
        switches,
        nics: parts.nics,
        force_remove_nics: parsed_list::<NicId>(&root, "force_remove_nics")?,
    };
    root.finish()?;
    validate(&bundle).map_err(|error| {
        let (part, place) = match &error.part {
            Part::Bundle => return root.error(error.field, error.problem),
            Part::Workers => ("workers", None),
            Part::Volume(index, _) => ("volume", parts.volume_places.get(*index)),
            Part::Group(index, _) => ("group", group_places.get(*index)),
            Part::Switch(index, _) => ("switch", switch_places.get(*index)),
            Part::Nic(index, _) => ("nic", parts.nic_places.get(*index)),
        };
        match place {
            Some(place) => located(place, &error),
            None => root.error(part, error.to_string()),
        }
    })?;
    Ok(bundle)
}

/// Reads the volumes of a file that holds nothing else, as `bulkhead volume create` writes it.
/// Validates no more than each field by itself.
///
/// # Errors
/// The first mistake, with file, line and field.
pub fn load_stanza(path: &Path) -> Result<Vec<Volume>, SourceError> {
    load_stanzas(path).map(|(volumes, _)| volumes)
}

/// Reads the volumes and the NICs of a file that holds nothing else. Validates no more than each field by
/// itself.
///
/// # Errors
/// The first mistake, with file, line and field.
pub fn load_stanzas(path: &Path) -> Result<(Vec<Volume>, Vec<Nic>), SourceError> {
    let mut parts = Parts::default();
    parts.load(path)?;
    Ok((parts.volumes, parts.nics))
}

fn read(path: &Path, file: &str) -> Result<String, SourceError> {
    fs::read_to_string(path).map_err(|error| SourceError {
        file: file.to_owned(),
        line: None,
        field: String::new(),
        problem: error.to_string(),
    })
}

impl Parts {
    fn load(&mut self, path: &Path) -> Result<(), SourceError> {
        let file = path.display().to_string();
        let text = read(path, &file)?;
        let document = Document {
            file: &file,
            text: &text,
        };
        let parsed = document.parse()?;
        let root = Table::root(document, &parsed);
        self.read(&root, &file)?;
        root.finish()
    }

    fn read(&mut self, root: &Table<'_, '_>, file: &str) -> Result<(), SourceError> {
        let (volumes, places) = list(root, file, "volume", read_volume)?;
        self.volumes.extend(volumes);
        self.volume_places.extend(places);
        let (nics, places) = list(root, file, "nic", net::nic)?;
        self.nics.extend(nics);
        self.nic_places.extend(places);
        Ok(())
    }
}

/// The tables of a list, and where they stand.
fn list<T>(
    root: &Table<'_, '_>,
    file: &str,
    name: &'static str,
    read: impl Fn(&Table<'_, '_>) -> Result<T, SourceError>,
) -> Result<(Vec<T>, Vec<Place>), SourceError> {
    let (mut items, mut places) = (Vec::new(), Vec::new());
    for (index, table) in root.tables(name)?.iter().enumerate() {
        items.push(read(table)?);
        places.push(Place::of(file, table, format!("{name}[{index}].")));
    }
    Ok((items, places))
}

/// A validation error with the line of the field it is about.
fn located(place: &Place, error: &ValidationError) -> SourceError {
    let line = place.lines.get(error.field).or(place.lines.get(""));
    SourceError {
        file: place.file.clone(),
        line: line.copied(),
        field: format!("{}{}", place.path, error.field),
        problem: format!("{}{}", error.part.prefix(), error.problem),
    }
}

fn read_volume(table: &Table<'_, '_>) -> Result<Volume, SourceError> {
    let volume = Volume {
        id: parsed(table, "id", table.string("id")?)?,
        name: table.string("name")?.to_owned(),
        path: table.string("path")?.to_owned(),
        size_bytes: size(table)?,
        data_unit_bytes: data_unit(table)?,
        logical_block_bytes: u32_field(table, "logical_block", None)?,
        read_only: table.boolean("read_only", false)?,
        serial: table.optional_string("serial")?.unwrap_or("").to_owned(),
        discard: discard(table)?,
        queues: queues(table)?,
        socket: read_socket(table)?,
        allowed_uid: u32_field(table, "allowed_uid", None)?,
        force_removal: table.boolean("force_removal", false)?,
        sealed_keys: keys::entries(table, "sealed_key")?,
        rekey: keys::rekey(table)?,
        limits: limits::limits(table)?,
        group: limits::group_name(table)?,
    };
    table.finish()?;
    Ok(volume)
}

/// The listener of a volume or a NIC.
fn read_socket(owner: &Table<'_, '_>) -> Result<SocketSpec, SourceError> {
    let table = owner.table("socket")?;
    let socket = SocketSpec {
        name: parsed::<SocketName>(&table, "name", table.string("name")?)?,
        uid: u32_field(&table, "uid", Some(0))?,
        gid: u32_field(&table, "gid", Some(0))?,
        mode: mode(&table)?,
    };
    table.finish()?;
    Ok(socket)
}

fn parsed<T: FromStr>(
    table: &Table<'_, '_>,
    field: &'static str,
    text: &str,
) -> Result<T, SourceError>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|e: T::Err| table.error(field, e.to_string()))
}

fn parsed_list<T: FromStr>(
    table: &Table<'_, '_>,
    field: &'static str,
) -> Result<Vec<T>, SourceError>
where
    T::Err: std::fmt::Display,
{
    let texts = table.strings(field)?;
    texts.iter().map(|t| parsed(table, field, t)).collect()
}

fn digests(table: &Table<'_, '_>) -> Result<Vec<EnvelopeDigest>, SourceError> {
    let digest = |text: &&str| {
        text::from_hex(text)
            .and_then(|bytes| <[u8; 48]>::try_from(bytes).ok())
            .map(ByteArray::from)
            .ok_or_else(|| {
                table.error(
                    "supersedes",
                    "is not a SHA-384 digest of an envelope (96 hex digits, see `bulkhead show`)",
                )
            })
    };
    table.strings("supersedes")?.iter().map(digest).collect()
}

fn u32_field(
    table: &Table<'_, '_>,
    field: &'static str,
    default: Option<u32>,
) -> Result<u32, SourceError> {
    let value = match (table.optional_integer(field, u64::from(u32::MAX))?, default) {
        (Some(value), _) => value,
        (None, Some(default)) => return Ok(default),
        (None, None) => return Err(table.error(field, "is missing")),
    };
    u32::try_from(value).map_err(|_| table.error(field, "is too large"))
}

fn queues(table: &Table<'_, '_>) -> Result<u16, SourceError> {
    let value = table.optional_integer("queues", u64::from(u16::MAX))?;
    u16::try_from(value.unwrap_or(1)).map_err(|_| table.error("queues", "is too large"))
}

fn size(table: &Table<'_, '_>) -> Result<u64, SourceError> {
    match table.value("size") {
        Some(DeValue::String(text)) => {
            parse_size(text).map_err(|problem| table.error("size", problem))
        }
        Some(DeValue::Integer(_)) => table.integer("size", u64::MAX),
        Some(_) => Err(table.error(
            "size",
            "must be a size like \"64MiB\", or a number of bytes",
        )),
        None => Err(table.error("size", "is missing")),
    }
}

/// A size as people write it: a number of bytes, or a whole number of KiB, MiB, GiB or TiB.
///
/// # Errors
/// What a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default().trim();
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => {
            return Err(format!(
                "{text:?} has the unknown unit {unit:?}: use KiB, MiB, GiB or TiB"
            ));
        }
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size like 64MiB"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is over 2^64 bytes"))
}

fn data_unit(table: &Table<'_, '_>) -> Result<Option<u32>, SourceError> {
    match table.value("data_unit") {
        Some(DeValue::String(text)) if text == "none" => Ok(None),
        Some(DeValue::Integer(_)) => u32_field(table, "data_unit", None).map(Some),
        Some(_) => Err(table.error("data_unit", "must be 512, 4096 or \"none\"")),
        // Whether a volume is encrypted is never left to a default.
        None => Err(table.error(
            "data_unit",
            "is missing: 512, 4096, or \"none\" for a plain volume",
        )),
    }
}

fn discard(table: &Table<'_, '_>) -> Result<DiscardPolicy, SourceError> {
    match table.optional_string("discard")? {
        None | Some("ignore") => Ok(DiscardPolicy::Ignore),
        Some("pass") => Ok(DiscardPolicy::Pass),
        Some(_) => Err(table.error("discard", "must be \"ignore\" or \"pass\"")),
    }
}

fn mode(socket: &Table<'_, '_>) -> Result<u32, SourceError> {
    let octal = |text: &str| {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        u32::from_str_radix(digits, 8).ok()
    };
    match socket.value("mode") {
        None => Ok(0o600),
        Some(DeValue::String(text)) => octal(text)
            .ok_or_else(|| socket.error("mode", "must be octal digits like \"0660\", or 0o660")),
        Some(DeValue::Integer(number)) if number.radix() == 8 => u32_field(socket, "mode", None),
        Some(_) => Err(socket.error("mode", "must be octal: \"0660\" or 0o660")),
    }
}

/// A volume as the stanza that [`load`] reads.
#[must_use]
pub fn volume_to_toml(volume: &Volume) -> String {
    let mut out = String::new();
    let unit = volume
        .data_unit_bytes
        .map_or("\"none\"".to_owned(), |unit| unit.to_string());
    let discard = match volume.discard {
        DiscardPolicy::Ignore => "ignore",
        DiscardPolicy::Pass => "pass",
    };
    let socket = &volume.socket;
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "[[volume]]\nid = \"{}\"\nname = {}\npath = {}\nsize = {}\ndata_unit = {unit}\n\
         logical_block = {}\nread_only = {}\nserial = {}\ndiscard = \"{discard}\"\nqueues = {}\n\
         socket = {{ name = \"{}\", uid = {}, gid = {}, mode = 0o{:o} }}\nallowed_uid = {}\n\
         force_removal = {}\n",
        volume.id,
        toml::Value::from(volume.name.as_str()),
        toml::Value::from(volume.path.as_str()),
        volume.size_bytes,
        volume.logical_block_bytes,
        volume.read_only,
        toml::Value::from(volume.serial.as_str()),
        volume.queues,
        socket.name,
        socket.uid,
        socket.gid,
        socket.mode,
        volume.allowed_uid,
        volume.force_removal,
    );
    limits::write(&mut out, volume);
    keys::write(&mut out, volume);
    out
}
