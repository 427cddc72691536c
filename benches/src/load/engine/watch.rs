//! The watch over a run: its phases by the clock, whether anything still moves, and requests a second
//! piece by piece.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use super::{Control, Phase, Plan};
use crate::load::LoadError;

/// How often the watching thread looks.
const TICK: Duration = Duration::from_millis(5);
/// Figures are taken of pieces of this length as well, of which the median counts.
const WINDOW: Duration = Duration::from_millis(50);

/// Sets the phases, and looks whether all is well; requests a second in each piece of the time.
pub(super) fn conduct(
    control: &Control,
    plan: &Plan,
    watch: &mut impl FnMut() -> Result<(), LoadError>,
) -> Result<Vec<f64>, LoadError> {
    let mut watcher = Watcher {
        control,
        timeout: plan.timeout,
        answered: 0,
        since: Instant::now(),
        watch,
    };
    if plan.verify {
        watcher.until(|| control.all_through(Phase::Fill))?;
        control.set(Phase::WarmUp);
    }
    let end = Instant::now() + plan.warm_up;
    watcher.until(|| Instant::now() >= end)?;
    control.set(Phase::Measure);
    let end = Instant::now() + plan.measure;
    let mut windows = Windows::new(control);
    watcher.until(|| {
        windows.look();
        Instant::now() >= end
    })?;
    control.set(Phase::Drain);
    watcher.until(|| control.all_through(Phase::Drain))?;
    if plan.verify {
        control.set(Phase::Sweep);
        watcher.until(|| control.all_through(Phase::Sweep))?;
    }
    control.set(Phase::End);
    Ok(windows.rates)
}

/// Requests a second, piece by piece.
struct Windows<'c> {
    control: &'c Control,
    since: Instant,
    answered: u64,
    rates: Vec<f64>,
}

impl<'c> Windows<'c> {
    fn new(control: &'c Control) -> Self {
        Self {
            control,
            since: Instant::now(),
            answered: control.sum(|thread| &thread.answered),
            rates: Vec::new(),
        }
    }

    fn look(&mut self) {
        let elapsed = self.since.elapsed();
        if elapsed < WINDOW {
            return;
        }
        let answered = self.control.sum(|thread| &thread.answered);
        let more = u32::try_from(answered - self.answered).unwrap_or(u32::MAX);
        self.rates.push(f64::from(more) / elapsed.as_secs_f64());
        (self.since, self.answered) = (Instant::now(), answered);
    }
}

struct Watcher<'c, W> {
    control: &'c Control,
    timeout: Duration,
    answered: u64,
    since: Instant,
    watch: &'c mut W,
}

impl<W: FnMut() -> Result<(), LoadError>> Watcher<'_, W> {
    fn until(&mut self, mut done: impl FnMut() -> bool) -> Result<(), LoadError> {
        while !done() {
            if self.control.phase() == Phase::Abandon {
                return Err(LoadError::Abandoned);
            }
            (self.watch)()?;
            self.check_progress()?;
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn check_progress(&mut self) -> Result<(), LoadError> {
        let answered = self.control.sum(|thread| &thread.answered);
        let in_flight = self.control.sum(|thread| &thread.in_flight);
        if answered != self.answered || in_flight == 0 {
            self.answered = answered;
            self.since = Instant::now();
        } else if self.since.elapsed() > self.timeout {
            return Err(LoadError::Stalled {
                waited: self.timeout,
                in_flight,
            });
        }
        Ok(())
    }
}
