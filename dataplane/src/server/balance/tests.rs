//! The policy, on loads that are written down and on workers that are simulated.

use super::*;

fn id(device: u64, index: u16) -> QueueId {
    QueueId {
        device: DeviceId(device),
        index,
    }
}

fn share(device: u64, worker: usize, share: Permille) -> QueueShare {
    QueueShare {
        queue: id(device, 0),
        worker,
        share,
        movable: true,
    }
}

/// Workers whose queues would like to have `demand` of one: each gets that, or an even part of what there
/// is. Looks until nothing moves; the moves.
fn settle(workers: usize, queues: &mut [(Permille, usize)]) -> Vec<Decision> {
    let mut balance = Balance::default();
    let mut moves = Vec::new();
    for _ in 0..200 {
        let mut busy = vec![0u32; workers];
        queues
            .iter()
            .for_each(|(demand, worker)| busy[*worker] += u32::from(*demand));
        let shares: Vec<_> = (1..)
            .zip(queues.iter())
            .map(|(device, (demand, worker))| {
                let of = u32::from(*demand) * 1000 / busy[*worker].max(1000);
                share(device, *worker, Permille::try_from(of).expect("a share"))
            })
            .collect();
        let busy: Vec<_> = busy
            .iter()
            .map(|b| Permille::try_from(*b.min(&1000)).expect("capped"))
            .collect();
        if let Some(decision) = balance.look(&busy, &shares) {
            let device = usize::try_from(decision.queue.device.0).expect("small");
            assert_eq!(queues[device - 1].1, decision.from);
            queues[device - 1].1 = decision.to;
            moves.push(decision);
        }
    }
    moves
}

fn totals(workers: usize, queues: &[(Permille, usize)]) -> Vec<u32> {
    let of = |worker| {
        queues
            .iter()
            .filter(|q| q.1 == worker)
            .map(|q| u32::from(q.0))
            .sum()
    };
    (0..workers).map(of).collect()
}

#[test]
fn a_queue_starts_where_there_is_least_to_do() {
    let running = [(id(1, 0), 0), (id(2, 0), 1), (id(3, 0), 1)];
    let place = |device, busy: &[Permille]| place(DeviceId(device), busy, running.into_iter());
    assert_eq!(place(9, &[500, 100, 900]), 1, "the least busy");
    assert_eq!(place(9, &[0, 0, 0]), 2, "the one without queues");
    assert_eq!(place(9, &[0, 0]), 0, "the one with fewer queues");
    assert_eq!(
        place(1, &[0, 0]),
        1,
        "the one without a queue of the device"
    );
    assert_eq!(place(1, &[40, 80]), 1, "a small difference is none");
    assert_eq!(place(9, &[]), 0);
}

#[test]
fn the_queues_of_a_device_spread() {
    let mut running = Vec::new();
    for index in 0..8 {
        let worker = place(DeviceId(1), &[0; 4], running.iter().copied());
        running.push((id(1, index), worker));
    }
    for worker in 0..4 {
        assert_eq!(running.iter().filter(|r| r.1 == worker).count(), 2);
    }
}

#[test]
fn a_move_takes_several_looks_that_agree() {
    let queues = [share(1, 0, 400), share(2, 0, 400)];
    let mut balance = Balance::default();
    for look in 1..AGREEING {
        assert_eq!(balance.look(&[800, 0], &queues), None, "look {look}");
    }
    assert_eq!(balance.look(&[500, 0], &queues), None, "not that busy now");
    for look in 1..AGREEING {
        assert_eq!(balance.look(&[800, 0], &queues), None, "look {look}, anew");
    }
    let expected = Decision {
        queue: id(1, 0),
        from: 0,
        to: 1,
    };
    assert_eq!(balance.look(&[800, 0], &queues), Some(expected));
    assert_eq!(balance.look(&[800, 0], &queues), None, "and then anew");
}

#[test]
fn what_would_not_be_better_stays() {
    let mut balance = Balance::default();
    let cases: &[(&[Permille], &[QueueShare])] = &[
        // One queue that fills a worker fills any.
        (&[1000, 0], &[share(1, 0, 1000)]),
        // Room enough where it is.
        (&[590, 0], &[share(1, 0, 300), share(2, 0, 290)]),
        // The other would be as busy.
        (
            &[900, 450],
            &[share(1, 0, 450), share(2, 0, 450), share(3, 1, 450)],
        ),
        // A little better is not enough.
        (
            &[700, 100],
            &[share(1, 0, 600), share(2, 0, 100), share(3, 1, 100)],
        ),
        (&[0, 0], &[]),
        (&[], &[]),
    ];
    for (busy, queues) in cases {
        for _ in 0..10 {
            assert_eq!(balance.look(busy, queues), None, "{busy:?}");
        }
    }
}

#[test]
fn a_queue_that_rests_stays_and_another_goes() {
    let rests = QueueShare {
        movable: false,
        ..share(1, 0, 500)
    };
    let wish = |queues: &[QueueShare]| wish(&[1000, 0], queues).map(|d| d.queue);
    assert_eq!(wish(&[rests]), None);
    assert_eq!(wish(&[rests, share(2, 0, 300)]), Some(id(2, 0)));
}

#[test]
fn full_workers_share_the_busy_queues_evenly() {
    let mut queues = vec![(1000, 0), (1000, 0), (1000, 0), (1000, 1), (1, 1), (1, 1)];
    let moves = settle(2, &mut queues);
    assert_eq!(moves.len(), 1);
    assert_eq!(totals(2, &queues), [2000, 2002]);
}

/// Whatever the loads and however they are placed, moves end: each queue moves a few times at most, and
/// nothing moves back and forth.
#[test]
fn loads_settle_and_do_not_oscillate() {
    let mut state = 7u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for round in 0..200 {
        let workers = 2 + random(3);
        let count = 1 + random(12);
        let mut queues: Vec<(Permille, usize)> = (0..count)
            .map(|_| {
                let demand = Permille::try_from(random(1001)).expect("small");
                (demand, random(workers) as usize)
            })
            .collect();
        let workers = workers as usize;
        let before = *totals(workers, &queues).iter().max().expect("workers");
        let moves = settle(workers, &mut queues);
        assert!(
            moves.len() <= 2 * queues.len(),
            "round {round}: {} moves of {} queues",
            moves.len(),
            queues.len()
        );
        let after = *totals(workers, &queues).iter().max().expect("workers");
        // A worker that is full hides what its queues would like to have.
        let fuller = before < u32::from(FULL) && after > before;
        assert!(!fuller, "round {round}: {before} to {after}");
        // Settled: another 200 looks move nothing.
        assert_eq!(settle(workers, &mut queues), [], "round {round}");
    }
}
