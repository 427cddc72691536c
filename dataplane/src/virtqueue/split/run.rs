//! Runs of a split queue: avail entries and descriptors are read, and used entries written, as many at a time as there
//! are.
//!
//! UNSAFETY: as of the module above, whose places these are: each index into them is masked or compared first.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::iter::repeat;
use std::sync::atomic::Ordering;

use super::{SplitQueue, UsedEntry};
use crate::memory::{read_words, will_read};
use crate::virtqueue::chain::{Descriptor, INDIRECT, NEXT, WRITE};
use crate::virtqueue::dying;
use crate::virtqueue::run::{MOST_CHAINS, Run, Taken, place};

/// Bytes in front of the used ring's entries, and of each.
const ENTRIES_AT: u64 = 4;
const ENTRY_BYTES: u64 = 8;

impl SplitQueue {
    /// As [`Virtqueue::pop_run`](super::super::Virtqueue::pop_run).
    #[inline]
    pub fn pop_run(&mut self, run: &mut Run, most: usize) -> usize {
        run.begin(&self.lease);
        let most = u16::try_from(most.min(MOST_CHAINS)).unwrap_or(0);
        let count = self.known(most).min(most);
        let mut heads = [0; MOST_CHAINS];
        let heads = heads.get_mut(..usize::from(count)).unwrap_or_default();
        self.read_heads(heads);
        let mut window = self.lease.window();
        for &mut id in heads {
            let in_flight = self.in_flight.get_mut(usize::from(id));
            let Some(in_flight) = in_flight.filter(|in_flight| !**in_flight) else {
                break;
            };
            // SAFETY: there is a place for each head that is below the table's length; the lease keeps the table.
            let words = unsafe { read_words(self.parts.desc.add(usize::from(id)).cast()) };
            let Descriptor {
                addr,
                len: bytes,
                flags,
                ..
            } = Descriptor::of_split(words);
            if flags & (NEXT | INDIRECT | WRITE) != run.direction {
                break;
            }
            let Some(host) = place(&self.lease, &mut window, addr, bytes) else {
                break;
            };
            *in_flight = true;
            run.add(Taken { host, bytes, id });
        }
        self.took(run);
        run.len()
    }

    /// Entries that the driver is known to have made available. The index is read if these are fewer than wanted.
    #[inline(always)]
    fn known(&mut self, wanted: u16) -> u16 {
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        if known >= wanted {
            return known;
        }
        // Acquire: entries and descriptors are read after the index that announced them.
        let given = self.avail(1).load(Ordering::Acquire);
        let now = given.wrapping_sub(self.next_avail);
        if now > self.layout.size {
            // An index that can't be is refused when a chain is taken by itself.
            return known;
        }
        self.seen_avail = given;
        now
    }

    /// Reads the entries that come next, each once, and has the CPU fetch the descriptors that they name.
    #[inline(always)]
    fn read_heads(&self, heads: &mut [u16]) {
        let mask = self.layout.size - 1;
        let mut index = self.next_avail;
        for head in heads {
            let slot = 2 + usize::from(index & mask);
            *head = self.avail(slot).load(Ordering::Relaxed);
            // SAFETY: masked to the table's length.
            will_read(unsafe { self.parts.desc.add(usize::from(*head & mask)) });
            index = index.wrapping_add(1);
        }
    }

    /// Notes that a run was taken.
    #[inline(always)]
    fn took(&mut self, run: &mut Run) {
        let count = u16::try_from(run.len()).unwrap_or(0);
        self.next_avail = self.next_avail.wrapping_add(count);
        // What was read ahead one by one may lie where these entries were.
        self.ahead_end = self.next_avail;
        self.in_flight_count += count;
        if let Some(order) = &mut self.order {
            run.leads = order.run_taken(run.all_out().iter().map(|taken| taken.id));
        }
        if let Some(region) = &mut self.region {
            for taken in run.all_out() {
                region.taken(taken.id);
            }
        }
    }

    /// As [`Virtqueue::push_run`](super::super::Virtqueue::push_run).
    #[inline]
    pub fn push_run(&mut self, run: &mut Run, lengths: &[u32]) {
        self.push_each(run, lengths.len(), lengths.iter().copied());
    }

    /// As [`Virtqueue::push_read`](super::super::Virtqueue::push_read).
    #[inline]
    pub fn push_read(&mut self, run: &mut Run, count: usize) {
        if !run.leads {
            return self.push_each(run, count, repeat(0));
        }
        let ended = run.all_out().iter().take(count);
        self.write_last_used(ended.map(|taken| taken.id));
        self.end_leaders(run, count);
    }

    /// Chains of which nothing was written end in order: one entry with the last one's head stands for all, and the places
    /// of the others behind it are passed over (2.7.9).
    #[inline(always)]
    fn write_last_used(&mut self, mut heads: impl DoubleEndedIterator<Item = u16>) {
        let Some(last) = heads.next_back() else {
            return;
        };
        let mut passed = 0;
        for head in heads {
            self.end_flight(head);
            if let Some(region) = &mut self.region {
                region.used(head);
            }
            passed += 1;
        }
        self.write_used(last, 0);
        self.next_used = self.next_used.wrapping_add(passed);
    }

    /// The first so many of a run that leads are given back.
    #[inline(always)]
    fn end_leaders(&mut self, run: &mut Run, count: usize) {
        let count = count.min(run.out());
        run.given(count);
        let order = self.order.as_mut();
        if order.is_some_and(|order| order.leaders_ended(count)) {
            self.push_ended();
        }
    }

    #[inline(always)]
    fn push_each(&mut self, run: &mut Run, count: usize, lengths: impl Iterator<Item = u32>) {
        let ended = run.all_out().iter().take(count).zip(lengths);
        if self.order.is_some() && !run.leads {
            ended.for_each(|(taken, len)| self.push_used(taken.id, len));
        } else if self.region.is_some() {
            ended.for_each(|(taken, len)| self.write_used(taken.id, len));
        } else {
            self.write_all_used(ended);
        }
        if run.leads {
            self.end_leaders(run, count);
        } else {
            run.given(count);
        }
    }

    /// Writes used entries one behind the other.
    #[inline(always)]
    fn write_all_used<'a>(&mut self, ended: impl Iterator<Item = (&'a Taken, u32)>) {
        let mask = self.layout.size - 1;
        let (first, mut index) = (self.next_used, self.next_used);
        for (taken, len) in ended {
            if let Some(in_flight) = self.in_flight.get_mut(usize::from(taken.id)) {
                *in_flight = false;
            }
            let id = u32::from(taken.id);
            dying::step();
            // SAFETY: the slot is masked to the ring's length; the lease keeps it.
            unsafe {
                let slot = self.parts.used_ring.add(usize::from(index & mask));
                slot.write_volatile(UsedEntry { id, len });
            }
            index = index.wrapping_add(1);
        }
        let count = index.wrapping_sub(first);
        self.in_flight_count -= count;
        self.next_used = index;
        if self.log.is_some() {
            let slot = first & mask;
            let here = count.min(self.layout.size - slot);
            self.mark_entries(slot, here);
            self.mark_entries(0, count - here);
        }
    }

    #[cold]
    fn mark_entries(&self, slot: u16, count: u16) {
        let at = ENTRIES_AT + ENTRY_BYTES * u64::from(slot);
        self.mark(at, ENTRY_BYTES * u64::from(count));
    }

    /// As [`Virtqueue::unpop_run`](super::super::Virtqueue::unpop_run).
    #[inline]
    pub fn unpop_run(&mut self, run: &mut Run) {
        let back = run.all_out();
        for taken in back.iter().rev() {
            self.end_flight(taken.id);
            if let Some(region) = &mut self.region {
                region.untaken(taken.id);
            }
        }
        self.go_back(u16::try_from(back.len()).unwrap_or(0));
        if let Some(order) = &mut self.order {
            if run.leads {
                order.leaders_ended(back.len());
            } else {
                order.forget_last(back.len());
            }
        }
        run.put_back();
    }
}
