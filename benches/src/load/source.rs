//! Which request comes next: where, and whether it reads.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::str::FromStr;

use bulkhead_integration::random::Random;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// How many of a hundred requests read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mix(u8);

impl Mix {
    /// Only reads.
    pub const READ: Self = Self(100);

    /// Only writes.
    pub const WRITE: Self = Self(0);

    /// Percentage of reads.
    #[must_use]
    pub fn read_percent(self) -> u8 {
        self.0
    }

    /// Whether there are writes.
    #[must_use]
    pub fn writes(self) -> bool {
        self.0 < 100
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "read" => Ok(Self(100)),
            "write" => Ok(Self(0)),
            number => number
                .parse()
                .ok()
                .filter(|percent| *percent <= 100)
                .map(Self)
                .ok_or_else(|| {
                    format!("{text:?} is not a mix: write read, write, or the percentage of reads from 0 to 100")
                }),
        }
    }
}

/// In which order blocks come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Anywhere, each block as likely as another.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
}

/// Consecutive blocks of a disk; a block is as long as a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

impl Span {
    /// The part that falls to number `index` of `parts`.
    #[must_use]
    pub fn part(self, index: u64, parts: u64) -> Self {
        let each = self.blocks / parts.max(1);
        Self {
            first: self.first + each * index,
            blocks: each,
        }
    }
}

/// Chooses requests; never ends.
#[derive(Debug)]
pub struct Source {
    random: Random,
    span: Span,
    next: u64,
    pattern: Pattern,
    mix: Mix,
}

impl Source {
    /// Chooses among the blocks of `span`, of which there must be one.
    #[must_use]
    pub fn new(span: Span, pattern: Pattern, mix: Mix, seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            span,
            next: 0,
            pattern,
            mix,
        }
    }

    /// A number below `limit`, each as likely but for one in 2^64 / `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        let product = u128::from(self.random.next_u64()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// The block of the next request.
    pub fn block(&mut self) -> u64 {
        let at = match self.pattern {
            Pattern::Random => self.below(self.span.blocks),
            Pattern::Sequential => {
                let at = self.next;
                self.next = if at + 1 < self.span.blocks { at + 1 } else { 0 };
                at
            }
        };
        self.span.first + at
    }

    /// What the next request does.
    pub fn kind(&mut self) -> Kind {
        let reads = match self.mix.read_percent() {
            100 => true,
            0 => false,
            percent => self.below(100) < u64::from(percent),
        };
        if reads { Kind::Read } else { Kind::Write }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(pattern: Pattern, mix: &str) -> Source {
        let span = Span {
            first: 100,
            blocks: 7,
        };
        Source::new(span, pattern, mix.parse().expect("a mix"), 42)
    }

    #[test]
    fn mixes() {
        for (text, percent) in [
            ("read", 100),
            ("write", 0),
            ("0", 0),
            ("70", 70),
            ("100", 100),
        ] {
            assert_eq!(text.parse(), Ok(Mix(percent)), "{text}");
        }
        for bad in ["", "101", "-1", "50%", "reads", "256"] {
            let error = bad.parse::<Mix>().expect_err(bad);
            assert!(error.contains("percentage of reads"), "{error}");
        }
    }

    #[test]
    fn sequential_blocks_start_again_at_the_end() {
        let mut source = source(Pattern::Sequential, "read");
        let blocks: Vec<u64> = (0..9).map(|_| source.block()).collect();
        assert_eq!(blocks, [100, 101, 102, 103, 104, 105, 106, 100, 101]);
    }

    #[test]
    fn random_blocks_reach_all_and_nothing_else() {
        let mut source = source(Pattern::Random, "read");
        let mut seen = [0u32; 7];
        for _ in 0..7000 {
            seen[usize::try_from(source.block() - 100).expect("small")] += 1;
        }
        assert!(seen.iter().all(|n| (700..1300).contains(n)), "{seen:?}");
    }

    #[test]
    fn a_mix_has_its_share_of_reads() {
        for (mix, expected) in [("read", 1000..=1000), ("write", 0..=0), ("70", 640..=760)] {
            let mut source = source(Pattern::Random, mix);
            let reads = (0..1000).filter(|_| source.kind() == Kind::Read).count();
            assert!(expected.contains(&reads), "{mix}: {reads}");
        }
    }

    #[test]
    fn parts_of_a_span_do_not_overlap() {
        let whole = Span {
            first: 0,
            blocks: 10,
        };
        let parts: Vec<Span> = (0..3).map(|i| whole.part(i, 3)).collect();
        for (i, part) in parts.iter().enumerate() {
            assert_eq!((part.first, part.blocks), (3 * i as u64, 3));
        }
    }
}
