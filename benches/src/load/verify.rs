//! What a disk must hold: which write of each block was acknowledged last.
//!
//! A block has one request in flight at most, so that what a read must find is never open. First each
//! block is written once ([`Stage::Fill`]), at the end each is read once ([`Stage::Sweep`]): no
//! block's last write goes unread.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::AtomicU64;

use super::LoadError;
use super::error::QueueError;
use super::source::{Kind, Source, Span};
use super::stamp::Stamp;

/// What is being done with the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Write each block once, in order.
    Fill,
    /// As the command line says.
    Mixed,
    /// Read each block once, in order.
    Sweep,
}

/// What a block must hold.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// How often it was written; the last of these writes may be in flight.
    generation: u32,
    busy: bool,
}

/// The blocks of one queue.
#[derive(Debug)]
pub struct Verify {
    span: Span,
    block_bytes: u32,
    run: u64,
    blocks: Vec<Block>,
    next: u64,
    reads: u64,
}

impl Verify {
    /// For the blocks of `span`; `run` is the run's random number.
    ///
    /// # Errors
    /// [`LoadError::Options`] if there are too many to keep in mind.
    pub fn new(span: Span, block_bytes: u32, run: u64) -> Result<Self, LoadError> {
        let count = usize::try_from(span.blocks)
            .ok()
            .filter(|count| *count <= 1 << 28);
        let count = count.ok_or_else(|| {
            let blocks = span.blocks;
            LoadError::Options(format!(
                "--verify can't keep {blocks} blocks in mind: choose a smaller --span"
            ))
        })?;
        Ok(Self {
            span,
            block_bytes,
            run,
            blocks: vec![Block::default(); count],
            next: 0,
            reads: 0,
        })
    }

    /// Reads that were checked.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// Begins a stage.
    pub fn begin(&mut self) {
        self.next = 0;
    }

    /// The block of the next request of a stage, which is marked as busy; none if the stage is over.
    pub fn choose(&mut self, stage: Stage, source: &mut Source) -> Option<(u64, Kind)> {
        match stage {
            Stage::Fill => Some((self.in_order()?, Kind::Write)),
            Stage::Sweep => Some((self.in_order()?, Kind::Read)),
            Stage::Mixed => {
                let kind = source.kind();
                // Fewer requests than half of the blocks are in flight: most tries succeed.
                loop {
                    let block = source.block();
                    let entry = self.entry(block)?;
                    if !entry.busy {
                        entry.busy = true;
                        return Some((block, kind));
                    }
                }
            }
        }
    }

    fn in_order(&mut self) -> Option<u64> {
        let block = self.span.first + self.next;
        // A block that is still busy from the stage before waits for its answer.
        let entry = self.entry(block).filter(|entry| !entry.busy)?;
        entry.busy = true;
        self.next += 1;
        Some(block)
    }

    /// Whether a stage in order has come to its end.
    #[must_use]
    pub fn is_through(&self) -> bool {
        self.next >= self.span.blocks
    }

    fn entry(&mut self, block: u64) -> Option<&mut Block> {
        let at = usize::try_from(block.checked_sub(self.span.first)?).ok()?;
        self.blocks.get_mut(at)
    }

    fn stamp(&mut self, block: u64) -> Stamp {
        let generation = self.entry(block).map_or(0, |entry| entry.generation);
        Stamp {
            offset: block * u64::from(self.block_bytes),
            generation: u64::from(generation),
            run: self.run,
        }
    }

    /// Before a request goes out: what a write writes.
    pub fn prepare(&mut self, block: u64, kind: Kind, buffer: &[AtomicU64]) {
        if kind == Kind::Write {
            if let Some(entry) = self.entry(block) {
                entry.generation += 1;
            }
            self.stamp(block).fill(buffer);
        }
    }

    /// After it was answered with success: what a read has read.
    ///
    /// # Errors
    /// [`QueueError::Corrupt`].
    pub fn finish(
        &mut self,
        block: u64,
        kind: Kind,
        buffer: &[AtomicU64],
    ) -> Result<(), QueueError> {
        if let Some(entry) = self.entry(block) {
            entry.busy = false;
        }
        if kind == Kind::Write {
            return Ok(());
        }
        self.reads += 1;
        let stamp = self.stamp(block);
        let checked = stamp.check(buffer);
        checked.map_err(|(offset, found)| QueueError::Corrupt {
            offset,
            request: stamp.offset,
            bytes: self.block_bytes,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::source::{Mix, Pattern};

    const SPAN: Span = Span {
        first: 10,
        blocks: 4,
    };

    fn parts() -> (Verify, Source, Vec<AtomicU64>) {
        let verify = Verify::new(SPAN, 512, 99).expect("small");
        let source = Source::new(SPAN, Pattern::Random, Mix::READ, 1);
        (verify, source, (0..64).map(|_| AtomicU64::new(0)).collect())
    }

    #[test]
    fn a_busy_block_is_not_chosen() {
        let (mut verify, mut source, buffer) = parts();
        let mut chosen: Vec<u64> = (0..4)
            .filter_map(|_| verify.choose(Stage::Mixed, &mut source))
            .map(|(block, _)| block)
            .collect();
        chosen.sort_unstable();
        assert_eq!(chosen, [10, 11, 12, 13]);
        assert_eq!(
            verify.choose(Stage::Sweep, &mut source),
            None,
            "all are busy"
        );
        assert!(!verify.is_through());
        verify.prepare(12, Kind::Write, &buffer);
        verify.finish(12, Kind::Write, &buffer).expect("a write");
        let next = verify.choose(Stage::Mixed, &mut source);
        assert_eq!(next, Some((12, Kind::Read)), "the only one");
    }

    #[test]
    fn stages_in_order_touch_each_block_once() {
        let (mut verify, mut source, buffer) = parts();
        for (stage, kind) in [(Stage::Fill, Kind::Write), (Stage::Sweep, Kind::Read)] {
            verify.begin();
            for block in 10..14 {
                assert_eq!(verify.choose(stage, &mut source), Some((block, kind)));
                verify.prepare(block, kind, &buffer);
                verify
                    .finish(block, Kind::Write, &buffer)
                    .expect("not looked at");
            }
            assert_eq!(verify.choose(stage, &mut source), None);
            assert!(verify.is_through());
        }
    }

    #[test]
    fn a_lost_write_is_found() {
        let (mut verify, _, buffer) = parts();
        verify.prepare(11, Kind::Write, &buffer);
        verify.finish(11, Kind::Read, &buffer).expect("as written");
        // The second write goes elsewhere; the disk still has the first.
        let other: Vec<_> = (0..64).map(|_| AtomicU64::new(0)).collect();
        verify.prepare(11, Kind::Write, &other);
        verify
            .finish(11, Kind::Write, &other)
            .expect("acknowledged");
        let error = verify.finish(11, Kind::Read, &buffer).expect_err("lost");
        assert!(
            matches!(error, QueueError::Corrupt { offset: 5632, .. }),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("write 1 of it, acknowledged was write 2")
        );
        assert_eq!(verify.reads(), 2);
    }
}
