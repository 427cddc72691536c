//! Guests that send and receive together for a while, driven by one thread.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::card::{Card, Pair, Wanted};
use super::frame::{HEADER_BYTES, Kind as Frame};
use super::receiver::Receiver;
use super::sender::{Sender, Sending};
use super::slots::Slots;
use crate::load::LoadError;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::pingpong;
use crate::load::ring::packed::Packed;
use crate::load::ring::split::Split;
use crate::load::ring::{Events, Ring};
use crate::ratio::median;

/// Steps between two looks at the clock.
const STEPS: u32 = 16;
/// Pieces of the time; the median of them counts.
const PIECES: u32 = 4;
/// How long nothing at all may come.
const PATIENCE: Duration = Duration::from_secs(10);
/// A receive buffer that holds any frame that is not cut: as drivers make them.
const WHOLE_BYTES: u32 = 1526;
/// A mergeable one, for large segments.
const MERGED_BYTES: u32 = 4096;

/// A guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Where its back-end listens.
    pub socket: PathBuf,
    /// What it sends, if it does.
    pub sending: Option<Sending>,
    /// It counts what comes; else it has no buffers for anything.
    pub receives: bool,
}

/// Guests for a while.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who.
    pub guests: Vec<Guest>,
    /// What they negotiate.
    pub wanted: Wanted,
    /// Entries of each ring.
    pub entries: u16,
    /// What is received.
    pub frame: Frame,
    /// Where they are driven from.
    pub cpu: usize,
    /// Before anything counts.
    pub warm_up: Duration,
    /// While it counts.
    pub measure: Duration,
}

/// Frames a second of a guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    /// That were taken from it.
    pub sent: f64,
    /// That came to it, of each sender by its number.
    pub received: Vec<f64>,
}

/// A guest that is connected, and its memory.
struct Opened {
    card: Card,
    memory: Memory,
    rx: Slots,
    tx: Slots,
    pair: Pair,
}

/// A guest's queues.
struct Driven<'m, R> {
    name: String,
    sender: Option<Sender<'m, R>>,
    receiver: Option<Receiver<'m, R>>,
}

/// Lets them send and receive; each guest's rates.
///
/// # Errors
/// See [`LoadError`].
pub fn run(plan: &Plan) -> Result<Vec<Rates>, LoadError> {
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            pingpong::pin(plan.cpu)?;
            let opened: Result<Vec<_>, _> = plan.guests.iter().map(|g| open(plan, g)).collect();
            let opened = opened?;
            let rates = if plan.wanted.packed {
                drive(plan, &opened, |m, s, e| Packed::new(m, &s.rings, s, e))
            } else {
                drive(plan, &opened, |m, s, e| Split::new(m, &s.rings, s, e))
            };
            let rates = rates?;
            for guest in &opened {
                guest.card.stop()?;
            }
            Ok(rates)
        });
        driver.join().map_err(|_| LoadError::Panicked)?
    })
}

fn open(plan: &Plan, guest: &Guest) -> Result<Opened, LoadError> {
    let card = Card::open(&guest.socket, plan.wanted)?;
    let header = u32::try_from(HEADER_BYTES).unwrap_or(0);
    let room = match (plan.wanted.segments, plan.wanted.mergeable) {
        (true, true) => MERGED_BYTES,
        (true, false) => header + plan.frame.bytes(),
        (false, _) => WHOLE_BYTES,
    };
    let rx = Slots::new(0, plan.entries, room);
    let sent = guest.sending.map_or(plan.frame, |sending| sending.frame);
    let tx = Slots::new(rx.end(), plan.entries, header + sent.bytes());
    let memory = Memory::new(tx.end())?;
    let pair = card.start(&memory, &rx, &tx)?;
    Ok(Opened {
        card,
        memory,
        rx,
        tx,
        pair,
    })
}

fn drive<'m, R: Ring>(
    plan: &Plan,
    opened: &'m [Opened],
    ring: impl Fn(&'m Memory, &'m Slots, Events) -> Result<R, LoadError>,
) -> Result<Vec<Rates>, LoadError> {
    let mut all = Vec::new();
    for (guest, opened) in plan.guests.iter().zip(opened) {
        let memory = &opened.memory;
        let events = Events {
            event_idx: opened.card.event_idx(),
            calls: false,
        };
        let sender = guest.sending.map(|sending| {
            let ring = ring(memory, &opened.tx, events)?;
            Sender::new(ring, opened.tx, memory, &opened.pair.tx, &sending)
        });
        let receiver = guest.receives.then(|| {
            let ring = ring(memory, &opened.rx, events)?;
            let what = (plan.frame, plan.wanted.mergeable);
            let mut new = Receiver::new(ring, opened.rx, memory, &opened.pair.rx, what)?;
            new.begin();
            Ok(new)
        });
        all.push(Driven {
            name: opened.card.path().display().to_string(),
            sender: sender.transpose()?,
            receiver: receiver.transpose()?,
        });
    }
    measure(plan, opened, &mut all)
}

/// What was counted so far, of each guest: sent, then received by sender.
type Counts = Vec<Vec<u64>>;

fn measure<R: Ring>(
    plan: &Plan,
    opened: &[Opened],
    all: &mut [Driven<'_, R>],
) -> Result<Vec<Rates>, LoadError> {
    let watch = || {
        opened
            .iter()
            .try_for_each(|guest| guest.card.watch(&guest.pair))
    };
    let start = Instant::now();
    while start.elapsed() < plan.warm_up || moved(all) == 0 {
        steps(all)?;
        if start.elapsed() > plan.warm_up + PATIENCE {
            watch()?;
            return Err(LoadError::Stalled {
                waited: start.elapsed(),
                in_flight: 0,
            });
        }
    }
    let mut pieces: Vec<Vec<Vec<f64>>> = Vec::new();
    for _ in 0..PIECES {
        let (start, before) = (Instant::now(), counts(all));
        let mut elapsed = start.elapsed();
        while elapsed < plan.measure / PIECES {
            steps(all)?;
            elapsed = start.elapsed();
        }
        pieces.push(rates(&before, &counts(all), elapsed));
    }
    watch()?;
    Ok(medians(&pieces))
}

#[inline]
fn steps<R: Ring>(all: &mut [Driven<'_, R>]) -> Result<(), LoadError> {
    for _ in 0..STEPS {
        for guest in &mut *all {
            let stepped = guest.step();
            stepped.map_err(|(queue, source)| LoadError::Queue {
                device: guest.name.clone(),
                queue,
                source,
            })?;
        }
    }
    Ok(())
}

impl<R: Ring> Driven<'_, R> {
    #[inline]
    fn step(&mut self) -> Result<(), (u16, QueueError)> {
        if let Some(receiver) = &mut self.receiver {
            receiver.step().map_err(|error| (0, error))?;
        }
        if let Some(sender) = &mut self.sender {
            sender.step().map_err(|error| (1, error))?;
        }
        Ok(())
    }
}

fn moved<R>(all: &[Driven<'_, R>]) -> u64 {
    counts(all).iter().flatten().sum()
}

fn counts<R>(all: &[Driven<'_, R>]) -> Counts {
    let of = |guest: &Driven<'_, R>| {
        let sent = guest.sender.as_ref().map_or(0, |sender| sender.sent);
        let received = guest.receiver.as_ref().map(|receiver| receiver.received);
        let received = received.into_iter().flatten();
        std::iter::once(sent).chain(received).collect()
    };
    all.iter().map(of).collect()
}

fn rates(before: &Counts, after: &Counts, elapsed: Duration) -> Vec<Vec<f64>> {
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of a run are far below 2^53"
    )]
    let rate = |(before, after): (&u64, &u64)| (after - before) as f64 / elapsed.as_secs_f64();
    let guests = before.iter().zip(after);
    let of = |(before, after): (&Vec<u64>, &Vec<u64>)| before.iter().zip(after).map(rate).collect();
    guests.map(of).collect()
}

fn medians(pieces: &[Vec<Vec<f64>>]) -> Vec<Rates> {
    let Some(first) = pieces.first() else {
        return Vec::new();
    };
    let figure = |guest: usize, at: usize| {
        let of_piece = |piece: &Vec<Vec<f64>>| piece.get(guest)?.get(at).copied();
        median(pieces.iter().filter_map(of_piece).collect())
    };
    let guests = first.iter().enumerate();
    let of = |(guest, figures): (usize, &Vec<f64>)| Rates {
        sent: figure(guest, 0),
        received: (1..figures.len()).map(|at| figure(guest, at)).collect(),
    };
    guests.map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_pieces_counts() {
        let piece = |sent: f64, one: f64| vec![vec![sent, one, 0.0]];
        let all = [piece(1.0, 9.0), piece(8.0, 3.0), piece(3.0, 5.0)];
        let rates = medians(&all);
        let expected = Rates {
            sent: 3.0,
            received: vec![5.0, 0.0],
        };
        assert_eq!(rates, [expected]);
    }
}
