//! Rounds of two sides, ours first, as a row: packets a second.
#![forbid(unsafe_code)]

use crate::block::rounds::Rounds;
use crate::figures::row::{Point, Row, Unit};

/// What was measured, beside whom, and what is wanted.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// The other side's.
    pub peer: &'static str,
    /// The least ratio.
    pub target: Option<f64>,
    /// Its place in the picture.
    pub point: Option<Point>,
}

/// The row of a case whose rounds have ours first and the peer second.
#[must_use]
pub fn row(case: Case, rounds: &Rounds) -> Row {
    let at = |round: &[f64], side: usize| round.get(side).copied().unwrap_or(f64::NAN);
    let rate = |side| 1e9 / rounds.median(|round| at(round, side));
    Row {
        case: case.name,
        unit: Unit::PacketsPerSecond,
        ours: rate(0),
        peer: case.peer.into(),
        theirs: rate(1),
        ratio: rounds.median(|round| at(round, 1) / at(round, 0)),
        target: case.target,
        placement: rounds.placement,
        point: case.point,
    }
}
