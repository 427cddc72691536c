//! The keys of a volume in the source: `[[volume.sealed_key]]`, and `[volume.rekey]` with the previous
//! ones.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt::Write as _;

use super::parsed;
use crate::reader::{SourceError, Table};
use crate::schema::{Rekey, SealedKeyEntry, Volume};
use crate::text;

/// The sealed keys of a list of tables.
pub(super) fn entries(
    table: &Table<'_, '_>,
    field: &'static str,
) -> Result<Vec<SealedKeyEntry>, SourceError> {
    let mut entries = Vec::new();
    for key in table.tables(field)? {
        entries.push(SealedKeyEntry {
            recipient: key.string("recipient")?.to_owned(),
            fingerprint: text::from_hex(key.string("fingerprint")?)
                .ok_or_else(|| key.error("fingerprint", "is not lower-case hex"))?,
            enc: base64(&key, "enc")?,
            ciphertext: base64(&key, "ciphertext")?,
        });
        key.finish()?;
    }
    Ok(entries)
}

/// The re-key of a volume, if it has one.
pub(super) fn rekey(volume: &Table<'_, '_>) -> Result<Option<Rekey>, SourceError> {
    if volume.value("rekey").is_none() {
        return Ok(None);
    }
    let table = volume.table("rekey")?;
    let rekey = Rekey {
        id: parsed(&table, "id", table.string("id")?)?,
        previous_keys: entries(&table, "previous_key")?,
    };
    table.finish()?;
    Ok(Some(rekey))
}

fn base64(table: &Table<'_, '_>, field: &'static str) -> Result<Vec<u8>, SourceError> {
    match text::from_base64(table.string(field)?) {
        Some(bytes) => Ok(bytes.to_vec()),
        None => Err(table.error(field, "is not base64")),
    }
}

/// Writes the keys of a volume as [`entries`] and [`rekey`] read them.
pub(super) fn write(out: &mut String, volume: &Volume) {
    write_entries(out, "volume.sealed_key", &volume.sealed_keys);
    if let Some(rekey) = &volume.rekey {
        // Writing to a String does not fail.
        let _ = write!(out, "\n[volume.rekey]\nid = \"{}\"\n", rekey.id);
        write_entries(out, "volume.rekey.previous_key", &rekey.previous_keys);
    }
}

fn write_entries(out: &mut String, table: &str, entries: &[SealedKeyEntry]) {
    for key in entries {
        let _ = write!(
            out,
            "\n[[{table}]]\nrecipient = {}\nfingerprint = \"{}\"\nenc = \"{}\"\nciphertext = \"{}\"\n",
            toml::Value::from(key.recipient.as_str()),
            text::to_hex(&key.fingerprint),
            text::to_base64(&key.enc),
            text::to_base64(&key.ciphertext),
        );
    }
}
