//! `endurance_*`: what a hostile guest or frontend does over and over, and what load does to
//! changes of memory: many rounds against one process, over split and packed rings.
//!
//! Each row has a number for every run of the tests and a full one, which `BULKHEAD_SOAK=1`
//! asks for. What must hold at the end is that of every [`Arena`]; rows add their own.

mod deaths;
mod endless;
mod heads;
mod moves;
mod orders;
mod racer;
mod socket;
mod swaps;
mod truncated;
mod wraps;

use std::error::Error;

use bulkhead_integration::arena::{Arena, Backend, MOVING, Serve};
use bulkhead_integration::disk::feature;
use bulkhead_integration::doomed;
use bulkhead_integration::driver::ring::Format;
use bulkhead_integration::random::Random;
use libtest_mimic::{Arguments, Failed, Trial};

/// What a row returns: what it did, for the log.
pub type Outcome = Result<String, Box<dyn Error>>;

/// Environment variable that asks for the full numbers.
const SOAK: &str = "BULKHEAD_SOAK";

/// One row.
struct Row {
    name: &'static str,
    /// Rounds in every run, and the full number.
    rounds: (u64, u64),
    formats: &'static [Format],
    backends: &'static [Backend],
    serve: Serve,
    run: fn(&mut Arena, &mut Random, u64) -> Outcome,
}

/// Formats that the data plane serves.
const SERVED: &[Format] = &[Format::Split, Format::Packed];
const BOTH: &[Format] = &[Format::Split, Format::Packed];
const SPLIT: &[Format] = &[Format::Split];
const PLAIN: &[Backend] = &[Backend::Plain];
const XTS: &[Backend] = &[Backend::Plain, Backend::Xts(4096)];
const USUAL: Serve = Serve {
    storage: "",
    options: &[],
};

const MOVED: Serve = Serve {
    options: MOVING,
    ..USUAL
};

const ROWS: &[Row] = &[
    Row {
        // T21
        name: "double_fetch",
        rounds: (8_000, 260_000),
        formats: BOTH,
        backends: XTS,
        serve: Serve {
            options: &["--discard"],
            ..USUAL
        },
        run: racer::run,
    },
    Row {
        // T22
        name: "heads_in_flight_again",
        rounds: (200, 10_000),
        formats: BOTH,
        backends: PLAIN,
        serve: Serve {
            storage: "delay=20000:",
            ..USUAL
        },
        run: heads::run,
    },
    Row {
        // T23
        name: "endless_chains",
        rounds: (1_000, 10_000),
        formats: BOTH,
        backends: PLAIN,
        serve: Serve {
            options: &["--discard"],
            ..USUAL
        },
        run: endless::run,
    },
    Row {
        // T24
        name: "socket_abuse",
        rounds: (1_500, 10_000),
        formats: SPLIT,
        backends: PLAIN,
        serve: USUAL,
        run: socket::run,
    },
    Row {
        // T25
        name: "message_orders",
        rounds: (300, 5_000),
        formats: BOTH,
        backends: PLAIN,
        serve: USUAL,
        run: orders::run,
    },
    Row {
        // T26
        name: "memory_swapped",
        rounds: (200, 1_000),
        formats: BOTH,
        backends: XTS,
        serve: USUAL,
        run: swaps::run,
    },
    Row {
        // T27
        name: "memory_truncated",
        rounds: (20, 100),
        formats: BOTH,
        backends: XTS,
        serve: USUAL,
        run: truncated::run,
    },
    Row {
        name: "queues_moved",
        rounds: (1_000, 50_000),
        formats: BOTH,
        backends: XTS,
        serve: MOVED,
        run: moves::run,
    },
    Row {
        name: "queues_moved_slow_storage",
        rounds: (100, 2_000),
        formats: BOTH,
        backends: XTS,
        serve: Serve {
            storage: "delay=8000:",
            ..MOVED
        },
        run: moves::run,
    },
    Row {
        name: "message_orders_moved",
        rounds: (100, 5_000),
        formats: BOTH,
        backends: PLAIN,
        serve: MOVED,
        run: orders::run,
    },
    Row {
        name: "memory_swapped_moved",
        rounds: (100, 1_000),
        formats: BOTH,
        backends: XTS,
        serve: MOVED,
        run: swaps::run,
    },
    Row {
        name: "memory_truncated_moved",
        rounds: (10, 100),
        formats: BOTH,
        backends: PLAIN,
        serve: MOVED,
        run: truncated::run,
    },
    Row {
        // T39: over all of its forms 1,000 deaths and 20,000 connections.
        name: "frontend_deaths",
        rounds: (250, 2_000),
        formats: BOTH,
        backends: XTS,
        serve: Serve {
            storage: "delay=2000:",
            ..USUAL
        },
        run: deaths::run,
    },
    Row {
        // T92
        name: "index_wraps",
        rounds: (400_000, 4_000_000),
        formats: BOTH,
        backends: PLAIN,
        serve: USUAL,
        run: wraps::run,
    },
];

fn main() {
    if doomed::run_if_told() {
        return;
    }
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for row in ROWS {
        for &backend in row.backends {
            for &format in row.formats.iter().filter(|f| SERVED.contains(f)) {
                let name = format!("endurance_{}_{}", row.name, label(backend, format));
                trials.push(Trial::test(name.clone(), move || {
                    trial(row, backend, format, &name)
                }));
            }
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn label(backend: Backend, format: Format) -> String {
    let ring = match format {
        Format::Split => "split",
        Format::Packed => "packed",
    };
    match backend {
        Backend::Xts(unit) => format!("{ring}_xts{unit}"),
        _ => ring.to_owned(),
    }
}

fn trial(row: &Row, backend: Backend, format: Format, name: &str) -> Result<(), Failed> {
    let mut arena = Arena::start_with(backend, 2, name, &row.serve)?;
    if format == Format::Packed {
        arena.guest_features |= feature::RING_PACKED;
    }
    let soak = std::env::var_os(SOAK).is_some_and(|value| value != "0");
    let rounds = if soak { row.rounds.1 } else { row.rounds.0 };
    let began = std::time::Instant::now();
    let did = (row.run)(&mut arena, &mut Random::named(name), rounds)
        .map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    println!("{name}: {did} in {:.1} s", began.elapsed().as_secs_f64());
    Ok(arena.check()?)
}
