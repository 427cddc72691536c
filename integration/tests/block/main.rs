//! `block_*`: what a well-behaved driver may expect of a disk, from every backend.
//!
//! Each row of [`TESTS`] runs against `serve` in its forms and, where installed, against
//! `qemu-storage-daemon`, which shows that frontend and driver here follow the specification. The suite in
//! [`conformance`] runs against every storage that `serve` knows.

mod conformance;
mod formats;
mod queues;
mod requests;
mod support;

use bulkhead_integration::arena::{Arena, Backend, MOVING, Serve};
use bulkhead_integration::disk::feature;
use bulkhead_integration::processes::installed;
use bulkhead_integration::random::Random;
use libtest_mimic::{Arguments, Failed, Trial};

use support::Outcome;

/// A test of the table.
struct Test {
    name: &'static str,
    queues: u16,
    backends: &'static [Backend],
    run: fn(&mut Arena, &mut Random) -> Outcome,
}

const ALL: &[Backend] = &[
    Backend::Plain,
    Backend::Xts(512),
    Backend::Xts(4096),
    Backend::Reference,
    Backend::Qemu,
];
/// Ours.
const OURS: &[Backend] = &[Backend::Plain, Backend::Xts(512), Backend::Xts(4096)];
/// `serve --reference` is a baseline for speed and for well-formed requests, no more.
const NOT_REFERENCE: &[Backend] = &[
    Backend::Plain,
    Backend::Xts(512),
    Backend::Xts(4096),
    Backend::Qemu,
];

const TESTS: &[Test] = &[
    row("random_io", 1, ALL, |a, r| {
        requests::random_io(a, r, 0, false)
    }),
    row("random_io_event_idx", 1, ALL, |a, r| {
        requests::random_io(a, r, feature::EVENT_IDX, false)
    }),
    row("random_io_indirect", 1, ALL, |a, r| {
        requests::random_io(a, r, 0, true)
    }),
    row("random_io_event_idx_indirect", 1, ALL, |a, r| {
        requests::random_io(a, r, feature::EVENT_IDX, true)
    }),
    row("random_io_memory_disk", 1, ALL, requests::random_io_memory),
    row("many_in_flight", 1, ALL, |a, r| {
        queues::many_in_flight(a, r, 0)
    }),
    row("many_in_flight_event_idx", 1, ALL, |a, r| {
        queues::many_in_flight(a, r, feature::EVENT_IDX)
    }),
    row("several_queues", 4, ALL, queues::several_queues),
    row(
        "several_devices_queues_at_once",
        2,
        ALL,
        queues::two_at_once,
    ),
    row("unaligned_segments", 1, ALL, requests::unaligned_segments),
    row("many_segments", 1, OURS, requests::many_segments),
    row("flush", 1, ALL, requests::flush),
    row("get_id", 1, ALL, requests::get_id),
    row("config_space", 1, NOT_REFERENCE, requests::config_space),
    row("stop_and_restart", 1, ALL, queues::stop_and_restart),
    row("stop_drains", 1, OURS, queues::stop_drains),
    row("index_wraps", 1, ALL, queues::index_wraps),
    row(
        "first_index_near_wrap",
        1,
        ALL,
        queues::first_index_near_wrap,
    ),
    row("no_acknowledgements", 1, ALL, queues::no_acknowledgements),
    row("calls_suppressed", 1, ALL, queues::calls_suppressed),
    row(
        "reconnect_keeps_data",
        1,
        ALL,
        requests::reconnect_keeps_data,
    ),
    row("file_holds_what_was_written", 1, ALL, requests::file_bytes),
];

const fn row(
    name: &'static str,
    queues: u16,
    backends: &'static [Backend],
    run: fn(&mut Arena, &mut Random) -> Outcome,
) -> Test {
    Test {
        name,
        queues,
        backends,
        run,
    }
}

fn main() {
    let args = Arguments::from_args();
    let qemu = installed("qemu-storage-daemon").is_some();
    let mut trials = Vec::new();
    for test in TESTS.iter().chain(formats::TESTS) {
        for &backend in test.backends {
            let name = format!("block_{}_{}", test.name, label(backend));
            let skipped = backend == Backend::Qemu && !qemu;
            let trial = Trial::test(name.clone(), move || trial(test, backend, &[], &name));
            trials.push(trial.with_ignored_flag(skipped));
        }
        // The same while queues move from worker to worker.
        if test.backends.contains(&Backend::Xts(4096)) {
            let name = format!("block_{}_moving", test.name);
            trials.push(Trial::test(name.clone(), move || {
                trial(test, Backend::Xts(4096), MOVING, &name)
            }));
        }
    }
    trials.extend(conformance::trials());
    libtest_mimic::run(&args, trials).exit();
}

fn label(backend: Backend) -> String {
    match backend {
        Backend::Plain => "plain".to_owned(),
        Backend::Xts(unit) => format!("xts{unit}"),
        Backend::Reference => "reference".to_owned(),
        Backend::Qemu => "qemu".to_owned(),
    }
}

fn trial(
    test: &Test,
    backend: Backend,
    options: &'static [&'static str],
    name: &str,
) -> Result<(), Failed> {
    let serve = Serve {
        options,
        ..Serve::default()
    };
    let mut arena = Arena::start_with(backend, test.queues, name, &serve)?;
    let mut random = Random::named(name);
    (test.run)(&mut arena, &mut random)
        .map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    Ok(arena.check()?)
}
