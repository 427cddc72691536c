//! Runs of a packed queue: descriptors are read and written a word at a time, cache line by cache line.
//!
//! UNSAFETY: as of the module above: each index is that of a [`Cursor`], which is below the ring's size, and the ring is
//! aligned to 16 bytes.
#![expect(unsafe_code, reason = "rings in guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::iter::repeat;
use std::sync::atomic::{AtomicU64, Ordering};

use super::announce::DESCRIPTORS_OF_LINE;
use super::{AVAIL, Cursor, LEN_AT, PackedQueue, USED};
use crate::memory::{read_once, shared_u64, will_read};
use crate::virtqueue::chain::{Descriptor, INDIRECT, NEXT, WRITE};
use crate::virtqueue::dying;
use crate::virtqueue::run::{MOST_CHAINS, Run, Taken, place};

/// Descriptors that are fetched ahead.
const AHEAD: u16 = 2 * DESCRIPTORS_OF_LINE;

impl Cursor {
    /// What flags say that are looked at, of a plain descriptor here that the driver has made available.
    #[inline(always)]
    fn plain_flags(self, direction: u16) -> u16 {
        direction | if self.wrap { AVAIL } else { USED }
    }
}

impl PackedQueue {
    /// As [`Virtqueue::pop_run`](super::super::Virtqueue::pop_run).
    #[inline]
    pub fn pop_run(&mut self, run: &mut Run, most: usize) -> usize {
        run.begin(&self.lease);
        // More than the ring has are refused when a chain is taken by itself.
        let room = usize::from(self.layout.size - self.descriptors);
        let size = self.layout.size;
        let most = most.min(room).min(MOST_CHAINS);
        let mut window = self.lease.window();
        let mut at = self.avail;
        if run.direction == WRITE {
            // Each will be written as used. One that is read only before comes from the other CPU twice.
            self.announce_used_of(u16::try_from(most).unwrap_or(0));
        }
        for _ in 0..most {
            let descriptor = self.descriptor_if_there(at);
            let looked_at = descriptor.flags & (AVAIL | USED | NEXT | INDIRECT | WRITE);
            if looked_at != at.plain_flags(run.direction) {
                break;
            }
            if run.direction != WRITE {
                self.fetch_ahead(at);
            }
            let (id, bytes) = (descriptor.next, descriptor.len);
            let of = self.descriptors_of.get_mut(usize::from(id));
            let Some(of) = of.filter(|of| **of == 0) else {
                break;
            };
            let Some(host) = place(&self.lease, &mut window, descriptor.addr, bytes) else {
                break;
            };
            *of = 1;
            if let Some(region) = &mut self.region {
                region.taken(id, &[descriptor]);
            }
            run.add(Taken { host, bytes, id });
            at = at.advanced(1, size);
        }
        self.took(run, at);
        run.len()
    }

    /// Has the CPU fetch a line of descriptors behind the ones that it comes to by itself: the driver's CPU wrote it, most
    /// likely.
    #[inline(always)]
    fn fetch_ahead(&self, at: Cursor) {
        let ahead = at.index + AHEAD;
        if at.index.is_multiple_of(DESCRIPTORS_OF_LINE) && ahead < self.layout.size {
            // SAFETY: below the ring's size.
            will_read(unsafe { self.parts.ring.add(usize::from(ahead)) });
        }
    }

    /// The second word of a descriptor: its length, buffer ID and flags.
    #[inline(always)]
    fn word(&self, at: Cursor) -> &AtomicU64 {
        debug_assert!(at.index < self.layout.size);
        // SAFETY: the descriptor lies in the ring, which the lease keeps, and is aligned to 16.
        unsafe {
            let descriptor = self.parts.ring.add(usize::from(at.index)).cast::<u8>();
            shared_u64(descriptor.add(LEN_AT).cast())
        }
    }

    /// A descriptor, each byte read once: what is behind its flags holds if these say that it is available.
    #[inline(always)]
    pub(super) fn descriptor_if_there(&self, at: Cursor) -> Descriptor {
        // Acquire: the address is read after the flags that announce it.
        let word = self.word(at).load(Ordering::Acquire);
        // SAFETY: as above.
        let addr = unsafe {
            let descriptor = self.parts.ring.add(usize::from(at.index));
            read_once(descriptor.cast::<u64>())
        };
        Descriptor::of_packed([u64::from_le(addr), u64::from_le(word)])
    }

    /// Notes that a run was taken, up to there.
    #[inline(always)]
    fn took(&mut self, run: &mut Run, end: Cursor) {
        let count = u16::try_from(run.len()).unwrap_or(0);
        self.avail = end;
        self.descriptors += count;
        self.in_flight_count += count;
        if let Some(order) = &mut self.order {
            run.leads = order.run_taken(run.all_out().iter().map(|taken| taken.id));
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

    /// Chains of which nothing was written end in order: one descriptor with the last one's ID stands for all, and the
    /// places of the others behind it are passed over (2.8.14). The driver's lines there stay with the driver's CPU.
    #[inline(always)]
    fn write_last_used(&mut self, mut ids: impl DoubleEndedIterator<Item = u16>) {
        let Some(last) = ids.next_back() else {
            return;
        };
        let mut passed = 0;
        for id in ids {
            passed += self.end_flight(id);
            if let Some(region) = &mut self.region {
                region.used(id);
            }
        }
        self.write_used(last, 0);
        self.unpublished += passed;
        self.used = self.used.advanced(passed, self.layout.size);
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

    /// Writes used descriptors one behind the other; flags that show the batch are held back, as of single ones.
    #[inline(always)]
    fn write_all_used<'a>(&mut self, mut ended: impl Iterator<Item = (&'a Taken, u32)>) {
        if self.held_back.is_none()
            && let Some((first, len)) = ended.next()
        {
            self.write_used(first.id, len);
        }
        let (size, mut at, mut count) = (self.layout.size, self.used, 0);
        for (taken, len) in ended {
            if let Some(of) = self.descriptors_of.get_mut(usize::from(taken.id)) {
                *of = 0;
            }
            let (id, flags) = (u64::from(taken.id), u64::from(at.used_flags(len)));
            let word = u64::from(len) | id << 32 | flags << 48;
            dying::step();
            // The driver looks here after it has seen the batch's first.
            self.word(at).store(word.to_le(), Ordering::Relaxed);
            self.mark(at.index);
            at = at.advanced(1, size);
            count += 1;
        }
        self.used = at;
        self.in_flight_count -= count;
        self.unpublished += count;
    }

    /// As [`Virtqueue::unpop_run`](super::super::Virtqueue::unpop_run).
    #[inline]
    pub fn unpop_run(&mut self, run: &mut Run) {
        let back = run.all_out();
        let mut count = 0;
        for taken in back.iter().rev() {
            count += self.end_flight(taken.id);
            if let Some(region) = &mut self.region {
                region.untaken(taken.id);
            }
        }
        self.descriptors -= count;
        self.avail = self.avail.retreated(count, self.layout.size);
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
