//! What verified sectors hold: every 512 bytes say which sector they are of, which write of it they
//! are from, and which run wrote them.
//!
//! | 64-bit word | |
//! | --- | --- |
//! | 0 | offset on the volume in bytes |
//! | 1 | generation: how many times this run has written the sector |
//! | 2 | number of the run, random |
//! | 3 to 63 | a mixture of these three and the word's place |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Bytes that have a stamp.
pub const SECTOR_BYTES: u64 = 512;
/// Words of a sector.
pub const SECTOR_WORDS: usize = 64;

/// What a sector should say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes from the volume's start.
    pub offset: u64,
    /// Of the write.
    pub generation: u64,
    /// Of the run.
    pub run: u64,
}

/// What a sector says instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// A sound sector of this run, of another place or time.
    Other {
        /// What it should be.
        expected: Stamp,
        /// What it is.
        found: Stamp,
    },
    /// Not what this run has written.
    Foreign {
        /// What it should be.
        expected: Stamp,
        /// Its first word.
        first_word: u64,
    },
    /// The stamp is right and what follows is not.
    Torn {
        /// What it should be.
        expected: Stamp,
        /// The first byte that is wrong, within the sector.
        at: usize,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other { expected, found } if expected.offset != found.offset => write!(
                f,
                "it holds what was written to offset {} (its write {}), a write went astray",
                found.offset, found.generation
            ),
            Self::Other { expected, found } => write!(
                f,
                "it holds write {} of it, acknowledged was write {}: a write was lost or put off",
                found.generation, expected.generation
            ),
            Self::Foreign { first_word, .. } => write!(
                f,
                "it holds nothing that this run has written (first word {first_word:#018x})"
            ),
            Self::Torn { at, .. } => write!(f, "the stamp is right, byte {at} after it is not"),
        }
    }
}

impl Stamp {
    /// The word at a place of the sector.
    fn word(&self, place: usize) -> u64 {
        match place {
            0 => self.offset,
            1 => self.generation,
            2 => self.run,
            _ => {
                self.mixture()
                    .wrapping_mul(2 * place as u64 + 1)
                    .rotate_left(29)
                    ^ self.run
            }
        }
    }

    fn mixture(&self) -> u64 {
        let both = self.offset ^ self.generation.rotate_left(40);
        (both ^ self.run).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    /// Stamps all sectors of a buffer, whose first one lies at this stamp's offset.
    pub fn fill(mut self, buffer: &[AtomicU64]) {
        for sector in buffer.chunks(SECTOR_WORDS) {
            for (place, word) in sector.iter().enumerate() {
                word.store(self.word(place), Relaxed);
            }
            self.offset += SECTOR_BYTES;
        }
    }

    /// Checks all sectors of a buffer: offset on the volume of the first that is wrong, and what is
    /// wrong with it.
    ///
    /// # Errors
    /// That.
    pub fn check(mut self, buffer: &[AtomicU64]) -> Result<(), (u64, Mismatch)> {
        for sector in buffer.chunks(SECTOR_WORDS) {
            let wrong = |(place, word): (usize, &AtomicU64)| word.load(Relaxed) != self.word(place);
            if let Some(place) = sector.iter().enumerate().position(wrong) {
                return Err((self.offset, self.explain(sector, place)));
            }
            self.offset += SECTOR_BYTES;
        }
        Ok(())
    }

    fn explain(&self, sector: &[AtomicU64], place: usize) -> Mismatch {
        let word = |at: usize| sector.get(at).map_or(0, |word| word.load(Relaxed));
        let expected = *self;
        if place > 2 {
            return Mismatch::Torn {
                expected,
                at: place * 8,
            };
        }
        let found = Self {
            offset: word(0),
            generation: word(1),
            run: word(2),
        };
        if found.run == self.run && found != expected && word(3) == found.word(3) {
            Mismatch::Other { expected, found }
        } else {
            Mismatch::Foreign {
                expected,
                first_word: word(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        offset: 8192,
        generation: 3,
        run: 0x1234_5678_9abc_def0,
    };

    fn sectors(count: usize) -> Vec<AtomicU64> {
        (0..count * SECTOR_WORDS)
            .map(|_| AtomicU64::new(0))
            .collect()
    }

    #[test]
    fn what_was_stamped_passes() {
        let buffer = sectors(8);
        STAMP.fill(&buffer);
        assert_eq!(STAMP.check(&buffer), Ok(()));
        assert_eq!(buffer[SECTOR_WORDS].load(Relaxed), 8192 + 512);
    }

    #[test]
    fn each_word_counts() {
        let buffer = sectors(2);
        STAMP.fill(&buffer);
        for (at, word) in buffer.iter().enumerate() {
            let right = word.fetch_xor(1 << 17, Relaxed);
            let (offset, _) = STAMP.check(&buffer).expect_err("one bit is wrong");
            assert_eq!(offset, 8192 + 512 * (at / SECTOR_WORDS) as u64, "{at}");
            word.store(right, Relaxed);
        }
        assert_eq!(STAMP.check(&buffer), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let buffer = sectors(1);
        let said = |stamp: Stamp| {
            let (offset, found) = stamp.check(&buffer).expect_err("not that");
            assert_eq!(offset, stamp.offset);
            found.to_string()
        };
        assert!(
            said(STAMP).contains("nothing that this run"),
            "never written"
        );
        STAMP.fill(&buffer);
        let (other, later, run) = (
            Stamp {
                offset: 512,
                ..STAMP
            },
            Stamp {
                generation: 4,
                ..STAMP
            },
            Stamp { run: 5, ..STAMP },
        );
        assert!(said(other).contains("written to offset 8192 (its write 3)"));
        assert!(said(later).contains("write 3 of it, acknowledged was write 4"));
        assert!(said(run).contains("nothing that this run"));
        buffer[40].fetch_xor(1, Relaxed);
        assert!(said(STAMP).contains("byte 320"));
    }

    #[test]
    fn words_differ_between_sectors_writes_and_places() {
        let later = Stamp {
            generation: 4,
            ..STAMP
        };
        let next = Stamp {
            offset: 8704,
            ..STAMP
        };
        let mut words: Vec<u64> = [STAMP, later, next]
            .iter()
            .flat_map(|stamp| (3..SECTOR_WORDS).map(|place| stamp.word(place)))
            .collect();
        let all = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), all);
    }
}
