//! Runs of a packed queue: each chain in one is what `pop` would have taken, and each that would have been is in it.

use bulkhead_dataplane::virtqueue::run::{MOST_CHAINS, Run};

use super::{Driver, Place, Taken};
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
        assert!(count <= most.min(MOST_CHAINS));
        let mut ids = Vec::new();
        for index in 0..count {
            let taken = self.model_take(&copy).expect("good").expect("there is one");
            let (at, bytes) = plain(&taken, is_writable).expect("one range");
            let slice = run.get(index);
            assert_eq!(slice.bytes() as u64, bytes);
            let mut right = vec![at, at + bytes - 1];
            right.dedup();
            assert_eq!(ends(self.guest, slice), right);
            ids.push(taken.id);
        }
        if count < most.min(MOST_CHAINS) {
            assert!(!self.model_is_plain(&copy, is_writable), "it was left out");
        }
        self.check_place();
        self.end_run(&mut run, &ids, input);
    }

    /// Some end, the others are put back.
    fn end_run(&mut self, run: &mut Run, ids: &[u16], input: &mut Input<'_>) {
        let ended = usize::from(input.u8()) % (ids.len() + 1);
        let lengths: Vec<u32> = ids[..ended].iter().map(|_| input.u32()).collect();
        self.queue.push_run(run, &lengths);
        self.queue.unpop_run(run);
        let copy = self.guest.copy();
        for (id, len) in ids.iter().zip(lengths) {
            self.has_ended(&copy, *id, len);
        }
        for id in &ids[ended..] {
            self.in_flight.remove(id);
            self.order.put_back();
            self.taken -= 1;
            self.avail = self.before(self.avail);
        }
        self.check_place();
    }

    fn check_place(&self) {
        assert_eq!(usize::from(self.queue.in_flight()), self.in_flight.len());
        let base = u32::from(self.avail.word()) | (u32::from(self.used.word()) << 16);
        assert_eq!(self.queue.base(), base, "where the ring goes on");
    }

    /// One place back.
    fn before(&self, place: Place) -> Place {
        match place.index.checked_sub(1) {
            Some(index) => Place { index, ..place },
            None => Place {
                index: self.size - 1,
                wrap: !place.wrap,
            },
        }
    }

    /// Whether the next chain is one that belongs into a run.
    fn model_is_plain(&self, copy: &Copy, is_writable: bool) -> bool {
        if !self.model_has_work(copy) || self.taken == self.size {
            return false;
        }
        let at = self.avail.descriptor();
        let (addr, len) = (copy.u64(at), u64::from(copy.u32(at + 8)));
        let (id, flags) = (copy.u16(at + 12), copy.u16(at + 14) & 7);
        let is_free = id < self.size && !self.in_flight.contains_key(&id);
        let is_there = len > 0 && copy.in_one_region(addr, len).is_some();
        flags == if is_writable { 2 } else { 0 } && is_free && is_there
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
