//! A volume whose re-key was interrupted, read without any Bulkhead running. What a data plane would have
//! left in the file is written here from the format.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use bulkhead_bundle::{Volume, source};
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey, key_check};
use bulkhead_protocol::rekey::{
    COPIES, Found, Layout, RECORD_BYTES, Record, Stage, Zone, find, journal_digest, layout,
};

use crate::{Folder, SEALED};

pub const MIB: u64 = 1 << 20;
pub const SIZE: u64 = 3 * MIB;
pub const REKEY: &str = "volume rekey --volume v.toml --host state/host.pub \
                     --recovery recovery.key.pub --out v-2.toml";
pub const FINISH: &str = "volume rekey --finish --volume v-2.toml --out v-3.toml";
const EXPORT: &str =
    "volume export --bundle v-2.toml --volume v --recovery recovery.key --file v.img --out raw";

pub fn load(folder: &Folder, name: &str) -> Volume {
    let mut volumes = source::load_stanza(&folder.path(name)).expect("stanza");
    assert_eq!(volumes.len(), 1);
    volumes.remove(0)
}

/// A volume of 3 MiB and a re-key that its file is prepared for.
pub fn prepared(unit: u32) -> Folder {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 3MiB --file v.img --data-unit {unit} {SEALED} \
         --out v.toml"
    ));
    folder.ok(&format!("{REKEY} --file v.img"));
    folder.ok(FINISH);
    folder
}

/// The key of a stanza without a re-key.
pub fn key(folder: &Folder, stanza: &str) -> XtsKey {
    let out = format!("{stanza}.key");
    folder.ok(&format!(
        "volume recover --bundle {stanza} --volume v --recovery recovery.key --out {out}"
    ));
    let key = fs::read(folder.path(&out)).expect("key");
    let arena = SecretArena::new(1).expect("arena");
    XtsKey::new(&arena, key.as_slice().try_into().expect("64 bytes")).expect("key")
}

pub fn file(folder: &Folder) -> File {
    let options = File::options()
        .read(true)
        .write(true)
        .open(folder.path("v.img"));
    options.expect("the volume's file")
}

pub fn places() -> Layout {
    layout(SIZE).expect("a layout")
}

pub fn found(folder: &Folder) -> Found {
    let mut copies = [0; COPIES * RECORD_BYTES];
    let read = file(folder).read_exact_at(&mut copies, places().copies[0]);
    read.expect("the record");
    find(&copies)
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("fits")
}

/// What a data plane does to the file of a volume, with both keys.
pub struct Half {
    pub folder: Folder,
    unit: DataUnit,
    plain: Vec<u8>,
    pub key: XtsKey,
    previous: XtsKey,
}

impl Half {
    pub fn new(unit: u32) -> Self {
        let folder = prepared(unit);
        Self {
            unit: DataUnit::new(unit).expect("unit"),
            plain: (0..=250).cycle().take(index(SIZE)).collect(),
            key: key(&folder, "v-3.toml"),
            previous: key(&folder, "v.toml"),
            folder,
        }
    }

    fn encrypted(&self, key: &XtsKey, from: u64, to: u64) -> Vec<u8> {
        let plain = &self.plain[index(from)..index(to)];
        let mut out = vec![0; plain.len()];
        let first = from / u64::from(self.unit.bytes());
        key.encrypt(self.unit, first, plain, &mut out)
            .expect("units");
        out
    }

    /// Up to here under the key, the rest under the previous one.
    pub fn write(&self, frontier: u64) {
        let mut bytes = self.encrypted(&self.key, 0, frontier);
        bytes.extend(self.encrypted(&self.previous, frontier, SIZE));
        file(&self.folder).write_all_at(&bytes, 0).expect("write");
    }

    pub fn check(&self, key: &XtsKey) -> [u8; 16] {
        let rekey = load(&self.folder, "v-2.toml").rekey.expect("a re-key");
        key_check(key, &rekey.id.0).expect("a check")
    }

    pub fn running(&self, frontier_bytes: u64, zone: Option<Zone>) -> Stage {
        Stage::Running {
            frontier_bytes,
            zone,
            previous_check: self.check(&self.previous),
            check: self.check(&self.key),
        }
    }

    pub fn record(&self, stage: Stage) {
        let volume = load(&self.folder, "v-2.toml");
        let record = Record {
            volume: volume.id,
            rekey: volume.rekey.expect("a re-key").id,
            size_bytes: SIZE,
            data_unit_bytes: self.unit.bytes(),
            sequence: 8,
            stage,
        };
        self.put(&record);
    }

    pub fn put(&self, record: &Record) {
        let at = places().copy_for(record.sequence);
        let written = file(&self.folder).write_all_at(&record.encode(), at);
        written.expect("the record");
    }

    /// The export of this stanza gives the plain bytes.
    fn exports(&self, stanza: &str) {
        self.folder
            .ok(&format!("{} --force", EXPORT.replace("v-2.toml", stanza)));
        let raw = fs::read(self.folder.path("raw")).expect("read");
        assert!(raw == self.plain, "{stanza}");
    }

    fn refuses(&self, stanza: &str, says: &str) {
        self.folder.refused(
            &format!("{} --force", EXPORT.replace("v-2.toml", stanza)),
            &[says],
        );
    }
}

#[test]
fn a_half_rekeyed_volume_is_exported_under_both_keys() {
    for unit in [512, 4096] {
        let half = Half::new(unit);
        half.write(0);
        half.exports("v-2.toml");
        half.exports("v.toml");
        // Between two chunks, and within one.
        for frontier in [MIB, MIB + 4096, SIZE - 4096] {
            half.write(frontier);
            half.record(half.running(frontier, None));
            half.exports("v-2.toml");
        }
        half.refuses("v.toml", "so that two keys are needed");
        half.refuses("v-3.toml", "so that two keys are needed");
        half.write(SIZE);
        half.record(Stage::Done {
            check: half.check(&half.key),
        });
        half.exports("v-2.toml");
        half.exports("v-3.toml");
        half.refuses(
            "v.toml",
            "is not encrypted with the key that the bundle has",
        );
        half.record(Stage::Over {
            check: half.check(&half.key),
        });
        half.exports("v-2.toml");
        half.exports("v-3.toml");
        // A backup of before, brought back below a record that has stayed.
        half.write(0);
        half.exports("v.toml");
    }
}

#[test]
fn a_piece_that_was_being_written_is_taken_from_its_journal() {
    let half = Half::new(512);
    let (from, to) = (MIB - 2048, 2 * MIB - 4096);
    let journal = half.encrypted(&half.key, from, to);
    let zone = Zone {
        bytes: to - from,
        journal_sha256: journal_digest(&journal),
    };
    half.write(from);
    let file = file(&half.folder);
    file.write_all_at(&journal, places().journal)
        .expect("journal");
    // Its place is half written.
    file.write_all_at(&journal[..4096], from).expect("write");
    file.write_all_at(&[0x5a; 512], from + 4096).expect("write");
    half.record(half.running(from, Some(zone)));
    half.exports("v-2.toml");
    // A journal that was not finished: then nothing of the place was touched.
    half.write(from);
    file.write_all_at(&[0; 512], places().journal + 1024)
        .expect("write");
    half.exports("v-2.toml");
}

#[test]
fn a_record_that_does_not_fit_the_stanza_is_refused() {
    let half = Half::new(4096);
    half.write(MIB);
    half.record(Stage::Running {
        frontier_bytes: MIB,
        zone: None,
        previous_check: half.check(&half.key),
        check: half.check(&half.previous),
    });
    half.refuses(
        "v-2.toml",
        "is not encrypted with the key that the bundle has",
    );
    let folder = &half.folder;
    folder.ok(&REKEY.replace("v-2.toml", "other.toml"));
    half.record(half.running(MIB, None));
    half.refuses("other.toml", "two keys are needed");
    let Found::Record(record) = found(folder) else {
        panic!("no record");
    };
    half.put(&Record {
        size_bytes: 2 * MIB,
        sequence: record.sequence + 2,
        ..record
    });
    half.refuses("v-2.toml", "is of another size or data unit");
    // One of another volume says nothing of this one.
    half.write(0);
    half.put(&Record {
        volume: bulkhead_protocol::VolumeId([9; 16]),
        sequence: record.sequence + 4,
        ..record
    });
    half.exports("v-2.toml");
}

#[test]
fn recover_gives_the_lines_for_both_parts() {
    let half = Half::new(4096);
    let folder = &half.folder;
    let recover = "volume recover --bundle v-2.toml --volume v --recovery recovery.key --out k";
    folder.refused(
        recover,
        &["volume \"v\" has two keys", "give that with --file"],
    );
    let recover = format!("{recover} --file v.img");
    let keys = || {
        let read = |name| fs::read(folder.path(name)).ok();
        let keys = (read("k"), read("k.previous"));
        let _ = (
            fs::remove_file(folder.path("k")),
            fs::remove_file(folder.path("k.previous")),
        );
        keys
    };
    let (new, old) = (
        fs::read(folder.path("v-3.toml.key")).expect("key"),
        fs::read(folder.path("v.toml.key")).expect("key"),
    );
    let said = folder.ok(&recover);
    assert!(said.contains("# nothing is re-keyed"), "{said}");
    assert!(said.contains("k.previous --keyfile-size 64"), "{said}");
    assert_eq!(keys(), (None, Some(old.clone())));

    half.write(MIB);
    let journal = half.encrypted(&half.key, MIB, MIB + 8192);
    let written = file(folder).write_all_at(&journal, places().journal);
    written.expect("journal");
    half.record(half.running(
        MIB,
        Some(Zone {
            bytes: 8192,
            journal_sha256: journal_digest(&journal),
        }),
    ));
    let said = folder.ok(&recover);
    for line in [
        "bs=512 skip=8192 seek=2048 count=16 conv=notrunc,fsync",
        "# up to byte 1056768, under the key",
        "--sector-size 4096 --iv-large-sectors --size 2064 --shared ",
        "--iv-large-sectors --offset 2064 --skip 2064 --size 4080 --shared ",
        "printf '0 2064 linear /dev/mapper/bulkhead-v-key 0\\n2064 4080 linear \
         /dev/mapper/bulkhead-v-previous 0\\n' | dmsetup create bulkhead-v",
    ] {
        assert!(said.contains(line), "{line} is not in {said}");
    }
    assert_eq!(keys(), (Some(new.clone()), Some(old)));

    half.record(Stage::Done {
        check: half.check(&half.key),
    });
    let said = folder.ok(&recover);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(keys(), (Some(new), None));
}
