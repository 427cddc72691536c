//! Deaths at every store: whoever serves the ring next takes what was in flight once, in the order in which it was
//! made available, and the driver sees each request end once. Also when that one dies while it recovers.

mod driver;
mod strange;

use super::Recovered;
use crate::virtqueue::dying::testing::within;
use crate::virtqueue::{Chain, QueueFeatures, Run, Virtqueue};
use driver::{Driver, take_all};

/// `BULKHEAD_ROUNDS=N` runs N times as many lives.
fn times() -> u64 {
    let times = std::env::var("BULKHEAD_ROUNDS").ok();
    times.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Random numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % below
    }
}

/// A backend's life: requests come, are taken, end in any order, are shown a few at a time.
fn live(driver: &mut Driver, queue: &mut Virtqueue, dice: &mut Dice, steps: usize) {
    let mut chain = Chain::default();
    let mut taken = Vec::new();
    while let Some(id) = queue.pop_again(&mut chain).expect("good") {
        taken.push(id);
    }
    for _ in 0..steps {
        match dice.roll(8) {
            7 => take_as_run(driver, queue, dice),
            6 => taken.extend(take_and_put_back(driver, queue, dice)),
            0 | 1 => driver.offer(1 + u16::try_from(dice.roll(3)).expect("small")),
            2 | 3 => {
                if let Some(id) = queue.pop(&mut chain).expect("good") {
                    taken.push(id);
                }
            }
            4 if !taken.is_empty() => {
                let at = usize::try_from(dice.roll(taken.len() as u64)).expect("small");
                queue.push_used(taken.remove(at), 1);
            }
            _ => {
                queue.publish();
                driver.look();
            }
        }
    }
}

/// Takes a few chains, puts back the last of them, and takes one more: the first of those; what stays taken.
fn take_and_put_back(driver: &mut Driver, queue: &mut Virtqueue, dice: &mut Dice) -> Vec<u16> {
    let (mut chain, mut taken, mut back) = (Chain::default(), Vec::new(), None);
    for _ in 0..1 + dice.roll(4) {
        taken.extend(queue.pop(&mut chain).expect("good"));
    }
    if dice.roll(2) == 0 {
        queue.publish();
        driver.look();
    }
    for _ in 0..dice.roll(taken.len() as u64 + 1) {
        back = taken.pop();
        queue.unpop(back.expect("as many"));
    }
    if back.is_some() && dice.roll(2) == 0 {
        assert_eq!(queue.pop(&mut chain).expect("good"), back);
        taken.extend(back);
    }
    taken
}

/// Takes a run; some of it ends, the rest is put back.
fn take_as_run(driver: &mut Driver, queue: &mut Virtqueue, dice: &mut Dice) {
    let mut run = Run::to_read();
    // Requests of one descriptor, which are plain.
    (0..dice.roll(4)).for_each(|_| driver.offer(1));
    queue.pop_run(&mut run, 1 + usize::try_from(dice.roll(5)).expect("small"));
    while run.out() > 0 && dice.roll(3) > 0 {
        let count = 1 + dice.roll(run.out() as u64);
        queue.push_read(&mut run, usize::try_from(count).expect("small"));
        if dice.roll(3) == 0 {
            queue.publish();
            driver.look();
        }
    }
    queue.unpop_run(&mut run);
}

/// Whoever serves the ring next takes exactly what the driver waits for, in order, and it can go on.
fn check(driver: &mut Driver, dice: &mut Dice) {
    driver.look();
    let expected: Vec<(u16, u64)> = driver
        .mind
        .open
        .iter()
        .map(|offer| (offer.id, offer.serial))
        .collect();
    let mut queue = driver.queue(u32::try_from(dice.roll(1 << 16)).expect("16 bits"));
    let recovered = queue.recover(driver.region()).expect("a good region");
    assert!(
        !matches!(recovered, Recovered::Stale { .. }),
        "{recovered:?}"
    );
    let (first, mut queue) = move_on(driver, queue, dice);
    let mut taken = take_all(&mut queue).expect("good");
    assert_eq!([first, taken.clone()].concat(), expected);
    while !taken.is_empty() {
        let at = usize::try_from(dice.roll(taken.len() as u64)).expect("small");
        queue.push_used(taken.remove(at).0, 1);
        if dice.roll(2) == 0 {
            queue.publish();
            driver.look();
        }
    }
    queue.publish();
    driver.look();
    assert_eq!(driver.mind.open, []);
    assert_eq!(queue.in_flight(), 0);
    live(driver, &mut queue, dice, 20);
}

/// Some of what was in flight is done, then the queue goes to another worker with the rest; what was done.
fn move_on(
    driver: &mut Driver,
    mut queue: Virtqueue,
    dice: &mut Dice,
) -> (Vec<(u16, u64)>, Virtqueue) {
    let (mut done, mut chain) = (Vec::new(), Chain::default());
    for _ in 0..dice.roll(queue.left_again() as u64 + 1) {
        let id = queue.pop_again(&mut chain).expect("good").expect("one");
        done.push((id, Driver::serial_of(&chain)));
    }
    for (id, _) in done.iter().rev() {
        queue.push_used(*id, 1);
    }
    queue.publish();
    driver.look();
    (done, queue.park().resume().expect("the same place"))
}

/// What the second backend does before it dies, if it does: recovers, and goes on.
fn second_life(driver: &mut Driver, seed: u64) {
    let mut dice = Dice(seed);
    driver.look();
    let mut queue = driver.queue(u32::try_from(dice.roll(1 << 16)).expect("16 bits"));
    queue.recover(driver.region()).expect("a good region");
    live(driver, &mut queue, &mut dice, 12);
}

/// A life that dies before each of its stores; after some of these deaths, a second one that does, too.
fn die_everywhere(features: QueueFeatures, seed: u64, twice_every: usize) -> usize {
    let (mut deaths, mut stores) = (0, 0);
    loop {
        let mut driver = Driver::new(features);
        let finished = within(stores, || {
            let mut queue = driver.queue(0);
            queue.recover(driver.region()).expect("fresh");
            live(&mut driver, &mut queue, &mut Dice(seed), 60);
        });
        let moment = driver.moment();
        check(&mut driver, &mut Dice(seed));
        deaths += 1;
        if stores.is_multiple_of(twice_every) {
            for more in 0.. {
                driver.back_to(&moment);
                let finished = within(more, || second_life(&mut driver, seed));
                check(&mut driver, &mut Dice(seed));
                deaths += 1;
                if finished.is_some() {
                    break;
                }
            }
        }
        if finished.is_some() {
            return deaths;
        }
        stores += 1;
    }
}

#[test]
fn whoever_dies_at_any_store_loses_nothing_and_does_nothing_twice() {
    for features in driver::features() {
        let seeds = 0..10 * times();
        let deaths: usize = seeds.map(|seed| die_everywhere(features, seed, 7)).sum();
        println!("{features:?}: {deaths} deaths");
        assert!(deaths > 2_000, "{features:?}: {deaths} deaths");
    }
}
