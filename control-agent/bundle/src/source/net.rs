//! Networks in the source: `[[switch]]` and `[[nic]]`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt::Write as _;

use bulkhead_protocol::net::{
    MirrorSpec, NicLimits, PortSpec, SNAP_BYTES, SpoofChecks, TrafficLimits, Trusted, Uplink,
};
use toml::de::DeValue;

use super::limits::{amount, count, rate};
use super::{parsed, parsed_list, read_socket, u32_field};
use crate::reader::{SourceError, Table};
use crate::schema::{Nic, Switch};

/// The MTU of a NIC that says nothing of it: Ethernet's.
const DEFAULT_MTU: u16 = 1500;

/// A `[[switch]]`.
pub(super) fn switch(table: &Table<'_, '_>) -> Result<Switch, SourceError> {
    let switch = Switch {
        name: parsed(table, "name", table.string("name")?)?,
        uplink: match table.value("uplink") {
            None => None,
            Some(DeValue::Table(_)) => Some(uplink(&table.table("uplink")?)?),
            Some(_) => {
                let problem = "must be { tap = \"…\" } or { af_xdp = \"…\", queue = 0 }";
                return Err(table.error("uplink", problem));
            }
        },
    };
    table.finish()?;
    Ok(switch)
}

fn uplink(table: &Table<'_, '_>) -> Result<Uplink, SourceError> {
    let uplink = match (
        table.optional_string("tap")?,
        table.optional_string("af_xdp")?,
    ) {
        (Some(name), None) => Uplink::Tap {
            interface: parsed(table, "tap", name)?,
        },
        (None, Some(name)) => Uplink::AfXdp {
            interface: parsed(table, "af_xdp", name)?,
            queue: u16_field(table, "queue", Some(0))?,
        },
        _ => return Err(table.error("tap", "is to be there, or af_xdp, and not both")),
    };
    table.finish()?;
    Ok(uplink)
}

/// A `[[nic]]`.
pub(super) fn nic(table: &Table<'_, '_>) -> Result<Nic, SourceError> {
    let nic = Nic {
        id: parsed(table, "id", table.string("id")?)?,
        name: table.string("name")?.to_owned(),
        mac: parsed(table, "mac", table.string("mac")?)?,
        mtu: u16_field(table, "mtu", Some(DEFAULT_MTU))?,
        queue_pairs: u16_field(table, "queue_pairs", Some(1))?,
        port: port(table)?,
        socket: read_socket(table)?,
        allowed_uid: u32_field(table, "allowed_uid", None)?,
        force_removal: table.boolean("force_removal", false)?,
        limits: limits(table)?,
        checks: SpoofChecks {
            mac: table.boolean("check_mac", true)?,
            sources: parsed_list(table, "sources")?,
            trusted: trusted(table)?,
        },
        mirror: mirror(table)?,
    };
    table.finish()?;
    Ok(nic)
}

fn trusted(nic: &Table<'_, '_>) -> Result<Trusted, SourceError> {
    let trusted = Trusted::from_names(nic.strings("trusted")?);
    trusted.ok_or_else(|| nic.error("trusted", "is a list of \"router\" and \"dhcp\""))
}

fn u16_field(
    table: &Table<'_, '_>,
    field: &'static str,
    default: Option<u16>,
) -> Result<u16, SourceError> {
    let value = table.optional_integer(field, u64::from(u16::MAX))?;
    let value = value.and_then(|value| u16::try_from(value).ok());
    let missing = || table.error(field, "is missing");
    value.or(default).ok_or_else(missing)
}

fn port(nic: &Table<'_, '_>) -> Result<PortSpec, SourceError> {
    match nic.value("port") {
        Some(DeValue::String(text)) if text == "null" => return Ok(PortSpec::Null),
        Some(DeValue::Table(_)) => {}
        _ => {
            let problem = "must be { switch = \"…\" }, { tap = \"…\" }, { af_xdp = \"…\", queue = 0 } \
                           or \"null\"";
            return Err(nic.error("port", problem));
        }
    }
    let table = nic.table("port")?;
    let kinds = ["switch", "tap", "af_xdp"].map(|kind| table.optional_string(kind));
    let [switch, tap, af_xdp] = kinds;
    let port = match (switch?, tap?, af_xdp?) {
        (Some(name), None, None) => PortSpec::Switch {
            switch: parsed(&table, "switch", name)?,
        },
        (None, Some(name), None) => PortSpec::Tap {
            interface: parsed(&table, "tap", name)?,
        },
        (None, None, Some(name)) => PortSpec::AfXdp {
            interface: parsed(&table, "af_xdp", name)?,
            queue: u16_field(&table, "queue", Some(0))?,
        },
        _ => return Err(nic.error("port", "has one of switch, tap and af_xdp")),
    };
    table.finish()?;
    Ok(port)
}

fn limits(nic: &Table<'_, '_>) -> Result<NicLimits, SourceError> {
    if nic.value("limits").is_none() {
        return Ok(NicLimits::default());
    }
    let table = nic.table("limits")?;
    let packets = |fields: [&'static str; 2]| {
        let [field, burst] = fields;
        rate(&table, burst, field, fields.map(|f| count(&table, f)))
    };
    let bytes = |fields: [&'static str; 2]| {
        let [field, burst] = fields;
        rate(&table, burst, field, fields.map(|f| amount(&table, f)))
    };
    let limits = NicLimits {
        tx: TrafficLimits {
            packets: packets(["tx_packets", "tx_packets_burst"])?,
            bytes: bytes(["tx_bandwidth", "tx_bandwidth_burst"])?,
        },
        rx: TrafficLimits {
            packets: packets(["rx_packets", "rx_packets_burst"])?,
            bytes: bytes(["rx_bandwidth", "rx_bandwidth_burst"])?,
        },
    };
    table.finish()?;
    Ok(limits)
}

fn mirror(nic: &Table<'_, '_>) -> Result<Option<MirrorSpec>, SourceError> {
    if nic.value("mirror").is_none() {
        return Ok(None);
    }
    let table = nic.table("mirror")?;
    let most_bytes = amount(&table, "bytes")?;
    let mirror = MirrorSpec {
        file: table.string("file")?.to_owned(),
        snap_bytes: u32_field(&table, "snap", Some(*SNAP_BYTES.end()))?,
        most_bytes: most_bytes.ok_or_else(|| table.error("bytes", "is missing"))?,
    };
    table.finish()?;
    Ok(Some(mirror))
}

/// A NIC as the stanza that [`nic`] reads.
#[must_use]
pub fn nic_to_toml(nic: &Nic) -> String {
    let port = match &nic.port {
        PortSpec::Switch { switch } => format!("{{ switch = \"{switch}\" }}"),
        PortSpec::Tap { interface } => format!("{{ tap = \"{interface}\" }}"),
        PortSpec::AfXdp { interface, queue } => {
            format!("{{ af_xdp = \"{interface}\", queue = {queue} }}")
        }
        PortSpec::Null => "\"null\"".to_owned(),
    };
    let socket = &nic.socket;
    let mut out = format!(
        "[[nic]]\nid = \"{}\"\nname = {}\nmac = \"{}\"\nmtu = {}\nqueue_pairs = {}\nport = {port}\n\
         socket = {{ name = \"{}\", uid = {}, gid = {}, mode = 0o{:o} }}\nallowed_uid = {}\n\
         force_removal = {}\ncheck_mac = {}\n",
        nic.id,
        toml::Value::from(nic.name.as_str()),
        nic.mac,
        nic.mtu,
        nic.queue_pairs,
        socket.name,
        socket.uid,
        socket.gid,
        socket.mode,
        nic.allowed_uid,
        nic.force_removal,
        nic.checks.mac,
    );
    let sources: Vec<_> = nic
        .checks
        .sources
        .iter()
        .map(|s| format!("\"{s}\""))
        .collect();
    // Writing to a String does not fail.
    if !sources.is_empty() {
        let _ = writeln!(out, "sources = [{}]", sources.join(", "));
    }
    if !nic.checks.trusted.is_nothing() {
        let names = nic.checks.trusted.names().join("\", \"");
        let _ = writeln!(out, "trusted = [\"{names}\"]");
    }
    let rates = [
        ("tx_packets", nic.limits.tx.packets),
        ("tx_bandwidth", nic.limits.tx.bytes),
        ("rx_packets", nic.limits.rx.packets),
        ("rx_bandwidth", nic.limits.rx.bytes),
    ];
    let rates: Vec<_> = rates
        .into_iter()
        .filter_map(|(name, rate)| {
            let rate = rate?;
            let (per_second, burst) = (rate.per_second, rate.burst);
            Some(format!("{name} = {per_second}, {name}_burst = {burst}"))
        })
        .collect();
    if !rates.is_empty() {
        let _ = writeln!(out, "limits = {{ {} }}", rates.join(", "));
    }
    if let Some(mirror) = &nic.mirror {
        let (file, snap) = (toml::Value::from(mirror.file.as_str()), mirror.snap_bytes);
        let most = mirror.most_bytes;
        let _ = writeln!(
            out,
            "mirror = {{ file = {file}, snap = {snap}, bytes = {most} }}"
        );
    }
    out
}
