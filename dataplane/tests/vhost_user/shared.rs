//! What is shared beside guest memory (dirty log, in-flight region, backend channel), the device's status and
//! resets, and whose the volume is.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::storage::{FileSpec, StorageSpec};
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::vhost_user::{Facts, Outbox, Session, feature};
use bulkhead_dataplane::virtqueue::Format;
use bulkhead_dataplane::worker::message::{FromWorker, QueueStart, ToWorker};

use crate::messages::{
    MEMORY_BYTES, QUEUES, SPLIT, USER, addresses, event, facts, halves, memfd, words,
};
use crate::rig::{Answer, Rig, ack, done, queue};

/// SET_VRING_ADDR with flags and a log address.
fn addresses_logged(index: u32, flags: u32, log: u64) -> Vec<u8> {
    let at = USER + 0x1000 * u64::from(index);
    let rest = words(&[at, at + 0x800, at + 0x400, log]);
    [halves(&[index, flags]), rest].concat()
}

pub fn started(rig: &mut Rig) -> Box<QueueStart> {
    match rig.to_worker.pop_front() {
        Some(ToWorker::Start(start)) => start,
        other => panic!("no start: {other:?}"),
    }
}

fn set_features(rig: &mut Rig, features: u64) -> Answer {
    rig.send(code::SET_FEATURES, words(&[features]), vec![])
}

#[test]
fn the_log_is_taken_before_and_switched_while_queues_run() {
    let mut rig = Rig::running();
    let log = memfd(4096);
    let base = words(&[4096, 0]);
    // It has a reply of its own, whether or not one was asked for.
    assert_eq!(rig.send(code::SET_LOG_BASE, base, vec![log]), ack(0));
    for (bytes, offset) in [(8192, 0), (0, 0), (4096, 1), (1, u64::MAX), (u64::MAX, 0)] {
        let body = words(&[bytes, offset]);
        let answer = rig.send(code::SET_LOG_BASE, body, vec![memfd(4096)]);
        assert_eq!(answer, ack(1), "{bytes} bytes at {offset}");
    }
    assert_eq!(
        rig.send(code::SET_LOG_FD, words(&[0]), vec![event()]),
        ack(0)
    );

    // Answered when each worker has gone past it.
    assert_eq!(
        set_features(&mut rig, SPLIT | feature::LOG_ALL),
        Answer::Pending
    );
    assert_eq!(rig.told(), ["enabled 0 true", "enabled 1 true"]);
    assert_eq!(rig.work(), ack(0));
    assert_eq!(
        set_features(&mut rig, SPLIT | feature::LOG_ALL),
        ack(0),
        "as it is"
    );
    let other = (SPLIT | feature::LOG_ALL) & !feature::EVENT_IDX;
    assert_eq!(set_features(&mut rig, other), ack(1));

    // A running queue's ring is logged from then on.
    let logged = addresses_logged(0, 1, 0x1800);
    assert_eq!(
        rig.send(code::SET_VRING_ADDR, logged, vec![]),
        Answer::Pending
    );
    match rig.to_worker.front() {
        Some(ToWorker::SetLog { log, .. }) => assert_eq!(*log, Some(0x1800)),
        other => panic!("{other:?}"),
    }
    assert_eq!(rig.work(), ack(0));
    let elsewhere = [halves(&[0, 1]), words(&[USER, USER, USER, 0])].concat();
    assert_eq!(rig.send(code::SET_VRING_ADDR, elsewhere, vec![]), ack(1));
    assert_eq!(set_features(&mut rig, SPLIT), Answer::Pending);
    assert_eq!(rig.work(), ack(0));
}

#[test]
fn writes_are_marked_in_the_log_of_whatever_memory_there_is() {
    let mut rig = Rig::negotiated();
    let log = memfd(4096);
    let mine = log.try_clone().expect("dup");
    let base = words(&[4096, 0]);
    assert_eq!(rig.send(code::SET_LOG_BASE, base, vec![log]), ack(0));
    assert_eq!(set_features(&mut rig, SPLIT | feature::LOG_ALL), ack(0));
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    let start = started(&mut rig);
    start.memory.log().mark(0x5123, 1);
    let mut bytes = [0];
    let file = std::fs::File::from(mine);
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("read");
    assert_eq!(bytes, [1 << 5]);
    assert_eq!(rig.say(FromWorker::Started { queue: queue(0) }), ack(0));
}

pub fn inflight(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let sizes = u32::from(queues) | (u32::from(size) << 16);
    [words(&[bytes, offset]), halves(&[sizes, 0])].concat()
}

#[test]
fn an_inflight_region_is_made_and_given_back() {
    let mut rig = Rig::negotiated();
    let stride = Format::Split.region_bytes(128);
    assert_eq!(stride, (16 + 16 * 128u64).next_multiple_of(64));
    let total = stride * u64::from(QUEUES);
    let body = inflight(0, 0, QUEUES, 128);
    let mut out = Outbox::default();
    let message = crate::messages::message(code::GET_INFLIGHT_FD, body.clone(), vec![]);
    rig.session.handle(message, &mut out).expect("made");
    let made = inflight(total, 0, QUEUES, 128);
    assert_eq!(out.replies[12..], made[..]);
    // As long as it was asked for: 20 bytes, without the padding, too.
    let mut short = Outbox::default();
    let message = crate::messages::message(code::GET_INFLIGHT_FD, body[..20].to_vec(), vec![]);
    rig.session.handle(message, &mut short).expect("made");
    assert_eq!(short.replies[12..], made[..20]);

    let fd = out.reply_fd.take().expect("a file");
    let file = std::fs::File::from(fd.try_clone().expect("dup"));
    assert_eq!(file.metadata().expect("stat").len(), total);
    assert!(file.set_len(1).is_err(), "nobody can cut it");
    assert_eq!(rig.send(code::SET_INFLIGHT_FD, made, vec![fd]), ack(0));

    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    rig.place(1);
    assert_eq!(rig.kick(1), Answer::Pending);
    let start = started(&mut rig);
    assert_eq!(start.region.expect("its region").entries(), 128);
    assert_eq!(rig.say(FromWorker::Started { queue: queue(1) }), ack(0));
}

#[test]
fn a_region_that_can_not_be_is_refused() {
    let total = Format::Split.region_bytes(128) * u64::from(QUEUES);
    for (body, bytes, what) in [
        (
            inflight(total, 0, QUEUES, 128),
            total - 1,
            "a file that ends before",
        ),
        (inflight(total - 1, 0, QUEUES, 128), total, "too few bytes"),
        (
            inflight(total, 1, QUEUES, 128),
            total,
            "an offset behind which it ends",
        ),
        (
            inflight(total, u64::MAX, QUEUES, 128),
            total,
            "an offset that wraps",
        ),
        (
            inflight(total, 0, QUEUES + 1, 128),
            total * 2,
            "queues that are not there",
        ),
        (inflight(total, 0, 0, 128), total, "no queues"),
        (inflight(total, 0, QUEUES, 0), total, "no entries"),
        (
            inflight(u64::MAX, 0, QUEUES, 32769),
            total,
            "too many entries",
        ),
    ] {
        let mut rig = Rig::negotiated();
        let answer = rig.send(code::SET_INFLIGHT_FD, body, vec![memfd(bytes)]);
        assert_eq!(answer, ack(1), "{what}");
    }
    for (queues, size) in [(0, 8), (QUEUES + 1, 8), (1, 0), (1, 0xffff)] {
        let mut rig = Rig::negotiated();
        let answer = rig.send(code::GET_INFLIGHT_FD, inflight(0, 0, queues, size), vec![]);
        assert_eq!(answer, Answer::End, "{queues} queues of {size}");
    }
    // A queue that is longer than its region.
    let mut rig = Rig::negotiated();
    let bytes = Format::Split.region_bytes(4) * u64::from(QUEUES);
    let body = inflight(bytes, 0, QUEUES, 4);
    assert_eq!(
        rig.send(code::SET_INFLIGHT_FD, body, vec![memfd(bytes)]),
        ack(0)
    );
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    rig.place(0);
    assert_eq!(rig.kick(0), ack(1));
    assert!(!rig.session.holds_volume());
}

#[test]
fn a_changed_configuration_is_told_on_the_backend_channel() {
    let mut rig = Rig::negotiated();
    let refused = rig.send(code::SET_BACKEND_REQ_FD, vec![], vec![event()]);
    assert_eq!(refused, ack(1), "it is no socket");
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    assert_eq!(
        rig.send(code::SET_BACKEND_REQ_FD, vec![], vec![ours.into()]),
        ack(0)
    );
    rig.session.config_changed();
    let mut message = [0; 12];
    theirs.read_exact(&mut message).expect("told");
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(!rig.session.backend_is_due());
}

#[test]
fn a_reset_stops_every_queue_and_forgets_what_was_said_about_it() {
    for (code, body) in [
        (code::RESET_DEVICE, vec![]),
        (code::RESET_OWNER, vec![]),
        (code::SET_STATUS, words(&[0])),
    ] {
        let mut rig = Rig::running();
        assert_eq!(rig.send(code::SET_STATUS, words(&[15]), vec![]), ack(0));
        assert_eq!(rig.send(code::GET_STATUS, vec![], vec![]), ack(15));
        assert_eq!(rig.send(code, body, vec![]), Answer::Pending);
        assert_eq!(rig.told(), ["stop 0", "stop 1"]);
        assert_eq!(rig.work(), ack(0));
        assert_eq!(rig.session.queues(), (0, 0));
        // RESET_OWNER is about queues alone.
        let status = if code == code::RESET_OWNER { 15 } else { 0 };
        assert_eq!(rig.send(code::GET_STATUS, vec![], vec![]), ack(status));
        // Memory and features stay; a queue has to be described again.
        assert_eq!(rig.kick(0), ack(1));
        // But for its descriptors, which the frontend gives once.
        for (code, body) in [
            (code::SET_VRING_NUM, halves(&[0, 8])),
            (code::SET_VRING_ADDR, addresses(0)),
        ] {
            assert_eq!(rig.send(code, body, vec![]), ack(0));
        }
        assert_eq!(rig.kick(0), Answer::Pending);
        let start = started(&mut rig);
        assert_eq!((start.features, start.base), (SPLIT, 0));
        assert!(!start.enabled);
        assert!(start.call.is_some() && start.error.is_some());
        assert_eq!(rig.say(FromWorker::Started { queue: queue(0) }), ack(0));
    }
}

#[test]
fn a_packed_ring_has_its_own_sizes_and_bases() {
    let mut rig = Rig::negotiated();
    let size = |rig: &mut Rig, n| rig.send(code::SET_VRING_NUM, halves(&[0, n]), vec![]);
    let base = |rig: &mut Rig, n| rig.send(code::SET_VRING_BASE, halves(&[0, n]), vec![]);
    assert_eq!(size(&mut rig, 100), ack(1));
    assert_eq!(base(&mut rig, 0x8000_8000), ack(1));
    assert_eq!(set_features(&mut rig, SPLIT | feature::RING_PACKED), ack(0));
    let start = Answer::Reply([halves(&[0]), halves(&[0x8000_8000])].concat());
    assert_eq!(
        rig.send(code::GET_VRING_BASE, halves(&[0, 0]), vec![]),
        start
    );
    assert_eq!(size(&mut rig, 100), ack(0));
    assert_eq!(size(&mut rig, 0), ack(1));
    assert_eq!(size(&mut rig, 32769), ack(1));
    assert_eq!(base(&mut rig, 0x0003_0003), ack(0));
}

/// A session of a device whose volume is this file.
pub fn on_file(path: &std::path::Path) -> (Rig, Arc<BlkDevice>) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path);
    let spec = FileSpec::from_fd(file.expect("open").into(), false, 512).expect("usable");
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: QUEUES,
        discard: false,
    };
    let device = BlkDevice::new(geometry, 8, StorageSpec::File(spec), None);
    let facts = Facts {
        device: (&device).into(),
        ..facts()
    };
    let mut rig = Rig::negotiated();
    rig.session = Session::new(facts);
    let features = words(&[SPLIT]);
    rig.quietly(code::SET_FEATURES, features, vec![]);
    let protocol = words(&[bulkhead_dataplane::vhost_user::protocol_feature::OFFERED]);
    assert_eq!(
        rig.send(code::SET_PROTOCOL_FEATURES, protocol, vec![]),
        ack(0)
    );
    assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
    (rig, device)
}

fn enable(rig: &mut Rig, index: u32) {
    rig.place(index);
    let enable = halves(&[index, 1]);
    assert_eq!(rig.send(code::SET_VRING_ENABLE, enable, vec![]), ack(0));
}

pub fn start_queue(rig: &mut Rig, index: u16) -> bool {
    enable(rig, u32::from(index));
    assert_eq!(rig.kick(u32::from(index)), Answer::Pending);
    let enabled = started(rig).enabled;
    assert_eq!(
        rig.say(FromWorker::Started {
            queue: queue(index)
        }),
        ack(0)
    );
    enabled
}

/// GET_VRING_BASE, in the steps that it takes.
fn stop_queue(rig: &mut Rig, index: u16, last: bool) {
    let body = halves(&[u32::from(index), 0]);
    assert_eq!(
        rig.send(code::GET_VRING_BASE, body, vec![]),
        Answer::Pending
    );
    let stop = rig.to_worker.pop_front().expect("told");
    let base = Answer::Reply([halves(&[u32::from(index)]), halves(&[77])].concat());
    if !last {
        assert_eq!(rig.say(done(&stop)), base);
        return;
    }
    assert_eq!(rig.say(done(&stop)), Answer::Pending, "it is flushed first");
    assert!(rig.session.is_pending());
    let flush = rig.to_worker.pop_front().expect("told");
    assert!(matches!(flush, ToWorker::Flush { .. }));
    assert_eq!(rig.say(done(&flush)), base);
}

pub fn volume() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in(".").expect("file");
    file.as_file().set_len(4096).expect("length");
    file
}

#[test]
fn a_volume_is_taken_at_the_first_start_and_let_go_of_at_the_last_stop() {
    let file = volume();
    let ((mut source, _one), (mut target, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(!source.session.holds_volume(), "never at attach");
    assert!(start_queue(&mut source, 0));
    assert!(start_queue(&mut source, 1));
    assert!(source.session.holds_volume());

    // The target is there too; the source stops, and the target starts.
    stop_queue(&mut source, 0, false);
    assert!(source.session.holds_volume(), "one queue still runs");
    stop_queue(&mut source, 1, true);
    assert!(!source.session.holds_volume());
    assert!(start_queue(&mut target, 0));
    assert!(target.session.holds_volume());

    // A cancelled migration: the source takes it back once the target has let go of it.
    stop_queue(&mut target, 0, true);
    assert!(start_queue(&mut source, 0));
    assert!(source.session.holds_volume());
}

#[test]
fn queues_wait_for_a_volume_that_another_has_and_are_served_once_it_is_free() {
    let file = volume();
    let ((mut source, _one), (mut target, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut source, 0));
    assert!(!start_queue(&mut target, 0), "it is started and not served");
    assert!(target.session.waits_for_volume() && !target.session.holds_volume());
    let retry = |rig: &mut Rig| {
        let mut out = Outbox::default();
        rig.session.retry_volume(&mut out);
        rig.to_worker
            .extend(out.to_workers.drain(..).map(|(_, m)| m));
    };
    retry(&mut target);
    assert!(target.told().is_empty());
    // Nothing that the frontend says serves them.
    let enable = halves(&[0, 1]);
    assert_eq!(
        target.send(code::SET_VRING_ENABLE, enable, vec![]),
        Answer::Pending
    );
    assert_eq!(target.told(), ["enabled 0 false"]);
    assert_eq!(target.work(), ack(0));

    stop_queue(&mut source, 0, true);
    retry(&mut target);
    assert_eq!(target.told(), ["enabled 0 true"]);
    assert!(target.session.holds_volume());
    assert_eq!(target.work(), Answer::Pending, "nobody asked");
    assert!(!target.session.is_pending());
    // One that waits can stop, without a flush.
    assert!(!start_queue(&mut source, 0));
    let body = halves(&[0, 0]);
    assert_eq!(
        source.send(code::GET_VRING_BASE, body, vec![]),
        Answer::Pending
    );
    assert!(matches!(source.work(), Answer::Reply(_)));
    assert!(!source.session.waits_for_volume());
}

#[test]
fn a_connection_that_ends_lets_go_of_the_volume_after_a_flush() {
    let file = volume();
    let ((mut one, _one), (mut two, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut one, 0));
    assert!(start_queue(&mut one, 1));
    assert!(one.close());
    for _ in 0..2 {
        let stop = one.to_worker.pop_front().expect("told");
        assert_eq!(one.say(done(&stop)), Answer::Pending);
    }
    assert!(!start_queue(&mut two, 0), "it is not flushed yet");
    let flush = one.to_worker.pop_front().expect("told");
    let mut out = Outbox::default();
    assert!(one.session.on_worker(done(&flush), &mut out).expect("over"));
    let mut out = Outbox::default();
    two.session.retry_volume(&mut out);
    assert!(two.session.holds_volume());
}

#[test]
fn a_connection_that_ends_while_its_volume_is_flushed_waits_for_it() {
    let file = volume();
    let ((mut one, _one), (mut two, _two)) = (on_file(file.path()), on_file(file.path()));
    assert!(start_queue(&mut one, 0));
    let body = halves(&[0, 0]);
    assert_eq!(
        one.send(code::GET_VRING_BASE, body, vec![]),
        Answer::Pending
    );
    let stop = one.to_worker.pop_front().expect("told");
    assert_eq!(one.say(done(&stop)), Answer::Pending);
    assert!(one.close(), "the flush is under way");
    let flush = one.to_worker.pop_front().expect("told");
    assert!(one.to_worker.is_empty(), "nothing is stopped twice");
    let mut out = Outbox::default();
    assert!(one.session.on_worker(done(&flush), &mut out).expect("over"));
    assert!(start_queue(&mut two, 0));
}

#[test]
fn a_start_that_fails_lets_go_of_the_volume() {
    let file = volume();
    let ((mut one, _one), (mut two, _two)) = (on_file(file.path()), on_file(file.path()));
    enable(&mut one, 0);
    assert_eq!(one.kick(0), Answer::Pending);
    let _ = started(&mut one);
    let reason = "as the test wants it".to_owned();
    let failed = FromWorker::StartFailed {
        queue: queue(0),
        reason,
    };
    assert_eq!(one.say(failed), ack(1));
    // Nothing was written: there is nothing to flush, however often a frontend asks for it.
    assert!(one.told().is_empty());
    assert!(!one.session.holds_volume());
    assert!(start_queue(&mut two, 0));
    assert!(!start_queue(&mut one, 0), "the other has it");
    stop_queue(&mut two, 0, true);
    let mut out = Outbox::default();
    one.session.retry_volume(&mut out);
    assert!(one.session.holds_volume());
    let changed = out.to_workers.pop().expect("served from now on").1;
    assert_eq!(one.say(done(&changed)), Answer::Pending);
    // One that runs still has its flush after a second one's start has failed.
    one.place(1);
    assert_eq!(one.kick(1), Answer::Pending);
    let _ = started(&mut one);
    let reason = "as the test wants it".to_owned();
    let failed = FromWorker::StartFailed {
        queue: queue(1),
        reason,
    };
    assert_eq!(one.say(failed), ack(1));
    assert!(one.session.holds_volume());
    stop_queue(&mut one, 0, true);
    assert!(!one.session.holds_volume());
    assert!(start_queue(&mut two, 0));
}
