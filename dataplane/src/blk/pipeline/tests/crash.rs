//! T55: every short workload of writes, zeroes, discards, flushes and changes of the cache mode, on one worker or
//! two, in every order in which its transfers may end, with the power cut after each step: what each cut may
//! leave is compared with a reference model.
//!
//! `BULKHEAD_ROUNDS` from 10 on adds workloads of four steps.

mod model;
mod world;

use model::{Model, Op};
use world::{Mode, SECTOR, Setting, World};

/// One way through a workload: which of how many was chosen, at each step.
#[derive(Debug, Default)]
struct Path {
    choices: Vec<(usize, usize)>,
    at: usize,
    /// Steps from here on have not been taken before.
    fresh_from: usize,
}

impl Path {
    fn choose(&mut self, of: usize) -> usize {
        if self.at == self.choices.len() {
            self.choices.push((0, of));
        }
        let (chosen, arity) = self.choices[self.at];
        assert_eq!(arity, of, "the same steps lead to something else");
        self.at += 1;
        chosen
    }

    fn is_fresh(&self) -> bool {
        self.at > self.fresh_from
    }

    /// Goes to the next way; false where there is none.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, of)) = self.choices.pop() {
            if chosen + 1 < of {
                self.fresh_from = self.choices.len();
                self.choices.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// What was gone through.
#[derive(Debug, Default)]
struct Counts {
    workloads: u64,
    ways: u64,
    cuts: u64,
}

/// All ways through a workload.
fn explore(world: &mut World, workload: &[Op], places: &[usize], counts: &mut Counts) {
    let mut path = Path::default();
    counts.workloads += 1;
    loop {
        counts.ways += 1;
        world.begin();
        let mut model = Model::new(world.setting().mode == Mode::Through);
        let mut next = 0;
        loop {
            let held = world.held();
            let may_submit =
                next < workload.len() && (workload[next] != Op::WriteThrough || model.is_idle());
            let choices = held.len() + usize::from(may_submit);
            if choices == 0 {
                break;
            }
            // The last choice submits, so that the first way has one request at a time.
            let choice = path.choose(choices);
            model.tick();
            match held.get(choice) {
                Some(&(worker, index)) => world.step(worker, index),
                None => {
                    let id = model.submit(workload[next]);
                    world.submit(places[next], id, workload[next]);
                    next += 1;
                }
            }
            world.ended(|id| model.complete(id));
            if path.is_fresh() {
                counts.cuts += 1;
                check(world, &model, workload, &path);
            }
        }
        assert!(
            next == workload.len() && model.is_idle(),
            "{workload:?} stands still"
        );
        if !path.next() {
            break;
        }
    }
}

/// Every version of every sector that a cut now may leave.
fn check(world: &World, model: &Model, workload: &[Op], path: &Path) {
    for image in world.images() {
        for (sector, bytes) in image.chunks_exact(SECTOR).enumerate() {
            let allowed = model.allowed(world.setting().block_of(sector));
            let found = world.content(sector, bytes);
            assert!(
                allowed.iter().any(|content| content.is(found)),
                "{:?}, {workload:?}, choices {:?}: sector {sector} has {found:?}, and not one of {allowed:?}",
                world.setting(),
                path.choices,
            );
        }
    }
}

/// Calls `f` with every sequence of one to `most` of these.
fn sequences(of: &[Op], most: usize, f: &mut impl FnMut(&[Op])) {
    fn longer(of: &[Op], most: usize, sequence: &mut Vec<Op>, f: &mut impl FnMut(&[Op])) {
        for op in of {
            sequence.push(*op);
            f(sequence);
            if sequence.len() < most {
                longer(of, most, sequence, f);
            }
            sequence.pop();
        }
    }
    longer(of, most, &mut Vec::new(), f);
}

fn run(mode: Mode, ops: &[Op]) -> Counts {
    let rounds = std::env::var("BULKHEAD_ROUNDS").ok();
    let rounds: u64 = rounds.and_then(|text| text.parse().ok()).unwrap_or(1);
    let most = if rounds < 10 { 3 } else { 4 };
    let mut counts = Counts::default();
    for unit in [None, Some(512), Some(4096)] {
        let mut world = World::new(Setting { unit, mode });
        sequences(ops, most, &mut |workload| {
            for places in [[0, 0, 0, 0], [0, 1, 0, 1]] {
                if workload.len() > 1 || places[1] == 0 {
                    explore(&mut world, workload, &places, &mut counts);
                }
            }
        });
    }
    println!("{mode:?}: {counts:?}");
    counts
}

#[test]
fn short_workloads_with_a_volatile_cache() {
    let counts = run(
        Mode::Back,
        &[
            Op::Write(0, 1),
            Op::Write(0, 2),
            Op::Flush,
            Op::Zero(1, 1, false),
            Op::Zero(0, 2, true),
            Op::Discard(0, 1),
        ],
    );
    assert!(counts.cuts >= 20_000, "{counts:?}");
}

#[test]
fn short_workloads_without_flush() {
    run(
        Mode::Through,
        &[
            Op::Write(0, 1),
            Op::Write(0, 2),
            Op::Zero(1, 1, false),
            Op::Discard(0, 1),
        ],
    );
}

#[test]
fn short_workloads_that_change_to_write_through() {
    run(
        Mode::Changes,
        &[
            Op::Write(0, 1),
            Op::Write(1, 1),
            Op::Flush,
            Op::Zero(0, 2, true),
            Op::WriteThrough,
        ],
    );
}
