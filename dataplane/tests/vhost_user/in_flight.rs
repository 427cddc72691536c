//! What a session makes of in-flight regions that somebody kept: which start may recover, what a queue does before it
//! stops, and that a device which is reset has nothing in flight.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use bulkhead_dataplane::blk::Patience;
use bulkhead_dataplane::vhost_user::Outbox;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::virtqueue::Format;
use bulkhead_dataplane::worker::message::{FromWorker, QueueStart};

use crate::messages::{QUEUES, halves, memfd};
use crate::rig::{Answer, Rig, ack, done, queue};
use crate::shared::{inflight, on_file, start_queue, started, volume};

/// Gives a region in which the first queue's has this version.
fn give_region(rig: &mut Rig, version: u16) -> File {
    let stride = Format::Split.region_bytes(128);
    let bytes = stride * u64::from(QUEUES);
    let fd: OwnedFd = memfd(bytes);
    let file = File::from(fd.try_clone().expect("dup"));
    let written = file.write_all_at(&version.to_le_bytes(), 8);
    written.expect("the region");
    let body = inflight(bytes, 0, QUEUES, 128);
    assert_eq!(rig.send(code::SET_INFLIGHT_FD, body, vec![fd]), ack(0));
    file
}

fn version(region: &File) -> u16 {
    let mut bytes = [0; 2];
    region.read_exact_at(&mut bytes, 8).expect("the region");
    u16::from_le_bytes(bytes)
}

fn start(rig: &mut Rig) -> QueueStart {
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    let start = started(rig);
    assert_eq!(rig.say(FromWorker::Started { queue: queue(0) }), ack(0));
    *start
}

fn get_base(rig: &mut Rig) -> Answer {
    rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![])
}

fn base() -> Answer {
    Answer::Reply([halves(&[0]), halves(&[77])].concat())
}

fn retry(rig: &mut Rig) {
    let mut out = Outbox::default();
    rig.session.retry_volume(&mut out);
    let messages = out.to_workers.drain(..).map(|(_, message)| message);
    rig.to_worker.extend(messages);
}

/// The worker says what it does, but for what it does not answer.
fn work(rig: &mut Rig) -> Answer {
    rig.to_worker
        .retain(|message| !format!("{message:?}").starts_with("Finish"));
    rig.work()
}

#[test]
fn only_a_queue_that_was_stopped_here_starts_anew() {
    let file = volume();
    let (mut rig, _device) = on_file(file.path());
    give_region(&mut rig, 1);
    assert!(!start(&mut rig).anew, "who served it before may have died");
    assert_eq!(get_base(&mut rig), Answer::Pending);
    assert_eq!(rig.told().len(), 2);
    assert!(rig.told()[0].starts_with("Finish"), "{:?}", rig.told());
    assert_eq!(rig.told()[1], "stop 0");
    assert_eq!(work(&mut rig), base());
    // Nothing of it is in flight now, and the frontend knows where it is.
    assert!(start(&mut rig).anew);
    assert_eq!(get_base(&mut rig), Answer::Pending);
    assert_eq!(rig.told(), ["stop 0"], "it owes nothing");
    assert_eq!(work(&mut rig), base());
}

#[test]
fn a_queue_without_a_past_has_nothing_to_finish() {
    let file = volume();
    let (mut rig, _device) = on_file(file.path());
    give_region(&mut rig, 0);
    assert!(!start(&mut rig).anew);
    assert_eq!(get_base(&mut rig), Answer::Pending);
    assert_eq!(rig.told(), ["stop 0"]);
    assert_eq!(work(&mut rig), base());
}

#[test]
fn a_device_that_is_reset_has_nothing_in_flight() {
    for (code, body) in [
        (code::RESET_OWNER, vec![]),
        (code::RESET_DEVICE, vec![]),
        (code::SET_STATUS, crate::messages::words(&[0])),
    ] {
        for running in [false, true] {
            let file = volume();
            let (mut rig, _device) = on_file(file.path());
            let region = give_region(&mut rig, 1);
            if running {
                start(&mut rig);
                assert_eq!(rig.send(code, body.clone(), vec![]), Answer::Pending);
                assert_eq!(rig.told(), ["stop 0"], "nothing of before is done");
                assert_eq!(version(&region), 1, "its worker may still write to it");
                assert_eq!(work(&mut rig), ack(0));
            } else {
                assert_eq!(rig.send(code, body.clone(), vec![]), ack(0));
            }
            assert_eq!(version(&region), 0);
            assert!(!start(&mut rig).anew);
        }
    }
}

/// The volume comes when old requests have ended, or whoever has it lets go of it.
#[test]
fn a_queue_that_owes_requests_waits_for_the_volume_before_it_stops() {
    let file = volume();
    let ((mut other, _one), (mut rig, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut other, 0));
    give_region(&mut rig, 1);
    assert!(!start(&mut rig).enabled, "it waits");
    assert!(!start_queue(&mut rig, 1));
    assert_eq!(get_base(&mut rig), Answer::Pending);
    retry(&mut rig);
    assert!(rig.told().is_empty(), "{:?}", rig.told());
    assert!(other.close());
    while !other.to_worker.is_empty() {
        let message = other.to_worker.pop_front().expect("told");
        let mut out = Outbox::default();
        other
            .session
            .on_worker(done(&message), &mut out)
            .expect("good");
        other
            .to_worker
            .extend(out.to_workers.drain(..).map(|(_, m)| m));
    }
    retry(&mut rig);
    assert_eq!(rig.told().len(), 2, "{:?}", rig.told());
    assert!(rig.told()[0].starts_with("Finish"), "{:?}", rig.told());
    assert_eq!(work(&mut rig), base());
    // The other queue is served from then on.
    retry(&mut rig);
    assert_eq!(rig.told(), ["enabled 1 true"]);
    assert!(rig.session.holds_volume());
}

#[test]
fn a_queue_that_owes_requests_does_not_wait_for_ever() {
    let file = volume();
    let ((mut other, _one), (mut rig, device)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut other, 0));
    device.health.set_patience(Patience {
        give_up: Duration::ZERO,
        ..Patience::default()
    });
    give_region(&mut rig, 1);
    start(&mut rig);
    assert_eq!(get_base(&mut rig), Answer::Pending);
    retry(&mut rig);
    assert_eq!(rig.told(), ["stop 0"]);
    assert_eq!(work(&mut rig), base());
}

#[test]
fn a_connection_that_ends_does_not_wait_for_what_a_queue_owes() {
    let file = volume();
    let ((mut other, _one), (mut rig, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut other, 0));
    let region = give_region(&mut rig, 1);
    start(&mut rig);
    assert_eq!(get_base(&mut rig), Answer::Pending);
    assert!(rig.close());
    assert_eq!(rig.told(), ["stop 0"]);
    let stop = rig.to_worker.pop_front().expect("told");
    let mut out = Outbox::default();
    assert!(rig.session.on_worker(done(&stop), &mut out).expect("over"));
    assert_eq!(version(&region), 1, "the region has it");
}

/// A field that is not where its size is would not be written at once.
#[test]
fn a_region_at_an_odd_place_is_refused_with_its_first_queue() {
    let file = volume();
    let (mut rig, _device) = on_file(file.path());
    let bytes = Format::Split.region_bytes(128) * u64::from(QUEUES);
    let body = inflight(bytes, 4, QUEUES, 128);
    let fd = memfd(bytes + 8);
    assert_eq!(rig.send(code::SET_INFLIGHT_FD, body, vec![fd]), ack(0));
    rig.place(0);
    assert_eq!(rig.kick(0), ack(1));
}
