//! Where a re-key stands still: a record that can't be written, a flush that failed, guests that
//! flush all the time, a zone that can't be finished.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn random(state: &mut u64, below: usize) -> usize {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1);
    usize::try_from((*state >> 33) % below as u64).expect("small")
}

/// A record could not be written. What is written then must not be where the last whole one is: if the power fails
/// in the middle of it, the one before would count, whose zone is long under the other key.
#[test]
fn the_whole_copy_of_a_record_outlives_a_failed_one() {
    let mut io = Io::new(None).expect("ring");
    let [first, _] = layout(BYTES).expect("layout").copies;
    for nth in 1..16 {
        let cache = cache(&image());
        let spec = ErrorSpec::new(StorageSpec::Volatile(Arc::clone(&cache)));
        let device = device(StorageSpec::Error(Arc::clone(&spec)), rekeyed());
        let images: Rc<RefCell<Vec<Vec<u8>>>> = Rc::default();
        let (left, target, of) = (Rc::clone(&images), Arc::clone(&spec), Arc::clone(&cache));
        let (mut count, mut state) = (0, nth);
        io.watch(move || {
            count += 1;
            if count == nth {
                // Of the record alone: the journal is written in full.
                let only = Fault {
                    bytes: Some(first..first + 8192),
                    ..Fault::next(1, Kind::Write, What::Short)
                };
                target.inject(only);
            }
            if target.injected() > 0 {
                for _ in 0..4 {
                    let cut = of.cut(|versions| random(&mut state, versions));
                    left.borrow_mut().push(cut);
                }
            }
        });
        let _ = job(&mut io, &device).map(|mut job| run(&mut io, &mut job));
        io.watch(|| {});
        if spec.injected() == 0 {
            continue;
        }
        for image in images.take() {
            check(&mut io, &image);
        }
        check(&mut io, &cache.cut(|versions| versions - 1));
    }
}

#[test]
fn a_volume_whose_flush_failed_is_left_as_it_is() {
    let mut io = Io::new(None).expect("ring");
    let cache = cache(&image());
    let device = device(StorageSpec::Volatile(Arc::clone(&cache)), rekeyed());
    let mut job = job(&mut io, &device).expect("prepared");
    assert_eq!(job.step(&mut io, &[]), Step::Moved);
    device.latch_flush_failure();
    let before = cache.cut(|versions| versions - 1);
    let Step::Stopped(reason) = job.step(&mut io, &[]) else {
        panic!("no flush can be believed any more");
    };
    assert!(reason.contains("flush"), "{reason}");
    assert!(
        cache.cut(|versions| versions - 1) == before,
        "nothing is written, so that no zone has to fail"
    );
    // Taken again by the same data plane, it is served and not re-keyed.
    assert!(matches!(take(&mut io, &device), Ok(State::Rekeyed(..))));
}

/// Guests that have a flush in flight all the time: one that began later does.
#[test]
fn a_later_flush_of_somebody_elses_will_do() {
    let mut io = Io::new(None).expect("ring");
    let device = device(StorageSpec::Volatile(cache(&image())), rekeyed());
    let storage = device.storage.open(&mut io.ring).expect("open");
    assert!(device.take_flush_turn(), "and never given back");
    let done = Arc::new(AtomicBool::new(false));
    let (guests, until) = (Arc::clone(&device), Arc::clone(&done));
    let guests = std::thread::spawn(move || {
        while !until.load(Ordering::Acquire) {
            let number = guests.begin_flush();
            guests.flush_succeeded(number);
            std::thread::yield_now();
        }
    });
    assert_eq!(io.flush(&device, &*storage), Ok(()));
    done.store(true, Ordering::Release);
    guests.join().expect("guests");
}

/// The zone that a crash has left can't be written to its place: requests for it fail, and the rest is served.
#[test]
fn a_zone_that_cannot_be_finished_is_all_that_fails() {
    let mut io = Io::new(None).expect("ring");
    let cache = cache(&image());
    let spec = ErrorSpec::new(StorageSpec::Volatile(Arc::clone(&cache)));
    let rotten = Fault {
        bytes: Some((1 << 20)..(2 << 20)),
        ..Fault::each(Kind::Write, What::Errno(libc::EIO))
    };
    spec.inject(rotten);
    let device = device(StorageSpec::Error(spec), rekeyed());
    let mut job = job(&mut io, &device).expect("prepared");
    assert_eq!(job.step(&mut io, &[]), Step::Moved);
    assert!(matches!(job.step(&mut io, &[]), Step::Stopped(_)));
    for _ in 0..2 {
        let Ok(State::Stuck(stuck)) = take(&mut io, &device) else {
            panic!("it is served");
        };
        assert_eq!(stuck.frontier_bytes, 1 << 20);
        assert_eq!(stuck.fails, Some((1 << 20)..(2 << 20)));
    }
    // On storage that takes it, nothing is missing.
    check(&mut io, &cache.cut(|versions| versions - 1));
}
