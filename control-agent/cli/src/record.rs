//! The record of a re-key behind a volume's end, as the command line reads it: which part of the volume
//! is under which key (`docs/formats/rekey.md`).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use bulkhead_bundle::Volume;
use bulkhead_protocol::rekey::{
    self, COPIES, Found, KeyCheck, Layout, RECORD_BYTES, Record, Stage, Zone,
};

use crate::failure::Failure;
use crate::image::length_of;

/// Bytes of both copies.
const RECORDS_BYTES: usize = COPIES * RECORD_BYTES;

/// Which key a volume's bytes are under, in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Below it everything is under the key, from it on under the previous key. A multiple of the data
    /// unit, at most the size.
    pub(crate) boundary_bytes: u64,
    /// What lies right below the boundary and has to be read from the journal.
    pub(crate) journal: Option<Journal>,
    /// What the key has to be.
    pub(crate) check: Option<Check>,
    /// What the previous key has to be.
    pub(crate) previous_check: Option<Check>,
}

/// A zone whose content is in the journal, whatever a crash left in its place. In bytes of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Journal {
    /// Where the zone begins.
    pub(crate) zone_at: u64,
    /// Where the journal begins.
    pub(crate) journal_at: u64,
    /// Length of the zone.
    pub(crate) bytes: u64,
}

/// A key's check value, and the re-key for which it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Check {
    /// Id of the re-key.
    pub(crate) rekey: [u8; 16],
    /// The value.
    pub(crate) value: KeyCheck,
}

/// Where a re-key's parts lie in the volume's file.
pub(crate) fn layout(volume: &Volume) -> Result<Layout, Failure> {
    rekey::layout(volume.size_bytes).ok_or_else(|| {
        Failure::new(format!(
            "volume {:?} is too large for a record behind its end",
            volume.name
        ))
    })
}

/// What lies in the place of the record; a file that ends before it has none.
pub(crate) fn find(file: &File, path: &Path, volume: &Volume) -> Result<Found, Failure> {
    let Some(layout) = rekey::layout(volume.size_bytes) else {
        return Ok(Found::Nothing);
    };
    let [first, _] = layout.copies;
    if length_of(file, path)? < first + RECORDS_BYTES as u64 {
        return Ok(Found::Nothing);
    }
    let mut copies = [0; RECORDS_BYTES];
    file.read_exact_at(&mut copies, first)
        .map_err(|e| Failure::at(path, format!("at byte {first}: {e}")))?;
    Ok(rekey::find(&copies))
}

/// How far a re-key is, in percent of the volume, rounded down.
pub(crate) fn percent(record: &Record) -> u64 {
    let done = match record.stage {
        Stage::Prepared => 0,
        Stage::Running { frontier_bytes, .. } => frontier_bytes,
        Stage::Done { .. } | Stage::Over { .. } => record.size_bytes,
    };
    let percent = u128::from(done) * 100 / u128::from(record.size_bytes.max(1));
    u64::try_from(percent).unwrap_or(100)
}

/// Which part of a volume is under which of the keys that its stanza has.
///
/// # Errors
/// If the stanza's keys are not those that the record speaks of, or it is damaged.
pub(crate) fn parts(file: &File, path: &Path, volume: &Volume) -> Result<Parts, Failure> {
    let not_begun = Parts {
        boundary_bytes: match volume.rekey {
            Some(_) => 0,
            None => volume.size_bytes,
        },
        journal: None,
        check: None,
        previous_check: None,
    };
    let record = match find(file, path, volume)? {
        Found::Record(record) if record.volume == volume.id => record,
        // A copy of another volume's file, say: nothing of it is about this one.
        Found::Record(_) | Found::Nothing => return Ok(not_begun),
        Found::Damaged => return Err(damaged(path, volume)),
    };
    let ours = volume.rekey.as_ref().map(|rekey| rekey.id) == Some(record.rekey);
    if matches!(record.stage, Stage::Over { .. }) && !ours {
        // What the volume is under since, and which size it has, it does not know.
        return Ok(not_begun);
    }
    let geometry = (record.size_bytes, Some(record.data_unit_bytes));
    if geometry != (volume.size_bytes, volume.data_unit_bytes) {
        return Err(Failure::at(
            path,
            "its re-key record is of another size or data unit than the bundle says",
        ));
    }
    let check = |value| {
        Some(Check {
            rekey: record.rekey.0,
            value,
        })
    };
    match record.stage {
        Stage::Prepared => Ok(not_begun),
        Stage::Running {
            frontier_bytes,
            zone,
            check: key,
            previous_check,
        } if ours => {
            let journal = match zone {
                Some(zone) => journal(file, path, volume, frontier_bytes, zone)?,
                None => None,
            };
            Ok(Parts {
                boundary_bytes: frontier_bytes + journal.map_or(0, |journal| journal.bytes),
                journal,
                check: check(key),
                previous_check: check(previous_check),
            })
        }
        Stage::Running { .. } => Err(Failure::at(
            path,
            format!(
                "its re-key {} stopped at {} %, so that two keys are needed: give the bundle or \
                 stanza with that re-key (`bulkhead show` prints the id)",
                record.rekey,
                percent(&record)
            ),
        )),
        Stage::Done { check: key } | Stage::Over { check: key }
            if ours || volume.rekey.is_none() =>
        {
            Ok(Parts {
                boundary_bytes: volume.size_bytes,
                check: check(key),
                ..not_begun
            })
        }
        // The next re-key, and its key to replace is the one that the last ended with.
        Stage::Done { check: key } | Stage::Over { check: key } => Ok(Parts {
            previous_check: check(key),
            ..not_begun
        }),
    }
}

/// The zone as the journal has it; none if the journal was not finished, and so the zone not touched.
fn journal(
    file: &File,
    path: &Path,
    volume: &Volume,
    zone_at: u64,
    zone: Zone,
) -> Result<Option<Journal>, Failure> {
    let journal_at = layout(volume)?.journal;
    let length = usize::try_from(zone.bytes)?;
    if length_of(file, path)? < journal_at + zone.bytes {
        return Ok(None);
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, journal_at)
        .map_err(|e| Failure::at(path, format!("at byte {journal_at}: {e}")))?;
    let whole = rekey::journal_digest(&bytes) == zone.journal_sha256;
    Ok(whole.then_some(Journal {
        zone_at,
        journal_at,
        bytes: zone.bytes,
    }))
}

pub(crate) fn damaged(path: &Path, volume: &Volume) -> Failure {
    let at = match rekey::layout(volume.size_bytes) {
        Some(layout) => layout.copies[0],
        None => volume.size_bytes,
    };
    Failure::at(
        path,
        format!(
            "its re-key record is damaged: no copy of it ({RECORDS_BYTES} bytes from byte {at}) is \
             whole, and which part is under which key stands nowhere else; restore them from a backup"
        ),
    )
}
