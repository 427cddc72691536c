//! Re-keys held against the record in the volume's file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use bulkhead_bundle::Rekey;
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::rekey::{layout, prepared};
use tempfile::TempDir;

use super::*;
use crate::examples;

const SIZE: u64 = 1 << 20;
const ONE: RekeyId = RekeyId([0xc1; 16]);
const TWO: RekeyId = RekeyId([0xc2; 16]);

fn volume(rekey: Option<RekeyId>) -> Volume {
    Volume {
        name: "disk".to_owned(),
        path: "disk.img".to_owned(),
        rekey: rekey.map(|id| Rekey {
            id,
            previous_keys: Vec::new(),
        }),
        ..examples::volume(1)
    }
}

fn bundle(volume: Volume) -> HostBundle {
    examples::bundle(vec![volume])
}

struct Disk {
    dir: TempDir,
    file: File,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![0; 1 << 20]).expect("file");
        let file = File::options().write(true).open(path).expect("open");
        Self { dir, file }
    }

    fn record(&self, rekey: RekeyId, stage: Stage) {
        let layout = layout(SIZE).expect("a layout");
        let first = prepared(VolumeId([1; 16]), rekey, SIZE, 512);
        self.file.set_len(layout.end).expect("size");
        self.file
            .write_all_at(&first, layout.copies[0])
            .expect("write");
        let record = Record {
            volume: VolumeId([1; 16]),
            rekey,
            size_bytes: SIZE,
            data_unit_bytes: 512,
            sequence: 2,
            stage,
        };
        self.file
            .write_all_at(&record.encode(), layout.copy_for(2))
            .expect("write");
    }

    /// What is said of a bundle with the second volume in the place of the first.
    fn check(&self, old: Option<Volume>, new: Volume) -> Result<(), String> {
        let (old, new) = (old.map(bundle), bundle(new));
        let directories = VolumeDirectories::open(&[self.dir.path().to_owned()]).expect("dir");
        check_files(&directories, &new, &Plan::between(old.as_ref(), &new))
    }

    fn refuses(&self, old: Option<Volume>, new: Volume, says: &str) {
        let problem = self.check(old, new).expect_err("must be refused");
        assert!(problem.starts_with("volume disk: "), "{problem}");
        assert!(problem.contains(says), "{problem} does not say {says}");
    }
}

fn running(frontier_bytes: u64) -> Stage {
    Stage::Running {
        frontier_bytes,
        zone: None,
        previous_check: [1; 16],
        check: [2; 16],
    }
}

#[test]
fn a_rekey_begins_only_from_a_file_that_is_prepared_for_it() {
    let disk = Disk::new();
    for old in [None, Some(volume(None))] {
        let disk = Disk::new();
        disk.refuses(old.clone(), volume(Some(ONE)), "its file is not prepared");
        disk.record(TWO, Stage::Prepared);
        disk.refuses(old.clone(), volume(Some(ONE)), "for another re-key, c2c2");
        // Wherever it is: another host may have begun.
        for stage in [
            Stage::Prepared,
            running(512),
            Stage::Done { check: [2; 16] },
            Stage::Over { check: [2; 16] },
        ] {
            disk.record(ONE, stage);
            assert_eq!(disk.check(old.clone(), volume(Some(ONE))), Ok(()));
        }
    }
    // What doesn't change, or has no re-key, is not looked at.
    let same = disk.check(Some(volume(Some(ONE))), volume(Some(ONE)));
    assert_eq!(same, Ok(()));
    assert_eq!(disk.check(None, volume(None)), Ok(()));
    fs::remove_file(disk.dir.path().join("disk.img")).expect("remove");
    disk.refuses(Some(volume(None)), volume(Some(ONE)), "create it first");
}

#[test]
fn a_previous_key_is_dropped_when_nothing_is_under_it() {
    let disk = Disk::new();
    let old = || Some(volume(Some(ONE)));
    disk.refuses(old(), volume(None), "has no record of it");
    for (stage, says) in [
        (Stage::Prepared, "it has not begun"),
        (running(SIZE / 2), "it is at 50 %"),
        (running(SIZE), "it is at 100 %"),
    ] {
        disk.record(ONE, stage);
        disk.refuses(old(), volume(None), says);
    }
    let forced = Volume {
        force_removal: true,
        ..volume(None)
    };
    assert_eq!(disk.check(old(), forced), Ok(()));
    // Over: another host has dropped the previous key already.
    let check = [2; 16];
    for stage in [Stage::Done { check }, Stage::Over { check }] {
        disk.record(ONE, stage);
        assert_eq!(disk.check(old(), volume(None)), Ok(()));
    }
    // Gone, and nobody can tell.
    let copies = layout(SIZE).expect("a layout").copies;
    let erased = disk.file.write_all_at(&[0; 8192], copies[0]);
    erased.expect("write");
    disk.refuses(old(), volume(None), "has no record of it");
    // The record of another re-key says nothing of this one.
    disk.record(TWO, Stage::Done { check: [2; 16] });
    disk.refuses(old(), volume(None), "has no record of it");
    // And one re-key never follows another without a bundle between them.
    disk.record(ONE, Stage::Done { check: [2; 16] });
    disk.refuses(old(), volume(Some(TWO)), "another re-key, c1c1");
}

#[test]
fn a_damaged_record_is_refused() {
    let disk = Disk::new();
    disk.record(ONE, running(512));
    let copies = layout(SIZE).expect("a layout").copies;
    for at in copies {
        disk.file.write_all_at(&[9; 64], at + 64).expect("write");
    }
    disk.refuses(Some(volume(Some(ONE))), volume(None), "is damaged");
}

#[test]
fn a_volume_that_is_rekeyed_keeps_its_size() {
    let grown = |rekey| Volume {
        size_bytes: 2 * SIZE,
        ..volume(rekey)
    };
    let check = |old, new| refuse_resizing(Some(&bundle(old)), &bundle(new));
    for (old, new) in [(None, Some(ONE)), (Some(ONE), Some(ONE)), (Some(ONE), None)] {
        let refused = check(volume(old), grown(new)).expect_err("refused");
        assert!(refused.contains("volume disk: it is re-keyed"), "{refused}");
        assert_eq!(check(volume(old), volume(new)), Ok(()));
    }
    assert_eq!(check(volume(None), grown(None)), Ok(()));
    assert_eq!(refuse_resizing(None, &bundle(volume(Some(ONE)))), Ok(()));
}
