//! A host's status as a table for people and as JSON for programs.

use std::fmt::Write as _;

use bulkhead_files::text::to_hex;
use bulkhead_protocol::admin::{HostStatus, ProcessStatus, VolumeEntry};
use bulkhead_protocol::control::{
    Latency, RekeyProgress, RekeyState, StorageState, StorageStatus, VolumeStatus,
};

use crate::host_keys;
use crate::json::Json;
use crate::limits;
use crate::nics::NetStatus;
use crate::output::{printable, rounded, row, size, table};
use crate::programs;

/// Digits of a measurement in the table; `--json` has all of them.
const SHORT_DIGITS: usize = 16;

/// The table.
pub(crate) fn to_text(status: &HostStatus, networks: &NetStatus) -> String {
    let mut out = String::new();
    let digest = status
        .digest
        .map_or("none".to_owned(), |digest| to_hex(&digest[..]));
    let epoch = status
        .epoch
        .map_or("none: no bundle was applied yet".to_owned(), |epoch| {
            format!("{epoch} (the next is above {})", status.epoch_floor)
        });
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "host    {}\nepoch   {epoch}\ndigest  {digest}\n",
        printable(&status.host)
    );
    if let Some(keys) = &status.keys {
        out.push_str(&host_keys::fingerprint_line(keys));
    }
    if let Some(workers) = &status.workers {
        out.push_str(&limits::workers(workers));
    }
    out.push_str("\nprocesses\n");
    out.push_str(&processes(&status.processes));
    out.push_str(&programs::to_text(&status.programs));
    out.push_str("\nvolumes\n");
    out.push_str(&volumes(&status.volumes));
    out.push_str(&limits::limits(status));
    out.push_str(&networks.to_text());
    if let Some(keys) = &status.keys {
        out.push_str(&host_keys::shreds(keys));
    }
    if !status.pending.is_empty() {
        out.push_str("\npending: failed, and tried again\n");
        for step in &status.pending {
            let _ = writeln!(out, "  {}", printable(step));
        }
    }
    out
}

fn processes(processes: &[ProcessStatus]) -> String {
    let mut rows = vec![row(&["ROLE", "PID", "GENERATION", "MEASUREMENT"])];
    for process in processes {
        let mut measurement = to_hex(&process.measurement[..]);
        measurement.truncate(SHORT_DIGITS);
        rows.push(vec![
            process.role.to_string(),
            process.pid.to_string(),
            process.generation.to_string(),
            measurement,
        ]);
    }
    table(&rows)
}

fn volumes(volumes: &[VolumeEntry]) -> String {
    if volumes.is_empty() {
        return "  none\n".to_owned();
    }
    let mut rows = vec![row(&[
        "NAME",
        "STATE",
        "HELD",
        "SIZE",
        "KEY",
        "UNDER KEY",
        "REKEY",
        "QUEUES",
        "OK",
        "FAILED",
        "READ",
        "WRITTEN",
        "SOCKET",
    ])];
    for entry in volumes {
        rows.push(volume_row(entry));
    }
    let mut out = table(&rows);
    for entry in volumes {
        if let Some(fault) = entry.state.as_ref().and_then(|state| state.fault.as_ref()) {
            let _ = writeln!(out, "  {}: {}", printable(&entry.name), printable(fault));
        }
        let storage = entry.state.as_ref().and_then(|state| state.storage);
        if let Some(storage) = storage.filter(|storage| storage.state != StorageState::Fine) {
            let _ = writeln!(out, "  {}: storage {storage}", printable(&entry.name));
        }
        let rekey = entry.state.as_ref().and_then(|state| state.rekey.as_ref());
        if let Some(RekeyState::Failed { reason }) = rekey.map(|rekey| &rekey.state) {
            let _ = writeln!(
                out,
                "  {}: its re-key stopped: {}",
                printable(&entry.name),
                printable(reason)
            );
        }
    }
    out
}

fn volume_row(entry: &VolumeEntry) -> Vec<String> {
    let mut cells = vec![
        printable(&entry.name),
        state_word(entry.state.as_ref()).to_owned(),
    ];
    match &entry.state {
        Some(state) => {
            let queues = match state.retired_queues {
                0 => state.running_queues.to_string(),
                retired => format!("{} ({retired} retired)", state.running_queues),
            };
            cells.extend([
                held_word(state).to_owned(),
                if state.attached {
                    size(state.capacity_bytes)
                } else {
                    "-".to_owned()
                },
                if state.encrypted { "held" } else { "-" }.to_owned(),
                entry.key_bytes.map_or("-".to_owned(), rounded),
                state.rekey.as_ref().map_or("-".to_owned(), rekey_words),
                queues,
                state.requests_ok.to_string(),
                state.requests_failed.to_string(),
                size(state.read_bytes),
                size(state.written_bytes),
            ]);
        }
        None => cells.extend(row(&["?"; 10])),
    }
    cells.push(printable(&entry.socket_path));
    cells
}

/// What a volume is doing, in one word.
fn state_word(state: Option<&VolumeStatus>) -> &'static str {
    match state {
        None => "unknown",
        Some(state) if state.fault.is_some() => "failed",
        Some(VolumeStatus {
            storage: Some(storage),
            ..
        }) if storage.state != StorageState::Fine => storage_word(storage.state),
        Some(state) if !state.attached => "detached",
        Some(state) if state.connected => "connected",
        Some(_) => "waiting",
    }
}

/// How a storage does, in one word.
fn storage_word(state: StorageState) -> &'static str {
    match state {
        StorageState::Fine => "fine",
        StorageState::Slow => "slow",
        StorageState::Hung => "hung",
        StorageState::GivenUp => "given-up",
    }
}

/// How far a re-key is.
fn rekey_words(progress: &RekeyProgress) -> String {
    let percent = progress.percent();
    match progress.state {
        RekeyState::Waiting => format!("{percent} % waits"),
        RekeyState::Running => format!("{percent} %"),
        RekeyState::Done => "done".to_owned(),
        RekeyState::Failed { .. } => format!("{percent} % stopped"),
    }
}

/// Whether the host holds the volume, in one word.
fn held_word(state: &VolumeStatus) -> &'static str {
    match (state.holds_volume, state.waits_for_volume) {
        (true, _) => "yes",
        (false, true) => "waits", // somebody else does
        (false, false) => "no",
    }
}

/// The JSON object: every field of [`HostStatus`] under its own name, with the networks.
pub(crate) fn to_json(status: &HostStatus, networks: &NetStatus) -> String {
    let texts = |texts: &[String]| Json::Array(texts.iter().map(Json::text).collect());
    let mut fields = vec![
        ("host", Json::text(&status.host)),
        ("epoch", Json::or_null(status.epoch, Json::Number)),
        ("epoch_floor", Json::Number(status.epoch_floor)),
        (
            "digest",
            Json::or_null(status.digest, |digest| Json::Text(to_hex(&digest[..]))),
        ),
        (
            "processes",
            Json::Array(status.processes.iter().map(process_json).collect()),
        ),
        (
            "volumes",
            Json::Array(status.volumes.iter().map(volume_json).collect()),
        ),
        ("pending", texts(&status.pending)),
        (
            "keys",
            Json::or_null(status.keys.as_deref(), host_keys::to_json),
        ),
        ("groups", limits::groups_json(&status.groups)),
        (
            "workers",
            Json::or_null(status.workers.as_deref(), limits::workers_json),
        ),
        ("programs", programs::to_json(&status.programs)),
    ];
    fields.extend(networks.to_json());
    Json::Object(fields).to_line()
}

fn process_json(process: &ProcessStatus) -> Json {
    Json::Object(vec![
        ("role", Json::text(process.role)),
        ("pid", Json::Number(process.pid.into())),
        ("generation", Json::Number(process.generation)),
        ("measurement", Json::Text(to_hex(&process.measurement[..]))),
    ])
}

fn volume_json(entry: &VolumeEntry) -> Json {
    Json::Object(vec![
        ("id", Json::text(entry.volume)),
        ("name", Json::text(&entry.name)),
        ("socket", Json::text(&entry.socket)),
        ("socket_path", Json::text(&entry.socket_path)),
        ("state", Json::or_null(entry.state.as_ref(), state_json)),
        ("key_bytes", Json::or_null(entry.key_bytes, Json::Number)),
        ("limits", limits::limits_json(&entry.limits)),
        ("group", Json::or_null(entry.group.as_ref(), Json::text)),
    ])
}

fn state_json(state: &VolumeStatus) -> Json {
    Json::Object(vec![
        ("attached", Json::Bool(state.attached)),
        ("connected", Json::Bool(state.connected)),
        ("capacity_bytes", Json::Number(state.capacity_bytes)),
        ("holds_volume", Json::Bool(state.holds_volume)),
        ("waits_for_volume", Json::Bool(state.waits_for_volume)),
        ("encrypted", Json::Bool(state.encrypted)),
        ("running_queues", Json::Number(state.running_queues.into())),
        ("retired_queues", Json::Number(state.retired_queues.into())),
        ("requests_ok", Json::Number(state.requests_ok)),
        ("requests_failed", Json::Number(state.requests_failed)),
        ("read_bytes", Json::Number(state.read_bytes)),
        ("written_bytes", Json::Number(state.written_bytes)),
        ("fault", Json::or_null(state.fault.as_ref(), Json::text)),
        ("rekey", Json::or_null(state.rekey.as_ref(), rekey_json)),
        (
            "storage",
            Json::or_null(state.storage.as_ref(), storage_json),
        ),
        ("throttled_ms", Json::Number(state.throttled_ms)),
    ])
}

fn storage_json(storage: &StorageStatus) -> Json {
    let latency = |latency: &Latency| {
        Json::Object(vec![
            ("median_us", Json::Number(latency.median_us)),
            ("p99_us", Json::Number(latency.p99_us)),
            ("p999_us", Json::Number(latency.p999_us)),
        ])
    };
    Json::Object(vec![
        ("state", Json::text(storage_word(storage.state))),
        ("old_requests", Json::Number(storage.old_requests.into())),
        ("oldest_ms", Json::Number(storage.oldest_ms)),
        ("slow_after_ms", Json::Number(storage.slow_after_ms)),
        ("slow_total", Json::Number(storage.slow_total)),
        ("latency", Json::or_null(storage.latency.as_ref(), latency)),
    ])
}

fn rekey_json(progress: &RekeyProgress) -> Json {
    let (state, reason) = match &progress.state {
        RekeyState::Waiting => ("waiting", None),
        RekeyState::Running => ("running", None),
        RekeyState::Done => ("done", None),
        RekeyState::Failed { reason } => ("failed", Some(reason)),
    };
    Json::Object(vec![
        ("state", Json::text(state)),
        ("done_bytes", Json::Number(progress.done_bytes)),
        ("total_bytes", Json::Number(progress.total_bytes)),
        ("reason", Json::or_null(reason, Json::text)),
    ])
}
