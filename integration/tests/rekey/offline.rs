//! A volume's file, read while nobody serves it: as whoever finds it after a crash must be able to, with the
//! record and both keys (`docs/formats/rekey.md`).

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey, key_check};
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::rekey::{
    COPIES, Found, Layout, RECORD_BYTES, Record, Stage, Zone, find, journal_digest, layout,
};

/// A re-key as its operator knows it.
#[derive(Debug)]
pub struct Rekey {
    /// Which one.
    pub id: RekeyId,
    /// The one before it, which is done.
    pub before: Option<RekeyId>,
    /// What everything becomes encrypted with.
    pub key: [u8; KEY_BYTES],
    /// What everything was encrypted with.
    pub previous: [u8; KEY_BYTES],
}

/// What a file holds.
#[derive(Debug)]
pub struct Image {
    /// The volume, decrypted.
    pub plain: Vec<u8>,
    /// The record of this re-key; none if it has none yet.
    pub record: Option<Record>,
    /// The zone that was under way.
    pub zone: ZoneLook,
}

/// What became of the zone that was under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZoneLook {
    /// There was none.
    None,
    /// Its journal was not finished.
    Untouched,
    /// It is in the journal. In its place so many data units already are as they are to be, of so many.
    Journalled {
        /// As the journal has them.
        written: usize,
        /// In all.
        units: usize,
    },
}

impl Image {
    /// Where the frontier is.
    pub fn frontier_bytes(&self) -> u64 {
        match self.record {
            None => 0,
            Some(record) => match record.stage {
                Stage::Prepared => 0,
                Stage::Running { frontier_bytes, .. } => frontier_bytes,
                Stage::Done { .. } | Stage::Over { .. } => record.size_bytes,
            },
        }
    }

    /// Whether everything is under the new key.
    pub fn is_done(&self) -> bool {
        self.record.is_some_and(|record| record.stage.is_complete())
    }
}

/// The file of a volume of `bytes`.
#[derive(Debug)]
pub struct Volume<'a> {
    /// It.
    pub file: &'a File,
    /// Bytes of the volume.
    pub bytes: u64,
    /// Its data unit.
    pub unit: DataUnit,
}

impl Volume<'_> {
    /// Where record and journal lie.
    pub fn layout(&self) -> Result<Layout, Box<dyn Error>> {
        layout(self.bytes).ok_or_else(|| "no layout".into())
    }

    /// What lies in the place of the record.
    pub fn record(&self) -> Result<Found, Box<dyn Error>> {
        let mut copies = [0; COPIES * RECORD_BYTES];
        let [first, _] = self.layout()?.copies;
        self.file.read_exact_at(&mut copies, first)?;
        Ok(find(&copies))
    }

    /// Reads all of it.
    pub fn read(&self, rekey: &Rekey) -> Result<Image, Box<dyn Error>> {
        let arena = SecretArena::new(2)?;
        let key = XtsKey::new(&arena, &rekey.key)?;
        let previous = XtsKey::new(&arena, &rekey.previous)?;
        let record = self.ours(rekey)?;
        let mut stored = vec![0; usize::try_from(self.bytes)?];
        self.file.read_exact_at(&mut stored, 0)?;
        let (mut frontier, mut zone) = (0, ZoneLook::None);
        match record.map(|record| record.stage) {
            None | Some(Stage::Prepared) => {}
            Some(Stage::Running {
                frontier_bytes,
                zone: open,
                previous_check,
                check,
            }) => {
                if previous_check != key_check(&previous, &rekey.id.0)? {
                    return Err("the record has another previous key".into());
                }
                self.is_under(&key, rekey, check)?;
                frontier = usize::try_from(frontier_bytes)?;
                if let Some(open) = open {
                    zone = self.apply_journal(&mut stored, frontier, &open)?;
                    if let ZoneLook::Journalled { .. } = zone {
                        frontier += usize::try_from(open.bytes)?;
                    }
                }
            }
            Some(Stage::Done { check } | Stage::Over { check }) => {
                self.is_under(&key, rekey, check)?;
                frontier = stored.len();
            }
        }
        let mut plain = vec![0; stored.len()];
        self.decrypt(&key, 0, &stored[..frontier], &mut plain[..frontier])?;
        self.decrypt(
            &previous,
            frontier,
            &stored[frontier..],
            &mut plain[frontier..],
        )?;
        Ok(Image {
            plain,
            record,
            zone,
        })
    }

    /// The record, if it is of this re-key; none if this one has not been prepared yet.
    fn ours(&self, rekey: &Rekey) -> Result<Option<Record>, Box<dyn Error>> {
        let record = match self.record()? {
            Found::Record(record) => record,
            Found::Nothing if rekey.before.is_none() => return Ok(None),
            other => return Err(format!("in the place of the record: {other:?}").into()),
        };
        if (record.size_bytes, record.data_unit_bytes) != (self.bytes, self.unit.bytes()) {
            return Err(format!("the record is of another volume: {record:?}").into());
        }
        if record.rekey == rekey.id {
            return Ok(Some(record));
        }
        let of_before = Some(record.rekey) == rekey.before;
        if of_before && record.stage.is_complete() {
            return Ok(None);
        }
        Err(format!("the record is of another re-key: {record:?}").into())
    }

    fn is_under(&self, key: &XtsKey, rekey: &Rekey, check: [u8; 16]) -> Result<(), Box<dyn Error>> {
        if check == key_check(key, &rekey.id.0)? {
            return Ok(());
        }
        Err("the record has another key".into())
    }

    /// Puts what the journal has of a zone into its place, if it has it.
    fn apply_journal(
        &self,
        stored: &mut [u8],
        at: usize,
        zone: &Zone,
    ) -> Result<ZoneLook, Box<dyn Error>> {
        let mut journal = vec![0; usize::try_from(zone.bytes)?];
        self.file
            .read_exact_at(&mut journal, self.layout()?.journal)?;
        if journal_digest(&journal) != zone.journal_sha256 {
            return Ok(ZoneLook::Untouched);
        }
        let place = &mut stored[at..at + journal.len()];
        let unit = self.unit.bytes() as usize;
        let both = place.chunks_exact(unit).zip(journal.chunks_exact(unit));
        let look = ZoneLook::Journalled {
            written: both.filter(|(placed, meant)| placed == meant).count(),
            units: journal.len() / unit,
        };
        place.copy_from_slice(&journal);
        Ok(look)
    }

    fn decrypt(
        &self,
        key: &XtsKey,
        at: usize,
        stored: &[u8],
        plain: &mut [u8],
    ) -> Result<(), Box<dyn Error>> {
        let first = at as u64 / u64::from(self.unit.bytes());
        Ok(key.decrypt(self.unit, first, stored, plain)?)
    }

    /// Encrypts all of a volume with one key, as it is before its first re-key.
    pub fn write(&self, key: &[u8; KEY_BYTES], plain: &[u8]) -> Result<(), Box<dyn Error>> {
        let key = XtsKey::new(&SecretArena::new(1)?, key)?;
        let mut stored = vec![0; plain.len()];
        key.encrypt(self.unit, 0, plain, &mut stored)?;
        self.file.set_len(self.layout()?.end)?;
        self.file.write_all_at(&stored, 0)?;
        Ok(self.file.sync_all()?)
    }
}
