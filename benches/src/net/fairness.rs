//! What a guest that floods leaves to another one: on one switch, one guest sends to a second; a third sends as fast as
//! it can, too, to a fourth, or to everybody, which costs a copy for each. The first one's fair share is half of what
//! it has alone. All guests have the same driver, in turns, so that both senders have the same chance to be served.
#![forbid(unsafe_code)]

use super::peers;
use super::rings::{ENTRIES, SMALL, mac};
use super::segments::{EVERYBODY, drive, guests, plan};
use crate::block::bench::Bench;
use crate::block::side::Side;
use crate::block::{BlockError, rounds};
use crate::figures::row::{Row, Unit};
use crate::traffic::card::Wanted;
use crate::traffic::frame::Kind;

/// The least part of its fair share that a guest must keep.
const TARGET: f64 = 0.9;

/// Measures all floods.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let floods = [("to another guest", 3), ("to everybody", EVERYBODY)];
    floods
        .map(|(name, to)| case(bench, name, to))
        .into_iter()
        .collect()
}

fn case(bench: &Bench, name: &str, to: u16) -> Result<Row, BlockError> {
    eprintln!("fairness, a flood {name} ..");
    let ports = [0, 1, 2, 3].map(|number| format!("switch:lan,mac={}", mac(number)));
    let ours = peers::ours(bench, "ours", &ports)?;
    let wanted = Wanted {
        packed: false,
        mergeable: true,
        segments: false,
    };
    let frame = Kind::Datagram(SMALL);
    let own = Some((1, frame));
    let of = |flood| {
        let guests = guests(&ours.sockets, &[own, None, flood, None]);
        let plan = plan(bench, guests, wanted, (ENTRIES, frame));
        Side::new(move || {
            let rates = drive(&plan)?;
            let received = rates.get(1).and_then(|guest| guest.received.first());
            Ok(1e9 / received.copied().unwrap_or(f64::NAN))
        })
    };
    let mut sides = [of(Some((to, frame))), of(None)];
    let rounds = rounds::take(bench, &mut sides)?;
    let at = |round: &[f64], side: usize| round.get(side).copied().unwrap_or(f64::NAN);
    let beside = 1e9 / rounds.median(|round| at(round, 0));
    let share = 0.5e9 / rounds.median(|round| at(round, 1));
    Ok(Row {
        case: format!("fairness, {SMALL} B beside a flood {name}"),
        unit: Unit::PacketsPerSecond,
        ours: beside,
        peer: "half of it alone".into(),
        theirs: share,
        ratio: rounds.median(|round| 2.0 * at(round, 1) / at(round, 0)),
        target: Some(TARGET),
        placement: rounds.placement,
        point: None,
    })
}
