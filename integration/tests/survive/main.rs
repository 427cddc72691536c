//! `survive_*`: the processes die under a verified load, and nothing is lost.

mod reconnect;

use libtest_mimic::{Arguments, Trial};

/// How a test ends.
type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A test.
struct Test {
    name: &'static str,
    run: fn() -> Outcome,
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for test in reconnect::TESTS {
        let run = test.run;
        trials.push(Trial::test(test.name, move || {
            run().map_err(|e| e.to_string().into())
        }));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
