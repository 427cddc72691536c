//! Sides in turns: each round has all of them within a moment, between two looks at how far the CPUs are apart.
//! Rounds in which that changed don't count, and others are taken instead, up to a bound.
#![forbid(unsafe_code)]

use super::BlockError;
use super::bench::Bench;
use super::side::Side;
use crate::figures::row::Placement;
use crate::load::pingpong::{self, Distance};
use crate::ratio::median;

/// What was measured, and where the CPUs were.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounds {
    /// Nanoseconds for a request: of each round, of each side.
    rounds: Vec<Vec<f64>>,
    /// Where the CPUs were in all of these.
    pub placement: Placement,
}

impl Rounds {
    /// Rounds as they are, each with a figure for every side.
    #[cfg(test)]
    pub(super) fn of(rounds: Vec<Vec<f64>>, placement: Placement) -> Self {
        Self { rounds, placement }
    }

    /// The median over the rounds of what is made of a round's figures.
    #[must_use]
    pub fn median(&self, of: impl Fn(&[f64]) -> f64) -> f64 {
        median(self.rounds.iter().map(|round| of(round)).collect())
    }
}

/// Nanoseconds of a cache line's way from the driving to the serving CPU and back.
///
/// # Errors
/// [`BlockError::Load`].
pub fn round_trip_ns(bench: &Bench) -> Result<f64, BlockError> {
    pingpong::round_trip_ns(bench.driver_cpu, bench.worker_cpu).map_err(|source| BlockError::Load {
        case: "ping-pong".to_owned(),
        source: Box::new(source),
    })
}

/// Where the CPUs are now.
///
/// # Errors
/// [`BlockError::Load`].
pub fn placement(bench: &Bench) -> Result<Placement, BlockError> {
    let ns = round_trip_ns(bench)?;
    Ok(between(ns, ns))
}

fn between(before_ns: f64, after_ns: f64) -> Placement {
    let distance = Distance {
        before_ns,
        after_ns,
    };
    match distance.placement() {
        pingpong::Placement::Near => Placement::Near,
        pingpong::Placement::Far => Placement::Far,
        pingpong::Placement::Flipped => Placement::Flipped,
    }
}

/// Lets each side take its turns.
///
/// # Errors
/// Of a side.
pub fn take(bench: &Bench, sides: &mut [Side<'_>]) -> Result<Rounds, BlockError> {
    let pace = bench.pace;
    let mut all: Vec<(Placement, Vec<f64>)> = Vec::new();
    let mut before = round_trip_ns(bench)?;
    for number in 0..pace.rounds + pace.more {
        let mut round = vec![f64::NAN; sides.len()];
        for at in 0..sides.len() {
            // Whoever comes after another side finds its traces: not always the same one.
            let at = (at + number) % sides.len();
            if let (Some(side), Some(place)) = (sides.get_mut(at), round.get_mut(at)) {
                *place = side.turn()?;
            }
        }
        let after = round_trip_ns(bench)?;
        all.push((between(before, after), round));
        before = after;
        if most(&all, pace.rounds).is_some() {
            break;
        }
    }
    Ok(chosen(all))
}

/// The placement that has at least so many rounds.
fn most(all: &[(Placement, Vec<f64>)], least: usize) -> Option<Placement> {
    let rounds = |wanted| all.iter().filter(|(at, _)| *at == wanted).count();
    let place = [Placement::Near, Placement::Far]
        .into_iter()
        .max_by_key(|place| rounds(*place))?;
    (rounds(place) >= least).then_some(place)
}

/// The rounds of the more frequent placement; all of them, as flipped, if the CPUs moved in each.
fn chosen(all: Vec<(Placement, Vec<f64>)>) -> Rounds {
    let placement = most(&all, 1).unwrap_or(Placement::Flipped);
    let rounds = all
        .into_iter()
        .filter(|(at, _)| placement == Placement::Flipped || *at == placement)
        .map(|(_, round)| round)
        .collect();
    Rounds { rounds, placement }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_in_which_cpus_moved_do_not_count() {
        use Placement::{Far, Flipped, Near};
        let all = vec![
            (Far, vec![9.0, 9.0]),
            (Flipped, vec![5.0, 9.0]),
            (Near, vec![1.0, 2.0]),
            (Near, vec![2.0, 6.0]),
            (Near, vec![3.0, 6.0]),
        ];
        assert_eq!(most(&all, 3), Some(Near));
        assert_eq!(most(&all, 4), None);
        let rounds = chosen(all);
        assert_eq!(rounds.placement, Near);
        let ours = rounds.median(|round| round[0]);
        let ratio = rounds.median(|round| round[1] / round[0]);
        assert!((ours - 2.0).abs() < 1e-9 && (ratio - 2.0).abs() < 1e-9);
    }

    #[test]
    fn if_they_always_move_that_is_said() {
        let rounds = chosen(vec![(Placement::Flipped, vec![1.0])]);
        assert_eq!(rounds.placement, Placement::Flipped);
        assert!((rounds.median(|round| round[0]) - 1.0).abs() < 1e-9);
    }
}
