//! States as each version writes them, checked in: this version reads them all, and writes its own byte for
//! byte. Built with `--cfg previous_state_format` it is the version before, which reads them all, too: what was
//! not there in its time is left out.
//!
//! A version that is new gets a file by `BULKHEAD_GOLDEN=write cargo test -p bulkhead-dataplane --test stored`;
//! a file that is there never changes.

use std::path::PathBuf;

use bulkhead_dataplane::stored::format::{WRITTEN_BY, decode, encode};
use bulkhead_dataplane::stored::{FdNumber, StoredVolume};

use crate::sample::full;

const SEQUENCE: u64 = 0x0102_0304_0506_0708;

fn file(version: u16) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/stored/golden");
    dir.join(format!("v{version}.state"))
}

/// What `reader` gets of what `writer` wrote.
fn expected(writer: u16, reader: u16) -> StoredVolume<FdNumber> {
    let mut volume = full(2, 2);
    // New in version 2.
    if writer.min(reader) < 2
        && let Some(connection) = &mut volume.connection
    {
        connection.told_sectors = None;
    }
    volume
}

#[test]
fn this_version_writes_what_it_always_wrote() {
    let bytes = encode(SEQUENCE, &full(2, 2)).expect("it fits");
    if std::env::var_os("BULKHEAD_GOLDEN").is_some() && !file(WRITTEN_BY).exists() {
        std::fs::write(file(WRITTEN_BY), &bytes).expect("write");
    }
    let golden = std::fs::read(file(WRITTEN_BY)).expect("it is checked in");
    assert!(golden == bytes, "the format changed: make a new version");
}

#[test]
fn every_version_is_read() {
    for writer in [1, 2] {
        let golden = std::fs::read(file(writer)).expect("it is checked in");
        let read = decode(&golden).expect("readable");
        assert_eq!(read.sequence, SEQUENCE);
        assert_eq!(read.volume, expected(writer, WRITTEN_BY), "{writer}");
    }
}
