//! How far two CPUs are apart: the time of a cache line's way there and back.
//!
//! CPUs of a virtual machine may be neighbours or not, and that may change while it runs; what two
//! polling threads achieve changes with it up to threefold. So figures say which it was.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Instant;

use super::LoadError;
use crate::serve::cpus;

/// Round trips of a sample.
const ROUNDS: u32 = 500;
/// Samples; their lower quartile counts: whoever disturbs a sample only ever makes it longer.
const SAMPLES: usize = 200;
/// What is nearer than this is near. Neighbours need 50 to 110 ns, others 340 and more.
const NEAR_NS: f64 = 180.0;
/// Whether two CPUs were neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Before and after.
    Near,
    /// Not, before and after.
    Far,
    /// It changed: the figures between say little.
    Flipped,
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Flipped => "flipped",
        })
    }
}

/// Round trips before and after a measurement, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// Before it.
    pub before_ns: f64,
    /// After it.
    pub after_ns: f64,
}

impl Distance {
    /// What they say together.
    #[must_use]
    pub fn placement(&self) -> Placement {
        match (self.before_ns < NEAR_NS, self.after_ns < NEAR_NS) {
            (true, true) => Placement::Near,
            (false, false) => Placement::Far,
            _ => Placement::Flipped,
        }
    }
}

/// Alone on its cache line, and on the one that is fetched with it.
#[repr(align(128))]
struct Alone<T>(T);

/// Nanoseconds of a round trip between two CPUs, without what disturbs it: of one cache line in which
/// one side writes odd numbers and the other answers with the next even one.
///
/// # Errors
/// [`LoadError::Options`] if they are one, or a thread can't be bound to one of them.
pub fn round_trip_ns(here: usize, there: usize) -> Result<f64, LoadError> {
    if here == there {
        let what = format!("CPU {here} is on both sides: choose another --cpu or --peer-cpu");
        return Err(LoadError::Options(what));
    }
    let (ball, stop) = (Alone(AtomicU32::new(0)), Alone(AtomicBool::new(false)));
    let (ball, stop) = (&ball.0, &stop.0);
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            let bound = pin(there);
            while !stop.load(Relaxed) {
                let value = ball.load(Acquire);
                if value % 2 == 1 {
                    ball.store(value + 1, Release);
                }
            }
            bound
        });
        let caller = scope.spawn(move || {
            let bound = pin(here);
            let samples = sample(ball);
            stop.store(true, Relaxed);
            bound.map(|()| samples)
        });
        let samples = caller.join().map_err(|_| LoadError::Panicked)?;
        echo.join().map_err(|_| LoadError::Panicked)??;
        let mut samples = samples?;
        samples.sort_by(f64::total_cmp);
        Ok(samples.get(SAMPLES / 4).copied().unwrap_or(f64::NAN))
    })
}

fn sample(ball: &AtomicU32) -> Vec<f64> {
    let mut value = 0u32;
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let start = Instant::now();
        for _ in 0..ROUNDS {
            ball.store(value + 1, Release);
            while ball.load(Acquire) != value + 2 {}
            value += 2;
        }
        samples.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS));
    }
    samples
}

/// Binds this thread to a CPU.
///
/// # Errors
/// [`LoadError::Options`].
pub fn pin(cpu: usize) -> Result<(), LoadError> {
    cpus::check(&[cpu])
        .and_then(|()| cpus::pin(&[cpu]))
        .map_err(|e| LoadError::Options(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_count() {
        let placement = |before_ns, after_ns| {
            let distance = Distance {
                before_ns,
                after_ns,
            };
            distance.placement()
        };
        assert_eq!(placement(50.0, 60.0), Placement::Near);
        assert_eq!(placement(340.0, 300.0), Placement::Far);
        assert_eq!(placement(50.0, 340.0), Placement::Flipped);
        assert_eq!(placement(340.0, 50.0), Placement::Flipped);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_said() {
        let error = round_trip_ns(100_000, 100_001).expect_err("no such CPUs");
        assert!(error.to_string().contains("choose one of them"), "{error}");
        let error = round_trip_ns(0, 0).expect_err("one CPU");
        assert!(error.to_string().contains("on both sides"), "{error}");
    }
}
