//! A volume that may have the record of a re-key: nobody is served before the rekeyer has looked, and the volume is
//! let go of after it.

use std::sync::Arc;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Ciphers, Rekey};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::vhost_user::Facts;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::worker::message::{FromWorker, ToWorker};
use bulkhead_protocol::{RekeyId, VolumeId};

use crate::messages::{MEMORY_BYTES, disk, facts, halves};
use crate::rig::{Answer, Rig, ack, done, queue};

fn cipher(byte: u8) -> Arc<Cipher> {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [byte; 64];
    key[0] = !byte;
    Arc::new(Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::B512,
    })
}

/// A device that is re-keyed.
fn rekeyed() -> Facts {
    let facts = facts();
    let ciphers = Ciphers {
        cipher: cipher(2),
        volume: Some(VolumeId([1; 16])),
        rekey: Some(Rekey {
            id: RekeyId([2; 16]),
            previous: cipher(1),
        }),
    };
    let geometry = disk(&facts).geometry.clone();
    let sectors = disk(&facts).capacity_sectors();
    Facts {
        device: BlkDevice::with_ciphers(geometry, sectors, StorageSpec::Null, Some(ciphers)).into(),
        ..facts
    }
}

fn ready(result: Result<(), String>) -> FromWorker {
    let device = facts().id;
    FromWorker::VolumeReady { device, result }
}

fn released() -> FromWorker {
    FromWorker::VolumeReleased { device: facts().id }
}

/// Queue 0 has started and is enabled, and the rekeyer was asked.
fn asked() -> Rig {
    let mut rig = Rig::negotiated_of(rekeyed());
    rig.share(&[(0, MEMORY_BYTES)]);
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    let first = rig.to_worker.pop_front().expect("asked");
    assert!(matches!(first, ToWorker::TakeVolume { .. }), "{first:?}");
    assert_eq!(rig.told(), ["start 0"]);
    assert_eq!(rig.work(), ack(0));
    let enable = halves(&[0, 1]);
    assert_eq!(
        rig.send(code::SET_VRING_ENABLE, enable, vec![]),
        Answer::Pending
    );
    assert_eq!(rig.told(), ["enabled 0 false"], "nobody knows the keys yet");
    assert_eq!(rig.work(), ack(0));
    rig
}

#[test]
fn queues_are_served_once_it_is_known_what_is_under_which_key() {
    let mut rig = asked();
    assert!(!rig.session.holds_volume());
    assert_eq!(rig.say(ready(Ok(()))), Answer::Pending);
    assert_eq!(rig.told(), ["enabled 0 true"]);
    assert_eq!(rig.work(), Answer::Pending);
    assert!(rig.session.holds_volume() && !rig.session.waits_for_volume());
}

/// A queue begins just when the volume is ready: its message is answered, although the session waits until all queues
/// know that they are served.
#[test]
fn a_start_is_answered_while_queues_are_told_that_they_are_served() {
    let mut rig = Rig::negotiated_of(rekeyed());
    rig.share(&[(0, MEMORY_BYTES)]);
    rig.place(0);
    assert_eq!(rig.kick(0), Answer::Pending);
    assert!(rig.session.is_answering());
    rig.say(ready(Ok(())));
    let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
    let started = FromWorker::Started { queue: queue(0) };
    assert!(!rig.session.on_worker(started, &mut out).expect("it began"));
    assert!(!out.replies.is_empty() && !rig.session.is_answering());
    assert!(rig.session.is_pending() && rig.session.holds_volume());
    let told = out.to_workers.pop().expect("told").1;
    assert!(matches!(told, ToWorker::SetEnabled { .. }), "{told:?}");
}

#[test]
fn a_volume_that_may_not_be_served_is_asked_for_again() {
    let mut rig = asked();
    rig.say(ready(Err("it needs its previous key".to_owned())));
    assert!(rig.session.waits_for_volume() && !rig.session.holds_volume());
    assert_eq!(rig.session.trouble(), Some("it needs its previous key"));
    assert!(rig.told().is_empty());
    let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
    rig.session.retry_volume(&mut out);
    let again = out.to_workers.pop().expect("asked again").1;
    assert!(matches!(again, ToWorker::TakeVolume { .. }), "{again:?}");
    rig.say(ready(Ok(())));
    assert_eq!(rig.told(), ["enabled 0 true"]);
    assert_eq!(rig.session.trouble(), None);
}

#[test]
fn the_end_waits_until_the_rekeyer_has_let_go() {
    let mut rig = asked();
    rig.say(ready(Ok(())));
    rig.work();
    assert!(rig.close());
    let stop = rig.to_worker.pop_front().expect("a stop");
    let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
    assert!(
        !rig.session
            .on_worker(done(&stop), &mut out)
            .expect("an end")
    );
    let (_, next) = out.to_workers.pop().expect("let go of");
    assert!(matches!(next, ToWorker::LetGoOfVolume { .. }), "{next:?}");
    assert!(rig.session.on_worker(released(), &mut out).expect("an end"));
}

/// The frontend goes while the rekeyer looks: its answer serves nobody, and it lets go.
#[test]
fn an_end_while_the_rekeyer_looks_waits_for_it() {
    let mut rig = asked();
    assert!(rig.close());
    let stopped = FromWorker::Stopped {
        queue: queue(0),
        base: None,
        left: false,
    };
    let mut out = bulkhead_dataplane::vhost_user::Outbox::default();
    assert!(!rig.session.on_worker(stopped, &mut out).expect("an end"));
    assert!(out.to_workers.is_empty(), "it still looks");
    let answer = rig.session.on_worker(ready(Ok(())), &mut out);
    assert!(!answer.expect("an end"));
    let (_, next) = out.to_workers.pop().expect("let go of");
    assert!(matches!(next, ToWorker::LetGoOfVolume { .. }), "{next:?}");
    assert!(rig.session.on_worker(released(), &mut out).expect("an end"));
}
