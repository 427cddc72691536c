//! Times that may be divided: each way of doing something takes a sample in turn, so that a slow
//! spell of the machine hits all of them alike, and the median of each counts.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// How long is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Samples of each side.
    pub rounds: usize,
    /// How long a sample takes, about.
    pub sample: Duration,
    /// For how long each side is tried first: caches and branch predictors warm up, and it shows how
    /// many calls a sample needs.
    pub warm_up: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            rounds: 101,
            sample: Duration::from_micros(100),
            warm_up: Duration::from_millis(20),
        }
    }
}

impl Pace {
    /// Too short to say anything about speed: shows that it can be measured.
    pub const QUICK: Self = Self {
        rounds: 3,
        sample: Duration::from_micros(20),
        warm_up: Duration::from_micros(200),
    };

    /// Lets each side take its samples in turns.
    pub fn turns(self, sides: &mut [&mut dyn FnMut()]) -> Turns {
        let counts: Vec<u32> = sides.iter_mut().map(|side| self.calls(side)).collect();
        let mut samples = vec![Vec::with_capacity(self.rounds); sides.len()];
        for round in 0..self.rounds {
            for at in 0..sides.len() {
                // Whoever comes after another side finds its traces in caches: not always the same one.
                let at = (at + round) % sides.len();
                let start = Instant::now();
                for _ in 0..counts[at] {
                    sides[at]();
                }
                samples[at].push(start.elapsed().as_secs_f64() / f64::from(counts[at]));
            }
        }
        Turns { samples }
    }

    /// Calls that a sample takes.
    fn calls(self, side: &mut dyn FnMut()) -> u32 {
        let start = Instant::now();
        let mut count = 0u32;
        while start.elapsed() < self.warm_up {
            side();
            count += 1;
        }
        let calls = f64::from(count) * self.sample.as_secs_f64() / start.elapsed().as_secs_f64();
        // A whole number that fits: at most `count`, as a sample is shorter than the warm-up.
        (1..=count)
            .rev()
            .find(|n| f64::from(*n) <= calls)
            .unwrap_or(1)
    }
}

/// What was sampled: for each side, seconds of one call in each round.
#[derive(Debug, Clone)]
pub struct Turns {
    samples: Vec<Vec<f64>>,
}

impl Turns {
    /// Median time of one call of a side, in seconds.
    ///
    /// # Panics
    /// If there is no such side.
    #[must_use]
    pub fn median(&self, side: usize) -> f64 {
        median(self.samples[side].clone())
    }

    /// How many times as long `other` takes as `side`: the median over the rounds, each of which has both within
    /// a moment.
    ///
    /// # Panics
    /// If there is no such side.
    #[must_use]
    pub fn ratio(&self, other: usize, side: usize) -> f64 {
        let rounds = self.samples[other].iter().zip(&self.samples[side]);
        median(rounds.map(|(other, side)| other / side).collect())
    }
}

/// Median time of one call of each side, in seconds.
pub fn medians(sides: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let turns = Pace::default().turns(sides);
    (0..sides.len()).map(|side| turns.median(side)).collect()
}

/// The middle one.
#[must_use]
pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_longer_has_the_larger_median() {
        let wait = |micros| move || std::thread::sleep(Duration::from_micros(micros));
        let (mut short, mut long) = (wait(20), wait(2000));
        let times = medians(&mut [&mut short, &mut long]);
        assert!(times[0] >= 20e-6 && times[1] >= 2000e-6, "{times:?}");
        assert!(times[0] < times[1], "{times:?}");
    }

    #[test]
    fn a_ratio_is_of_the_same_round() {
        let turns = Turns {
            // The machine was ten times slower in the second and third round, for both.
            samples: vec![vec![1.0, 10.0, 10.0], vec![2.0, 20.0, 30.0]],
        };
        assert!((turns.ratio(1, 0) - 2.0).abs() < 1e-9);
        assert!((turns.median(1) - 20.0).abs() < 1e-9);
    }
}
