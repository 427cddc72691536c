//! The supervisor as a process, with real children: rot executes this same test binary under each
//! of the three names, and started by rot it is a puppet that does what the test says.
#![forbid(unsafe_code)]

mod host;
mod interfaces;
mod lifecycle;
mod listening;
mod peers;
mod puppet;
mod replacing;
mod setup;
mod storing;
mod systemd;
mod upgrading;

use libtest_mimic::{Arguments, Trial};

/// A test and whether it needs root, to give children and sockets other owners.
struct Case {
    name: &'static str,
    needs_root: bool,
    run: fn(),
}

const fn case(name: &'static str, run: fn()) -> Case {
    Case {
        name,
        needs_root: false,
        run,
    }
}

const fn root_case(name: &'static str, run: fn()) -> Case {
    Case {
        name,
        needs_root: true,
        run,
    }
}

fn main() {
    if std::env::var_os(bulkhead_protocol::process::ROT_ENV).is_some() {
        puppet::main();
    }
    let root = nix::unistd::geteuid().is_root();
    let groups = [
        interfaces::CASES,
        lifecycle::CASES,
        listening::CASES,
        peers::CASES,
        replacing::CASES,
        setup::CASES,
        storing::CASES,
        systemd::CASES,
        upgrading::CASES,
    ];
    let trials = groups.into_iter().flatten().map(|case| {
        let run = case.run;
        let trial = Trial::test(case.name, move || {
            run();
            Ok(())
        });
        trial.with_ignored_flag(case.needs_root && !root)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
