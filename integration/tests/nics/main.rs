//! `net_guest_*`: Linux guests with network cards: what they say to each other through a switch, and to the host
//! through a TAP, has to arrive byte by byte, whatever happens to the cards meanwhile.
//!
//! Each test has a number of rounds for every run and a full one, which `BULKHEAD_SOAK=1` asks for
//! (`cargo xtask soak net`). A test that can't run on a machine is skipped by name, with the reason.

mod cards;
mod host;
mod moves;
mod pair;
mod script;
mod support;
mod tap;

use libtest_mimic::{Arguments, Trial};

/// A test: its name, and what it does.
struct Test {
    name: &'static str,
    run: fn() -> support::Outcome,
}

fn main() {
    let mut arguments = Arguments::from_args();
    // Two guests at a time are what the machines that run this have processors for.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let missing = support::missing();
    let mut trials = Vec::new();
    for test in [cards::TESTS, tap::TESTS, host::TESTS, moves::TESTS]
        .into_iter()
        .flatten()
    {
        if let Some(reason) = &missing {
            eprintln!("skipped: {}: {reason}", test.name);
        }
        let run = test.run;
        let trial = Trial::test(test.name, move || run().map_err(|e| e.to_string().into()));
        trials.push(trial.with_ignored_flag(missing.is_some()));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
