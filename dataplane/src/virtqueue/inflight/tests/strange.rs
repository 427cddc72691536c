//! Regions that can't be: noise, of another queue, short of what they say, looped, of another life of the ring.

use super::super::Recovered;
use super::driver::{Driver, SIZE, features, take_all};
use super::{Dice, live, times};
use crate::virtqueue::{Chain, QueueFeatures, RingError, Virtqueue};

/// A backend died with something in flight; what its region has.
fn died(features: QueueFeatures, seed: u64) -> Driver {
    let mut driver = Driver::new(features);
    let mut queue = driver.queue(0);
    queue.recover(driver.region()).expect("fresh");
    live(&mut driver, &mut queue, &mut Dice(seed), 40);
    driver.offer(1);
    queue.pop(&mut Chain::default()).expect("good");
    driver.look();
    driver
}

/// Spoils a region in one of several ways.
fn spoil(bytes: &mut [u8], other: &[u8], dice: &mut Dice) {
    let mut at = |below: usize| usize::try_from(dice.roll(below as u64)).expect("small");
    let len = bytes.len();
    match at(5) {
        0 => {
            for _ in 0..1 + at(8) {
                let flipped = 1u8 << at(8);
                bytes[at(len)] ^= flipped;
            }
        }
        1 => {
            // A field of two bytes says something small, or something large.
            let value = [0, 1, SIZE - 1, SIZE, 0x7fff, u16::MAX][at(6)];
            let field = at(len / 2) * 2;
            bytes[field..field + 2].copy_from_slice(&value.to_le_bytes());
        }
        2 => {
            let (from, to) = (at(len), at(len));
            bytes[from.min(to)..from.max(to)].fill(0);
        }
        3 => {
            let from = at(len);
            bytes[from..].copy_from_slice(&other[from..]);
        }
        _ => bytes.iter_mut().skip(12).for_each(|byte| {
            *byte = u8::try_from(at(256)).expect("a byte");
        }),
    }
}

/// A queue over that region is served, or refuses it; what it takes, it takes once.
fn serve(driver: &mut Driver) -> Option<Recovered> {
    let mut queue = driver.queue(0);
    let recovered = match queue.recover(driver.region()) {
        Ok(recovered) => recovered,
        Err(RingError::RegionVersion { .. }) => return None,
        Err(other) => panic!("{other}"),
    };
    assert!(queue.left_again() <= usize::from(SIZE));
    let before = queue.left_again();
    if let Recovered::Kept { chains } = recovered {
        assert_eq!(usize::from(chains), before);
    }
    if let Some(taken) = taken_once(&mut queue) {
        for id in taken {
            queue.push_used(id, 1);
        }
        queue.publish();
        assert_eq!(queue.in_flight(), 0);
    }
    Some(recovered)
}

/// What is taken, none of it twice; none if the ring turns out to be broken.
fn taken_once(queue: &mut Virtqueue) -> Option<Vec<u16>> {
    let taken = take_all(queue).ok()?;
    let ids: Vec<u16> = taken.iter().map(|(id, _)| *id).collect();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), ids.len(), "{ids:?}");
    assert!(ids.iter().all(|id| *id < SIZE));
    Some(ids)
}

#[test]
fn a_region_that_can_not_be_is_refused_or_does_no_harm() {
    for features in features() {
        let (mut refused, mut stale, mut kept) = (0, 0, 0);
        for seed in 0..50 * times() {
            let mut driver = died(features, seed);
            let other = died(features, seed + 1_000).region_bytes();
            let (good, moment) = (driver.region_bytes(), driver.moment());
            let mut dice = Dice(seed);
            for _ in 0..50 {
                driver.back_to(&moment);
                let mut bytes = good.clone();
                spoil(&mut bytes, &other, &mut dice);
                driver.set_region(&bytes);
                match serve(&mut driver) {
                    None => refused += 1,
                    Some(Recovered::Stale { .. }) => stale += 1,
                    Some(Recovered::Kept { .. } | Recovered::Fresh) => kept += 1,
                }
            }
        }
        assert!(
            refused > 50 && stale > 500 && kept > 100,
            "{features:?}: {refused}, {stale}, {kept}"
        );
    }
}

/// The guest's driver starts anew while no backend is there, and the frontend keeps the region: no request of
/// before is done.
#[test]
fn what_was_in_flight_before_the_ring_was_made_anew_is_not_done() {
    for features in features() {
        let mut stale = 0;
        for seed in 0..500 {
            let mut driver = died(features, seed);
            // Of a ring that was hardly used the region of one life looks like that of another.
            let used = driver.used();
            driver.reset();
            let mut dice = Dice(seed);
            for _ in 0..dice.roll(4) {
                driver.offer(1 + u16::try_from(dice.roll(2)).expect("small"));
            }
            if used == (0, true) {
                continue;
            }
            let mut queue = driver.queue(0);
            let recovered = queue.recover(driver.region()).expect("a good version");
            assert!(
                matches!(recovered, Recovered::Stale { .. }),
                "{recovered:?} after {used:?}"
            );
            let expected: Vec<(u16, u64)> = driver
                .mind
                .open
                .iter()
                .map(|offer| (offer.id, offer.serial))
                .collect();
            assert_eq!(take_all(&mut queue).expect("good"), expected);
            stale += 1;
        }
        assert!(stale > 100, "{features:?}: {stale}");
    }
}

/// What somebody else's program keeps there is not guessed at, and stays for it to find.
#[test]
fn a_region_of_another_version_is_refused_and_not_touched() {
    for features in features() {
        for (at, byte) in [(8, 2), (0, 1)] {
            let driver = died(features, 1);
            let mut bytes = driver.region_bytes();
            bytes[at] = byte;
            driver.set_region(&bytes);
            let refused = driver.queue(0).recover(driver.region());
            assert!(
                matches!(refused, Err(RingError::RegionVersion { .. })),
                "{refused:?}"
            );
            assert_eq!(driver.region_bytes(), bytes);
            // A device that is reset has nothing in flight.
            driver.region().forget();
            let mut queue = driver.queue(0);
            assert_eq!(queue.recover(driver.region()), Ok(Recovered::Fresh));
            assert_eq!(queue.in_flight(), 0);
        }
    }
}

/// Another queue's region, which is next to it, is not written.
#[test]
fn only_the_region_of_the_queue_is_put_in_order() {
    for features in features() {
        let mut driver = died(features, 3);
        let first = driver.other_region_bytes();
        serve(&mut driver).expect("good");
        assert_eq!(driver.other_region_bytes(), first);
    }
}

/// A frontend that takes the region away while it is read.
#[test]
fn a_region_that_goes_away_is_noticed() {
    crate::memory::sigbus::install().expect("handler");
    for features in features() {
        let driver = died(features, 4);
        driver.cut_region();
        let mut queue = driver.queue(0);
        queue.recover(driver.region()).expect("zeroes");
        assert!(queue.is_lost());
    }
}
