//! Requests that are taken from a queue together: all of their chains are followed before the first is begun.
//!
//! What a request needs first are its header, which the driver's CPU wrote, and the line of its status. From
//! another CPU these take longer than the rest of a request does, so all of a batch are asked for at once.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::blk::request::Operation;
use crate::virtqueue::{Chain, RingError, Virtqueue};

/// Requests of a batch at most: of a queue's turn.
pub const MOST: usize = 16;

/// A chain that was taken.
#[derive(Debug)]
pub struct Taken {
    /// Its head, as the queue needs it back.
    pub head: u16,
    /// Its buffers.
    pub chain: Chain,
    /// A read or write that is done together with others of the batch ([`Pipeline::gather`]).
    ///
    /// [`Pipeline::gather`]: crate::blk::pipeline::Pipeline::gather
    pub work: Option<Operation>,
    /// It was done.
    pub done: bool,
}

/// Room for a batch; a worker has one.
#[derive(Debug)]
pub struct Batch {
    places: Box<[Taken]>,
    count: usize,
}

impl Default for Batch {
    fn default() -> Self {
        let place = |_| Taken {
            head: 0,
            chain: Chain::with_capacity(128),
            work: None,
            done: false,
        };
        Self {
            places: (0..MOST).map(place).collect(),
            count: 0,
        }
    }
}

impl Batch {
    /// Takes what a queue has, at most `most` requests and [`MOST`], in the place of the batch before. How the
    /// driver broke it, if it did: behind what was taken. Of a `LIMITED` device no further request is taken once
    /// those that were have `most_bytes`.
    #[inline(always)]
    pub fn take<const LIMITED: bool>(
        &mut self,
        ring: &mut Virtqueue,
        most: usize,
        most_bytes: u64,
    ) -> Option<RingError> {
        self.count = 0;
        let mut bytes = 0;
        for place in self.places.iter_mut().take(most) {
            match ring.pop(&mut place.chain) {
                Ok(Some(head)) => place.head = head,
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
            place.chain.announce();
            self.count += 1;
            if LIMITED {
                bytes += place.chain.readable.bytes() + place.chain.writable.bytes();
                if bytes >= most_bytes {
                    return None;
                }
            }
        }
        None
    }

    /// As [`Batch::take`], of what was in flight when the queue started.
    #[cold]
    pub fn take_again(&mut self, ring: &mut Virtqueue, most: usize) -> Option<RingError> {
        self.count = 0;
        for place in self.places.iter_mut().take(most) {
            match ring.pop_again(&mut place.chain) {
                Ok(Some(head)) => place.head = head,
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
            self.count += 1;
        }
        None
    }

    /// What was taken, in order. A chain that is under way leaves another one in its place.
    #[inline]
    pub fn taken(&mut self) -> &mut [Taken] {
        self.places.get_mut(..self.count).unwrap_or_default()
    }

    /// Lets go of the guest memory of what was taken, of which nothing is needed any more.
    pub fn release(&mut self) {
        self.count = 0;
        for place in &mut self.places {
            place.chain.release();
        }
    }
}
