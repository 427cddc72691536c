//! `shared_*`: what a frontend shares beside guest memory, byte by byte: the dirty log of a
//! migration, the in-flight region; and what it says of the device as a whole: status, resets of
//! the device and of one queue. Over split and packed rings, with what a hostile frontend sends.

mod device;
mod hostile;
mod inflight;
mod log;

use std::error::Error;

use bulkhead_integration::arena::{Arena, Backend, MOVING, Serve};
use bulkhead_integration::disk::{Options, feature};
use bulkhead_integration::driver::ring::Format;
use bulkhead_integration::frontend::message::protocol_feature;
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Box<dyn Error>>;

/// One row.
struct Row {
    name: &'static str,
    /// What stands before the first device's file.
    storage: &'static str,
    run: fn(&mut Arena) -> Outcome,
}

const fn row(name: &'static str, run: fn(&mut Arena) -> Outcome) -> Row {
    Row {
        name,
        storage: "",
        run,
    }
}

const fn slow(name: &'static str, run: fn(&mut Arena) -> Outcome) -> Row {
    Row {
        storage: "delay=200000:",
        ..row(name, run)
    }
}

const ROWS: &[Row] = &[
    row("log_has_exactly_what_was_written", log::exactly),
    row("log_begins_and_ends_while_requests_run", log::while_running),
    slow("log_has_what_was_in_flight_when_it_began", log::in_flight),
    row("log_that_is_too_short", log::too_short),
    row("log_that_is_cut_off", log::cut_off),
    row("log_replaced", log::replaced),
    row("log_refused", hostile::logs),
    row("inflight_after_requests", inflight::after_requests),
    slow("inflight_during_requests", inflight::during_requests),
    row("inflight_full_of_noise", inflight::noise),
    row("inflight_cut_off", inflight::cut_off),
    row("inflight_refused", hostile::regions),
    row("inflight_asked_for_wrongly", hostile::questions),
    row("backend_channel_of_any_kind", hostile::backend_channels),
    row("status_is_kept", device::status),
    row("status_zero_resets", device::status_zero),
    row("device_reset", device::reset),
    row("queue_reset_beside_another", device::queue_reset),
    slow("nothing_after_a_stop", device::nothing_after_a_stop),
];

/// Queues of each device.
const QUEUES: u16 = 2;

fn main() {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for row in ROWS {
        for (backend, disk) in [(Backend::Plain, ""), (Backend::Xts(4096), "_xts")] {
            for (format, ring) in [(Format::Split, ""), (Format::Packed, "_packed")] {
                let name = format!("shared_{}{ring}{disk}", row.name);
                trials.push(Trial::test(name.clone(), move || {
                    trial(row, backend, format, &[], &name)
                }));
            }
        }
        // The same while queues move from worker to worker.
        for (format, ring) in [(Format::Split, ""), (Format::Packed, "_packed")] {
            let name = format!("shared_{}{ring}_moving", row.name);
            trials.push(Trial::test(name.clone(), move || {
                trial(row, Backend::Plain, format, MOVING, &name)
            }));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn trial(
    row: &Row,
    backend: Backend,
    format: Format,
    options: &'static [&'static str],
    name: &str,
) -> Result<(), Failed> {
    let serve = Serve {
        storage: row.storage,
        options,
    };
    let mut arena = Arena::start_with(backend, QUEUES, name, &serve)?;
    if format == Format::Packed {
        arena.guest_features |= feature::RING_PACKED;
    }
    (row.run)(&mut arena).map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    Ok(arena.check()?)
}

/// Two queues, and everything negotiated that is shared.
fn options() -> Options {
    let mut options = Options {
        queues: QUEUES,
        ..Options::default()
    };
    options.protocol_features |= protocol_feature::LOG_SHMFD
        | protocol_feature::INFLIGHT_SHMFD
        | protocol_feature::RESET_DEVICE
        | protocol_feature::STATUS
        | protocol_feature::BACKEND_REQ;
    options.features |= feature::RING_RESET;
    options
}

/// Fails with `what` unless it holds.
fn ensure(holds: bool, what: impl Fn() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}
