//! Threads that drive queues through the phases of a run, and the watch over them.
//!
//! A driving thread polls its queues and looks at one shared byte, nothing else: time, signals of
//! back-ends and whether anything still moves are the watching thread's.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::LoadError;
use super::lane::{Counts, Lane};
use super::pingpong::pin;
use super::ring::Ring;
use super::verify::Stage;

mod watch;

use watch::conduct;

/// Empty rounds after which a thread lets others have its CPU for once: it is not alone there.
pub const YIELD_AFTER: u32 = 1 << 14;

/// What all threads do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    Fill,
    WarmUp,
    Measure,
    Drain,
    Sweep,
    End,
    Abandon,
}

const PHASES: [Phase; 7] = [
    Phase::Fill,
    Phase::WarmUp,
    Phase::Measure,
    Phase::Drain,
    Phase::Sweep,
    Phase::End,
    Phase::Abandon,
];

/// How long a run takes.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Before anything counts.
    pub warm_up: Duration,
    /// While it counts.
    pub measure: Duration,
    /// Longest time without a single answer.
    pub timeout: Duration,
    /// Fill the disk before, and read it after, checking every block.
    pub verify: bool,
    /// How long a thread sleeps that finds nothing to do; none: it looks again at once.
    pub pause: Option<Duration>,
}

/// A queue with the name to use in messages.
#[derive(Debug)]
pub struct Named<'m, R> {
    /// The socket, or the ring echo.
    pub device: String,
    /// Number of the queue.
    pub queue: u16,
    /// Place in the order of devices and queues.
    pub number: usize,
    /// The queue.
    pub lane: Lane<'m, R>,
}

/// Figures of a run, all queues together.
#[derive(Debug)]
pub struct Measured {
    /// What was counted.
    pub counts: Counts,
    /// Over which time, of the thread that measured longest.
    pub elapsed: Duration,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
    /// Of so many requests at most one has its latency taken.
    pub sample_every: u64,
    /// Reads that were checked.
    pub verified_reads: u64,
    /// Requests a second in each piece of the time.
    pub windows: Vec<f64>,
    /// The same of each queue, in the order of devices and queues.
    pub lanes: Vec<OfLane>,
}

/// Figures of one queue.
#[derive(Debug, Clone, PartialEq)]
pub struct OfLane {
    /// Place in the order of devices and queues.
    pub number: usize,
    /// The socket, or the ring echo.
    pub device: String,
    /// What was counted.
    pub counts: Counts,
    /// Requests a second over the whole time.
    pub mean_iops: f64,
    /// Half of its latencies, and 99 of a hundred, were no longer: nanoseconds.
    pub latency_ns: [u64; 2],
}

/// Threads' common state.
struct Control {
    phase: AtomicU8,
    threads: Vec<Progress>,
}

/// A thread's state, on a cache line of its own.
#[repr(align(128))]
struct Progress {
    /// Requests that were answered, in all phases.
    answered: AtomicU64,
    in_flight: AtomicU64,
    /// The last phase of which everything is done.
    through: AtomicU8,
}

/// Nothing yet.
const NOT_YET: u8 = u8::MAX;

impl Control {
    fn phase(&self) -> Phase {
        let number = usize::from(self.phase.load(Acquire));
        PHASES.get(number).copied().unwrap_or(Phase::Abandon)
    }

    fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Release);
    }

    fn all_through(&self, phase: Phase) -> bool {
        let through = |thread: &Progress| thread.through.load(Acquire) == phase as u8;
        self.threads.iter().all(through)
    }

    fn sum(&self, of: impl Fn(&Progress) -> &AtomicU64) -> u64 {
        self.threads
            .iter()
            .map(|thread| of(thread).load(Relaxed))
            .sum()
    }
}

/// Drives each list of queues from a thread, bound to the CPU that goes with it, through a whole run.
/// `watch` is called every few milliseconds, and ends the run with what it fails with.
///
/// # Errors
/// Of `watch`, of a queue, or [`LoadError::Stalled`]: the first.
pub fn run<R: Ring + Send>(
    threads: Vec<(Option<usize>, Vec<Named<'_, R>>)>,
    plan: &Plan,
    mut watch: impl FnMut() -> Result<(), LoadError>,
) -> Result<Measured, LoadError> {
    let fresh = || Progress {
        answered: AtomicU64::new(0),
        in_flight: AtomicU64::new(0),
        through: AtomicU8::new(NOT_YET),
    };
    let first = if plan.verify {
        Phase::Fill
    } else {
        Phase::WarmUp
    };
    let control = Control {
        phase: AtomicU8::new(first as u8),
        threads: threads.iter().map(|_| fresh()).collect(),
    };
    std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for ((cpu, lanes), progress) in threads.into_iter().zip(&control.threads) {
            let control = &control;
            handles.push(scope.spawn(move || {
                let result = cpu.map_or(Ok(()), pin);
                let result = result.and_then(|()| drive(lanes, control, progress, plan.pause));
                if result.is_err() {
                    control.set(Phase::Abandon);
                }
                result
            }));
        }
        let watched = conduct(&control, plan, &mut watch);
        if watched.is_err() {
            control.set(Phase::Abandon);
        }
        let mut results = Vec::new();
        for handle in handles {
            results.push(handle.join().unwrap_or(Err(LoadError::Panicked)));
        }
        combine(results, watched)
    })
}

/// The first real failure, else all figures as one.
fn combine(
    results: Vec<Result<Measured, LoadError>>,
    watched: Result<Vec<f64>, LoadError>,
) -> Result<Measured, LoadError> {
    let mut whole: Option<Measured> = None;
    let mut abandoned = false;
    for result in results {
        match (result, &mut whole) {
            (Err(LoadError::Abandoned), _) => abandoned = true,
            (Err(other), _) => return Err(other),
            (Ok(part), None) => whole = Some(part),
            (Ok(part), Some(whole)) => whole.add(part),
        }
    }
    let windows = watched?;
    match whole {
        Some(mut whole) if !abandoned => {
            whole.lanes.sort_by_key(|lane| lane.number);
            Ok(Measured { windows, ..whole })
        }
        _ => Err(LoadError::Abandoned),
    }
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.counts.answered += other.counts.answered;
        self.counts.reads += other.counts.reads;
        self.counts.kicks += other.counts.kicks;
        self.counts.calls += other.counts.calls;
        self.elapsed = self.elapsed.max(other.elapsed);
        // Same bounds: nothing can be out of range.
        let _ = self.latency.add(&other.latency);
        self.lanes.extend(other.lanes);
        self.sample_every = self.sample_every.max(other.sample_every);
        self.verified_reads += other.verified_reads;
    }
}

/// A thread's run.
fn drive<R: Ring>(
    mut lanes: Vec<Named<'_, R>>,
    control: &Control,
    progress: &Progress,
    pause: Option<Duration>,
) -> Result<Measured, LoadError> {
    let mut current = None;
    let mut since = Instant::now();
    let mut elapsed = Duration::ZERO;
    let mut idle_rounds = 0u32;
    let mut total = 0u64;
    loop {
        let phase = control.phase();
        if current != Some(phase) {
            if current == Some(Phase::Measure) {
                elapsed = since.elapsed();
            }
            enter(&mut lanes, phase, since.elapsed());
            (current, since) = (Some(phase), Instant::now());
            idle_rounds = 0;
        }
        match phase {
            Phase::Abandon => return Err(LoadError::Abandoned),
            Phase::End => break,
            _ => {}
        }
        let answered = step(&mut lanes)?;
        if answered > 0 {
            total += answered;
            progress.answered.store(total, Relaxed);
            idle_rounds = 0;
            continue;
        }
        idle_rounds += 1;
        if idle_rounds == 1 {
            let in_flight: usize = lanes.iter().map(|named| named.lane.in_flight()).sum();
            progress.in_flight.store(in_flight as u64, Relaxed);
            if lanes.iter().all(|named| named.lane.is_through()) {
                progress.through.store(phase as u8, Release);
            }
        } else if idle_rounds > YIELD_AFTER {
            idle_rounds = 0;
            std::thread::yield_now();
        }
        match pause {
            Some(pause) => std::thread::sleep(pause),
            None => std::hint::spin_loop(),
        }
    }
    collect(&lanes, elapsed)
}

#[inline]
fn step<R: Ring>(lanes: &mut [Named<'_, R>]) -> Result<u64, LoadError> {
    let mut answered = 0;
    for named in lanes {
        answered += named.lane.step().map_err(|source| LoadError::Queue {
            device: named.device.clone(),
            queue: named.queue,
            source,
        })?;
    }
    Ok(answered)
}

fn enter<R: Ring>(lanes: &mut [Named<'_, R>], phase: Phase, last: Duration) {
    for Named { lane, .. } in lanes {
        match phase {
            Phase::Fill => lane.set_stage(Some(Stage::Fill)),
            Phase::WarmUp => {
                lane.set_stage(Some(Stage::Mixed));
                lane.start_counting(Duration::MAX);
            }
            Phase::Measure => {
                // A thread that begins late, with no warm-up, is here first.
                lane.set_stage(Some(Stage::Mixed));
                lane.start_counting(last);
            }
            Phase::Drain => {
                lane.stop_counting();
                lane.set_stage(None);
            }
            Phase::Sweep => {
                lane.set_pace(None);
                lane.set_stage(Some(Stage::Sweep));
            }
            Phase::End | Phase::Abandon => lane.set_stage(None),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of a run are far below 2^53"
)]
fn of_lane<R: Ring>(named: &Named<'_, R>, elapsed: Duration) -> OfLane {
    let counts = named.lane.measured();
    let (latency, _) = named.lane.latency();
    OfLane {
        number: named.number,
        device: named.device.clone(),
        counts,
        mean_iops: counts.answered as f64 / elapsed.as_secs_f64().max(1e-9),
        latency_ns: [0.5, 0.99].map(|quantile| latency.value_at_quantile(quantile)),
    }
}

fn collect<R: Ring>(lanes: &[Named<'_, R>], elapsed: Duration) -> Result<Measured, LoadError> {
    let parts = lanes.iter().map(|named| {
        let (latency, sample_every) = named.lane.latency();
        Measured {
            counts: named.lane.measured(),
            elapsed,
            latency: latency.clone(),
            sample_every,
            verified_reads: named.lane.verified_reads(),
            windows: Vec::new(),
            lanes: vec![of_lane(named, elapsed)],
        }
    });
    let whole = parts.reduce(|mut whole, part| {
        whole.add(part);
        whole
    });
    whole.ok_or_else(|| LoadError::Options("a thread without a queue: use fewer --cpu".to_owned()))
}
