//! The check of a file can fail: what a wrong re-key would leave is planted, and found.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey, key_check};
use bulkhead_protocol::rekey::{Record, Stage, Zone, journal_digest};
use bulkhead_protocol::{RekeyId, VolumeId};

use crate::content::{Content, Value};
use crate::offline::{Image, Rekey, Volume, ZoneLook};

const BYTES: u64 = 4 << 20;
const ZONE: u64 = 1 << 20;
const UNIT: DataUnit = DataUnit::B4096;
/// Data units of a zone.
const ZONE_UNITS: usize = 256;

/// A volume in the middle of its second zone.
struct Scene {
    file: File,
    content: Content,
    rekey: Rekey,
}

/// What is done to it, and what the check must say.
struct Fault {
    name: &'static str,
    plant: fn(&Scene) -> Result<(), Box<dyn Error>>,
    /// Data units that can't be read; none: the file is refused.
    expected: Option<usize>,
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "none",
        plant: |_| Ok(()),
        expected: Some(0),
    },
    Fault {
        name: "a frontier that is a zone too far",
        plant: |scene| scene.put_record(2 * ZONE, None),
        expected: Some(ZONE_UNITS / 2),
    },
    Fault {
        name: "a frontier that is a zone behind",
        plant: |scene| scene.put_record(0, None),
        expected: Some(ZONE_UNITS + ZONE_UNITS / 2),
    },
    Fault {
        name: "a torn zone without its journal",
        plant: |scene| scene.flip(scene.volume().layout()?.journal),
        expected: Some(ZONE_UNITS / 2),
    },
    Fault {
        name: "a zone that the record forgot",
        plant: |scene| scene.put_record(ZONE, None),
        expected: Some(ZONE_UNITS / 2),
    },
    Fault {
        name: "a changed bit below the frontier",
        plant: |scene| scene.flip(5 * 4096),
        expected: Some(1),
    },
    Fault {
        name: "a changed bit above it",
        plant: |scene| scene.flip(BYTES - 1),
        expected: Some(1),
    },
    Fault {
        name: "a record that is gone",
        plant: |scene| scene.erase(&scene.volume().layout()?.copies),
        // As if nothing had begun: the first zone, half of the second.
        expected: Some(ZONE_UNITS + ZONE_UNITS / 2),
    },
    Fault {
        name: "a damaged record",
        plant: |scene| scene.flip(scene.volume().layout()?.copies[1] + 100),
        expected: None,
    },
];

/// Plants each.
pub fn faults() -> Result<(), Box<dyn Error>> {
    for fault in FAULTS {
        let mut scene = Scene::new()?;
        (fault.plant)(&scene)?;
        let wrong = scene.wrong_units();
        match (wrong, fault.expected) {
            (Ok(wrong), Some(expected)) if wrong == expected => {}
            (Err(_), None) => {}
            (found, expected) => {
                let name = fault.name;
                return Err(format!("{name}: {found:?} and not {expected:?}").into());
            }
        }
    }
    Ok(())
}

/// What a disk holds is compared unit by unit, and a doubt is one between two values.
pub fn doubts() -> Result<(), Box<dyn Error>> {
    let mut content = Content::new(8 * 512, 512)?;
    let (old, new) = (content.next_stamp(), content.next_stamp());
    content.set(0..8, old);
    content.doubt(2..4, new);
    content.doubt(4..5, Value::Anything);
    let mut bytes = content.bytes();
    bytes[3 * 512..4 * 512].copy_from_slice(&new.bytes(3, 512));
    bytes[4 * 512..5 * 512].fill(0x11);
    bytes[5 * 512..6 * 512].copy_from_slice(&new.bytes(5, 512));
    bytes[6 * 512..7 * 512].fill(0);
    let wrong = content.settle(&bytes);
    if wrong != [5, 6] {
        return Err(format!("{wrong:?} are said to be wrong").into());
    }
    // What a doubt was settled as holds from then on.
    let again = content.first_wrong(0, &bytes);
    bytes[3 * 512..4 * 512].copy_from_slice(&old.bytes(3, 512));
    let changed = content.first_wrong(3, &bytes[3 * 512..4 * 512]);
    if (again, changed) != (Some(5), Some(3)) {
        return Err(format!("{again:?} and {changed:?}").into());
    }
    Ok(())
}

impl Scene {
    /// One zone is re-encrypted; of the second, which is in the journal, every other unit.
    fn new() -> Result<Self, Box<dyn Error>> {
        let scene = Self {
            file: tempfile::tempfile()?,
            content: Content::new(BYTES, 4096)?,
            rekey: Rekey {
                id: RekeyId([1; 16]),
                before: None,
                key: std::array::from_fn(|i| u8::try_from(i).unwrap_or(0)),
                previous: std::array::from_fn(|i| 200 - u8::try_from(i).unwrap_or(0)),
            },
        };
        let plain = scene.content.bytes();
        scene.volume().write(&scene.rekey.previous, &plain)?;
        let [_, key] = scene.keys()?;
        let both = usize::try_from(2 * ZONE)?;
        let mut stored = vec![0; both];
        key.encrypt(UNIT, 0, &plain[..both], &mut stored)?;
        let (first, second) = stored.split_at(both / 2);
        scene.file.write_all_at(first, 0)?;
        for (unit, bytes) in second.chunks_exact(4096).enumerate().step_by(2) {
            scene.file.write_all_at(bytes, ZONE + unit as u64 * 4096)?;
        }
        let journal = scene.volume().layout()?.journal;
        scene.file.write_all_at(second, journal)?;
        let zone = Zone {
            bytes: ZONE,
            journal_sha256: journal_digest(second),
        };
        scene.put_record(ZONE, Some(zone))?;
        Ok(scene)
    }

    fn volume(&self) -> Volume<'_> {
        Volume {
            file: &self.file,
            bytes: BYTES,
            unit: UNIT,
        }
    }

    /// The previous one and the new one.
    fn keys(&self) -> Result<[XtsKey; 2], Box<dyn Error>> {
        let arena = SecretArena::new(2)?;
        let previous = XtsKey::new(&arena, &self.rekey.previous)?;
        Ok([previous, XtsKey::new(&arena, &self.rekey.key)?])
    }

    /// The only record, whole.
    fn put_record(&self, frontier_bytes: u64, zone: Option<Zone>) -> Result<(), Box<dyn Error>> {
        let [previous, key] = self.keys()?;
        let record = Record {
            volume: VolumeId([2; 16]),
            rekey: self.rekey.id,
            size_bytes: BYTES,
            data_unit_bytes: UNIT.bytes(),
            sequence: 7,
            stage: Stage::Running {
                frontier_bytes,
                zone,
                previous_check: key_check(&previous, &self.rekey.id.0)?,
                check: key_check(&key, &self.rekey.id.0)?,
            },
        };
        let at = self.volume().layout()?.copy_for(record.sequence);
        Ok(self.file.write_all_at(&record.encode(), at)?)
    }

    fn flip(&self, at: u64) -> Result<(), Box<dyn Error>> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at)?;
        Ok(self.file.write_all_at(&[byte[0] ^ 1], at)?)
    }

    fn erase(&self, copies: &[u64]) -> Result<(), Box<dyn Error>> {
        for at in copies {
            self.file.write_all_at(&[0; 4096], *at)?;
        }
        Ok(())
    }

    fn wrong_units(&mut self) -> Result<usize, Box<dyn Error>> {
        let Image { plain, zone, .. } = self.volume().read(&self.rekey)?;
        let wrong = self.content.settle(&plain).len();
        let half = ZoneLook::Journalled {
            written: ZONE_UNITS / 2,
            units: ZONE_UNITS,
        };
        if wrong == 0 && zone != half {
            return Err(format!("the zone looks like {zone:?}").into());
        }
        Ok(wrong)
    }
}
