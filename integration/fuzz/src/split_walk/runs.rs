//! Runs of a split queue: each chain in one is what `pop` would have taken, and each that would have been is in it.

use bulkhead_dataplane::virtqueue::run::{MOST_CHAINS, Run};

use super::{AVAIL, DESC, Driver, Taken};
use crate::guest::{Copy, ends};
use crate::input::Input;

impl Driver<'_> {
    /// Takes a run, gives some of it back and puts back the rest.
    pub(super) fn take_run(&mut self, choice: u8, input: &mut Input<'_>) {
        let (is_writable, most) = (choice & 0x40 != 0, usize::from(input.u8() % 80));
        let mut run = if is_writable {
            Run::to_write()
        } else {
            Run::to_read()
        };
        let copy = self.guest.copy();
        let count = self.queue.pop_run(&mut run, most);
        let known = self.model_known(&copy, most);
        // Entries are read again, also those that were read ahead.
        self.ahead.clear();
        let mut heads = Vec::new();
        for index in 0..count {
            assert!(index < known, "more than the driver has made available");
            self.ahead.push_back(self.model_entry(&copy));
            let taken = self.model_take(&copy).expect("good").expect("there is one");
            let (at, bytes) = plain(&taken, is_writable).expect("one range");
            let slice = run.get(index);
            assert_eq!(slice.bytes() as u64, bytes);
            let mut right = vec![at, at + bytes - 1];
            right.dedup();
            assert_eq!(ends(self.guest, slice), right);
            heads.push(taken.head);
        }
        if count < known {
            assert!(!self.model_is_plain(&copy, is_writable), "it was left out");
        }
        assert_eq!(self.queue.next_avail(), self.next_avail);
        assert_eq!(usize::from(self.queue.in_flight()), self.in_flight.len());
        self.end_run(&mut run, &heads, input);
    }

    /// Some end, the others are put back.
    fn end_run(&mut self, run: &mut Run, heads: &[u16], input: &mut Input<'_>) {
        let ended = usize::from(input.u8()) % (heads.len() + 1);
        let lengths: Vec<u32> = heads[..ended].iter().map(|_| input.u32()).collect();
        self.queue.push_run(run, &lengths);
        self.queue.unpop_run(run);
        for (head, len) in heads.iter().zip(lengths) {
            for (head, len) in self.order.ended(*head, len) {
                self.in_flight.remove(&head);
                self.given_back.push((head, len));
            }
        }
        for head in heads[ended..].iter().rev() {
            self.in_flight.remove(head);
            self.order.put_back();
            self.next_avail = self.next_avail.wrapping_sub(1);
        }
        if self.seen_avail.wrapping_sub(self.next_avail) > self.size {
            self.seen_avail = self.next_avail;
        }
        self.ahead.clear();
        assert_eq!(self.queue.next_avail(), self.next_avail);
        assert_eq!(usize::from(self.queue.in_flight()), self.in_flight.len());
    }

    /// Entries of which a run may have some. The index is read if fewer are known than wanted.
    fn model_known(&mut self, copy: &Copy, most: usize) -> usize {
        let most = most.min(MOST_CHAINS);
        let known = |seen: u16| usize::from(seen.wrapping_sub(self.next_avail));
        let index = copy.u16(AVAIL + 2);
        if known(self.seen_avail) < most && known(index) <= usize::from(self.size) {
            self.seen_avail = index;
        }
        usize::from(self.seen_avail.wrapping_sub(self.next_avail)).min(most)
    }

    fn model_entry(&self, copy: &Copy) -> u16 {
        let slot = u64::from(self.next_avail % self.size);
        copy.u16(AVAIL + 4 + 2 * slot)
    }

    /// Whether the next chain is one that belongs into a run.
    fn model_is_plain(&self, copy: &Copy, is_writable: bool) -> bool {
        let head = self.model_entry(copy);
        if head >= self.size || self.in_flight.contains(&head) {
            return false;
        }
        let at = DESC + 16 * u64::from(head);
        let (addr, len) = (copy.u64(at), u64::from(copy.u32(at + 8)));
        let flags = copy.u16(at + 12) & 7;
        let is_there = len > 0 && copy.in_one_region(addr, len).is_some();
        flags == if is_writable { 2 } else { 0 } && is_there
    }
}

/// The only range of a chain that has one, in that direction.
fn plain(taken: &Taken, is_writable: bool) -> Option<(u64, u64)> {
    let (its, others) = if is_writable {
        (&taken.writable, &taken.readable)
    } else {
        (&taken.readable, &taken.writable)
    };
    match its[..] {
        [one] if others.is_empty() => Some(one),
        _ => None,
    }
}
