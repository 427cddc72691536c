//! States as each version writes them, checked in: this version reads them all, and writes its own byte for
//! byte. Built with `--cfg previous_state_format` it is the version before, which reads what there was in its time,
//! and refuses the rest by name.
//!
//! A version that is new gets a file by `BULKHEAD_GOLDEN=write cargo test -p bulkhead-dataplane --test stored`;
//! a file that is there never changes.

use std::path::PathBuf;

use bulkhead_dataplane::stored::format::{FormatError, WRITTEN_BY, decode, encode};
use bulkhead_dataplane::stored::{FdNumber, Stored};

use crate::sample::{full, nic, switch, xdp_nic};

const SEQUENCE: u64 = 0x0102_0304_0506_0708;

fn file(version: u16, kind: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/stored/golden");
    dir.join(format!("v{version}{kind}.state"))
}

/// What a version writes: how its file is called, and what is in it.
fn written_by(version: u16) -> Vec<(&'static str, Stored<FdNumber>)> {
    let mut volume = full(2, 2);
    // New in version 2.
    if version < 2
        && let Some(connection) = &mut volume.connection
    {
        connection.told_sectors = None;
    }
    let mut all = vec![("", volume.into())];
    // New in version 3.
    if version >= 3 {
        all.extend([
            ("-nic", nic(1, 2).into()),
            ("-nic-xdp", xdp_nic(2).into()),
            ("-switch", switch().into()),
        ]);
    }
    all
}

#[test]
fn this_version_writes_what_it_always_wrote() {
    for (kind, stored) in written_by(WRITTEN_BY) {
        let bytes = encode(SEQUENCE, &stored).expect("it fits");
        let file = file(WRITTEN_BY, kind);
        if std::env::var_os("BULKHEAD_GOLDEN").is_some() && !file.exists() {
            std::fs::write(&file, &bytes).expect("write");
        }
        let golden = std::fs::read(file).expect("it is checked in");
        assert!(golden == bytes, "the format changed: make a new version");
    }
}

#[test]
fn every_version_is_read_by_those_that_know_what_is_in_it() {
    for writer in [1, 2, 3] {
        for (kind, stored) in written_by(writer) {
            let golden = std::fs::read(file(writer, kind)).expect("it is checked in");
            match decode(&golden) {
                Ok(read) => {
                    assert_eq!(read.sequence, SEQUENCE);
                    assert_eq!(read.stored, stored, "{writer}{kind}");
                }
                Err(error) => {
                    let is_newer = matches!(error, FormatError::Newer { readable_by: 3, .. });
                    let has_none =
                        WRITTEN_BY < 3 && matches!(stored, Stored::Nic(_) | Stored::Switch(_));
                    assert!(is_newer && has_none, "{writer}{kind}: {error}");
                }
            }
        }
    }
}
