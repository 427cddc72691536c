//! The record of a re-key: what a volume's file says of which part is encrypted with which key.
//!
//! It lies in the file or device itself, behind the volume's last byte, so that it travels with the
//! blocks and whoever holds the volume's lock is its only writer. [`layout`] says where, [`Record`] what,
//! `docs/formats/rekey.md` both for people. The data plane writes it while the volume is served; the
//! command line writes the first one ([`prepared`]) and reads it to export or recover a volume.
//!
//! Whoever can write the storage can forge a record, as it can put old ciphertext under any block: XTS
//! does not authenticate. So decoding is total, and every value of a decoded record lies in its range.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use sha2::{Digest, Sha256};

pub use crate::identity::RekeyId;
use crate::identity::VolumeId;

/// Bytes of one copy of the record.
pub const RECORD_BYTES: usize = 4096;
/// Copies of the record, one behind the other.
pub const COPIES: usize = 2;
/// Most bytes that are re-encrypted at a time, and those of the journal.
pub const ZONE_BYTES: u64 = 1 << 20;
/// The record begins at a multiple of this.
const ALIGN_BYTES: u64 = 1 << 20;
/// From the first copy of the record to the journal.
const JOURNAL_AT: u64 = 1 << 20;

const MAGIC: &[u8; 16] = b"bulkhead rekey 1";
const DIGEST_BYTES: usize = 32;
const DIGEST_AT: usize = RECORD_BYTES - DIGEST_BYTES;
/// A sequence number counts flushes: none ever comes near. (A forged one must not make us overflow.)
const MAX_SEQUENCE: u64 = 1 << 62;

/// Where the parts of a volume with a re-key lie in its file, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The copies of the record, [`RECORD_BYTES`] each.
    pub copies: [u64; COPIES],
    /// The journal, [`ZONE_BYTES`] long.
    pub journal: u64,
    /// What the file has to have.
    pub end: u64,
}

impl Layout {
    /// Where the record with this sequence number is written.
    #[must_use]
    pub fn copy_for(&self, sequence: u64) -> u64 {
        let [even, odd] = self.copies;
        if sequence.is_multiple_of(2) {
            even
        } else {
            odd
        }
    }
}

/// The layout of a volume of `size_bytes`; none if its file would be too long for any file system.
#[must_use]
pub fn layout(size_bytes: u64) -> Option<Layout> {
    let first = size_bytes.checked_next_multiple_of(ALIGN_BYTES)?;
    let journal = first.checked_add(JOURNAL_AT)?;
    let end = journal.checked_add(ZONE_BYTES)?;
    i64::try_from(end).ok()?;
    Some(Layout {
        copies: [first, first + RECORD_BYTES as u64],
        journal,
        end,
    })
}

/// What can be told of a key without it: 16 bytes that another key would hardly give (for how they are
/// made see `docs/formats/rekey.md`). Never secret.
pub type KeyCheck = [u8; 16];

/// The piece at the frontier that is being re-encrypted: the journal has it under the new key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zone {
    /// How many bytes from the frontier on: whole data units, at most [`ZONE_BYTES`].
    pub bytes: u64,
    /// SHA-256 of that many bytes at the start of the journal. If it is another, then the journal was
    /// not finished and the zone not touched.
    pub journal_sha256: [u8; 32],
}

/// Where a re-key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Everything is under the previous key, and no data plane has begun: the volume may still be served
    /// without the re-key.
    Prepared,
    /// What lies below the frontier is under the key, what lies from it on under the previous key.
    Running {
        /// In bytes from the volume's start, whole data units, at most its size.
        frontier_bytes: u64,
        /// Being re-encrypted.
        zone: Option<Zone>,
        /// Of the previous key.
        previous_check: KeyCheck,
        /// Of the key.
        check: KeyCheck,
    },
    /// Everything is under the key.
    Done {
        /// Of the key.
        check: KeyCheck,
    },
    /// It was done, and its previous key is dropped: the record says no more than that this re-key never
    /// begins again. What the volume is under now may be the key of a later one.
    Over {
        /// Of the key that it ended with.
        check: KeyCheck,
    },
}

impl Stage {
    /// Whether nothing of the volume is under the previous key any more.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Over { .. })
    }
}

/// The record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Whose.
    pub volume: VolumeId,
    /// Of which re-key.
    pub rekey: RekeyId,
    /// Size of the volume: it does not change during a re-key.
    pub size_bytes: u64,
    /// Its data unit: 512 or 4096.
    pub data_unit_bytes: u32,
    /// Counts the records written; the higher one counts. Even ones are written to the first copy.
    pub sequence: u64,
    /// Where the re-key is.
    pub stage: Stage,
}

/// What the place of the record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// No record.
    Nothing,
    /// This one.
    Record(Record),
    /// Something that begins as a record does, and no copy is whole.
    Damaged,
}

/// Offsets of the fields, all little-endian; what lies between them and [`DIGEST_AT`] is zero.
mod at {
    pub(super) const VOLUME: usize = 16;
    pub(super) const REKEY: usize = 32;
    pub(super) const SIZE: usize = 48;
    pub(super) const SEQUENCE: usize = 56;
    pub(super) const FRONTIER: usize = 64;
    pub(super) const ZONE: usize = 72;
    pub(super) const UNIT: usize = 80;
    pub(super) const STAGE: usize = 84;
    pub(super) const PREVIOUS_CHECK: usize = 88;
    pub(super) const CHECK: usize = 104;
    pub(super) const JOURNAL: usize = 120;
    pub(super) const END: usize = 152;
}

const NO_CHECK: KeyCheck = [0; 16];
const NO_DIGEST: [u8; DIGEST_BYTES] = [0; DIGEST_BYTES];

/// A stage as its fields: number, frontier, zone, journal, previous check, check.
type Fields = (u32, u64, u64, [u8; DIGEST_BYTES], KeyCheck, KeyCheck);

impl Record {
    /// One copy, as it is written.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let (stage, frontier, zone, journal, previous_check, check) = self.fields();
        let mut bytes = [0; RECORD_BYTES];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, at::VOLUME, &self.volume.0);
        put(&mut bytes, at::REKEY, &self.rekey.0);
        put(&mut bytes, at::SIZE, &self.size_bytes.to_le_bytes());
        put(&mut bytes, at::SEQUENCE, &self.sequence.to_le_bytes());
        put(&mut bytes, at::FRONTIER, &frontier.to_le_bytes());
        put(&mut bytes, at::ZONE, &zone.to_le_bytes());
        put(&mut bytes, at::UNIT, &self.data_unit_bytes.to_le_bytes());
        put(&mut bytes, at::STAGE, &stage.to_le_bytes());
        put(&mut bytes, at::PREVIOUS_CHECK, &previous_check);
        put(&mut bytes, at::CHECK, &check);
        put(&mut bytes, at::JOURNAL, &journal);
        let digest = digest(&bytes);
        put(&mut bytes, DIGEST_AT, &digest);
        bytes
    }

    fn fields(&self) -> Fields {
        match self.stage {
            Stage::Prepared => (0, 0, 0, NO_DIGEST, NO_CHECK, NO_CHECK),
            Stage::Running {
                frontier_bytes,
                zone,
                previous_check,
                check,
            } => {
                let bytes = zone.map_or(0, |zone| zone.bytes);
                let journal = zone.map_or(NO_DIGEST, |zone| zone.journal_sha256);
                (1, frontier_bytes, bytes, journal, previous_check, check)
            }
            Stage::Done { check } => (2, self.size_bytes, 0, NO_DIGEST, NO_CHECK, check),
            Stage::Over { check } => (3, self.size_bytes, 0, NO_DIGEST, NO_CHECK, check),
        }
    }

    /// One copy, as it was read; none if it is none that [`Record::encode`] writes for values in their
    /// ranges.
    #[must_use]
    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        if !has_magic(bytes) || bytes.get(DIGEST_AT..) != Some(digest(bytes).as_slice()) {
            return None;
        }
        let size_bytes = u64::from_le_bytes(get(bytes, at::SIZE)?);
        let data_unit_bytes = u32::from_le_bytes(get(bytes, at::UNIT)?);
        let sequence = u64::from_le_bytes(get(bytes, at::SEQUENCE)?);
        let record = Self {
            volume: VolumeId(get(bytes, at::VOLUME)?),
            rekey: RekeyId(get(bytes, at::REKEY)?),
            size_bytes,
            data_unit_bytes,
            sequence,
            stage: decode_stage(bytes, size_bytes, data_unit_bytes)?,
        };
        let unit_fits = matches!(data_unit_bytes, 512 | 4096)
            && size_bytes > 0
            && size_bytes.is_multiple_of(u64::from(data_unit_bytes));
        let in_range = unit_fits && layout(size_bytes).is_some() && sequence <= MAX_SEQUENCE;
        // Every byte that no field of this stage has is zero.
        (in_range && record.encode() == *bytes).then_some(record)
    }

    /// The record that follows this one.
    #[must_use]
    pub fn next(&self, stage: Stage) -> Self {
        Self {
            sequence: self.sequence.saturating_add(1),
            stage,
            ..*self
        }
    }
}

fn decode_stage(bytes: &[u8; RECORD_BYTES], size: u64, unit: u32) -> Option<Stage> {
    let check = get(bytes, at::CHECK)?;
    match u32::from_le_bytes(get(bytes, at::STAGE)?) {
        0 => Some(Stage::Prepared),
        1 => {
            let frontier_bytes = u64::from_le_bytes(get(bytes, at::FRONTIER)?);
            let zone_bytes = u64::from_le_bytes(get(bytes, at::ZONE)?);
            let unit = u64::from(unit);
            let end = frontier_bytes.checked_add(zone_bytes)?;
            let whole =
                unit > 0 && frontier_bytes.is_multiple_of(unit) && zone_bytes.is_multiple_of(unit);
            if end > size || zone_bytes > ZONE_BYTES || !whole {
                return None;
            }
            let zone = Zone {
                bytes: zone_bytes,
                journal_sha256: get(bytes, at::JOURNAL)?,
            };
            Some(Stage::Running {
                frontier_bytes,
                zone: (zone_bytes > 0).then_some(zone),
                previous_check: get(bytes, at::PREVIOUS_CHECK)?,
                check,
            })
        }
        2 => Some(Stage::Done { check }),
        3 => Some(Stage::Over { check }),
        _ => None,
    }
}

/// What is written to both copies, as one piece at the first, when a re-key is prepared: a record that says
/// that nothing has begun.
///
/// Whoever prepares a re-key first looks at what is there ([`find`]): over a record in [`Stage::Running`]
/// nothing may be written, its volume could not be read any more.
#[must_use]
pub fn prepared(
    volume: VolumeId,
    rekey: RekeyId,
    size_bytes: u64,
    data_unit_bytes: u32,
) -> [u8; COPIES * RECORD_BYTES] {
    let first = Record {
        volume,
        rekey,
        size_bytes,
        data_unit_bytes,
        sequence: 0,
        stage: Stage::Prepared,
    };
    let second = first.next(Stage::Prepared);
    let mut bytes = [0; COPIES * RECORD_BYTES];
    put(&mut bytes, 0, &first.encode());
    put(&mut bytes, RECORD_BYTES, &second.encode());
    bytes
}

/// What lies in the place of the record: of two whole copies the later one counts. A copy that is not whole
/// beside one that is was being written when the power failed, and nothing that it says had begun.
#[must_use]
pub fn find(copies: &[u8; COPIES * RECORD_BYTES]) -> Found {
    let (pieces, _) = copies.as_chunks::<RECORD_BYTES>();
    let whole = pieces.iter().enumerate().filter_map(|(index, piece)| {
        // A copy that lies in the other's place is none that we wrote.
        let record = Record::decode(piece)?;
        (record.sequence % COPIES as u64 == index as u64).then_some(record)
    });
    match whole.max_by_key(|record| record.sequence) {
        Some(record) => Found::Record(record),
        None if pieces.iter().any(has_magic) => Found::Damaged,
        None => Found::Nothing,
    }
}

fn has_magic(bytes: &[u8; RECORD_BYTES]) -> bool {
    bytes.starts_with(MAGIC)
}

fn digest(bytes: &[u8; RECORD_BYTES]) -> [u8; DIGEST_BYTES] {
    let covered = bytes.get(..DIGEST_AT).unwrap_or_default();
    Sha256::digest(covered).into()
}

/// SHA-256 of a zone's bytes in the journal, for [`Zone::journal_sha256`].
#[must_use]
pub fn journal_digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + value.len()) {
        to.copy_from_slice(value);
    }
}

fn get<const N: usize>(bytes: &[u8; RECORD_BYTES], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

const _: () = assert!(at::END <= DIGEST_AT && at::JOURNAL + DIGEST_BYTES == at::END);

#[cfg(test)]
mod tests;
