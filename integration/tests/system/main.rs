//! `system_*` and `refused_*`: the whole host with all of its processes, and real guests.
//!
//! Guests boot Debian's kernel in QEMU under TCG. A test that can't run on a machine is skipped by
//! name, with the reason.

mod deaths;
mod descriptors;
mod dmcrypt;
mod dmcrypt_kernels;
mod full_disk;
mod guests;
mod interfaces;
mod isolation;
mod limits;
mod migration;
mod networks;
mod refusals;
mod rekey;
mod rekey_dmcrypt;
mod shred;
mod support;
mod volumes;
mod whole_disk;
mod workers;

use libtest_mimic::{Arguments, Trial};

/// A test: its name, what it needs, and what it does.
struct Test {
    name: &'static str,
    needs: &'static [Need],
    run: fn() -> support::Outcome,
}

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// QEMU, busybox and a kernel.
    Guest,
    /// To be root.
    Root,
}

fn main() {
    if bulkhead_integration::doomed::run_if_told() {
        return;
    }
    let arguments = Arguments::from_args();
    let tables = [
        guests::TESTS,
        whole_disk::TESTS,
        migration::TESTS,
        networks::TESTS,
        volumes::TESTS,
        dmcrypt::TESTS,
        dmcrypt_kernels::TESTS,
        refusals::TESTS,
        rekey::TESTS,
        rekey_dmcrypt::TESTS,
        isolation::TESTS,
        deaths::TESTS,
        descriptors::TESTS,
        full_disk::TESTS,
        limits::TESTS,
        interfaces::TESTS,
        workers::TESTS,
        shred::TESTS,
    ];
    let mut trials = Vec::new();
    for test in tables.into_iter().flatten() {
        let missing = test.needs.iter().find_map(|need| support::missing(*need));
        if let Some(reason) = &missing {
            eprintln!("skipped: {}: {reason}", test.name);
        }
        let run = test.run;
        let trial = Trial::test(test.name, move || run().map_err(|e| e.to_string().into()));
        trials.push(trial.with_ignored_flag(missing.is_some()));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
