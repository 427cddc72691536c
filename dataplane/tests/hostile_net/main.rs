//! `hostile_net_*`: what a hostile guest or frontend does with a network card, and how a device may end it.
//!
//! Each case is a row: its name, the end that is right, and the attack. The attacked card is on a switch with two
//! others. After each attack these talk to each other, nothing of theirs was dropped and no queue of theirs retired,
//! and the attacked card can be attached again and talks to them. A row runs with split and with packed rings.

mod arena;
mod frames;
mod messages;
mod offloads;
mod receive;
#[path = "../net/rig.rs"]
#[allow(
    dead_code,
    missing_debug_implementations,
    reason = "other tests use more of it"
)]
mod rig;
mod rings;
mod roles;
mod shared;

use arena::{Arena, End, Run};
use libtest_mimic::{Arguments, Failed, Trial};

/// One row.
pub(crate) struct Case {
    /// Without `hostile_net_`.
    pub name: &'static str,
    /// The end that is right.
    pub end: End,
    /// The attack.
    pub run: Run,
    /// Whether split rings, and packed ones, are tried.
    pub formats: &'static [bool],
}

/// Split rings, and packed ones.
pub(crate) const BOTH: &[bool] = &[false, true];
pub(crate) const SPLIT: &[bool] = &[false];
pub(crate) const PACKED: &[bool] = &[true];

fn main() {
    let args = Arguments::from_args();
    bulkhead_dataplane::memory::sigbus::install().expect("a handler");
    let tables = [
        frames::cases(),
        offloads::cases(),
        receive::cases(),
        rings::cases(),
        roles::cases(),
        messages::cases(),
        shared::cases(),
    ];
    let mut trials = Vec::new();
    for case in tables.into_iter().flatten() {
        for &packed in case.formats {
            let name = match (packed, case.formats.len()) {
                (_, 1) => format!("hostile_net_{}", case.name),
                (false, _) => format!("hostile_net_{}_split", case.name),
                (true, _) => format!("hostile_net_{}_packed", case.name),
            };
            let (run, end) = (case.run.clone(), case.end);
            trials.push(Trial::test(name, move || trial(&run, end, packed)));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn trial(run: &Run, end: End, packed: bool) -> Result<(), Failed> {
    let mut arena = Arena::new(packed);
    let ended = run(&mut arena)?;
    // Whatever the end was: first see that nobody else suffers.
    arena.check()?;
    if ended == end {
        return Ok(());
    }
    Err(format!("it ended as {ended:?}; right is {end:?}").into())
}
