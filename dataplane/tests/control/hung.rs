//! Storage that really hangs: a file system that stops answering, under the data plane's own process.

use std::time::{Duration, Instant};

use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{self, VERSION, request};
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::control::{StorageState, StorageStatus};

use super::harness::{Host, VOLUME_BYTES, features, volume};
use super::refused;
use super::stuck::{Sticks, Stuck};

/// How long anything here may take, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(30);
const BLOCK: u32 = 4096;

fn mounted(test: &str) -> Option<Stuck> {
    let stuck = Stuck::mount(VOLUME_BYTES);
    if stuck.is_none() {
        println!("skipped: {test}: no file system can be mounted here");
    }
    stuck
}

fn attach(host: &Host, n: u8) -> Disk {
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    Disk::attach(&host.socket_path(n), &options).expect("a disk")
}

/// Requests that end when the storage answers: so many reads and as many writes.
fn submit(disk: &mut Disk, count: u16) {
    for slot in 0..2 * count {
        let request = Request {
            kind: if slot < count { kind::IN } else { kind::OUT },
            sector: u64::from(slot) * 8,
            segments: vec![(DATA + u64::from(slot) * u64::from(BLOCK), BLOCK)],
        };
        disk.push(0, slot, &request).expect("push");
    }
    disk.publish(0).expect("publish");
}

fn storage_of(host: &mut Host, n: u8) -> Option<StorageStatus> {
    host.status_of(n).and_then(|status| status.storage)
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn said(host: &Host, of: VolumeId) -> Vec<StorageState> {
    let of = |(volume, state): &(VolumeId, StorageState)| (*volume == of).then_some(*state);
    host.storage_said.iter().filter_map(of).collect()
}

#[test]
fn a_volume_whose_storage_hangs_is_taken_away_and_the_others_go_on() {
    let Some(stuck) = mounted("a_volume_whose_storage_hangs_is_taken_away_and_the_others_go_on")
    else {
        return;
    };
    let mut host = Host::start();
    // It has to answer for a data plane to end.
    let _answers = stuck.answers_at_the_end();
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    host.served(2);
    let mut disks = [1, 2].map(|n| attach(&host, n));
    let [disk, neighbour] = &mut disks;
    disk.write(0, 0, &[7; BLOCK as usize]).expect("it answers");

    stuck.stick(Sticks::All);
    submit(disk, 3);
    // Writes of one file go on one after the other there.
    wait_until("the storage has them", || stuck.waiting() >= 4);
    for queue in [0, 1, 0, 1] {
        neighbour
            .write(queue, 8, &[9; BLOCK as usize])
            .expect("the neighbour's");
        assert_eq!(
            neighbour.read(queue, 8, BLOCK).expect("read"),
            [9; BLOCK as usize]
        );
    }
    wait_until("it is seen", || {
        storage_of(&mut host, 1)
            .is_some_and(|s| s.state == StorageState::Slow && s.old_requests == 6)
    });
    let of_neighbour = storage_of(&mut host, 2).expect("attached");
    assert_eq!(of_neighbour.state, StorageState::Fine);

    assert_eq!(host.prepare_remove(1, true), Ok(()));
    let (began, left) = (Instant::now(), host.detach_hung(1));
    assert_eq!(left, 6, "after {:?}", began.elapsed());
    let heard = disk.frontend.receive();
    assert!(matches!(heard, Err(FrontendError::Closed)), "{heard:?}");
    let status = host.status_of(1).expect("granted");
    assert!(!status.attached && !status.connected && !status.encrypted);
    let storage = status.storage.expect("something is left");
    assert_eq!(
        (storage.state, storage.old_requests),
        (StorageState::GivenUp, 6)
    );
    // Neither this way nor under another name.
    host.granted(1);
    refused(
        host.attach_on(1, 1, &stuck.file()),
        "6 requests still with the kernel",
    );
    neighbour
        .write(0, 16, &[8; BLOCK as usize])
        .expect("the neighbour's");

    stuck.stick(Sticks::Nothing);
    wait_until("they have ended", || storage_of(&mut host, 1).is_none());
    assert_eq!(host.cancel_remove(1), Ok(()));
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    let mut disk = attach(&host, 1);
    assert_eq!(disk.read(0, 0, BLOCK).expect("read"), [7; BLOCK as usize]);
    assert_eq!(
        said(&host, volume(1)),
        [
            StorageState::Slow,
            StorageState::GivenUp,
            StorageState::Fine
        ]
    );
    assert_eq!(said(&host, volume(2)), []);
    drop(disk);
    assert!(host.stop().success());
}

#[test]
fn a_frontend_that_goes_while_the_storage_hangs_holds_nobody_up() {
    let Some(stuck) = mounted("a_frontend_that_goes_while_the_storage_hangs_holds_nobody_up")
    else {
        return;
    };
    let mut host = Host::start();
    // It has to answer for a data plane to end.
    let _answers = stuck.answers_at_the_end();
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &stuck.file()), Ok(()));
    let mut disk = attach(&host, 1);
    stuck.stick(Sticks::All);
    submit(&mut disk, 2);
    wait_until("the storage has them", || stuck.waiting() >= 3);
    // It asks where its queue stands, is not told, and ends.
    let ask = message::encode(request::GET_VRING_BASE, VERSION, &[0; 8]);
    disk.frontend.send_raw(&ask, &[]).expect("sent");
    drop(disk);
    wait_until("it is noticed", || {
        !host.status_of(1).expect("granted").connected
    });
    // The next one waits: what it writes must not be overwritten by what its predecessor wrote.
    let mut next = host.frontend(1);
    next.set_read_timeout(Some(Duration::from_millis(200)))
        .expect("timeout");
    assert_eq!(features(&mut next), None, "served too early");
    assert_eq!(storage_of(&mut host, 1).expect("attached").old_requests, 4);
    drop(next);
    stuck.stick(Sticks::Nothing);
    let mut disk = attach(&host, 1);
    disk.write(0, 0, &[5; BLOCK as usize]).expect("write");
    disk.flush(0).expect("no flush has failed by it");
    assert_eq!(disk.read(0, 0, BLOCK).expect("read"), [5; BLOCK as usize]);
    drop(disk);
    assert_eq!(host.detach(1), Ok(()));
}
