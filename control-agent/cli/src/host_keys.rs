//! What a host's status says of its key and of the volumes it shredded: the proof of a shred.

use std::fmt::Write as _;

use bulkhead_files::text::to_hex;
use bulkhead_protocol::keys::{HostKeys, Shred, ShredState};

use crate::json::Json;
use crate::output::{printable, table, utc};

/// Digits of a fingerprint in the table; `--json` has all of them.
const SHORT_DIGITS: usize = 16;

/// Which public key volumes are to be sealed to.
pub(crate) fn fingerprint_line(keys: &HostKeys) -> String {
    format!("key     {}\n", to_hex(&keys.fingerprint[..]))
}

/// The table of what was shredded; empty if nothing was.
pub(crate) fn shreds(keys: &HostKeys) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    if let Some(reason) = &keys.unfinished {
        let _ = writeln!(
            out,
            "\nthe files of the host's key are not in order: {}",
            printable(reason)
        );
    }
    if keys.shreds.is_empty() {
        return out;
    }
    out.push_str("\nshredded\n");
    let header = [
        "VOLUME",
        "STATE",
        "EPOCH",
        "WHEN",
        "OLD HOST KEY",
        "NEW HOST KEY",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(keys.shreds.iter().map(row));
    out.push_str(&table(&rows));
    let told = keys.shreds.len() as u64;
    if keys.shreds_total > told {
        let _ = writeln!(out, "  and {} before them", keys.shreds_total - told);
    }
    out
}

fn row(shred: &Shred) -> Vec<String> {
    let short = |fingerprint: &[u8]| {
        let mut hex = to_hex(fingerprint);
        hex.truncate(SHORT_DIGITS);
        hex
    };
    vec![
        shred.volume.to_string(),
        state_words(shred.state).to_owned(),
        shred.epoch.to_string(),
        utc(shred.time_s),
        short(&shred.destroyed_key[..]),
        short(&shred.new_key[..]),
    ]
}

/// How far a shred is, for people.
fn state_words(state: ShredState) -> &'static str {
    match state {
        ShredState::Done => "destroyed",
        ShredState::HeldByDataplane => "held by the data plane",
        ShredState::KeyOnDisk => "old host key on disk",
    }
}

/// How far a shred is, for programs.
fn state_name(state: ShredState) -> &'static str {
    match state {
        ShredState::Done => "destroyed",
        ShredState::HeldByDataplane => "held_by_dataplane",
        ShredState::KeyOnDisk => "key_on_disk",
    }
}

/// The JSON object: every field of [`HostKeys`] under its own name.
pub(crate) fn to_json(keys: &HostKeys) -> Json {
    let hex = |fingerprint: &[u8]| Json::Text(to_hex(fingerprint));
    let shred = |shred: &Shred| {
        Json::Object(vec![
            ("volume", Json::text(shred.volume)),
            ("epoch", Json::Number(shred.epoch)),
            ("time_s", Json::Number(shred.time_s)),
            ("destroyed_key", hex(&shred.destroyed_key[..])),
            ("new_key", hex(&shred.new_key[..])),
            ("state", Json::text(state_name(shred.state))),
        ])
    };
    Json::Object(vec![
        ("fingerprint", hex(&keys.fingerprint[..])),
        (
            "shreds",
            Json::Array(keys.shreds.iter().map(shred).collect()),
        ),
        ("shreds_total", Json::Number(keys.shreds_total)),
        (
            "unfinished",
            Json::or_null(keys.unfinished.as_ref(), Json::text),
        ),
    ])
}
