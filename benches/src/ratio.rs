//! Times that may be divided: each way of doing something takes a sample in turn, so that a slow
//! spell of the machine hits all of them alike, and the median of each counts.

use std::time::{Duration, Instant};

/// Samples of each side.
const ROUNDS: usize = 101;
/// How long a sample takes, about.
const SAMPLE: Duration = Duration::from_micros(100);
/// For how long each side is tried first: caches and branch predictors warm up, and it shows how
/// many calls a sample needs.
const WARM_UP: Duration = Duration::from_millis(20);

/// Median time of one call of each side, in seconds.
pub fn medians(sides: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let counts: Vec<u32> = sides
        .iter_mut()
        .map(|side| calls_per_sample(side))
        .collect();
    let mut samples = vec![Vec::with_capacity(ROUNDS); sides.len()];
    for _ in 0..ROUNDS {
        for ((side, &count), samples) in sides.iter_mut().zip(&counts).zip(&mut samples) {
            let start = Instant::now();
            for _ in 0..count {
                side();
            }
            samples.push(start.elapsed().as_secs_f64() / f64::from(count));
        }
    }
    samples.into_iter().map(median).collect()
}

fn calls_per_sample(side: &mut dyn FnMut()) -> u32 {
    let start = Instant::now();
    let mut count = 0u32;
    while start.elapsed() < WARM_UP {
        side();
        count += 1;
    }
    let samples = WARM_UP.as_micros() / SAMPLE.as_micros();
    (count / u32::try_from(samples).unwrap_or(1)).max(1)
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
}
