//! How a disk grows, and what of its cache outlives a reset and its process.

use super::*;
use crate::storage::{FileSpec, RamSpec};

fn device(storage: StorageSpec, capacity_sectors: u64) -> Arc<BlkDevice> {
    let geometry = Geometry {
        logical_block_bytes: 4096,
        read_only: false,
        serial: [0; 20],
        queues: 1,
        discard: false,
    };
    BlkDevice::new(geometry, capacity_sectors, storage, None)
}

#[test]
fn it_grows_as_far_as_its_storage_does() {
    let file = tempfile::NamedTempFile::new_in(".").expect("temporary file");
    file.as_file().set_len(1 << 20).expect("length");
    let fd = file.reopen().expect("reopen").into();
    let spec = FileSpec::from_fd(fd, false, 4096).expect("usable");
    let device = device(StorageSpec::File(spec), 2048);
    let error = device
        .resize(2056)
        .expect_err("the file is as short as before");
    assert!(matches!(
        error,
        ResizeError::Storage {
            has_bytes: 1_048_576,
            ..
        }
    ));
    assert_eq!(device.capacity_sectors(), 2048);
    file.as_file().set_len(2 << 20).expect("length");
    device.resize(4096).expect("the file has grown");
    assert_eq!(device.capacity_sectors(), 4096);
}

#[test]
fn it_never_shrinks_and_has_whole_blocks() {
    let ram = RamSpec::new(1 << 20).expect("memory");
    let device = device(StorageSpec::Ram(ram.into()), 1024);
    let shrinks = device.resize(1016).expect_err("smaller");
    assert!(matches!(
        shrinks,
        ResizeError::Shrinks {
            from_sectors: 1024,
            ..
        }
    ));
    for odd in [1025, 1031, u64::MAX, u64::MAX / 512] {
        let error = device.resize(odd).expect_err("no size");
        assert!(matches!(error, ResizeError::Size(_)), "{odd}: {error}");
    }
    device.resize(1024).expect("as it is");
    device.resize(2048).expect("all of it");
    assert!(device.resize(2056).is_err());
}

#[test]
fn a_failed_flush_and_the_cache_mode_outlive_the_process() {
    let kept = crate::stored::file::StateFile::create().expect("memory");
    let before = device(StorageSpec::Null, 8);
    before.keep_flush_failure(kept.flush_failed());
    before.set_writeback(false);
    assert!(!before.flush_failed() && !kept.flush_failed().is_raised());
    before.latch_flush_failure();
    let after = device(StorageSpec::Null, 8);
    after.keep_flush_failure(kept.flush_failed());
    after.resume_cache_mode(before.cache_mode());
    assert!(after.flush_failed() && !after.writeback());
    assert!(after.is_unsettled(), "nobody knows what is stable");
}

#[test]
fn a_reset_puts_the_cache_mode_back_and_forgives_no_failed_flush() {
    let device = device(StorageSpec::Null, 8);
    assert!(device.writeback());
    device.set_writeback(false);
    device.latch_flush_failure();
    device.reset();
    assert!(device.writeback() && device.flush_failed());
}
