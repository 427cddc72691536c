//! Large TCP segments from guest to guest through the switch, whole: beside a copy of as many bytes between as much
//! memory, on the CPU that serves. One copy is what the way takes at least; neither side's payload is looked at.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::peers;
use super::rings::{Rings, mac};
use crate::block::alone::memory;
use crate::block::bench::Bench;
use crate::block::side::Side;
use crate::block::{BlockError, rounds, thread};
use crate::figures::row::{Row, Unit};
use crate::load::LoadError;
use crate::serve::cpus;
use crate::traffic::card::Wanted;
use crate::traffic::frame::Kind;
use crate::traffic::run::{Guest, Plan, run};
use crate::traffic::sender::Sending;

/// Bytes of the longest IP packet in an Ethernet frame.
const BYTES: u32 = 65_535 + 14;
/// Entries of each ring: a segment takes 17 of them.
const ENTRIES: u16 = 1024;
/// What is wanted of the copy's speed.
const TARGET: f64 = 0.8;
/// Memory that the frames of a ring lie in, about; buffers take as much.
const MEMORY_BYTES: usize = 4 << 20;

/// Measures both ring formats.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mergeable = Rings::all(bench.quick);
    let rings = mergeable.into_iter().filter(|rings| rings.mergeable);
    rings.map(|rings| case(bench, rings)).collect()
}

fn case(bench: &Bench, rings: Rings) -> Result<Row, BlockError> {
    eprintln!("segments, {} ..", rings.name());
    let ports = [0, 1].map(|number| format!("switch:lan,mac={}", mac(number)));
    let ours = peers::ours(bench, "ours", &ports)?;
    let wanted = Wanted {
        packed: rings.packed,
        mergeable: true,
        segments: true,
    };
    let frame = Kind::Segment(BYTES);
    let guests = guests(&ours.sockets, &[Some((1, frame)), None]);
    let plan = plan(bench, guests, wanted, (ENTRIES, frame));
    let switch = Side::new(|| {
        let rates = drive(&plan)?;
        let received = rates.get(1).and_then(|guest| guest.received.first());
        Ok(1e9 / received.copied().unwrap_or(f64::NAN))
    });
    let rounds = rounds::take(bench, &mut [switch, copy(bench)?])?;
    let at = |round: &[f64], side: usize| round.get(side).copied().unwrap_or(f64::NAN);
    let rate = |side| f64::from(BYTES) / rounds.median(|round| at(round, side));
    Ok(Row {
        case: format!("segments, 64 KiB through the switch, {}", rings.name()),
        unit: Unit::GigabytesPerSecond,
        ours: rate(0),
        peer: "a copy alone".into(),
        theirs: rate(1),
        ratio: rounds.median(|round| at(round, 1) / at(round, 0)),
        target: Some(TARGET),
        placement: rounds.placement,
        point: None,
    })
}

/// A guest at each socket, with the MAC of its number; those that send have a frame and the receiver's number. Who does
/// not send receives.
pub(super) fn guests(sockets: &[PathBuf], sending: &[Option<(u16, Kind)>]) -> Vec<Guest> {
    let mut guests = Vec::new();
    for ((socket, sending), number) in sockets.iter().zip(sending).zip(0..) {
        guests.push(Guest {
            socket: socket.clone(),
            sending: sending.map(|(to, frame)| Sending {
                sender: number,
                from: address(u16::from(number)),
                to: address(to),
                frame,
            }),
            receives: sending.is_none(),
        });
    }
    guests
}

/// Number of everybody, as a receiver.
pub(super) const EVERYBODY: u16 = u16::MAX;

/// The bytes of [`mac`].
fn address(number: u16) -> [u8; 6] {
    if number == EVERYBODY {
        return [0xff; 6];
    }
    let [high, low] = number.to_be_bytes();
    [0x02, 0xbb, 0, 0, high, low]
}

/// Guests for a turn.
pub(super) fn plan(
    bench: &Bench,
    guests: Vec<Guest>,
    wanted: Wanted,
    (entries, frame): (u16, Kind),
) -> Plan {
    Plan {
        guests,
        wanted,
        entries,
        frame,
        cpu: bench.driver_cpu,
        warm_up: bench.pace.warm_up,
        measure: bench.pace.sample,
    }
}

/// A turn of guests.
pub(super) fn drive(plan: &Plan) -> Result<Vec<crate::traffic::run::Rates>, BlockError> {
    run(plan).map_err(|source: LoadError| BlockError::Load {
        case: "guests on a switch".to_owned(),
        source: Box::new(source),
    })
}

/// A copy of a segment's bytes, from one memory to another.
fn copy(bench: &Bench) -> Result<Side<'_>, BlockError> {
    let mut copy = Copy {
        from: memory(MEMORY_BYTES)?,
        to: memory(MEMORY_BYTES)?,
        next: 0,
    };
    Ok(Side::new(move || {
        std::thread::scope(|scope| {
            let copy = &mut copy;
            let alone = scope.spawn(move || {
                cpus::pin(&[bench.worker_cpu]).map_err(|e| BlockError::Program {
                    what: "binding a thread to its CPU".to_owned(),
                    source: std::io::Error::other(e),
                })?;
                copy.run(bench.pace.warm_up / 4);
                Ok(copy.run(bench.pace.sample / 3))
            });
            thread::joined(alone)
        })
    }))
}

struct Copy {
    from: MmapMut,
    to: MmapMut,
    next: usize,
}

impl Copy {
    /// Nanoseconds for a segment, over this time.
    fn run(&mut self, time: Duration) -> f64 {
        let start = Instant::now();
        let mut count = 0u32;
        loop {
            for _ in 0..8 {
                self.one();
            }
            count += 8;
            let elapsed = start.elapsed();
            if elapsed >= time {
                return elapsed.as_secs_f64() * 1e9 / f64::from(count);
            }
        }
    }

    fn one(&mut self) {
        let bytes = BYTES as usize;
        if self.next + bytes > self.from.len() {
            self.next = 0;
        }
        let range = self.next..self.next + bytes;
        self.next += bytes;
        if let (Some(to), Some(from)) = (self.to.get_mut(range.clone()), self.from.get(range)) {
            to.copy_from_slice(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_goes_over_all_of_the_memory() {
        let mut copy = Copy {
            from: memory(MEMORY_BYTES).expect("memory"),
            to: memory(MEMORY_BYTES).expect("memory"),
            next: 0,
        };
        copy.from.fill(1);
        for _ in 0..MEMORY_BYTES / BYTES as usize {
            copy.one();
        }
        let copied = copy.to.iter().filter(|byte| **byte == 1).count();
        assert!(copied > MEMORY_BYTES - BYTES as usize, "{copied}");
    }

    #[test]
    fn guests_have_the_addresses_that_their_cards_have() {
        assert_eq!(mac(0x0102), "02:bb:00:00:01:02");
        assert_eq!(address(0x0102), [0x02, 0xbb, 0, 0, 1, 2]);
    }
}
