//! The acknowledged set: which write of each sector of a disk its device has acknowledged last.
//!
//! A sector has one request under way at most, so what a read must find there is never open, however
//! often the device died in between: a write that was under way ends once, in one life or another, and
//! is the last one from then on.

use std::collections::VecDeque;

use super::content::{Mismatch, SECTOR, Stamp};
use crate::random::Random;

/// Writes that are remembered, to be done again.
const MOST_WRITTEN: usize = 64;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads, and compares.
    Read,
    /// Writes stamps.
    Write,
    /// Writes zeroes.
    Zeroes,
    /// Flushes.
    Flush,
}

/// A request for some sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// What it does.
    pub kind: Kind,
    /// First sector.
    pub first: u64,
    /// How many; none of a flush.
    pub sectors: u32,
    /// Number of the write, of one that writes.
    pub write: u32,
}

impl Work {
    /// A flush.
    pub const FLUSH: Self = Self {
        kind: Kind::Flush,
        first: 0,
        sectors: 0,
        write: 0,
    };

    /// Its bytes of data.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.sectors as usize * SECTOR
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// Never written by this run.
    Unknown,
    Zeroes,
    Write(u32),
}

#[derive(Debug, Clone, Copy)]
struct Sector {
    holds: Holds,
    busy: bool,
}

/// A sector that does not hold what was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sector {sector} should hold {expected}, and holds {found}")]
pub struct Wrong {
    /// Which.
    pub sector: u64,
    /// The acknowledged write; none: zeroes.
    pub expected: Expected,
    /// What it holds.
    pub found: Mismatch,
}

/// What was acknowledged last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Zeroes.
    Zeroes,
    /// A write.
    Write(u32),
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zeroes => write!(f, "zeroes"),
            Self::Write(number) => write!(f, "write {number}"),
        }
    }
}

/// The acknowledged set of a disk.
#[derive(Debug)]
pub struct Journal {
    owner: u64,
    /// Sectors of a logical block, of which requests have whole ones.
    block: u64,
    sectors: Vec<Sector>,
    /// Number of the last write.
    writes: u32,
    /// Where a pass in order goes on.
    next: u64,
    /// What was written last: first sectors, and how many.
    written: VecDeque<(u64, u32)>,
}

impl Journal {
    /// Of a disk of so many sectors, in logical blocks of `block` sectors. `owner` is the disk's and run's own
    /// number ([`Stamp::owner`]).
    #[must_use]
    pub fn new(owner: u64, sectors: u64, block: u64) -> Self {
        let fresh = Sector {
            holds: Holds::Unknown,
            busy: false,
        };
        let block = block.max(1);
        let whole = sectors / block * block;
        Self {
            owner,
            block,
            sectors: vec![fresh; usize::try_from(whole).unwrap_or(0)],
            writes: 0,
            next: 0,
            written: VecDeque::new(),
        }
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Whether the disk has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Begins a pass over all sectors in order.
    pub fn rewind(&mut self) {
        self.next = 0;
    }

    /// The next part of a pass, of at most `most` sectors; none at its end, or while something is under way there.
    pub fn in_order(&mut self, kind: Kind, most: u32) -> Option<Work> {
        let left = self.len() - self.next;
        let count = left.min(u64::from(most) / self.block * self.block);
        let work = self.take(kind, self.next, u32::try_from(count).ok()?)?;
        self.next += count;
        Some(work)
    }

    /// Whether a pass has come to its end.
    #[must_use]
    pub fn is_through(&self) -> bool {
        self.next >= self.len()
    }

    /// A request for some sectors of which none is busy, at most `most`; none if there was none in a few tries.
    pub fn anywhere(&mut self, kind: Kind, most: u32, random: &mut Random) -> Option<Work> {
        let block = self.block;
        let blocks = self.len() / block;
        for _ in 0..8 {
            let longest = u64::from(most) / block;
            let count = (1 + random.below(longest.max(1))).min(blocks.max(1));
            let first = random.below(blocks.saturating_sub(count) + 1);
            let sectors = u32::try_from(count * block).unwrap_or(0);
            if let Some(work) = self.take(kind, first * block, sectors) {
                return Some(work);
            }
        }
        None
    }

    /// A write of what was written just before; none if there was nothing, or something is under way there.
    pub fn again(&mut self) -> Option<Work> {
        let (first, sectors) = self.written.pop_front()?;
        self.take(Kind::Write, first, sectors)
    }

    fn span(&mut self, first: u64, count: u32) -> Option<&mut [Sector]> {
        let first = usize::try_from(first).ok()?;
        self.sectors.get_mut(first..first + count as usize)
    }

    fn take(&mut self, kind: Kind, first: u64, count: u32) -> Option<Work> {
        let span = self.span(first, count).filter(|span| !span.is_empty())?;
        if span.iter().any(|sector| sector.busy) {
            return None;
        }
        span.iter_mut().for_each(|sector| sector.busy = true);
        if matches!(kind, Kind::Write | Kind::Zeroes) {
            self.writes += 1;
        }
        Some(Work {
            kind,
            first,
            sectors: count,
            write: self.writes,
        })
    }

    /// What a write writes.
    #[must_use]
    pub fn data(&self, work: &Work) -> Vec<u8> {
        let mut bytes = vec![0; work.bytes()];
        for (sector, at) in bytes.chunks_exact_mut(SECTOR).zip(work.first..) {
            self.stamp(at, work.write).fill(sector);
        }
        bytes
    }

    fn stamp(&self, sector: u64, write: u32) -> Stamp {
        Stamp {
            owner: self.owner,
            sector,
            write,
        }
    }

    /// A request was acknowledged; `data` is what a read brought.
    ///
    /// # Errors
    /// [`Wrong`], if it read something that was not acknowledged there.
    pub fn acknowledged(&mut self, work: &Work, data: &[u8]) -> Result<(), Wrong> {
        let holds = match work.kind {
            Kind::Write => Some(Holds::Write(work.write)),
            Kind::Zeroes => Some(Holds::Zeroes),
            Kind::Read | Kind::Flush => None,
        };
        for sector in self.span(work.first, work.sectors).unwrap_or_default() {
            sector.busy = false;
            sector.holds = holds.unwrap_or(sector.holds);
        }
        if work.kind == Kind::Write {
            self.written.truncate(MOST_WRITTEN - 1);
            self.written.push_front((work.first, work.sectors));
        }
        if work.kind != Kind::Read {
            return Ok(());
        }
        for (bytes, at) in data.chunks_exact(SECTOR).zip(work.first..) {
            self.check(at, bytes)?;
        }
        Ok(())
    }

    fn check(&self, sector: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let index = usize::try_from(sector).unwrap_or(usize::MAX);
        let holds = self.sectors.get(index).map(|sector| sector.holds);
        let (expected, checked) = match holds {
            None | Some(Holds::Unknown) => return Ok(()),
            Some(Holds::Write(number)) => (
                Expected::Write(number),
                self.stamp(sector, number).check(bytes),
            ),
            Some(Holds::Zeroes) if bytes.iter().all(|byte| *byte == 0) => return Ok(()),
            // Any stamp there is of a write before.
            Some(Holds::Zeroes) => (Expected::Zeroes, self.stamp(sector, u32::MAX).check(bytes)),
        };
        checked.map_err(|found| Wrong {
            sector,
            expected,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> (Journal, Vec<u8>) {
        let mut journal = Journal::new(9, 32, 8);
        let mut disk = Vec::new();
        while let Some(work) = journal.in_order(Kind::Write, 17) {
            disk.extend(journal.data(&work));
            journal.acknowledged(&work, &[]).expect("a write");
        }
        assert!(journal.is_through());
        assert_eq!(disk.len(), 32 * SECTOR);
        (journal, disk)
    }

    fn read(journal: &mut Journal, disk: &[u8]) -> Result<(), Wrong> {
        journal.rewind();
        let work = journal.in_order(Kind::Read, 32).expect("nothing is busy");
        journal.acknowledged(&work, disk)
    }

    #[test]
    fn what_was_acknowledged_is_there() {
        let (mut journal, disk) = filled();
        read(&mut journal, &disk).expect("all of it");
    }

    #[test]
    fn a_lost_write_is_found() {
        let (mut journal, disk) = filled();
        let work = journal.take(Kind::Write, 8, 8).expect("free");
        journal.acknowledged(&work, &[]).expect("a write");
        let wrong = read(&mut journal, &disk).expect_err("it never came");
        let expected = Wrong {
            sector: 8,
            expected: Expected::Write(work.write),
            found: Mismatch::Stale { found: 1 },
        };
        assert_eq!(wrong, expected);
    }

    #[test]
    fn what_was_written_is_written_again() {
        let (mut journal, _) = filled();
        let again = journal.again().expect("the last one");
        assert_eq!(
            (again.kind, again.first, again.sectors),
            (Kind::Write, 16, 16)
        );
        let next = journal.again().expect("the one before");
        assert_eq!((next.first, next.sectors), (0, 16));
        assert_eq!(journal.again(), None);
    }

    #[test]
    fn zeroes_are_acknowledged_too() {
        let (mut journal, mut disk) = filled();
        let work = journal.take(Kind::Zeroes, 16, 8).expect("free");
        journal.acknowledged(&work, &[]).expect("a write");
        let wrong = read(&mut journal, &disk).expect_err("they never came");
        assert_eq!((wrong.sector, wrong.expected), (16, Expected::Zeroes));
        assert!(matches!(wrong.found, Mismatch::Stale { .. }));
        disk[16 * SECTOR..24 * SECTOR].fill(0);
        read(&mut journal, &disk).expect("now they did");
        disk[8 * SECTOR..9 * SECTOR].fill(0);
        let wrong = read(&mut journal, &disk).expect_err("these are too many");
        assert_eq!((wrong.sector, wrong.found), (8, Mismatch::Zeroes));
    }

    #[test]
    fn a_sector_has_one_request_at_most() {
        let mut journal = Journal::new(1, 64, 8);
        let mut random = Random::new(3);
        let mut taken = Vec::new();
        for _ in 0..100 {
            taken.extend(journal.anywhere(Kind::Write, 16, &mut random));
        }
        let mut sectors: Vec<u64> = taken
            .iter()
            .flat_map(|work| work.first..work.first + u64::from(work.sectors))
            .collect();
        let all = sectors.len();
        sectors.sort_unstable();
        sectors.dedup();
        assert_eq!(sectors.len(), all);
        assert!(all >= 48, "{all} of 64 sectors");
        assert!(
            taken
                .iter()
                .all(|work| work.first % 8 == 0 && work.sectors % 8 == 0)
        );
        for work in &taken {
            journal.acknowledged(work, &[]).expect("a write");
        }
        assert!(
            journal.take(Kind::Read, 0, 64).is_some(),
            "all are free again"
        );
    }
}
