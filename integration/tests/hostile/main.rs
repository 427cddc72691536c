//! `hostile_*`: what a hostile guest or frontend does, and how a device may end it.
//!
//! Each case is a row: its name, the ends that are right (several where the specification leaves
//! the choice), why, and the attack. Around each attack stands an [`Arena`], which checks that the
//! process lives, the second device serves, and no byte, length or descriptor changed beyond the
//! attack's own right. Every row runs against a plain and an encrypted disk.

mod chains;
mod descriptors;
mod guest;
mod layouts;
mod memory_table;
mod packed;
mod rings;
mod session;

use std::error::Error;

use bulkhead_integration::arena::{Arena, Backend};
use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::ring::Format;
use libtest_mimic::{Arguments, Failed, Trial};

/// How an attack ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A request was used with this status byte.
    Status(u8),
    /// A request was used, with any status: the attack made the status byte meaningless.
    Used,
    /// Nothing was used and the error descriptor was signalled.
    Retired,
    /// The backend closed the connection.
    Closed,
    /// The message was acknowledged with a failure.
    Refused,
    /// The message was taken.
    Accepted,
    /// Nothing happened in time.
    Silent,
}

/// What an attack returns: its end, or what is wrong.
pub type Attack = Result<End, Box<dyn Error>>;

/// One row.
#[derive(Debug)]
pub struct Case {
    /// Without `hostile_`.
    pub name: &'static str,
    /// Ends that are right.
    pub ends: &'static [End],
    /// Why these.
    pub why: &'static str,
    /// The attack.
    pub run: fn(&mut Arena) -> Attack,
    /// Formats of the rings that it is tried with.
    formats: &'static [Format],
}

impl Case {
    /// A row for both ring formats.
    pub const fn new(
        name: &'static str,
        ends: &'static [End],
        why: &'static str,
        run: fn(&mut Arena) -> Attack,
    ) -> Self {
        Self {
            name,
            ends,
            why,
            run,
            formats: &[Format::Split, Format::Packed],
        }
    }

    /// A row for split rings only.
    pub const fn split(
        name: &'static str,
        ends: &'static [End],
        why: &'static str,
        run: fn(&mut Arena) -> Attack,
    ) -> Self {
        Self {
            formats: &[Format::Split],
            ..Self::new(name, ends, why, run)
        }
    }

    /// A row in which no ring's format matters.
    pub const fn once(
        name: &'static str,
        ends: &'static [End],
        why: &'static str,
        run: fn(&mut Arena) -> Attack,
    ) -> Self {
        Self::split(name, ends, why, run)
    }

    /// A row for packed rings only.
    pub const fn packed(
        name: &'static str,
        ends: &'static [End],
        why: &'static str,
        run: fn(&mut Arena) -> Attack,
    ) -> Self {
        Self {
            formats: &[Format::Packed],
            ..Self::new(name, ends, why, run)
        }
    }
}

/// Ring formats that the data plane serves.
const SERVED: &[Format] = &[Format::Split, Format::Packed];
/// Queues of each device under attack: the second shows that a retired one takes nothing with it.
const QUEUES: u16 = 2;

fn main() {
    let args = Arguments::from_args();
    let tables = [
        chains::CASES,
        layouts::CASES,
        rings::CASES,
        packed::CASES,
        session::CASES,
        memory_table::CASES,
        descriptors::CASES,
    ];
    let backends = [(Backend::Plain, ""), (Backend::Xts(4096), "_xts")];
    let mut trials = Vec::new();
    for case in tables.into_iter().flatten() {
        for (backend, suffix) in backends {
            for &format in case.formats.iter().filter(|f| SERVED.contains(f)) {
                let ring = match format {
                    Format::Split => "",
                    Format::Packed => "_packed",
                };
                let name = format!("hostile_{}{ring}{suffix}", case.name);
                trials.push(Trial::test(name.clone(), move || {
                    trial(case, backend, format, &name)
                }));
            }
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn trial(case: &Case, backend: Backend, format: Format, name: &str) -> Result<(), Failed> {
    let mut arena = Arena::start(backend, QUEUES, name)?;
    if format == Format::Packed {
        arena.guest_features |= feature::RING_PACKED;
    }
    let end =
        (case.run)(&mut arena).map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    // Whatever the end was: first see that nothing else broke.
    arena.check()?;
    if case.ends.contains(&end) {
        return Ok(());
    }
    Err(format!(
        "it ended as {end:?}; right is one of {:?}: {}\n--- log:\n{}",
        case.ends,
        case.why,
        arena.process.log()
    )
    .into())
}
