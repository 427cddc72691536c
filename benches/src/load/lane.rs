//! One queue under load: as many requests in flight as its depth allows, each answered one followed
//! by the next.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use super::LoadError;
use super::device::Signals;
use super::error::QueueError;
use super::requests::Requests;
use super::ring::{Ring, Used};
use super::source::{Kind, Source};
use super::stamp::SECTOR_BYTES;
use super::verify::{Stage, Verify};
use hdrhistogram::Histogram;

/// Shown to the device this often while a long batch is being made: it starts meanwhile.
const PUBLISH_EVERY: u32 = 8;
/// Latencies that are taken in a second and queue at most: taking them costs time as well.
const SAMPLES_PER_SECOND: u64 = 100_000;
/// The longest latency that is told apart, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;
/// The longest time between two requests: a year is as good as forever.
const LONGEST_GAP: Duration = Duration::from_secs(365 * 86_400);
const _: () = assert!(SECTOR_BYTES == 512);

/// What was counted while measuring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that were answered.
    pub answered: u64,
    /// Those of them that read.
    pub reads: u64,
    /// Kicks sent.
    pub kicks: u64,
    /// Calls that came.
    pub calls: u64,
}

/// A request's state.
#[derive(Debug, Clone, Copy)]
struct Flight {
    busy: bool,
    kind: Kind,
    block: u64,
    since: Option<Instant>,
}

/// Requests at a rate, not as fast as they are answered: each has its time, and its latency counts
/// from then, whether or not there was room to send it.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    gap: Duration,
    due: Instant,
}

impl Pace {
    /// So many requests a second, evenly; the first after a part of the time between two, from 0 to 1.
    #[must_use]
    pub fn new(per_second: f64, first: f64) -> Self {
        let gap = Duration::try_from_secs_f64(1.0 / per_second).unwrap_or(LONGEST_GAP);
        Self {
            gap,
            due: Instant::now() + gap.min(LONGEST_GAP).mul_f64(first),
        }
    }

    /// When the next request was due, if that is not in the future.
    fn take(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due;
        if due > now {
            return None;
        }
        self.due = due.checked_add(self.gap)?;
        Some(due)
    }
}

/// One queue.
#[derive(Debug)]
pub struct Lane<'m, R> {
    ring: R,
    requests: Requests<'m>,
    signals: Option<&'m Signals>,
    source: Source,
    verify: Option<Verify>,
    stage: Option<Stage>,
    pace: Option<Pace>,
    flights: Vec<Flight>,
    free: Vec<u16>,
    sectors_per_block: u64,
    counts: Counts,
    measured: Option<Counts>,
    latency: Histogram<u64>,
    sample_every: u64,
    until_sample: u64,
}

impl<'m, R: Ring> Lane<'m, R> {
    /// A queue with nothing in flight, that sends nothing until it has a stage. `signals` are none
    /// where the device never sleeps.
    ///
    /// # Errors
    /// [`LoadError::Options`] without a latency histogram, which depends on constants only.
    pub fn new(
        ring: R,
        requests: Requests<'m>,
        signals: Option<&'m Signals>,
        source: Source,
        verify: Option<Verify>,
    ) -> Result<Self, LoadError> {
        let depth = requests.shape().depth;
        let idle = Flight {
            busy: false,
            kind: Kind::Read,
            block: 0,
            since: None,
        };
        let latency = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Ok(Self {
            ring,
            sectors_per_block: u64::from(requests.shape().block_bytes) / SECTOR_BYTES,
            requests,
            signals,
            source,
            verify,
            stage: None,
            pace: None,
            flights: vec![idle; usize::from(depth)],
            free: (0..depth).rev().collect(),
            counts: Counts::default(),
            measured: None,
            latency: latency.map_err(|e| LoadError::Options(e.to_string()))?,
            sample_every: 1,
            until_sample: 1,
        })
    }

    /// What it does from now on; with none it only waits for answers.
    pub fn set_stage(&mut self, stage: Option<Stage>) {
        self.stage = stage;
        if let Some(verify) = &mut self.verify {
            verify.begin();
        }
    }

    /// Sends requests at a rate from now on.
    pub fn set_pace(&mut self, pace: Option<Pace>) {
        self.pace = pace;
    }

    /// Starts to count anew; as the queue has answered `answered` requests in `elapsed` so far, it
    /// takes the latency of each, or of so few that this costs nothing.
    pub fn start_counting(&mut self, elapsed: Duration) {
        let per_second =
            u128::from(self.counts.answered) * 1_000_000_000 / elapsed.as_nanos().max(1);
        let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
        self.sample_every = per_second.div_ceil(SAMPLES_PER_SECOND).max(1);
        self.until_sample = self.sample_every;
        self.counts = Counts::default();
        self.calls();
        self.latency.reset();
        for flight in &mut self.flights {
            flight.since = None;
        }
    }

    /// What was counted so far is what counts; latencies are taken no more.
    pub fn stop_counting(&mut self) {
        self.counts.calls = self.calls();
        self.measured = Some(self.counts);
        for flight in &mut self.flights {
            flight.since = None;
        }
        self.until_sample = u64::MAX;
    }

    /// Calls since the last look.
    fn calls(&self) -> u64 {
        self.signals.map_or(0, Signals::calls)
    }

    /// What was counted between [`Lane::start_counting`] and [`Lane::stop_counting`].
    #[must_use]
    pub fn measured(&self) -> Counts {
        self.measured.unwrap_or_default()
    }

    /// The latencies in nanoseconds, and of how many requests one was taken.
    #[must_use]
    pub fn latency(&self) -> (&Histogram<u64>, u64) {
        (&self.latency, self.sample_every)
    }

    /// Reads that were checked.
    #[must_use]
    pub fn verified_reads(&self) -> u64 {
        self.verify.as_ref().map_or(0, Verify::reads)
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether nothing is in flight, and the stage, if it has an end, is over.
    #[must_use]
    pub fn is_through(&self) -> bool {
        let over = match self.stage {
            None => true,
            Some(Stage::Mixed) => false,
            Some(Stage::Fill | Stage::Sweep) => self.verify.as_ref().is_none_or(Verify::is_through),
        };
        over && self.in_flight() == 0
    }

    /// Takes what was answered, of a device that keeps up no more than a round of all requests (other
    /// queues and the clock are waiting), sends what may be sent; how many were answered.
    ///
    /// # Errors
    /// [`QueueError`].
    #[inline]
    pub fn step(&mut self) -> Result<u64, QueueError> {
        let mut unpublished = 0;
        let mut answered = 0;
        let most = self.flights.len() as u64;
        while answered < most
            && let Some(used) = self.ring.poll()?
        {
            answered += 1;
            self.finish(used)?;
            unpublished += u32::from(self.send());
            if unpublished == PUBLISH_EVERY {
                self.publish();
                unpublished = 0;
            }
        }
        if answered > 0 {
            self.ring.rearm();
        }
        while self.send() {
            unpublished += 1;
        }
        if unpublished > 0 {
            self.publish();
        }
        Ok(answered)
    }

    #[inline]
    fn publish(&mut self) {
        if self.ring.publish()
            && let Some(signals) = self.signals
        {
            self.counts.kicks += 1;
            // A full counter means that the device has kicks to see already.
            let _ = signals.kick.write(1);
        }
    }

    /// Offers the next request, if there is one and room for it.
    #[inline]
    fn send(&mut self) -> bool {
        let (Some(stage), Some(&slot)) = (self.stage, self.free.last()) else {
            return false;
        };
        let due = match &mut self.pace {
            None => None,
            Some(pace) => match pace.take(Instant::now()) {
                None => return false,
                due => due,
            },
        };
        let (block, kind) = match &mut self.verify {
            None => (self.source.block(), self.source.kind()),
            Some(verify) => match verify.choose(stage, &mut self.source) {
                None => return false,
                Some((block, kind)) => {
                    verify.prepare(block, kind, self.requests.buffer(slot));
                    (block, kind)
                }
            },
        };
        self.free.pop();
        let since = self.sample(due);
        if let Some(flight) = self.flights.get_mut(usize::from(slot)) {
            *flight = Flight {
                busy: true,
                kind,
                block,
                since,
            };
        }
        self.requests
            .prepare(slot, kind, block * self.sectors_per_block);
        self.ring.offer(&self.requests, slot, kind);
        true
    }

    #[inline]
    fn sample(&mut self, due: Option<Instant>) -> Option<Instant> {
        self.until_sample -= 1;
        if self.until_sample > 0 {
            return None;
        }
        self.until_sample = self.sample_every;
        due.or_else(|| Some(Instant::now()))
    }

    #[inline]
    fn finish(&mut self, used: Used) -> Result<(), QueueError> {
        let flight = self
            .flights
            .get_mut(usize::from(used.slot))
            .filter(|flight| flight.busy);
        let flight = flight.ok_or(QueueError::NotInFlight {
            id: u32::from(used.slot),
        })?;
        flight.busy = false;
        let Flight {
            kind, block, since, ..
        } = *flight;
        self.check(used, kind, block)?;
        if let Some(verify) = &mut self.verify {
            verify.finish(block, kind, self.requests.buffer(used.slot))?;
        }
        if let Some(since) = since {
            let nanos = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.latency.saturating_record(nanos);
        }
        self.counts.answered += 1;
        self.counts.reads += u64::from(kind == Kind::Read);
        self.free.push(used.slot);
        Ok(())
    }

    #[inline]
    fn check(&self, used: Used, kind: Kind, block: u64) -> Result<(), QueueError> {
        let bytes = self.requests.shape().block_bytes;
        let offset = block * u64::from(bytes);
        let status = self.requests.status(used.slot);
        if status != 0 {
            return Err(QueueError::Status {
                kind,
                offset,
                bytes,
                status,
            });
        }
        let room = self.requests.writable_bytes(kind);
        if used.len > room {
            return Err(QueueError::Length {
                given: used.len,
                room,
                kind,
                offset,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
