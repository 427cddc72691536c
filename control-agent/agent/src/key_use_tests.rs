//! The totals over restarts, re-keys and limits.

use bulkhead_bundle::Rekey;
use proptest::prelude::*;

use super::*;
use crate::examples;

const ID: VolumeId = VolumeId([1; 16]);
const FIRST: Process = Process {
    pid: 7,
    generation: 1,
};
const SECOND: Process = Process {
    pid: 8,
    generation: 2,
};

fn bundle(rekey: Option<u8>) -> HostBundle {
    let volume = |number: u8, data_unit_bytes| Volume {
        size_bytes: 1000,
        data_unit_bytes,
        rekey: rekey.map(|id| Rekey {
            id: RekeyId([id; 16]),
            previous_keys: Vec::new(),
        }),
        ..examples::volume(number)
    };
    examples::bundle(vec![volume(1, Some(512)), volume(2, None)])
}

fn said(written_bytes: u64) -> Vec<VolumeStatus> {
    let status = |number: u8| VolumeStatus {
        volume: VolumeId([number; 16]),
        attached: true,
        connected: true,
        encrypted: number == 1,
        running_queues: 1,
        retired_queues: 0,
        requests_ok: 0,
        requests_failed: 0,
        read_bytes: 0,
        written_bytes,
        fault: None,
        capacity_bytes: 0,
        holds_volume: true,
        waits_for_volume: false,
        rekey: None,
        storage: None,
        throttled_ms: 0,
    };
    vec![status(1), status(2)]
}

#[test]
fn figures_are_added_up_over_restarts_of_either_process() {
    let mut key_use = KeyUse::default();
    let mut add = |process, written, expected| {
        // The agent is another one each time.
        key_use = KeyUse::from_text(&key_use.to_text()).expect("kept");
        key_use.add(&bundle(None), process, &said(written));
        assert_eq!(key_use.of(ID), Some(expected));
    };
    add(FIRST, 100, 100);
    add(FIRST, 100, 100);
    add(FIRST, 130, 130);
    add(SECOND, 500, 630);
    // Detached and attached again: it counts from zero.
    add(SECOND, 20, 650);
    add(SECOND, 25, 655);
    assert_eq!(key_use.of(VolumeId([2; 16])), None, "a plain volume");
}

#[test]
fn another_key_is_counted_from_the_volume_that_is_written_under_it() {
    let mut key_use = KeyUse::default();
    key_use.add(&bundle(None), FIRST, &said(70));
    key_use.add(&bundle(Some(3)), FIRST, &said(90));
    assert_eq!(key_use.of(ID), Some(1000));
    key_use.add(&bundle(Some(3)), FIRST, &said(95));
    // Finished: the key stays.
    key_use.add(&bundle(None), FIRST, &said(99));
    assert_eq!(key_use.of(ID), Some(1009));
    key_use.add(&bundle(Some(4)), FIRST, &said(100));
    assert_eq!(key_use.of(ID), Some(1000));
}

#[test]
fn each_limit_is_told_of_once() {
    let mut key_use = KeyUse::default();
    let mut add = |written| key_use.add(&bundle(None), FIRST, &said(written));
    assert_eq!(add(1 << 40), Vec::<String>::new());
    let warnings = add((1 << 40) + 1);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("volume disk1: ") && warnings[0].contains("1 TiB"));
    assert!(warnings[0].contains("re-key it (`bulkhead volume rekey`)"));
    assert_eq!(add(200 << 40), Vec::<String>::new());
    let warnings = add(300 << 40);
    assert!(warnings[0].contains("256 TiB"), "{warnings:?}");
    assert_eq!(add(600 << 40), Vec::<String>::new());
}

#[test]
fn a_text_that_was_not_written_here_is_none() {
    let mut key_use = KeyUse::default();
    key_use.add(&bundle(Some(3)), FIRST, &said(70));
    let text = key_use.to_text();
    assert_eq!(KeyUse::from_text(&text), Some(key_use));
    for (from, to) in [
        ("v1", "v2"),
        ("dataplane 7 1", "dataplane 7"),
        ("1000 70", "1000"),
        ("1000 70", "1000 070"),
        ("1000 70", "1000 70 1"),
        ("03030303-", "0303030-"),
    ] {
        assert!(text.contains(from), "{from}");
        assert_eq!(KeyUse::from_text(&text.replace(from, to)), None, "{to}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text: String) {
        let _ = KeyUse::from_text(&text);
    }
}
