//! Grants that begin or end a re-key, for a data plane that is locked in: what is refused, and what the status
//! says of it.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bulkhead_crypto::{SecretArena, XtsKey, key_check};
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::control::{RekeyProgress, RekeyState};
use bulkhead_protocol::keys::{DataplaneToKeyd, VolumeGrant};
use bulkhead_protocol::rekey::{KeyCheck, Record, Stage, layout, prepared};

use super::grant_refused;
use super::harness::{Host, VOLUME_BYTES, features, grant, key, key_page, volume};

const FIRST: RekeyId = RekeyId([0xa1; 16]);
const SECOND: RekeyId = RekeyId([0xb2; 16]);

/// Key number 2 takes the place of key number 1.
fn with(rekey: RekeyId, epoch: u64) -> VolumeGrant {
    VolumeGrant {
        rekey: Some(rekey),
        epoch,
        ..grant(1)
    }
}

/// Grants volume 1 with keys of these numbers.
fn granted(host: &Host, grant: &VolumeGrant, keys: &[u8]) -> DataplaneToKeyd {
    let pages: Vec<_> = keys.iter().map(|n| key_page(&key(*n)).into_fd()).collect();
    let pages: Vec<_> = pages.iter().map(AsFd::as_fd).collect();
    host.grant(grant, &pages)
}

fn accepted() -> DataplaneToKeyd {
    DataplaneToKeyd::Granted {
        id: volume(1).into(),
    }
}

/// Volume 1 with a record behind it.
fn file_with(host: &Host, record: &[u8]) -> std::fs::File {
    file_of(host, 1, record)
}

fn file_of(host: &Host, n: u8, record: &[u8]) -> std::fs::File {
    let layout = layout(VOLUME_BYTES).expect("layout");
    let file = host.file_of(n, layout.end);
    file.write_all_at(record, layout.copies[0]).expect("record");
    file
}

fn check(rekey: RekeyId, n: u8) -> KeyCheck {
    let arena = SecretArena::new(1).expect("arena");
    let key = XtsKey::new(&arena, &key(n)).expect("key");
    key_check(&key, &rekey.0).expect("one unit")
}

/// A record that says that everything is under key number `n`.
fn done(rekey: RekeyId, n: u8) -> Vec<u8> {
    record(
        1,
        rekey,
        Stage::Done {
            check: check(rekey, n),
        },
    )
}

/// One that says that it was, and that the previous key is dropped.
fn over(rekey: RekeyId, n: u8) -> Vec<u8> {
    let check = check(rekey, n);
    record(1, rekey, Stage::Over { check })
}

/// One of volume 2 that says that a data unit is under key number `n`, and the rest under `previous`.
fn running(rekey: RekeyId, n: u8, previous: u8) -> Vec<u8> {
    record(
        2,
        rekey,
        Stage::Running {
            frontier_bytes: 4096,
            zone: None,
            previous_check: check(rekey, previous),
            check: check(rekey, n),
        },
    )
}

fn record(n: u8, rekey: RekeyId, stage: Stage) -> Vec<u8> {
    let record = Record {
        volume: volume(n),
        rekey,
        size_bytes: VOLUME_BYTES,
        data_unit_bytes: 4096,
        sequence: 8,
        stage,
    };
    record.encode().to_vec()
}

fn wait_for(host: &mut Host, done_bytes: u64, state: &RekeyState) {
    wait_for_of(host, 1, done_bytes, state);
}

fn wait_for_of(host: &mut Host, n: u8, done_bytes: u64, state: &RekeyState) {
    let expected = Some(RekeyProgress {
        done_bytes,
        total_bytes: VOLUME_BYTES,
        state: state.clone(),
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = host.status_of(n).expect("granted");
        if status.rekey == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{:?}", status.rekey);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_re_key_begins_on_a_served_volume_and_its_previous_key_stays() {
    let mut host = Host::start();
    let record = prepared(volume(1), FIRST, VOLUME_BYTES, 4096);
    let file = file_with(&host, &record);
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    // Its previous key has to be the one in use.
    let answer = granted(&host, &with(FIRST, 2), &[2, 3]);
    grant_refused(answer, "previous key");
    grant_refused(granted(&host, &with(FIRST, 2), &[2, 2]), "");
    assert_eq!(host.status_of(1).expect("granted").rekey, None);
    assert_eq!(granted(&host, &with(FIRST, 2), &[2, 1]), accepted());
    wait_for(&mut host, 0, &RekeyState::Waiting);
    assert!(features(&mut frontend).is_some(), "the connection stays");
    // Nothing is under the new key yet: neither it alone, nor a next re-key, nor another size.
    let alone = VolumeGrant {
        epoch: 3,
        ..grant(1)
    };
    grant_refused(granted(&host, &alone, &[2]), "0 %");
    let and_more = VolumeGrant {
        serial: "another".to_owned(),
        ..alone.clone()
    };
    grant_refused(granted(&host, &and_more, &[2]), "0 %");
    grant_refused(granted(&host, &with(SECOND, 3), &[3, 2]), "0 %");
    let grown = VolumeGrant {
        size_bytes: 2 * VOLUME_BYTES,
        ..with(FIRST, 3)
    };
    grant_refused(granted(&host, &grown, &[2, 1]), "re-key");
    assert!(features(&mut frontend).is_some(), "the connection stays");
    wait_for(&mut host, 0, &RekeyState::Waiting);
    assert!(host.is_alive());
}

#[test]
fn a_re_key_that_is_done_ends_without_a_detach_and_another_can_begin() {
    let mut host = Host::start();
    let file = file_with(&host, &done(FIRST, 2));
    assert_eq!(granted(&host, &with(FIRST, 1), &[2, 1]), accepted());
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    wait_for(&mut host, VOLUME_BYTES, &RekeyState::Done);
    let alone = VolumeGrant {
        epoch: 2,
        ..grant(1)
    };
    grant_refused(granted(&host, &alone, &[1]), "");
    assert_eq!(granted(&host, &alone, &[2]), accepted());
    assert_eq!(host.status_of(1).expect("granted").rekey, None);
    assert!(features(&mut frontend).is_some(), "the connection stays");
    // The next begins at nothing, whatever was known of the last.
    assert_eq!(granted(&host, &with(SECOND, 3), &[3, 2]), accepted());
    grant_refused(granted(&host, &alone, &[3]), "0 %");
    assert!(features(&mut frontend).is_some(), "the connection stays");
    assert!(host.is_alive());
}

#[test]
fn what_another_host_has_done_is_found_out_when_it_matters() {
    let at = layout(VOLUME_BYTES).expect("layout").copies[0];
    for left in [done(FIRST, 2), over(FIRST, 2)] {
        finished_elsewhere(&left, at);
    }
}

/// A host that never held the volume drops the previous key once the one that did has left this behind it.
fn finished_elsewhere(left: &[u8], at: u64) {
    let mut host = Host::start();
    let file = file_with(&host, &prepared(volume(1), FIRST, VOLUME_BYTES, 4096));
    assert_eq!(granted(&host, &with(FIRST, 1), &[2, 1]), accepted());
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    // Volumes are looked at in turn: once the second's record was seen, the first's was, too.
    let second = VolumeGrant {
        rekey: Some(SECOND),
        ..grant(2)
    };
    let marker = file_of(&host, 2, &running(SECOND, 4, 3));
    let answer = granted(&host, &second, &[4, 3]);
    assert_eq!(
        answer,
        DataplaneToKeyd::Granted {
            id: volume(2).into()
        }
    );
    host.listen(2);
    assert_eq!(host.attach_on(2, 2, &marker), Ok(()));
    wait_for_of(&mut host, 2, 4096, &RekeyState::Waiting);
    let alone = VolumeGrant {
        epoch: 2,
        ..grant(1)
    };
    grant_refused(granted(&host, &alone, &[2]), "0 %");
    // The host that holds the volume has it done. It has the file open by itself: the data plane's own is
    // for direct I/O only, and so is this one, which it was made from.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let other = std::fs::File::options().write(true).open(path);
    let written = other.expect("open").write_all_at(left, at);
    written.expect("record");
    let deadline = Instant::now() + Duration::from_secs(20);
    while granted(&host, &alone, &[2]) != accepted() {
        assert!(Instant::now() < deadline, "it never looks");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(host.status_of(1).expect("granted").rekey, None);
    assert!(host.is_alive());
}
