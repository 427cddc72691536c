//! `load_*`: the load generator against each back-end that it must drive, and against back-ends that
//! fail. Times are short, and nothing is said here about speed.

mod backends;
mod failures;
mod support;

use bulkhead_integration::processes::installed;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut arguments = Arguments::from_args();
    // Each has two threads that poll: more at once only wait for each other.
    arguments.test_threads.get_or_insert(1);
    let mut trials: Vec<Trial> = Vec::new();
    for (name, test) in backends::TESTS.iter().chain(failures::TESTS) {
        let qemu = name.contains("qemu") && installed("qemu-storage-daemon").is_none();
        let trial = Trial::test(*name, move || {
            test();
            Ok(())
        });
        trials.push(trial.with_ignored_flag(qemu));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
