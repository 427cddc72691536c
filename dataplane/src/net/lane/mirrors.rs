//! Mirrors of the cards on a worker: opened with a card's first queue, and ended when the card has none here any more or
//! is not to be mirrored any longer. What was recorded until then is still written.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use crate::log_limit::LogLimit;
use crate::net::frame::Frame;
use crate::port::mirror::pcapng::Direction;
use crate::port::mirror::{Mirror, MirrorFile};
use crate::port::{Nic, Tokens};
use crate::worker::ring::{Completion, Ring};

/// In the upper half of a token: it is a mirror's, and not a port's.
const MIRROR: u64 = 1 << 23;

/// A mirror that is open.
#[derive(Debug)]
struct Open {
    file: Arc<MirrorFile>,
    mirror: Mirror,
    tokens: Tokens,
}

/// The mirrors of a worker.
#[derive(Debug)]
pub(super) struct Mirrors {
    /// By the numbers of their cards.
    open: Vec<Option<Open>>,
    /// How many of them there are.
    count: usize,
    /// Those that have ended and still write.
    closing: Vec<Open>,
    /// Upper bits of their tokens, and the number of the last.
    tokens: u64,
    last: u64,
}

impl Mirrors {
    /// None. `tokens`: upper bits of the tokens of everything that cards have in the ring.
    pub(super) fn new(tokens: u64) -> Self {
        Self {
            open: Vec::new(),
            count: 0,
            closing: Vec::new(),
            tokens,
            last: 0,
        }
    }

    /// Whether there is one.
    #[inline]
    pub(super) fn any(&self) -> bool {
        self.count > 0
    }

    /// Records a frame that a card's guest sent or received, if the card is mirrored.
    #[inline]
    pub(super) fn record(&mut self, card: Nic, direction: Direction, frame: &Frame<'_>) {
        if self.count > 0 {
            self.record_of(card, direction, frame);
        }
    }

    #[inline(never)]
    fn record_of(&mut self, card: Nic, direction: Direction, frame: &Frame<'_>) {
        let open = self.open.get_mut(usize::from(card.0));
        if let Some(open) = open.and_then(Option::as_mut) {
            open.mirror.record(direction, frame);
        }
    }

    /// The end of a turn: what was recorded is written.
    #[inline]
    pub(super) fn flush(&mut self, ring: &mut Ring) {
        if self.count > 0 {
            self.flush_all(ring);
        }
    }

    #[inline(never)]
    fn flush_all(&mut self, ring: &mut Ring) {
        for open in self.open.iter_mut().flatten() {
            open.mirror.flush(ring);
        }
    }

    /// A card is to be mirrored to this file from now on, or not at all.
    pub(super) fn set(&mut self, card: Nic, file: Option<&Arc<MirrorFile>>, ring: &mut Ring) {
        let at = usize::from(card.0);
        if self.open.len() <= at {
            self.open.resize_with(at + 1, || None);
        }
        let Some(place) = self.open.get_mut(at) else {
            return;
        };
        let is_same = match (place.as_ref(), file) {
            (Some(open), Some(file)) => Arc::ptr_eq(&open.file, file),
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return;
        }
        if let Some(ended) = place.take() {
            self.count -= 1;
            self.closing.push(ended);
        }
        if let Some(file) = file {
            self.last = (self.last + 1) % MIRROR;
            let number = (MIRROR | self.last) << Tokens::SLOT_BITS;
            let tokens = Tokens::new(self.tokens | number);
            match Mirror::new(Arc::clone(file), tokens, ring) {
                Ok(mirror) => {
                    *place = Some(Open {
                        file: Arc::clone(file),
                        mirror,
                        tokens,
                    });
                    self.count += 1;
                }
                Err(error) => {
                    static LIMIT: LogLimit = LogLimit::new();
                    if LIMIT.allows() {
                        tracing::warn!("a card can't be mirrored: {error}");
                    }
                }
            }
        }
        self.close(ring);
    }

    /// Has those write that have ended, and closes those that have.
    fn close(&mut self, ring: &mut Ring) {
        for at in (0..self.closing.len()).rev() {
            let Some(open) = self.closing.get_mut(at) else {
                continue;
            };
            open.mirror.flush(ring);
            if open.mirror.is_idle() {
                self.closing.swap_remove(at).mirror.close(ring);
            }
        }
    }

    /// An entry of the ring has ended; false: it is no mirror's.
    pub(super) fn landed(
        &mut self,
        completion: Completion,
        ring: &mut Ring,
    ) -> Result<(), Completion> {
        let all = self.open.iter_mut().flatten().chain(&mut self.closing);
        let mut its = all.filter(|open| open.tokens.has(completion.token));
        let Some(open) = its.next() else {
            return Err(completion);
        };
        open.mirror.landed(completion, ring);
        self.close(ring);
        Ok(())
    }

    /// Whether some have ended and still write.
    pub(super) fn is_closing(&self) -> bool {
        !self.closing.is_empty()
    }
}
