//! The bytes: what is written is read, damage is told, and of two copies the later whole one counts.

use bulkhead_dataplane::stored::format::{
    COPY_BYTES, FRAME_BYTES, FormatError, MAX_PAYLOAD_BYTES, WRITTEN_BY, decode, encode, latest,
};
use bulkhead_dataplane::stored::{FdNumber, Reply, Step, Stored, StoredVolume};
use proptest::prelude::*;

use crate::sample::{full, idle, nic, switch};

fn copy(sequence: u64, stored: &Stored<FdNumber>) -> Vec<u8> {
    let mut bytes = encode(sequence, stored).expect("it fits");
    bytes.resize(COPY_BYTES, 0xee);
    bytes
}

/// A volume with everything that there can be.
fn whole_volume(queues: u16, regions: u64) -> Stored<FdNumber> {
    full(queues, regions).into()
}

#[test]
fn what_is_written_is_read_and_the_largest_fits_twice() {
    let mut next = 0;
    let mut number = || {
        next += 1;
        FdNumber(next)
    };
    let mut all: Vec<Stored<FdNumber>> = vec![
        idle(1, &mut number).into(),
        full(1, 1).into(),
        full(64, 32).into(),
    ];
    if WRITTEN_BY >= 3 {
        all.extend([nic(1, 1).into(), nic(16, 32).into(), switch().into()]);
    }
    for stored in all {
        let read = decode(&copy(5, &stored)).expect("whole");
        assert_eq!((read.sequence, &read.stored), (5, &stored));
        let bytes = encode(1, &stored).expect("it fits").len();
        assert!(
            bytes < COPY_BYTES / 2,
            "{bytes} bytes leave no room for more fields"
        );
    }
}

#[test]
fn a_version_that_has_no_cards_refuses_them_by_name() {
    let refused = |stored: Stored<FdNumber>| match encode(1, &stored) {
        Ok(bytes) => {
            assert_eq!(bytes[18..20], 3u16.to_le_bytes());
            false
        }
        Err(error) => matches!(error, FormatError::Value(_)),
    };
    assert_eq!(refused(nic(1, 1).into()), WRITTEN_BY < 3);
    assert_eq!(refused(switch().into()), WRITTEN_BY < 3);
    // As a version writes it that has them.
    let mut bytes = encode(1, &whole_volume(1, 1)).expect("it fits");
    bytes[18..20].copy_from_slice(&3u16.to_le_bytes());
    bytes[32] = 1;
    let error = decode(&sealed(bytes)).expect_err("no card");
    assert_eq!(
        matches!(error, FormatError::Newer { readable_by: 3, .. }),
        WRITTEN_BY < 3,
        "{error}"
    );
}

#[test]
fn a_state_that_is_too_long_is_not_written() {
    let error = encode(1, &whole_volume(1000, 1000)).expect_err("too long");
    assert!(matches!(error, FormatError::TooLong(n) if n > MAX_PAYLOAD_BYTES));
}

#[test]
fn the_later_whole_copy_counts() {
    let (old, new) = (whole_volume(1, 1), whole_volume(2, 1));
    let read = |one: &[u8], two: &[u8]| latest([one, two]).map(|n| n.sequence);
    let (one, two) = (copy(7, &old), copy(8, &new));
    assert_eq!(read(&one, &two), Ok(8));
    assert_eq!(read(&two, &one), Ok(8));
    let nothing = vec![0; COPY_BYTES];
    assert_eq!(read(&nothing, &one), Ok(7));
    assert_eq!(read(&nothing, &nothing), Err(FormatError::Empty));
    // A death in the middle of a write, wherever that is.
    let length = encode(8, &new).expect("it fits").len();
    let six = copy(6, &old);
    for cut in (0..length).step_by(7) {
        let torn = [&two[..cut], &six[cut..]].concat();
        let expected = if torn == six { 6 } else { 0 };
        assert_eq!(read(&torn, &one), Ok(7.max(expected)), "cut at {cut}");
        if torn != six {
            let alone = latest([&torn, &nothing]).expect_err("torn");
            assert!(
                matches!(alone, FormatError::Damaged(_)),
                "cut at {cut}: {alone}"
            );
        }
    }
}

#[test]
fn every_bit_of_a_state_counts() {
    let whole = encode(3, &whole_volume(1, 1)).expect("it fits");
    for at in 0..whole.len() {
        for bit in [1, 0x80] {
            let mut bad = whole.clone();
            bad[at] ^= bit;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
    }
    for length in 0..whole.len() {
        assert!(decode(&whole[..length]).is_err(), "{length} bytes");
    }
}

/// The digest put right after the frame or the payload was changed.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    use sha2::Digest;
    let digest = sha2::Sha256::new()
        .chain_update(&bytes[..48])
        .chain_update(&bytes[FRAME_BYTES..]);
    bytes[48..FRAME_BYTES].copy_from_slice(&digest.finalize());
    bytes
}

#[test]
fn a_version_says_who_can_read_it() {
    let mut bytes = encode(3, &whole_volume(1, 1)).expect("it fits");
    assert_eq!(bytes[16..18], WRITTEN_BY.to_le_bytes());
    assert_eq!(bytes[18..20], 1u16.to_le_bytes(), "every version");
    bytes[16..18].copy_from_slice(&900u16.to_le_bytes());
    assert!(
        decode(&sealed(bytes.clone())).is_ok(),
        "a later one that we can read"
    );
    bytes[18..20].copy_from_slice(&899u16.to_le_bytes());
    let error = decode(&sealed(bytes)).expect_err("too new");
    let newer = FormatError::Newer {
        written_by: 900,
        readable_by: 899,
    };
    assert_eq!(error, newer);
    assert!(
        error
            .to_string()
            .contains("start a newer bulkhead-dataplane")
    );
}

#[test]
fn what_can_not_be_is_refused() {
    type Change = fn(&mut StoredVolume<FdNumber>);
    let cases: [(&str, Change); 7] = [
        ("another number of queues", |v| v.grant.queues = 2),
        ("a queue's size", |v| {
            v.connection.as_mut().expect("one").vrings[0].size = 32769;
        }),
        ("too many regions", |v| {
            let c = v.connection.as_mut().expect("one");
            c.memory = (0..33)
                .map(|i| {
                    let mut region = c.memory[0];
                    region.fd = FdNumber(i);
                    region
                })
                .collect();
        }),
        ("a descriptor twice", |v| v.file = v.listener),
        ("a connection's descriptor twice", |v| {
            v.connection.as_mut().expect("one").socket = v.file;
        }),
        ("a message that is too short", |v| {
            let step = Step::Applied {
                bytes: 11,
                reply: Reply::None,
            };
            v.connection.as_mut().expect("one").step = step;
        }),
        ("a message that is too long", |v| {
            let step = Step::Applied {
                bytes: 12 + 4097,
                reply: Reply::None,
            };
            v.connection.as_mut().expect("one").step = step;
        }),
    ];
    for (name, change) in cases {
        let mut volume = full(1, 1);
        change(&mut volume);
        let error = decode(&copy(1, &volume.into())).expect_err(name);
        assert!(matches!(error, FormatError::Value(_)), "{name}: {error}");
    }
    for sequence in [0, (1 << 62) + 1, u64::MAX] {
        assert!(
            decode(&copy(sequence, &whole_volume(1, 1))).is_err(),
            "{sequence}"
        );
    }
}

proptest! {
    #[test]
    fn any_payload_is_read_or_refused(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = encode(3, &whole_volume(1, 1)).expect("it fits");
        bytes.truncate(FRAME_BYTES);
        bytes[20..24].copy_from_slice(&u32::try_from(payload.len()).expect("short").to_le_bytes());
        bytes.extend(payload);
        let _ = decode(&sealed(bytes));
    }

    #[test]
    fn a_payload_with_other_bytes_in_it_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode(3, &whole_volume(2, 2)).expect("it fits");
        for (at, byte) in changes {
            let at = FRAME_BYTES + at.index(bytes.len() - FRAME_BYTES);
            bytes[at] = byte;
        }
        if let Ok(read) = decode(&sealed(bytes)) {
            prop_assert!(encode(read.sequence, &read.stored).is_ok());
        }
    }
}
