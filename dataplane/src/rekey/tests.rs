//! A re-key with the power cut wherever it may be, with faults at every step, with records that belong to
//! something else: whatever happened, each data unit is readable under the key that the record says.

mod stuck;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_protocol::rekey::{Found, Record, Stage, find, layout, prepared};
use bulkhead_protocol::{RekeyId, VolumeId};

use super::io::Io;
use super::record::{State, Volume};
use super::zone::{Job, Step};
use crate::blk::{BlkDevice, Cipher, Ciphers, Geometry, Rekey};
use crate::storage::error::{Fault, Kind, What};
use crate::storage::{ErrorSpec, RamSpec, StorageSpec, VolatileCache};
use crate::worker::message::DeviceId;

const VOLUME: VolumeId = VolumeId([7; 16]);
const REKEY: RekeyId = RekeyId([9; 16]);
/// Two zones and a part of one.
const BYTES: u64 = (2 << 20) + (64 << 10);
const UNIT: DataUnit = DataUnit::B4096;

fn end() -> u64 {
    layout(BYTES).expect("layout").end
}

/// A key of its own for each byte.
fn cipher(byte: u8) -> Arc<Cipher> {
    let arena = SecretArena::new(1).expect("arena");
    let mut key = [byte; 64];
    key[0] = !byte;
    Arc::new(Cipher {
        key: XtsKey::new(&arena, &key).expect("key"),
        unit: UNIT,
    })
}

/// Every block of the volume is another.
fn plain() -> Vec<u8> {
    let words = (0..BYTES / 8).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// A volume under key 1, with the record of a re-key behind it that has not begun.
pub(super) fn image() -> Vec<u8> {
    let mut image = vec![0; usize::try_from(end()).expect("small")];
    let (volume, _) = image.split_at_mut(plain().len());
    cipher(1)
        .key
        .encrypt(UNIT, 0, &plain(), volume)
        .expect("whole units");
    let record = prepared(VOLUME, REKEY, BYTES, UNIT.bytes());
    let [at, _] = layout(BYTES).expect("layout").copies;
    let at = usize::try_from(at).expect("small");
    image[at..at + record.len()].copy_from_slice(&record);
    image
}

fn cache(image: &[u8]) -> Arc<VolatileCache> {
    let ram = RamSpec::new(image.len() as u64).expect("memory");
    assert!(ram.copy_in(0, image));
    VolatileCache::new(ram)
}

fn device(storage: StorageSpec, ciphers: Ciphers) -> Arc<BlkDevice> {
    let geometry = Geometry {
        logical_block_bytes: 4096,
        read_only: false,
        serial: [0; 20],
        queues: 1,
        discard: false,
    };
    BlkDevice::with_ciphers(geometry, BYTES / 512, storage, Some(ciphers))
}

pub(super) fn rekeyed() -> Ciphers {
    rekeyed_as(REKEY.0[0])
}

/// The same keys for a re-key with another id.
pub(super) fn rekeyed_as(id: u8) -> Ciphers {
    Ciphers {
        cipher: cipher(2),
        volume: Some(VOLUME),
        rekey: Some(Rekey {
            id: RekeyId([id; 16]),
            previous: cipher(1),
        }),
    }
}

/// A device on an image.
pub(super) fn device_on(image: &[u8], ciphers: Ciphers) -> Arc<BlkDevice> {
    device(StorageSpec::Volatile(cache(image)), ciphers)
}

fn single(byte: u8) -> Ciphers {
    Ciphers {
        cipher: cipher(byte),
        volume: Some(VOLUME),
        rekey: None,
    }
}

fn take(io: &mut Io, device: &BlkDevice) -> Result<State, String> {
    let storage = device.storage.open(&mut io.ring).expect("open");
    let volume = Volume {
        device,
        storage: &*storage,
    };
    volume.take(io, &device.ciphers().expect("keys"))
}

/// As the thread does when the volume is taken.
fn job(io: &mut Io, device: &Arc<BlkDevice>) -> Result<Job, String> {
    let ciphers = device.ciphers().expect("keys");
    let State::Rekeyed(layout, record) = take(io, device)? else {
        return Err("it is not re-keyed".to_owned());
    };
    Ok(Job {
        id: DeviceId(1),
        device: Arc::clone(device),
        storage: device.storage.open(&mut io.ring).expect("open"),
        key: ciphers.cipher,
        previous: ciphers.rekey.expect("a re-key").previous,
        layout,
        record,
        busy: 0,
        due: std::time::Instant::now(),
    })
}

/// Without guests, a re-key is a step after the other.
fn run(io: &mut Io, job: &mut Job) -> Step {
    loop {
        match job.step(io, &[]) {
            Step::Moved => {}
            other => return other,
        }
    }
}

/// What a power cut left: taken by the next data plane, every unit is what it was, under the key that
/// the record says. How far it had come.
fn check(io: &mut Io, image: &[u8]) -> u64 {
    let cache = cache(image);
    let device = device(StorageSpec::Volatile(Arc::clone(&cache)), rekeyed());
    let job = job(io, &device).expect("it can be served");
    // Nothing of the recovery may be lost again: what is stable counts.
    let stable = cache.cut(|_| 0);
    let frontier = usize::try_from(job.done_bytes()).expect("small");
    let mut read = vec![0; plain().len()];
    let (below, above) = read.split_at_mut(frontier);
    let first = frontier as u64 / u64::from(UNIT.bytes());
    let stored = &stable[..plain().len()];
    let decrypted = cipher(2)
        .key
        .decrypt(UNIT, 0, &stored[..frontier], below)
        .and_then(|()| {
            cipher(1)
                .key
                .decrypt(UNIT, first, &stored[frontier..], above)
        });
    decrypted.expect("whole units");
    assert!(
        read == plain(),
        "a unit is not readable, with the frontier at {frontier}"
    );
    job.done_bytes()
}

#[test]
fn the_power_may_be_cut_at_any_moment() {
    let mut io = Io::new(None).expect("ring");
    let cache = cache(&image());
    let device = device(StorageSpec::Volatile(Arc::clone(&cache)), rekeyed());
    let left: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let (images, of) = (Rc::clone(&left), Arc::clone(&cache));
    let mut random = 1u64;
    // Beside what is stable and what is newest, any mixture of the sectors.
    io.watch(move || {
        let mut images = images.borrow_mut();
        images.push(of.cut(|_| 0));
        images.push(of.cut(|versions| versions - 1));
        images.push(of.cut(|versions| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            usize::try_from((random >> 33) % versions as u64).expect("small")
        }));
    });
    let mut job = job(&mut io, &device).expect("prepared");
    assert_eq!(run(&mut io, &mut job), Step::Done);
    let images = left.take();
    assert!(
        images.len() > 3 * 3 * 5,
        "each zone has five steps: {}",
        images.len()
    );
    let mut other = Io::new(None).expect("ring");
    let mut frontiers: Vec<u64> = images
        .iter()
        .map(|image| check(&mut other, image))
        .collect();
    frontiers.sort_unstable();
    frontiers.dedup();
    assert_eq!(frontiers, [0, 1 << 20, 2 << 20, BYTES]);
}

/// The nth transfer of each kind fails, for every n until none does: it stops or goes on, and a data plane that
/// takes the volume then finds everything.
#[test]
fn whatever_fails_nothing_is_lost() {
    let mut io = Io::new(None).expect("ring");
    for kind in [Kind::Read, Kind::Write, Kind::Flush] {
        for what in [What::Errno(libc::EIO), What::Short] {
            let mut failures = 0;
            for nth in 1.. {
                let cache = cache(&image());
                let spec = ErrorSpec::new(StorageSpec::Volatile(Arc::clone(&cache)));
                let device = device(StorageSpec::Error(Arc::clone(&spec)), rekeyed());
                let (count, target) = (Rc::new(RefCell::new(0u32)), Arc::clone(&spec));
                io.watch(move || {
                    *count.borrow_mut() += 1;
                    if *count.borrow() == nth {
                        target.inject(Fault::next(1, kind, what));
                    }
                });
                let ended = job(&mut io, &device).map(|mut job| run(&mut io, &mut job));
                io.watch(|| {});
                let newest = cache.cut(|versions| versions - 1);
                check(&mut io, &newest);
                // After a failed flush anything may be lost that was not stable before.
                check(&mut io, &cache.cut(|_| 0));
                if spec.injected() == 0 {
                    assert_eq!(ended, Ok(Step::Done));
                    break;
                }
                failures += u32::from(ended != Ok(Step::Done));
            }
            let is_flush = matches!((kind, what), (Kind::Flush, What::Short));
            assert!(
                is_flush || failures > 5,
                "{kind:?} {what:?}: {failures} stopped it"
            );
        }
    }
}

#[test]
fn keys_and_records_have_to_belong_together() {
    let mut io = Io::new(None).expect("ring");
    let fresh = cache(&image());
    let on = |ciphers: Ciphers| device(StorageSpec::Volatile(Arc::clone(&fresh)), ciphers);
    let refused = |io: &mut Io, ciphers: Ciphers, part: &str| {
        let error = take(io, &on(ciphers)).expect_err(part);
        assert!(error.contains(part), "{error}");
    };
    // Prepared and not begun: also without the re-key, as before.
    assert!(matches!(take(&mut io, &on(single(1))), Ok(State::Single)));
    let other_id = Ciphers {
        rekey: Some(Rekey {
            id: RekeyId([8; 16]),
            previous: cipher(1),
        }),
        ..rekeyed()
    };
    refused(&mut io, other_id, "has no record");
    let mut begun = job(&mut io, &on(rekeyed())).expect("prepared");
    assert_eq!(begun.step(&mut io, &[]), Step::Moved);
    refused(&mut io, single(2), "previous key");
    refused(&mut io, single(1), "previous key");
    for (key, previous) in [(3, 1), (2, 3), (1, 2)] {
        let others = Ciphers {
            cipher: cipher(key),
            volume: Some(VOLUME),
            rekey: Some(Rekey {
                id: REKEY,
                previous: cipher(previous),
            }),
        };
        refused(&mut io, others, "other keys");
    }
    assert_eq!(run(&mut io, &mut begun), Step::Done);
    refused(&mut io, single(1), "newest key");
    assert!(matches!(
        take(&mut io, &on(rekeyed())),
        Ok(State::Rekeyed(
            _,
            Record {
                stage: Stage::Done { .. },
                ..
            }
        ))
    ));
    // Over, with nobody there to say so to: whoever takes the volume next closes the record, which says nothing
    // about the key of a later re-key any more.
    assert!(matches!(take(&mut io, &on(single(2))), Ok(State::Single)));
    assert!(matches!(take(&mut io, &on(single(1))), Ok(State::Single)));
    // A host that was late, and never saw the record, goes on with the key that it ended with.
    assert!(matches!(
        take(&mut io, &on(rekeyed())),
        Ok(State::Rekeyed(
            _,
            Record {
                stage: Stage::Over { .. },
                ..
            }
        ))
    ));
    let exchanged = Ciphers {
        cipher: cipher(1),
        rekey: Some(Rekey {
            id: REKEY,
            previous: cipher(2),
        }),
        ..rekeyed()
    };
    refused(&mut io, exchanged, "other keys");
}

/// Wherever the power goes while a record is closed, what is left says that everything is under the key.
#[test]
fn a_record_that_is_closed_is_done_or_over_at_any_moment() {
    let mut io = Io::new(None).expect("ring");
    let cache = cache(&image());
    let on = |ciphers| device(StorageSpec::Volatile(Arc::clone(&cache)), ciphers);
    let mut begun = job(&mut io, &on(rekeyed())).expect("prepared");
    assert_eq!(run(&mut io, &mut begun), Step::Done);
    let left: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
    let (images, of) = (Rc::clone(&left), Arc::clone(&cache));
    // Each of the sectors that are not stable is lost in some of 16 cuts, and not in others.
    io.watch(move || {
        for chosen in 0..1u32 << 4 {
            let mut sector = 0;
            images.borrow_mut().push(of.cut(|versions| {
                sector += 1;
                let kept = chosen.rotate_right(sector % 4) & 1 == 1;
                if kept { versions - 1 } else { 0 }
            }));
        }
    });
    assert!(matches!(take(&mut io, &on(single(2))), Ok(State::Single)));
    io.watch(|| {});
    let mut images = left.take();
    assert!(images.len() > 16, "it is closed in steps");
    images.push(cache.cut(|_| 0));
    let [first, _] = layout(BYTES).expect("layout").copies;
    let first = usize::try_from(first).expect("small");
    let stages: Vec<Stage> = images
        .iter()
        .map(|image| {
            let places = image[first..].first_chunk().expect("both copies");
            match find(places) {
                Found::Record(record) if record.stage.is_complete() => record.stage,
                other => panic!("{other:?}"),
            }
        })
        .collect();
    assert!(matches!(stages.first(), Some(Stage::Done { .. })));
    assert!(matches!(stages.last(), Some(Stage::Over { .. })));
}

#[test]
fn what_is_no_record_is_none_and_what_is_broken_is_refused() {
    let mut io = Io::new(None).expect("ring");
    let mut broken = image();
    let [one, two] = layout(BYTES).expect("layout").copies;
    for at in [one, two] {
        broken[usize::try_from(at).expect("small") + 100] ^= 1;
    }
    for ciphers in [single(1), rekeyed()] {
        let device = device(StorageSpec::Volatile(cache(&broken)), ciphers);
        let error = take(&mut io, &device).expect_err("damaged");
        assert!(error.contains("damaged"), "{error}");
    }
    // Without room behind the volume there can be none.
    let short = &image()[..usize::try_from(end()).expect("small") - 4096];
    let alone = device(StorageSpec::Volatile(cache(short)), single(1));
    assert!(matches!(take(&mut io, &alone), Ok(State::Single)));
    let device = device(StorageSpec::Volatile(cache(short)), rekeyed());
    let error = take(&mut io, &device).expect_err("no room");
    assert!(error.contains("needs room"), "{error}");
}
