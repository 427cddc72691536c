//! Frames that are taken from a queue together: first all of their buffers, then all of their heads.
//!
//! Most drivers give each frame as one descriptor: a run of such is taken, and given back, as one. What comes in several
//! descriptors or in a table is taken chain by chain.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;

use super::MOST_FRAMES;
use super::transmit::{Asked, Sent};
use crate::net::Counts;
use crate::net::frame::HeadBuffer;
use crate::port::DropReason;
use crate::virtqueue::{Chain, Run, Virtqueue};

/// Bytes at the front of what is sent that are asked for as soon as they are known: the header, and what is looked at of
/// most frames.
const FIRST_BYTES: u32 = 128;

/// What was found out about a frame.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) head: HeadBuffer,
    /// It may go on.
    pub(super) goes: Cell<bool>,
}

impl Place {
    /// Whether the frame goes on; if not, that is counted.
    #[inline(always)]
    pub(super) fn settle(&self, step: Result<(), DropReason>, counts: &mut Counts) {
        self.goes.set(step.is_ok());
        if let Err(reason) = step {
            counts.dropped(reason);
        }
    }
}

/// How the frames of a turn were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    /// So many of the run.
    Run(usize),
    /// So many chains.
    Chains(usize),
}

/// What the frames of a turn are read from.
pub(super) enum Source<'a> {
    /// A run.
    Run(&'a Run),
    /// Chains, and their IDs.
    Chains(&'a [(u16, Chain)]),
}

/// Room for frames that are taken together.
#[derive(Debug)]
pub(super) struct Frames {
    run: Run,
    chains: Box<[(u16, Chain)]>,
    places: Box<[Place]>,
    taken: Taken,
}

impl Default for Frames {
    fn default() -> Self {
        let chain = |_| (0, Chain::with_capacity(32));
        let place = |_| Place::default();
        Self {
            run: Run::to_read(),
            chains: (0..MOST_FRAMES).map(chain).collect(),
            places: (0..MOST_FRAMES).map(place).collect(),
            taken: Taken::Run(0),
        }
    }
}

impl Frames {
    /// Takes what a queue has, as far as it may.
    #[inline]
    pub(super) fn take(&mut self, ring: &mut Virtqueue, asked: Asked) -> Sent {
        let count = ring.pop_run(&mut self.run, asked.frames.min(MOST_FRAMES));
        if count == 0 {
            return self.take_chains(ring, asked);
        }
        let mut sent = Sent::default();
        while sent.frames < count && sent.bytes < asked.bytes {
            let frame = self.run.get(sent.frames);
            frame.will_read(FIRST_BYTES as usize);
            sent.bytes += frame.bytes() as u64;
            sent.frames += 1;
        }
        self.taken = Taken::Run(sent.frames);
        sent
    }

    /// Takes chains one by one.
    #[inline(never)]
    fn take_chains(&mut self, ring: &mut Virtqueue, asked: Asked) -> Sent {
        let mut sent = Sent::default();
        for (id, chain) in self.chains.iter_mut().take(asked.frames) {
            match ring.pop(chain) {
                Ok(Some(head)) => *id = head,
                Ok(None) => break,
                Err(error) => {
                    sent.broken = Some(error);
                    break;
                }
            }
            chain.readable.announce_front(FIRST_BYTES);
            sent.frames += 1;
            sent.bytes += chain.readable.bytes();
            if sent.bytes >= asked.bytes {
                break;
            }
        }
        self.taken = Taken::Chains(sent.frames);
        sent
    }

    /// What was taken, and a place for each.
    #[inline(always)]
    pub(super) fn taken(&mut self) -> (Source<'_>, &mut [Place]) {
        let (source, count) = match self.taken {
            Taken::Run(count) => (Source::Run(&self.run), count),
            Taken::Chains(count) => {
                let chains = self.chains.get(..count).unwrap_or_default();
                (Source::Chains(chains), count)
            }
        };
        (source, self.places.get_mut(..count).unwrap_or_default())
    }

    /// Gives back all that was taken.
    #[inline]
    pub(super) fn give_back(&mut self, ring: &mut Virtqueue) {
        match self.taken {
            Taken::Run(count) => {
                ring.push_read(&mut self.run, count);
                if self.run.out() > 0 {
                    ring.unpop_run(&mut self.run);
                }
            }
            Taken::Chains(count) => {
                for (id, _) in self.chains.iter().take(count) {
                    ring.push_used(*id, 0);
                }
            }
        }
        self.taken = Taken::Run(0);
    }

    /// Lets go of guest memory.
    pub(super) fn release(&mut self) {
        self.run.release();
        for (_, chain) in &mut self.chains {
            chain.release();
        }
    }
}
