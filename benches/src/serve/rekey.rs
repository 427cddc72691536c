//! A re-key without a key service: how large a disk is whose file has room for the record, and the record
//! that makes it begin. The formats are those of a volume (`docs/formats/rekey.md`).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use bulkhead_protocol::rekey::{
    COPIES, Found, Layout, RECORD_BYTES, Stage, ZONE_BYTES, find, layout, prepared,
};
use bulkhead_protocol::{RekeyId, VolumeId};

use super::devices::Backing;
use super::file::AlignedBuffer;

/// Both copies of the record.
const RECORDS_BYTES: usize = COPIES * RECORD_BYTES;

/// Why a disk can't be re-keyed.
#[derive(Debug, thiserror::Error)]
pub enum RekeyError {
    /// Nowhere to keep a record.
    #[error("a disk of null: or ram: can't be re-keyed: its record lies in a file, give file:PATH")]
    NoFile,
    /// Too short.
    #[error(
        "{0} bytes have no room for a re-key: behind the disk, which has whole MiB, two more MiB are \
         needed (`truncate -s +2M`)"
    )]
    NoRoom(u64),
    /// The record can't be read or written.
    #[error("the record of the re-key: {0}")]
    Io(#[from] io::Error),
    /// The record is of something else.
    #[error(
        "the file has the record of {0}: it would be lost, go on with that one or use another file"
    )]
    Other(String),
}

/// Bytes of the disk in a file of so many: all whole MiB but the last two, which are the record's and the
/// journal's.
///
/// # Errors
/// [`RekeyError::NoRoom`].
pub fn volume_bytes(file_bytes: u64) -> Result<u64, RekeyError> {
    let room = 2 * ZONE_BYTES;
    let bytes = file_bytes.saturating_sub(room) / ZONE_BYTES * ZONE_BYTES;
    if bytes == 0 || layout(bytes).is_none() {
        return Err(RekeyError::NoRoom(file_bytes));
    }
    Ok(bytes)
}

/// Whose record a disk's is: the first bytes of its serial, the same ones at each start.
#[must_use]
pub fn volume_id(serial: &[u8; 20]) -> VolumeId {
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(serial) {
        *to = *from;
    }
    VolumeId(id)
}

/// Sees to it that the disk's file has a record of this re-key: one that is there is gone on with, one of
/// an earlier re-key that came to its end, or never began, is replaced.
///
/// # Errors
/// See [`RekeyError`].
pub fn prepare(
    backing: &Backing,
    volume: VolumeId,
    rekey: RekeyId,
    unit_bytes: u32,
) -> Result<(), RekeyError> {
    let file = file(backing).ok_or(RekeyError::NoFile)?;
    let size_bytes = volume_bytes(backing.bytes())?;
    let places = layout(size_bytes).ok_or(RekeyError::NoRoom(backing.bytes()))?;
    let found = read(file, &places)?;
    let other = match found {
        Found::Nothing => None,
        Found::Damaged => Some("a re-key, damaged".to_owned()),
        Found::Record(record) if record.volume != volume => {
            Some(format!("another disk's re-key, {}", record.volume))
        }
        Found::Record(record) if record.rekey == rekey => return Ok(()),
        Found::Record(record) if matches!(record.stage, Stage::Running { .. }) => {
            Some(format!("re-key {} under way", record.rekey))
        }
        Found::Record(_) => None,
    };
    if let Some(other) = other {
        return Err(RekeyError::Other(other));
    }
    write(
        file,
        &places,
        &prepared(volume, rekey, size_bytes, unit_bytes),
    )?;
    Ok(())
}

fn file(backing: &Backing) -> Option<&File> {
    match backing {
        Backing::Null { .. } | Backing::Ram { .. } => None,
        Backing::File { file, .. } | Backing::VolatileCache { file, .. } => Some(file),
        Backing::Delay { inner, .. }
        | Backing::Hang { inner, .. }
        | Backing::Error { inner, .. } => self::file(inner),
    }
}

fn read(file: &File, places: &Layout) -> io::Result<Found> {
    let [first, _] = places.copies;
    let mut buffer = AlignedBuffer::new(RECORDS_BYTES);
    file.read_exact_at(buffer.bytes_mut(), first)?;
    let mut copies = [0; RECORDS_BYTES];
    copies.copy_from_slice(buffer.bytes_mut());
    Ok(find(&copies))
}

fn write(file: &File, places: &Layout, copies: &[u8; RECORDS_BYTES]) -> io::Result<()> {
    let [first, _] = places.copies;
    let mut buffer = AlignedBuffer::new(RECORDS_BYTES);
    buffer.bytes_mut().copy_from_slice(copies);
    file.write_all_at(buffer.bytes_mut(), first)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const VOLUME: VolumeId = VolumeId([1; 16]);
    const FIRST: RekeyId = RekeyId([2; 16]);
    const SECOND: RekeyId = RekeyId([3; 16]);

    fn backing(bytes: u64) -> Backing {
        let file = tempfile::tempfile().expect("file");
        file.set_len(bytes).expect("length");
        Backing::Delay {
            most: std::time::Duration::ZERO,
            inner: Box::new(Backing::VolatileCache { file, bytes }),
        }
    }

    fn record(backing: &Backing) -> bulkhead_protocol::rekey::Record {
        let places = layout(2 * MIB).expect("fits");
        match read(file(backing).expect("file"), &places).expect("read") {
            Found::Record(record) => record,
            other => panic!("{other:?}"),
        }
    }

    fn set_stage(backing: &Backing, stage: Stage) {
        let next = record(backing).next(stage);
        let places = layout(2 * MIB).expect("fits");
        let at = places.copy_for(next.sequence);
        let file = file(backing).expect("file");
        file.write_all_at(&next.encode(), at).expect("write");
    }

    const RUNNING: Stage = Stage::Running {
        frontier_bytes: 4096,
        zone: None,
        previous_check: [0; 16],
        check: [0; 16],
    };

    #[test]
    fn a_record_is_prepared_once_and_then_gone_on_with() {
        let backing = backing(4 * MIB);
        prepare(&backing, VOLUME, FIRST, 512).expect("prepares");
        let first = record(&backing);
        assert_eq!((first.stage, first.rekey), (Stage::Prepared, FIRST));
        assert_eq!((first.size_bytes, first.data_unit_bytes), (2 * MIB, 512));
        set_stage(&backing, RUNNING);
        prepare(&backing, VOLUME, FIRST, 512).expect("goes on");
        assert_eq!(record(&backing).stage, RUNNING);
    }

    #[test]
    fn only_a_record_that_nobody_needs_is_replaced() {
        let backing = backing(4 * MIB + 5);
        prepare(&backing, VOLUME, FIRST, 4096).expect("prepares");
        prepare(&backing, VOLUME, SECOND, 4096).expect("the first never began");
        assert_eq!(record(&backing).rekey, SECOND);
        set_stage(&backing, RUNNING);
        for (volume, rekey) in [(VOLUME, FIRST), (VolumeId([9; 16]), SECOND)] {
            let error = prepare(&backing, volume, rekey, 4096).expect_err("it is under way");
            assert!(matches!(error, RekeyError::Other(_)), "{error}");
            assert_eq!(record(&backing).stage, RUNNING);
        }
        set_stage(&backing, Stage::Done { check: [0; 16] });
        prepare(&backing, VOLUME, FIRST, 4096).expect("the second is done");
        assert_eq!(record(&backing).stage, Stage::Prepared);
    }

    #[test]
    fn a_disk_without_room_is_refused() {
        for (bytes, expected) in [(3 * MIB, MIB), (4 * MIB - 1, MIB), (10 * MIB, 8 * MIB)] {
            assert_eq!(volume_bytes(bytes).expect("room"), expected, "{bytes}");
        }
        for bytes in [0, MIB, 2 * MIB, 3 * MIB - 1, u64::MAX] {
            let error = volume_bytes(bytes).expect_err("no room");
            assert!(error.to_string().contains("two more MiB"), "{bytes}");
        }
        let error = prepare(&Backing::Null { bytes: 8 * MIB }, VOLUME, FIRST, 512);
        assert!(matches!(error, Err(RekeyError::NoFile)), "{error:?}");
    }

    #[test]
    fn the_volume_is_told_by_the_serial() {
        let id = volume_id(b"serve-1\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&id.0, b"serve-1\0\0\0\0\0\0\0\0\0");
    }
}
