//! The record of a re-key behind a volume: found and held against the keys that were granted, written in turn
//! to its two places.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ops::Range;

use bulkhead_crypto::key_check;
use bulkhead_protocol::rekey::{
    COPIES, Found, KeyCheck, Layout, RECORD_BYTES, Record, Stage, Zone, find, journal_digest,
    layout,
};
use bulkhead_protocol::{RekeyId, VolumeId};

use super::io::{Errno, Io, Pieces};
use crate::blk::{BlkDevice, Cipher, Ciphers, SECTOR_BYTES};
use crate::storage::Storage;

const PLACE_BYTES: usize = COPIES * RECORD_BYTES;

/// A volume and what is behind it.
#[derive(Debug)]
pub(super) struct Volume<'a> {
    pub(super) device: &'a BlkDevice,
    pub(super) storage: &'a dyn Storage,
}

/// What was found out about a volume.
#[derive(Debug)]
pub(super) enum State {
    /// It is not re-keyed: everything is under the key.
    Single,
    /// It is, and this is how far it is. There is no interrupted zone.
    Rekeyed(Layout, Record),
    /// It is, and can't go on; the rest of it can be served.
    Stuck(Stuck),
}

/// A re-key that can't go on until the volume is taken anew.
#[derive(Debug)]
pub(super) struct Stuck {
    /// What lies below is under the key, the rest under the previous key.
    pub(super) frontier_bytes: u64,
    /// Bytes of which nobody knows what they hold.
    pub(super) fails: Option<Range<u64>>,
    /// For the operator.
    pub(super) reason: String,
}

impl Volume<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.device.capacity_sectors() * SECTOR_BYTES
    }

    /// Finds out what is under which key, and brings what was interrupted to its end, so that the volume can be
    /// served. Writes only where a re-key begins or a zone was interrupted.
    ///
    /// # Errors
    /// Why it can't be served with the keys that it has, for the operator.
    pub(super) fn take(&self, io: &mut Io, ciphers: &Ciphers) -> Result<State, String> {
        let Some((layout, found)) = self.found(io)? else {
            return match ciphers.rekey {
                None => Ok(State::Single),
                Some(_) => Err(self.no_room()),
            };
        };
        let Some(volume) = ciphers.volume else {
            return Ok(State::Single);
        };
        match (&ciphers.rekey, found) {
            (Some(_), _) if self.device.storage_bytes() < layout.end => Err(self.no_room()),
            (None, found) => {
                judge_single(volume, &ciphers.cipher, &found)?;
                self.tidy(io, volume, &found);
                Ok(State::Single)
            }
            (Some(rekey), Found::Record(record))
                if record.volume == volume && record.rekey == rekey.id =>
            {
                self.resume(io, &layout, record, &ciphers.cipher, &rekey.previous)
            }
            (Some(rekey), found) => Err(not_prepared(&rekey.id, &found)),
        }
    }

    /// The record as it is, without any judgement; none where there is no room for one.
    pub(super) fn found(&self, io: &mut Io) -> Result<Option<(Layout, Found)>, String> {
        let has = self.device.storage_bytes();
        let fits = |layout: &Layout| layout.copies[0] + PLACE_BYTES as u64 <= has;
        let Some(layout) = layout(self.bytes()).filter(fits) else {
            return Ok(None);
        };
        let [at, _] = layout.copies;
        let pieces = io.read(self.storage, at, PLACE_BYTES as u64);
        let pieces = pieces.map_err(|e| format!("the record of a re-key can't be read: {e}"))?;
        let mut copies = [0; PLACE_BYTES];
        let read = pieces
            .first()
            .is_some_and(|p| p.chunk.copy_out(&mut copies));
        io.give(pieces);
        if !read {
            return Err("the record of a re-key can't be read: out of memory".to_owned());
        }
        Ok(Some((layout, find(&copies))))
    }

    fn no_room(&self) -> String {
        let needs = layout(self.bytes()).map_or(u64::MAX, |layout| layout.end);
        format!(
            "a re-key needs room behind the volume: its file or device has to have {needs} bytes; \
             make it so long (the volume's size stays as it is), then run `bulkhead volume rekey \
             --prepare`"
        )
    }

    /// Holds a record of the right re-key against the volume and its keys, and goes on from there.
    fn resume(
        &self,
        io: &mut Io,
        layout: &Layout,
        record: Record,
        key: &Cipher,
        previous: &Cipher,
    ) -> Result<State, String> {
        if record.size_bytes != self.bytes() || record.data_unit_bytes != key.unit.bytes() {
            return Err(format!(
                "the record of its re-key is of {} bytes in data units of {}, the volume of {} in \
                 units of {}: neither changes during a re-key",
                record.size_bytes,
                record.data_unit_bytes,
                self.bytes(),
                key.unit.bytes()
            ));
        }
        let ours = check(key, &record.rekey)?;
        let before = check(previous, &record.rekey)?;
        match record.stage {
            Stage::Prepared => {
                let begun = record.next(Stage::Running {
                    frontier_bytes: 0,
                    zone: None,
                    previous_check: before,
                    check: ours,
                });
                Ok(match self.put(io, layout, &begun, Vec::new()) {
                    Ok(_) => State::Rekeyed(*layout, begun),
                    // Whether it was written or not: everything is under the previous key.
                    Err(errno) => State::Stuck(Stuck {
                        frontier_bytes: 0,
                        fails: None,
                        reason: format!("the record of its re-key can't be written: {errno}"),
                    }),
                })
            }
            Stage::Running {
                check,
                previous_check,
                ..
            } if check != ours || previous_check != before => Err(other_keys(&record.rekey)),
            Stage::Done { check } | Stage::Over { check } if check != ours => {
                Err(other_keys(&record.rekey))
            }
            Stage::Running {
                frontier_bytes,
                zone: Some(zone),
                ..
            } => {
                let finished = self.finish_zone(io, layout, &record, frontier_bytes, &zone);
                Ok(match finished {
                    Ok(record) => State::Rekeyed(*layout, record),
                    Err(reason) => State::Stuck(Stuck {
                        frontier_bytes,
                        fails: Some(frontier_bytes..frontier_bytes + zone.bytes),
                        reason,
                    }),
                })
            }
            Stage::Running { .. } | Stage::Done { .. } | Stage::Over { .. } => {
                Ok(State::Rekeyed(*layout, record))
            }
        }
    }

    /// Brings an interrupted zone to its end. If its journal is not whole, the zone was not touched.
    fn finish_zone(
        &self,
        io: &mut Io,
        layout: &Layout,
        record: &Record,
        frontier_bytes: u64,
        zone: &Zone,
    ) -> Result<Record, String> {
        let failed = |what: &str, errno: Errno| {
            format!(
                "the zone of its re-key at byte {frontier_bytes} was interrupted and {what}: {errno}"
            )
        };
        let pieces = io.read(self.storage, layout.journal, zone.bytes);
        let pieces = pieces.map_err(|e| failed("its journal can't be read", e))?;
        let whole = digest(&pieces) == zone.journal_sha256;
        let mut moved = frontier_bytes;
        if whole {
            moved += zone.bytes;
            let (lots, written) = io.write(self.storage, vec![(frontier_bytes, pieces)]);
            lots.into_iter().for_each(|pieces| io.give(pieces));
            written
                .and_then(|()| io.flush(self.device, self.storage))
                .map_err(|e| failed("can't be written", e))?;
        } else {
            io.give(pieces);
        }
        let closed = record.next(at_frontier(&record.stage, moved, None));
        self.put(io, layout, &closed, Vec::new())
            .map_err(|e| failed("its record can't be written", e))?;
        tracing::info!(
            at = frontier_bytes,
            whole,
            "an interrupted zone of a re-key is whole again"
        );
        Ok(closed)
    }

    /// Writes a record, and the journal with it where there is one, and makes both stable.
    pub(super) fn put(
        &self,
        io: &mut Io,
        layout: &Layout,
        record: &Record,
        journal: Pieces,
    ) -> Result<Pieces, Errno> {
        let bytes = record.encode();
        let mut room = io.pieces(bytes.len() as u64)?;
        let fits = room.first_mut().is_some_and(|p| p.chunk.copy_in(&bytes));
        debug_assert!(fits, "a record fits the smallest chunk");
        let place = layout.copy_for(record.sequence);
        let lots = vec![(place, room), (layout.journal, journal)];
        let (lots, written) = io.write(self.storage, lots);
        let mut lots = lots.into_iter();
        lots.next().into_iter().for_each(|room| io.give(room));
        let journal = lots.next().unwrap_or_default();
        match written.and_then(|()| io.flush(self.device, self.storage)) {
            Ok(()) => Ok(journal),
            Err(errno) => {
                io.give(journal);
                Err(errno)
            }
        }
    }

    /// Closes the record of a re-key that was done, and over while nobody held the volume. What stays is true,
    /// but the next re-key can't be prepared over it.
    fn tidy(&self, io: &mut Io, volume: VolumeId, found: &Found) {
        let is_done = |record: &Record| matches!(record.stage, Stage::Done { .. });
        if matches!(found, Found::Record(record) if is_done(record))
            && !self.device.geometry.read_only
            && let Err(reason) = self.close(io, volume)
        {
            tracing::warn!("{reason}");
        }
    }

    /// Says in both copies that this volume's re-key is over, if it is done. One after the other: a crash
    /// leaves one that is whole and says `done` or `over`, and none from before.
    pub(super) fn close(&self, io: &mut Io, volume: VolumeId) -> Result<(), String> {
        let Some((layout, Found::Record(mut record))) = self.found(io)? else {
            return Ok(());
        };
        let Stage::Done { check } = record.stage else {
            return Ok(());
        };
        if record.volume != volume {
            return Ok(());
        }
        for _ in 0..COPIES {
            record = record.next(Stage::Over { check });
            self.put(io, &layout, &record, Vec::new())
                .map_err(|errno| format!("the record of its re-key can't be closed: {errno}"))?;
        }
        Ok(())
    }
}

/// Whether a record was written with this key, as far as it tells.
pub(super) fn is_with(record: &Record, key: &Cipher) -> bool {
    match record.stage {
        Stage::Prepared => true,
        Stage::Running { check: with, .. }
        | Stage::Done { check: with }
        | Stage::Over { check: with } => check(key, &record.rekey) == Ok(with),
    }
}

/// The stage of a running re-key with another frontier and zone; other stages stay.
pub(super) fn at_frontier(stage: &Stage, frontier_bytes: u64, zone: Option<Zone>) -> Stage {
    match *stage {
        Stage::Running {
            previous_check,
            check,
            ..
        } => Stage::Running {
            frontier_bytes,
            zone,
            previous_check,
            check,
        },
        other => other,
    }
}

/// SHA-256 over pieces, as the record has it.
pub(super) fn digest(pieces: &Pieces) -> [u8; 32] {
    let mut bytes = Vec::new();
    for piece in pieces {
        let at = bytes.len();
        bytes.resize(at + piece.bytes as usize, 0);
        let copied = bytes
            .get_mut(at..)
            .is_some_and(|to| piece.chunk.copy_out(to));
        debug_assert!(copied, "a piece is no longer than its chunk");
    }
    journal_digest(&bytes)
}

fn check(cipher: &Cipher, rekey: &RekeyId) -> Result<KeyCheck, String> {
    key_check(&cipher.key, &rekey.0).map_err(|e| e.to_string())
}

/// Whether a volume can be served with one key beside what is behind it.
fn judge_single(volume: VolumeId, cipher: &Cipher, found: &Found) -> Result<(), String> {
    match found {
        Found::Record(record) if record.volume == volume => match record.stage {
            Stage::Prepared | Stage::Over { .. } => Ok(()),
            Stage::Running { frontier_bytes, .. } => Err(format!(
                "its re-key {} is at byte {frontier_bytes} of {}: what lies behind is under the \
                 previous key; apply a bundle that has that key still (`[volume.rekey]`)",
                record.rekey, record.size_bytes
            )),
            Stage::Done { check: done } if check(cipher, &record.rekey)? == done => Ok(()),
            Stage::Done { .. } => Err(format!(
                "its re-key {} is done, and the key is not the one that it ended with: apply a \
                 bundle with the volume's newest key",
                record.rekey
            )),
        },
        Found::Record(_) | Found::Nothing => Ok(()),
        Found::Damaged => Err(damaged()),
    }
}

fn damaged() -> String {
    "the record of a re-key behind it is damaged, so that nobody can tell which key is where: \
     restore the volume from a backup, or let both keys decrypt a copy (`bulkhead volume recover`)"
        .to_owned()
}

fn not_prepared(rekey: &RekeyId, found: &Found) -> String {
    match found {
        Found::Damaged => damaged(),
        Found::Nothing => format!(
            "re-key {rekey} has no record: if it never began, run `bulkhead volume rekey --prepare` with \
             the volume's file (if it did, that would destroy the volume: restore the file with what is \
             behind the volume's end)"
        ),
        Found::Record(other) => format!(
            "re-key {rekey} has no record, behind the volume is that of re-key {} of \
             volume {}: if the other one came first, run `bulkhead volume rekey --prepare` with the \
             volume's file; if this one did, apply the bundle with the other",
            other.rekey, other.volume
        ),
    }
}

fn other_keys(rekey: &RekeyId) -> String {
    format!(
        "its re-key {rekey} was begun with other keys than the bundle has: apply the bundle with \
         which it began"
    )
}
