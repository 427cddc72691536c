//! A re-key under the requests of guests on two workers, on a real file: what they read is what they wrote, and in the
//! end all of it is under the new key.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Ciphers, Geometry, Patience, Rekey};
use bulkhead_dataplane::rekey::{Rekeyer, ToRekeyer};
use bulkhead_dataplane::storage::{FileSpec, StorageSpec};
use bulkhead_dataplane::worker::message::{DeviceId, FromWorker};
use bulkhead_dataplane::worker::{WorkerConfig, WorkerHandle, start};
use bulkhead_protocol::control::RekeyState;
use bulkhead_protocol::rekey::{layout, prepared};
use bulkhead_protocol::{RekeyId, VolumeId};

use super::rig::{OK, Op, PATIENCE, Rig, SECTOR, Shape};
use super::stuck::{Sticks, Stuck};
use super::{Random, rounds};

const VOLUME: VolumeId = VolumeId([1; 16]);
const REKEY: RekeyId = RekeyId([2; 16]);
const ID: DeviceId = DeviceId(1);
/// Five zones and a part of one.
const BYTES: u64 = (5 << 20) + (64 << 10);
const BLOCK: u64 = 4096;
/// Blocks of a request, at most.
const MOST: u64 = 24;

fn cipher(byte: u8) -> Arc<Cipher> {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [byte; 64];
    key[0] = !byte;
    Arc::new(Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: DataUnit::B4096,
    })
}

/// A file with these blocks under key 1, and the record of a re-key that has not begun; and what to look at it
/// with, beside direct I/O.
fn file(model: &[u8]) -> (StorageSpec, File) {
    let layout = layout(BYTES).expect("layout");
    let file = tempfile::NamedTempFile::new_in(".").expect("file");
    let mut stored = vec![0; model.len()];
    let key = &cipher(1).key;
    key.encrypt(DataUnit::B4096, 0, model, &mut stored)
        .expect("whole units");
    let handle = file.as_file();
    handle.set_len(layout.end).expect("length");
    handle.write_all_at(&stored, 0).expect("blocks");
    let record = prepared(VOLUME, REKEY, BYTES, 4096);
    let [at, _] = layout.copies;
    handle.write_all_at(&record, at).expect("record");
    handle.sync_all().expect("sync");
    let fd = file.reopen().expect("open").into();
    let spec = FileSpec::from_fd(fd, false, 4096).expect("usable");
    (StorageSpec::File(spec), file.into_file())
}

fn device(storage: StorageSpec) -> Arc<BlkDevice> {
    let geometry = Geometry {
        logical_block_bytes: 4096,
        read_only: false,
        serial: [0; 20],
        queues: 2,
        discard: true,
    };
    let ciphers = Ciphers {
        cipher: cipher(2),
        volume: Some(VOLUME),
        rekey: Some(Rekey {
            id: REKEY,
            previous: cipher(1),
        }),
    };
    BlkDevice::with_ciphers(geometry, BYTES / SECTOR as u64, storage, Some(ciphers))
}

/// One request in a half of the volume, and what it is to find or leave.
struct Asked {
    queue: u16,
    at: usize,
    bytes: usize,
    reads: bool,
}

/// Begins a request in a queue's own half, so that two in flight never meet.
fn ask(rig: &mut Rig, random: &mut Random, model: &mut [u8], queue: u16) -> Asked {
    let half = BYTES / BLOCK / 2;
    let count = 1 + random.below(MOST);
    let first = u64::from(queue) * half + random.below(half - count);
    let at = usize::try_from(first * BLOCK).expect("small");
    let bytes = usize::try_from(count * BLOCK).expect("small");
    let sector = first * BLOCK / SECTOR as u64;
    let sectors = u32::try_from(bytes / SECTOR).expect("few");
    let blocks = &mut model[at..at + bytes];
    let op = match random.below(8) {
        0 => {
            blocks.fill(0);
            Op::Zero(sector, sectors, false)
        }
        1..4 => {
            blocks.fill_with(|| random.next().to_le_bytes()[0]);
            Op::Write(sector, blocks.to_vec())
        }
        _ => Op::Read(sector, sectors),
    };
    rig.submit(queue, &op);
    Asked {
        queue,
        at,
        bytes,
        reads: matches!(op, Op::Read(..)),
    }
}

fn end(rig: &mut Rig, model: &[u8], asked: &Asked) {
    let length = if asked.reads { asked.bytes } else { 0 };
    let (_, status, read) = rig.wait(asked.queue, length);
    assert_eq!(status, OK);
    let expected = &model[asked.at..asked.at + length];
    assert!(read == expected, "{} bytes at {}", asked.bytes, asked.at);
}

fn take(rig: &Rig, rekeyer: &Rekeyer) {
    let device = Arc::clone(&rig.device);
    rekeyer.send(ToRekeyer::Take { id: ID, device });
    let ready = rig.reply();
    let is_ready = matches!(ready, FromWorker::VolumeReady { result: Ok(()), .. });
    assert!(is_ready, "{ready:?}");
}

fn let_go(rig: &Rig, rekeyer: &Rekeyer) {
    rekeyer.send(ToRekeyer::LetGo { id: ID });
    assert!(matches!(rig.reply(), FromWorker::VolumeReleased { .. }));
}

fn under_load(seed: u64) {
    let mut random = Random(seed);
    let mut model = vec![0; usize::try_from(BYTES).expect("small")];
    model.fill_with(|| random.next().to_le_bytes()[0]);
    let (storage, file) = file(&model);
    let configs = vec![WorkerConfig::default(); 2];
    let (workers, replies) = start(&configs).expect("workers");
    let mailboxes = workers.iter().map(WorkerHandle::mailbox).collect();
    let rekeyer = Rekeyer::start(mailboxes, replies.sender(), false, None).expect("rekeyer");
    let shape = Shape {
        unit: Some(4096),
        queues: 2,
        workers: 2,
        ..Shape::PLAIN
    };
    let mut rig = Rig::of(workers, replies, device(storage), shape);
    take(&rig, &rekeyer);
    let (began, mut requests) = (Instant::now(), 0);
    while rig.device.rekey_progress().expect("a re-key").state != RekeyState::Done {
        let asked = [0, 1].map(|queue| ask(&mut rig, &mut random, &mut model, queue));
        asked.iter().for_each(|asked| end(&mut rig, &model, asked));
        requests += 2;
        // As a guest that is paused, or goes to another host and comes back.
        if random.below(64) == 0 {
            let_go(&rig, &rekeyer);
            take(&rig, &rekeyer);
        }
        assert!(began.elapsed() < 6 * PATIENCE, "it does not end");
    }
    // How many depends on the machine; without the guests going on it would be none but the first.
    assert!(requests > 4, "guests go on: {requests} requests");
    for block in (0..BYTES / BLOCK).step_by(16) {
        let count = 16.min(BYTES / BLOCK - block);
        let sectors = u32::try_from(count * BLOCK / SECTOR as u64).expect("few");
        let (status, read) = rig.run(0, &Op::Read(block * BLOCK / SECTOR as u64, sectors));
        let at = usize::try_from(block * BLOCK).expect("small");
        assert!(
            status == OK && read == model[at..at + read.len()],
            "block {block}"
        );
    }
    let_go(&rig, &rekeyer);
    rekeyer.end();
    rig.end();
    // The new key alone opens all of it.
    let (mut stored, mut plain) = (vec![0; model.len()], vec![0; model.len()]);
    file.read_exact_at(&mut stored, 0).expect("blocks");
    let key = &cipher(2).key;
    key.decrypt(DataUnit::B4096, 0, &stored, &mut plain)
        .expect("whole units");
    assert!(plain == model, "something is not under the new key");
}

#[test]
fn guests_read_what_they_wrote_while_the_key_changes() {
    for seed in 0..u64::try_from(rounds(4)).expect("some") {
        under_load(seed);
    }
}

/// The rekeyer writes to a file system that does not answer: others are served, and the volume is let go of when its
/// last write has ended, and not before.
#[test]
fn a_storage_that_hangs_holds_the_rekeyer_up_for_a_while_only() {
    let layout = layout(BYTES).expect("layout");
    let Some(stuck) = Stuck::mount(layout.end) else {
        println!("skipped: a_storage_that_hangs_holds_the_rekeyer_up_for_a_while_only: no mount");
        return;
    };
    let file = stuck.file();
    let [at, _] = layout.copies;
    let record = prepared(VOLUME, REKEY, BYTES, 4096);
    file.write_all_at(&record, at).expect("record");
    let spec = FileSpec::from_fd(file.into(), false, 4096).expect("usable");
    let device = device(StorageSpec::File(spec));
    device.health.set_patience(Patience {
        hung: Duration::from_millis(200),
        ..Patience::default()
    });
    let (workers, replies) = start(&[WorkerConfig::default()]).expect("a worker");
    let mailboxes = workers.iter().map(WorkerHandle::mailbox).collect();
    let rekeyer = Rekeyer::start(mailboxes, replies.sender(), false, None).expect("rekeyer");
    let mut rig = Rig::of(
        workers,
        replies,
        device,
        Shape {
            unit: Some(4096),
            ..Shape::PLAIN
        },
    );
    let answers = stuck.answers_at_the_end();

    stuck.stick(Sticks::Writes);
    let device = Arc::clone(&rig.device);
    rekeyer.send(ToRekeyer::Take { id: ID, device });
    let ready = rig.reply();
    assert!(
        matches!(ready, FromWorker::VolumeReady { result: Err(_), .. }),
        "{ready:?}"
    );
    assert_eq!((stuck.waiting(), rig.device.health.summary().old), (1, 1));
    let device = Arc::clone(&rig.device);
    rekeyer.send(ToRekeyer::Take { id: ID, device });
    let FromWorker::VolumeReady {
        result: Err(reason),
        ..
    } = rig.reply()
    else {
        panic!("taken although a write is left");
    };
    assert!(reason.contains("still with the kernel"), "{reason}");
    // It is asked first, and the other one is answered first.
    rekeyer.send(ToRekeyer::LetGo { id: ID });
    let other = DeviceId(9);
    rekeyer.send(ToRekeyer::Forget { id: other });
    let first = rig.reply();
    assert!(
        matches!(first, FromWorker::Detached { id, .. } if id == other),
        "{first:?}"
    );

    stuck.stick(Sticks::Nothing);
    let released = rig.reply();
    assert!(
        matches!(released, FromWorker::VolumeReleased { .. }),
        "{released:?}"
    );
    assert_eq!(rig.device.health.summary().old, 0);
    take(&rig, &rekeyer);
    let began = Instant::now();
    while rig.device.rekey_progress().expect("a re-key").state != RekeyState::Done {
        assert!(began.elapsed() < 6 * PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.run(0, &Op::Flush).0, OK, "no flush has failed");
    let_go(&rig, &rekeyer);
    rekeyer.end();
    rig.end();
    drop(answers);
}
