//! Fields lie where the specification has them, and only one of them can be written.

use std::sync::Arc;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use super::*;
use crate::blk::Cipher;
use crate::storage::StorageSpec;

const CAPACITY: u64 = 0x0102_0304_0506_0708;

fn geometry() -> Geometry {
    Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: 1,
        discard: false,
    }
}

fn device(geometry: &Geometry, cipher: Option<Cipher>) -> Arc<BlkDevice> {
    BlkDevice::new(geometry.clone(), CAPACITY, StorageSpec::Null, cipher)
}

fn cipher() -> Cipher {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [1; 64];
    key[32..].fill(2);
    Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::B512,
    }
}

#[test]
fn fields_lie_where_the_specification_has_them() {
    let geometry = Geometry {
        queues: 3,
        discard: true,
        ..geometry()
    };
    let space = read(&device(&geometry, None));
    assert_eq!(space[0..8], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(space[8..12], [0, 0, 0, 1], "16 MiB");
    assert_eq!(space[12..16], [126, 0, 0, 0]);
    assert_eq!(space[16..20], [0; 4], "no cylinders");
    assert_eq!(space[20..24], [0, 2, 0, 0]);
    assert_eq!(space[24..26], [3, 0], "4096 = 512 << 3");
    assert_eq!(space[26..28], [8, 0]);
    assert_eq!(space[28..32], [0; 4]);
    assert_eq!(space[32..34], [1, 0], "write-back");
    assert_eq!(space[34..36], [3, 0]);
    assert_eq!(space[36..40], [0, 0, 64, 0], "2 GiB");
    assert_eq!(space[40..44], [16, 0, 0, 0]);
    assert_eq!(space[44..48], [8, 0, 0, 0]);
    assert_eq!(space[48..52], [0, 0, 1, 0], "32 MiB");
    assert_eq!(space[52..56], [16, 0, 0, 0]);
    assert_eq!(space[56], 1);
    assert!(
        space[57..].iter().all(|b| *b == 0),
        "no secure erase, no zones"
    );
}

#[test]
fn what_is_offered_depends_on_the_volume() {
    let always = (1 << 1) | (1 << 2) | (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11);
    assert_eq!(features(&geometry()), always | (1 << 14));
    let with = |change: fn(&mut Geometry)| {
        let mut geometry = geometry();
        change(&mut geometry);
        (features(&geometry), read(&device(&geometry, None)))
    };
    let (bits, space) = with(|g| g.discard = true);
    assert_eq!(bits, always | (1 << 13) | (1 << 14));
    assert_ne!(space[36..48], [0; 12]);
    let (bits, space) = with(|g| (g.discard, g.read_only) = (true, true));
    assert_eq!(bits, always | (1 << 5));
    assert_eq!(space[36..60], [0; 24]);
    let (bits, _) = with(|g| g.queues = 2);
    assert_eq!(bits, always | (1 << 12) | (1 << 14));
    let (_, space) = with(|g| g.logical_block_bytes = 4096);
    assert_eq!(space[24..28], [0, 0, 1, 0]);
    let encrypted = read(&device(&geometry(), Some(cipher())));
    assert_eq!(encrypted[56], 0, "encrypted zeroes are written");
}

/// All offsets and sizes from 0 to 256: 66,049 pairs.
#[test]
fn only_the_cache_mode_can_be_written() {
    let device = device(&geometry(), None);
    let bytes = [0u8; 256];
    let mut taken = Vec::new();
    for offset in 0..=256 {
        for size in 0..=256 {
            if write(&device, offset, &bytes[..size]).is_ok() {
                taken.push((offset, size));
            }
        }
    }
    assert_eq!(taken, [(32, 1)]);
    assert!(!device.writeback());
    assert!(write(&device, u32::MAX, &[1]).is_err());
    for (mode, writeback) in [(1, true), (0, false), (1, true), (2, false)] {
        write(&device, 32, &[mode]).expect("the cache mode");
        assert_eq!(device.writeback(), writeback, "{mode}");
        assert_eq!(read(&device)[32], u8::from(writeback), "{mode}");
    }
}
