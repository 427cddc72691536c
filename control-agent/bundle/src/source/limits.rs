//! Limits, groups and workers in the source: `limits = { … }` of a volume or a group, `[[group]]` and
//! `[workers]`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt::Write as _;

use bulkhead_protocol::GroupName;
use bulkhead_protocol::limits::{Limits, Rate};
use bulkhead_protocol::workers::{MAX_WORKERS, Workers, parse_cpus};
use toml::de::DeValue;

use super::{parse_size, parsed};
use crate::reader::{SourceError, Table};
use crate::schema::{Group, Volume};

/// The limits of a volume or a group; none are none.
pub(super) fn limits(owner: &Table<'_, '_>) -> Result<Limits, SourceError> {
    if owner.value("limits").is_none() {
        return Ok(Limits::default());
    }
    let table = owner.table("limits")?;
    let requests = ["requests", "requests_burst"].map(|field| count(&table, field));
    let bytes = ["bandwidth", "bandwidth_burst"].map(|field| amount(&table, field));
    let limits = Limits {
        requests: rate(&table, "requests_burst", "requests", requests)?,
        bytes: rate(&table, "bandwidth_burst", "bandwidth", bytes)?,
    };
    table.finish()?;
    Ok(limits)
}

/// The rate and the burst that two fields say.
pub(super) fn rate(
    table: &Table<'_, '_>,
    burst_field: &'static str,
    field: &'static str,
    [per_second, burst]: [Result<Option<u64>, SourceError>; 2],
) -> Result<Option<Rate>, SourceError> {
    match (per_second?, burst?) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(table.error(
            burst_field,
            format!("is a burst over no rate: say also how much may pass in a second, {field}"),
        )),
        (Some(per_second), None) => Ok(Some(Rate::with_default_burst(per_second))),
        (Some(per_second), Some(burst)) => Ok(Some(Rate { per_second, burst })),
    }
}

pub(super) fn count(
    table: &Table<'_, '_>,
    field: &'static str,
) -> Result<Option<u64>, SourceError> {
    table.optional_integer(field, u64::MAX)
}

/// Bytes, as a number or with a unit.
pub(super) fn amount(
    table: &Table<'_, '_>,
    field: &'static str,
) -> Result<Option<u64>, SourceError> {
    match table.value(field) {
        None => Ok(None),
        Some(DeValue::String(text)) => {
            let size = parse_size(text);
            size.map(Some)
                .map_err(|problem| table.error(field, problem))
        }
        Some(DeValue::Integer(_)) => count(table, field),
        Some(_) => Err(table.error(
            field,
            "must be bytes a second like \"100MiB\", or a number of bytes",
        )),
    }
}

/// The group that a volume names.
pub(super) fn group_name(volume: &Table<'_, '_>) -> Result<Option<GroupName>, SourceError> {
    let name = volume.optional_string("group")?;
    name.map(|text| parsed(volume, "group", text)).transpose()
}

/// A `[[group]]`.
pub(super) fn group(table: &Table<'_, '_>) -> Result<Group, SourceError> {
    let group = Group {
        name: parsed(table, "name", table.string("name")?)?,
        limits: limits(table)?,
    };
    table.finish()?;
    Ok(group)
}

/// `[workers]` of a bundle, if it has them.
pub(super) fn workers(bundle: &Table<'_, '_>) -> Result<Option<Workers>, SourceError> {
    if bundle.value("workers").is_none() {
        return Ok(None);
    }
    let table = bundle.table("workers")?;
    let most = u64::from(MAX_WORKERS);
    let count = table.optional_integer("count", most)?;
    let count = count.and_then(|count| u16::try_from(count).ok());
    let cpus = match table.optional_string("cpus")? {
        None => Vec::new(),
        Some(text) => parse_cpus(text).map_err(|problem| table.error("cpus", problem))?,
    };
    table.finish()?;
    if count.is_none() && cpus.is_empty() {
        let problem = "says nothing: give count, cpus or both";
        return Err(table.error("count", problem));
    }
    let workers = Workers::new(count, cpus);
    workers
        .map(Some)
        .map_err(|problem| table.error("cpus", problem))
}

/// Writes what a volume says of limits as [`limits`] and [`group_name`] read it.
pub(super) fn write(out: &mut String, volume: &Volume) {
    let rates = [
        ("requests", volume.limits.requests),
        ("bandwidth", volume.limits.bytes),
    ];
    let text = |(name, rate): (&str, Option<Rate>)| {
        let Rate { per_second, burst } = rate?;
        Some(format!("{name} = {per_second}, {name}_burst = {burst}"))
    };
    let fields: Vec<_> = rates.into_iter().filter_map(text).collect();
    // Writing to a String does not fail.
    if !fields.is_empty() {
        let _ = writeln!(out, "limits = {{ {} }}", fields.join(", "));
    }
    if let Some(group) = &volume.group {
        let _ = writeln!(out, "group = \"{group}\"");
    }
}
