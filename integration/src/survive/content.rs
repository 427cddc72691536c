//! What a sector of a verified disk holds: 512 bytes that say which sector they are of and which write
//! put them there, so that no two sectors and no two writes have the same.
//!
//! | 64-bit word | |
//! | --- | --- |
//! | 0 | number of the run and of the disk |
//! | 1 | sector |
//! | 2 | number of the write, counted on its disk |
//! | 3 to 63 | a mixture of these and the word's place |

use std::fmt;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Which write of which sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Of the run and the disk: another one for each disk of each run.
    pub owner: u64,
    /// Number of the sector.
    pub sector: u64,
    /// Number of the write.
    pub write: u32,
}

/// What a sector holds instead of what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// An earlier write of it: the acknowledged one is lost, or something old came over it.
    Stale {
        /// Number of that write.
        found: u32,
    },
    /// A write that was never acknowledged as its last one.
    Later {
        /// Number of that write.
        found: u32,
    },
    /// A write of another sector.
    Astray {
        /// Which.
        sector: u64,
    },
    /// Zeroes.
    Zeroes,
    /// The stamp of one write, and behind it something else.
    Torn {
        /// First byte that is wrong, in the sector.
        at: usize,
    },
    /// Nothing that this disk was ever written.
    Foreign,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { found } => {
                write!(f, "write {found}, older: the acknowledged one is lost")
            }
            Self::Later { found } => write!(f, "write {found}, which is not its last one"),
            Self::Astray { sector } => write!(f, "what was written to sector {sector}"),
            Self::Zeroes => write!(f, "zeroes"),
            Self::Torn { at } => write!(f, "its stamp, and from byte {at} on something else"),
            Self::Foreign => write!(f, "nothing that was ever written to this disk"),
        }
    }
}

fn word(bytes: &[u8], place: usize) -> u64 {
    let bytes = bytes.get(place * 8..place * 8 + 8);
    bytes
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

impl Stamp {
    fn mixture(&self) -> u64 {
        let both = self.sector ^ u64::from(self.write).rotate_left(37) ^ self.owner;
        both.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    fn word(&self, place: usize) -> u64 {
        match place {
            0 => self.owner,
            1 => self.sector,
            2 => u64::from(self.write),
            _ => self
                .mixture()
                .wrapping_mul(2 * place as u64 + 1)
                .rotate_left(23),
        }
    }

    /// Fills one sector.
    pub fn fill(&self, sector: &mut [u8]) {
        for (place, word) in sector.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(place).to_le_bytes());
        }
    }

    /// Looks at one sector.
    ///
    /// # Errors
    /// What it holds instead.
    pub fn check(&self, sector: &[u8]) -> Result<(), Mismatch> {
        let wrong = (0..SECTOR / 8).find(|place| word(sector, *place) != self.word(*place));
        match wrong {
            None => Ok(()),
            Some(place) if place > 2 => Err(Mismatch::Torn { at: place * 8 }),
            Some(_) => Err(self.explain(sector)),
        }
    }

    fn explain(&self, bytes: &[u8]) -> Mismatch {
        if bytes.iter().all(|byte| *byte == 0) {
            return Mismatch::Zeroes;
        }
        let (owner, sector) = (word(bytes, 0), word(bytes, 1));
        let Ok(write) = u32::try_from(word(bytes, 2)) else {
            return Mismatch::Foreign;
        };
        let found = Self {
            owner,
            sector,
            write,
        };
        if owner != self.owner {
            return Mismatch::Foreign;
        }
        if let Some(place) = (3..SECTOR / 8).find(|p| word(bytes, *p) != found.word(*p)) {
            return Mismatch::Torn { at: place * 8 };
        }
        if sector != self.sector {
            return Mismatch::Astray { sector };
        }
        if write < self.write {
            Mismatch::Stale { found: write }
        } else {
            Mismatch::Later { found: write }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        owner: 0x1234_5678_9abc,
        sector: 77,
        write: 5,
    };

    fn filled(stamp: Stamp) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        stamp.fill(&mut bytes);
        bytes
    }

    #[test]
    fn each_bit_counts() {
        let mut bytes = filled(STAMP);
        assert_eq!(STAMP.check(&bytes), Ok(()));
        for at in 0..SECTOR {
            bytes[at] ^= 0x10;
            assert!(STAMP.check(&bytes).is_err(), "byte {at}");
            bytes[at] ^= 0x10;
        }
    }

    #[test]
    fn what_is_there_instead_is_named() {
        let named = |stamp: Stamp| STAMP.check(&filled(stamp));
        let stamp = STAMP;
        assert_eq!(
            named(Stamp { write: 4, ..stamp }),
            Err(Mismatch::Stale { found: 4 })
        );
        assert_eq!(
            named(Stamp { write: 6, ..stamp }),
            Err(Mismatch::Later { found: 6 })
        );
        let astray = Stamp { sector: 3, ..stamp };
        assert_eq!(named(astray), Err(Mismatch::Astray { sector: 3 }));
        assert_eq!(named(Stamp { owner: 1, ..stamp }), Err(Mismatch::Foreign));
        assert_eq!(STAMP.check(&[0; SECTOR]), Err(Mismatch::Zeroes));
        let mut torn = filled(STAMP);
        torn[256..].copy_from_slice(&filled(Stamp { write: 4, ..stamp })[256..]);
        assert_eq!(STAMP.check(&torn), Err(Mismatch::Torn { at: 256 }));
    }
}
