//! The record: what is written is read back, and nothing else is taken for one.

use proptest::prelude::*;

use super::*;

fn stages() -> impl Strategy<Value = Stage> {
    let zone = (0..=256u64, any::<[u8; 32]>()).prop_map(|(units, journal_sha256)| {
        (units > 0).then_some(Zone {
            bytes: units * 4096,
            journal_sha256,
        })
    });
    let running = (0..=1000u64, zone, any::<KeyCheck>(), any::<KeyCheck>());
    prop_oneof![
        Just(Stage::Prepared),
        running.prop_map(|(units, zone, previous_check, check)| Stage::Running {
            frontier_bytes: units * 4096,
            zone,
            previous_check,
            check,
        }),
        any::<KeyCheck>().prop_map(|check| Stage::Done { check }),
        any::<KeyCheck>().prop_map(|check| Stage::Over { check }),
    ]
}

fn record(stage: Stage, sequence: u64) -> Record {
    Record {
        volume: VolumeId([1; 16]),
        rekey: RekeyId([2; 16]),
        size_bytes: 2000 * 4096,
        data_unit_bytes: 4096,
        sequence,
        stage,
    }
}

fn running(frontier_bytes: u64, zone_bytes: u64) -> Stage {
    Stage::Running {
        frontier_bytes,
        zone: (zone_bytes > 0).then_some(Zone {
            bytes: zone_bytes,
            journal_sha256: [5; 32],
        }),
        previous_check: [3; 16],
        check: [4; 16],
    }
}

/// A copy with one field overwritten and the digest made right again: what a forger would write.
fn forged(stage: Stage, at: usize, value: &[u8]) -> [u8; RECORD_BYTES] {
    let mut bytes = record(stage, 4).encode();
    put(&mut bytes, at, value);
    let digest = digest(&bytes);
    put(&mut bytes, DIGEST_AT, &digest);
    bytes
}

fn copies(first: &[u8; RECORD_BYTES], second: &[u8; RECORD_BYTES]) -> [u8; COPIES * RECORD_BYTES] {
    let mut bytes = [0; COPIES * RECORD_BYTES];
    put(&mut bytes, 0, first);
    put(&mut bytes, RECORD_BYTES, second);
    bytes
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(stage in stages(), sequence in 0..=MAX_SEQUENCE) {
        let record = record(stage, sequence);
        prop_assert_eq!(Record::decode(&record.encode()), Some(record));
    }

    /// As a torn or a rotten sector leaves it.
    #[test]
    fn no_changed_byte_passes(stage in stages(), at in 0..RECORD_BYTES, flip in 1..=255u8) {
        let mut bytes = record(stage, 8).encode();
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= flip;
        }
        prop_assert_eq!(Record::decode(&bytes), None);
    }

    /// Whatever decodes keeps its promises, however its bytes came about.
    #[test]
    fn a_forged_record_has_values_in_range_or_is_none(
        stage in stages(),
        at in 0..at::END,
        value in proptest::collection::vec(any::<u8>(), 1..16),
    ) {
        let bytes = forged(stage, at, &value);
        if let Some(record) = Record::decode(&bytes) {
            prop_assert_eq!(record.encode(), bytes);
            let layout = layout(record.size_bytes);
            prop_assert!(layout.is_some_and(|layout| layout.end > record.size_bytes));
            if let Stage::Running { frontier_bytes, zone, .. } = record.stage {
                let zone = zone.map_or(0, |zone| zone.bytes);
                prop_assert!(zone <= ZONE_BYTES && frontier_bytes + zone <= record.size_bytes);
                let unit = u64::from(record.data_unit_bytes);
                prop_assert!((frontier_bytes % unit, zone % unit) == (0, 0));
            }
            prop_assert!(record.next(record.stage).sequence > record.sequence);
        }
    }

    #[test]
    fn the_parts_never_touch_the_volume_or_each_other(size in 1..1u64 << 62) {
        let layout = layout(size).expect("fits");
        let [first, second] = layout.copies;
        prop_assert!(first >= size && first % (1 << 20) == 0);
        prop_assert_eq!(second, first + RECORD_BYTES as u64);
        prop_assert!(layout.journal >= second + RECORD_BYTES as u64);
        prop_assert_eq!(layout.end, layout.journal + ZONE_BYTES);
        prop_assert!(layout.end - size < 3 << 20);
    }
}

#[test]
fn values_out_of_range_are_no_record_even_with_the_right_digest() {
    let stage = running(4096, 8192);
    assert!(Record::decode(&forged(stage, at::CHECK, &[9])).is_some());
    let cases: [(&str, usize, &[u8]); 13] = [
        ("magic", 0, b"Bulkhead"),
        ("no size", at::SIZE, &0u64.to_le_bytes()),
        (
            "part of a unit",
            at::SIZE,
            &(2000 * 4096 + 512u64).to_le_bytes(),
        ),
        ("too large", at::SIZE, &(u64::MAX - 4095).to_le_bytes()),
        ("no unit", at::UNIT, &0u32.to_le_bytes()),
        ("odd unit", at::UNIT, &1024u32.to_le_bytes()),
        ("stage", at::STAGE, &3u32.to_le_bytes()),
        ("frontier in a unit", at::FRONTIER, &1u64.to_le_bytes()),
        (
            "frontier behind",
            at::FRONTIER,
            &(2001 * 4096u64).to_le_bytes(),
        ),
        ("overflow", at::FRONTIER, &(u64::MAX - 4095).to_le_bytes()),
        ("zone behind", at::ZONE, &(2000 * 4096u64).to_le_bytes()),
        ("sequence", at::SEQUENCE, &u64::MAX.to_le_bytes()),
        ("unused bytes", at::END, &[1]),
    ];
    for (name, at, value) in cases {
        assert_eq!(Record::decode(&forged(stage, at, value)), None, "{name}");
    }
    let done = Stage::Done { check: [4; 16] };
    for (name, at) in [
        ("zone", at::ZONE),
        ("frontier", at::FRONTIER),
        ("previous", at::PREVIOUS_CHECK),
    ] {
        assert_eq!(
            Record::decode(&forged(done, at, &[1])),
            None,
            "done, {name}"
        );
        let prepared = forged(Stage::Prepared, at, &[1]);
        assert_eq!(Record::decode(&prepared), None, "prepared, {name}");
    }
}

#[test]
fn the_later_whole_copy_counts() {
    let (old, new) = (record(running(0, 4096), 6), record(running(4096, 0), 7));
    let torn = [0x5a; RECORD_BYTES];
    let mut half = new.encode();
    half[2048..].fill(0);
    let none = [0; RECORD_BYTES];
    let cases = [
        ("both", old.encode(), new.encode(), Found::Record(new)),
        ("the first alone", old.encode(), none, Found::Record(old)),
        ("the second torn", old.encode(), half, Found::Record(old)),
        ("the first lost", torn, new.encode(), Found::Record(new)),
        ("both torn", torn, half, Found::Damaged),
        ("other data", torn, torn, Found::Nothing),
        ("nothing", none, none, Found::Nothing),
        (
            "in each other's place",
            new.encode(),
            old.encode(),
            Found::Damaged,
        ),
    ];
    for (name, first, second, expected) in cases {
        assert_eq!(find(&copies(&first, &second)), expected, "{name}");
    }
}

#[test]
fn a_prepared_re_key_is_found_whichever_copy_is_whole() {
    let bytes = prepared(VolumeId([1; 16]), RekeyId([2; 16]), 1 << 20, 512);
    for torn in [None, Some(0), Some(RECORD_BYTES)] {
        let mut bytes = bytes;
        if let Some(at) = torn {
            put(&mut bytes, at + 100, &[0xff; 64]);
        }
        let Found::Record(record) = find(&bytes) else {
            panic!("no record with {torn:?} torn");
        };
        assert_eq!(
            (record.stage, record.size_bytes),
            (Stage::Prepared, 1 << 20)
        );
        assert_eq!(record.rekey, RekeyId([2; 16]));
    }
}

#[test]
fn the_copy_is_chosen_by_the_sequence() {
    let layout = layout(1).expect("fits");
    assert_eq!(layout.copies, [1 << 20, (1 << 20) + 4096]);
    assert_eq!((layout.journal, layout.end), (2 << 20, 3 << 20));
    assert_eq!(layout.copy_for(6), layout.copies[0]);
    assert_eq!(layout.copy_for(7), layout.copies[1]);
    assert_eq!(super::layout(u64::MAX), None);
    assert_eq!(super::layout(i64::MAX.unsigned_abs()), None);
}
