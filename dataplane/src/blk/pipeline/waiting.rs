//! What waits: for room in a storage, for staging, for a flush, for its end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::Pipeline;
use super::flight::Landed;
use crate::storage::Polled;

impl Pipeline {
    /// Goes on with what waited, as far as it can; whether something did. Requests that end by it are
    /// handed to `landed`.
    pub fn resume(&mut self, mut landed: impl FnMut(Landed)) -> bool {
        let mut any = self.take_ended(&mut landed);
        while let Some((token, transfer)) = self.again.pop_front() {
            if !self.give(token, transfer) {
                // It is the last now, and was the first.
                self.again.rotate_right(1);
                break;
            }
            any = true;
        }
        any |= self.poll_holders();
        any |= self.resume_flushes();
        any | self.resume_lines(&mut landed)
    }

    /// Takes in what had ended outside the ring when this began.
    fn take_ended(&mut self, landed: &mut impl FnMut(Landed)) -> bool {
        let count = self.ended.len();
        for _ in 0..count {
            if let Some(ended) = self.ended.pop_front().and_then(|c| self.take_in(c)) {
                landed(ended);
            }
        }
        count > 0
    }

    fn poll_holders(&mut self) -> bool {
        let mut any = false;
        let mut at = 0;
        while let Some(holder) = self.holders.get(at) {
            match holder.storage.poll(&mut self.ring) {
                Some(Polled::Passed) => self.held -= 1,
                Some(Polled::Ended(completion)) => {
                    self.held -= 1;
                    self.ended.push_back(completion);
                }
                None => {
                    at += 1;
                    continue;
                }
            }
            any = true;
        }
        if self.held == 0 {
            self.holders.clear();
        }
        any
    }

    /// Whether something waits that [`Pipeline::resume`] goes on with. It may be that no completion of
    /// the ring comes before: whoever sleeps does so for a short while only.
    #[must_use]
    #[inline]
    pub fn has_waiting(&self) -> bool {
        !self.lines.is_empty()
            || self.held > 0
            || !self.unflushed.is_empty()
            || !self.ended.is_empty()
            || !self.again.is_empty()
    }
}
