//! What a driver may ask for: every accepted range lies inside, whatever was written down.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::blk::Geometry;
use crate::memory::{GuestBuffer, Lease, anonymous};
use crate::storage::StorageSpec;

const MEMORY_BYTES: u64 = 1 << 20;

fn device(capacity_sectors: u64, block_bytes: u32, read_only: bool) -> Arc<BlkDevice> {
    let geometry = Geometry {
        logical_block_bytes: block_bytes,
        read_only,
        serial: [0; 20],
        queues: 1,
        discard: false,
    };
    BlkDevice::new(geometry, capacity_sectors, StorageSpec::Null, None)
}

/// A chain with a header as given and `readable` and `writable` bytes of data.
fn chain(kind: u32, sector: u64, readable: u32, writable: u32) -> Chain {
    let (memory, _fd) = anonymous(MEMORY_BYTES).expect("memory");
    let lease = Lease::new(Arc::new(memory));
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    let mut chain = Chain::default();
    let fill = |buffer: &mut GuestBuffer, at: u64, bytes: u32| {
        buffer.reset(&lease);
        buffer.push(at, bytes).expect("in memory");
    };
    fill(&mut chain.readable, 0, 16 + readable);
    assert!(chain.readable.copy_in(0, &header));
    fill(&mut chain.writable, MEMORY_BYTES / 2, writable + 1);
    chain
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is asked: an accepted range lies inside, has whole blocks, and is not written
    /// to a read-only device.
    #[test]
    fn an_accepted_range_is_inside(
        kind in prop_oneof![Just(kind::IN), Just(kind::OUT)],
        sector in prop_oneof![0..2048u64, Just(u64::MAX), Just(1 << 55), any::<u64>()],
        blocks in 0..64u32,
        odd in 0..3u32,
        capacity in 0..1024u64,
        block in prop_oneof![Just(512u32), Just(4096)],
        read_only in any::<bool>(),
    ) {
        let bytes = blocks * 512 + odd;
        let device = device(capacity, block, read_only);
        let (readable, writable) = if kind == kind::IN { (0, bytes) } else { (bytes, 0) };
        let mut chain = chain(kind, sector, readable, writable);
        let parsed = parse(&mut chain, &device, feature::FLUSH).expect("it has a status");
        let inside = sector
            .checked_mul(512)
            .and_then(|at| at.checked_add(u64::from(bytes)))
            .is_some_and(|end| end <= capacity * 512);
        let whole = bytes > 0
            && bytes % block == 0
            && (u128::from(sector) * 512).is_multiple_of(u128::from(block));
        let allowed = kind == kind::IN || !read_only;
        match parsed {
            Ok(Operation::Read { offset_bytes } | Operation::Write { offset_bytes }) => {
                prop_assert!(inside && whole && allowed);
                prop_assert_eq!(offset_bytes, sector * 512);
            }
            Ok(other) => prop_assert!(false, "{other:?}"),
            Err(status) => {
                prop_assert!(!(inside && whole && allowed));
                prop_assert_eq!(status, Status::IoError);
            }
        }
    }
}

#[test]
fn the_wrong_direction_is_an_error() {
    let device = device(1024, 512, false);
    for (kind, readable, writable) in [(kind::IN, 512, 512), (kind::OUT, 512, 512)] {
        let mut chain = chain(kind, 0, readable, writable);
        assert_eq!(
            parse(&mut chain, &device, feature::FLUSH),
            Ok(Err(Status::IoError)),
            "{kind}"
        );
    }
    let mut nothing = chain(kind::GET_ID, 0, 0, 0);
    assert_eq!(
        parse(&mut nothing, &device, feature::FLUSH),
        Ok(Err(Status::IoError))
    );
}

#[test]
fn a_flush_that_was_not_negotiated_and_types_of_others_are_not_supported() {
    let device = device(1024, 512, true);
    let mut flush = chain(kind::FLUSH, 0, 0, 0);
    assert_eq!(parse(&mut flush, &device, 0), Ok(Err(Status::Unsupported)));
    for kind in [2, 3, 5, 7, 9, 10, 11, 12, 13, 14, 0x8000_0000, u32::MAX] {
        let mut chain = chain(kind, 0, 0, 512);
        assert_eq!(
            parse(&mut chain, &device, feature::FLUSH),
            Ok(Err(Status::Unsupported)),
            "{kind}"
        );
    }
}

#[test]
fn without_a_status_byte_there_is_no_answer() {
    let mut chain = chain(kind::IN, 0, 0, 0);
    chain.writable.release();
    let error = parse(&mut chain, &device(8, 512, false), feature::FLUSH);
    assert_eq!(error, Err(RingError::NoStatus));
}

const BOTH: u64 = feature::DISCARD | feature::WRITE_ZEROES;

/// A request with these ranges: sector, sectors, flags.
fn with_ranges(kind: u32, list: &[(u64, u32, u32)]) -> Chain {
    let bytes: Vec<u8> = list
        .iter()
        .flat_map(|(sector, sectors, flags)| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes
        })
        .collect();
    let length = u32::try_from(bytes.len()).expect("short");
    let chain = chain(kind, 0, length, 0);
    assert!(chain.readable.copy_in(16, &bytes));
    chain
}

/// What a request with these ranges is parsed into.
fn parsed(
    device: &BlkDevice,
    kind: u32,
    list: &[(u64, u32, u32)],
) -> Result<(Operation, Vec<Range>), Status> {
    let mut chain = with_ranges(kind, list);
    let operation = parse(&mut chain, device, BOTH).expect("it has a status")?;
    let mut out = vec![Range {
        offset_bytes: 1,
        bytes: 1,
        unmap: true,
    }];
    ranges(&chain, operation, device, &mut out)?;
    Ok((operation, out))
}

#[test]
fn ranges_are_taken_as_they_are() {
    let device = device(1 << 30, 512, false);
    let (operation, list) =
        parsed(&device, kind::WRITE_ZEROES, &[(8, 16, 1), (100, 1, 0)]).expect("good");
    assert_eq!(operation, Operation::WriteZeroes);
    let range = |offset_bytes, bytes, unmap| Range {
        offset_bytes,
        bytes,
        unmap,
    };
    assert_eq!(list, [range(4096, 8192, true), range(51_200, 512, false)]);
    let most = [(0, MAX_DISCARD_SECTORS, 0); MAX_RANGES];
    let (operation, list) = parsed(&device, kind::DISCARD, &most).expect("good");
    assert_eq!((operation, list.len()), (Operation::Discard, MAX_RANGES));
}

#[test]
fn one_bad_range_spoils_all() {
    let device = device(1024, 4096, false);
    let good = (0, 8, 0);
    let bad = [
        (0, 0, 0),
        (1, 8, 0),
        (0, 4, 0),
        (1024, 8, 0),
        (1016, 16, 0),
        (u64::MAX, 8, 0),
        (u64::MAX / 512, 8, 0),
        (1 << 55, 8, 0),
        (0, u32::MAX, 0),
        (0, u32::MAX - 7, 0),
    ];
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        assert!(parsed(&device, kind, &[good, good]).is_ok());
        for bad in bad {
            let result = parsed(&device, kind, &[good, bad, good]);
            assert_eq!(result, Err(Status::IoError), "{kind} {bad:?}");
        }
    }
}

#[test]
fn ranges_are_no_longer_than_offered_and_no_more() {
    let device = device(1 << 40, 512, false);
    for (kind, most) in [
        (kind::DISCARD, MAX_DISCARD_SECTORS),
        (kind::WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS),
    ] {
        assert!(parsed(&device, kind, &[(0, most, 0)]).is_ok());
        let result = parsed(&device, kind, &[(0, most + 1, 0)]);
        assert_eq!(result, Err(Status::IoError));
        let many = vec![(0, 8, 0); MAX_RANGES + 1];
        assert_eq!(parsed(&device, kind, &many), Err(Status::IoError));
        assert_eq!(parsed(&device, kind, &[]), Err(Status::IoError));
        // Half a range, and very many, of which none is read.
        for bytes in [8, 24, 512 * 1024 - 32] {
            let mut chain = chain(kind, 0, bytes, 0);
            let result = parse(&mut chain, &device, BOTH);
            assert_eq!(result, Ok(Err(Status::IoError)), "{bytes}");
        }
        let mut writable = chain(kind, 0, 16, 16);
        let result = parse(&mut writable, &device, BOTH);
        assert_eq!(result, Ok(Err(Status::IoError)));
    }
}

#[test]
fn flags_that_there_are_not_are_not_supported() {
    let device = device(1024, 512, false);
    for flags in [2, 3, 4, 0x8000_0000, u32::MAX] {
        let result = parsed(&device, kind::WRITE_ZEROES, &[(0, 8, flags)]);
        assert_eq!(result, Err(Status::Unsupported), "{flags:#x}");
    }
    for flags in [1, 2, u32::MAX] {
        let result = parsed(&device, kind::DISCARD, &[(0, 8, flags)]);
        assert_eq!(result, Err(Status::Unsupported), "{flags:#x}");
    }
}

#[test]
fn ranges_need_their_feature_and_a_device_that_may_change() {
    let writable = device(1024, 512, false);
    let read_only = device(1024, 512, true);
    for (kind, feature) in [
        (kind::DISCARD, feature::DISCARD),
        (kind::WRITE_ZEROES, feature::WRITE_ZEROES),
    ] {
        let mut chain = with_ranges(kind, &[(0, 8, 0)]);
        let result = parse(&mut chain, &writable, BOTH & !feature);
        assert_eq!(result, Ok(Err(Status::Unsupported)));
        let mut chain = with_ranges(kind, &[(0, 8, 0)]);
        let result = parse(&mut chain, &read_only, BOTH);
        assert_eq!(result, Ok(Err(Status::IoError)));
    }
}

#[test]
fn a_write_is_durable_without_flush_or_by_choice() {
    let device = device(8, 512, false);
    assert!(is_durable(&device, 0));
    assert!(!is_durable(&device, feature::FLUSH));
    device.set_writeback(false);
    assert!(is_durable(&device, feature::FLUSH));
    // What a driver begins with, ...
    device.reset();
    device.negotiated(feature::FLUSH | feature::CONFIG_WCE);
    assert!(device.writeback());
    device.negotiated(feature::CONFIG_WCE);
    assert!(!device.writeback());
    device.negotiated(feature::FLUSH | feature::CONFIG_WCE);
    assert!(device.writeback());
    // ... and what it chose, which a frontend that starts its queues anew does not say again.
    device.set_writeback(false);
    device.negotiated(feature::FLUSH | feature::CONFIG_WCE);
    assert!(!device.writeback());
}
