//! What was in flight of a packed queue when whoever served it died ("When reconnecting", packed virtqueues).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::packed::{
    ENTRY_ADDR, ENTRY_COUNTER, ENTRY_FLAGS, ENTRY_ID, ENTRY_INFLIGHT, ENTRY_LAST, ENTRY_LEN,
    ENTRY_NEXT, ENTRY_NUM, FREE_HEAD, USED, entry, store_free, store_used,
};
use super::past::{Past, Submitted, flag, is_of, renumber};
use super::{PackedRegion, QueueRegion};
use crate::virtqueue::RingError;
use crate::virtqueue::chain::{Descriptor, INDIRECT, NEXT};
use crate::virtqueue::packed::Cursor;

/// A chain in flight, as the ring had it when it was taken.
#[derive(Debug)]
pub(in crate::virtqueue) struct Kept {
    /// Its buffer ID.
    pub(in crate::virtqueue) id: u16,
    pub(in crate::virtqueue) descriptors: Box<[Descriptor]>,
}

/// A queue's past: its region goes on, the next used descriptor is written there, and these chains are in
/// flight, in the order in which they were taken.
#[derive(Debug)]
pub(in crate::virtqueue) struct PackedPast {
    pub(in crate::virtqueue) region: PackedRegion,
    pub(in crate::virtqueue) used: Cursor,
    pub(in crate::virtqueue) chains: Vec<Kept>,
    /// Descriptors of the ring that they have.
    pub(in crate::virtqueue) descriptors: u16,
}

impl PackedPast {
    /// Reads the region of a queue of `size` descriptors, and puts it in order. `flags` are those of a
    /// descriptor of the ring.
    ///
    /// # Errors
    /// [`RingError::RegionVersion`].
    pub(in crate::virtqueue) fn of(
        region: &QueueRegion,
        size: u16,
        flags: impl Fn(u16) -> u16,
    ) -> Result<Past<Self>, RingError> {
        match is_of(region, size)? {
            None => return Ok(Past::Fresh),
            Some(false) => return Ok(Past::Stale("it was kept for a ring of another size")),
            Some(true) => {}
        }
        match Found::read(region, size, flags) {
            Ok(found) => Ok(Past::Kept(found.adopt(region, size))),
            Err(why) => Ok(Past::Stale(why)),
        }
    }
}

/// What a region says, which may be true.
struct Found {
    used: Cursor,
    free_head: u16,
    /// For each entry the one that follows it.
    next: Box<[u16]>,
    /// Free entries that say that they are in flight: of a batch that the driver has seen, of a chain that was
    /// not quite taken.
    ended: Vec<u16>,
    chains: Vec<Chain>,
    descriptors: u16,
}

/// A chain in flight, and where it is in the region.
struct Chain {
    submitted: Submitted,
    last: u16,
    kept: Kept,
}

impl Found {
    fn read(
        region: &QueueRegion,
        size: u16,
        flags: impl Fn(u16) -> u16,
    ) -> Result<Self, &'static str> {
        let (used, free_head) = committed(region, size, &flags)?;
        let mut walk = Walk::new(region, size)?;
        let ended = walk.free(free_head)?;
        let mut ids = vec![false; usize::from(size)];
        let mut chains = Vec::new();
        for first in 0..size {
            if !walk.is_open(first) {
                continue;
            }
            let chain = walk.chain(region, first)?;
            match ids.get_mut(usize::from(chain.kept.id)) {
                Some(taken) if !*taken => *taken = true,
                _ => return Err("a buffer in it is in flight twice, or not of the ring"),
            }
            chains.push(chain);
        }
        if walk.seen.contains(&false) {
            return Err("an entry is neither free nor of a chain");
        }
        fits(used, walk.taken, size, flags)?;
        Ok(Self {
            used,
            free_head,
            next: walk.next,
            ended,
            chains,
            descriptors: walk.taken,
        })
    }

    /// Puts the region in order. Each store leaves it as true as it was.
    fn adopt(mut self, region: &QueueRegion, size: u16) -> PackedPast {
        for first in &self.ended {
            region.store_u8(entry(*first, ENTRY_INFLIGHT), 0);
        }
        store_free(region, self.free_head, self.free_head);
        store_used(region, self.used, self.used);
        self.chains.sort_unstable_by_key(|chain| chain.submitted);
        let chains = self.chains.iter().map(|chain| chain.submitted);
        renumber(region, chains, |first| entry(first, ENTRY_COUNTER));
        let mut ends = vec![(0, 0); usize::from(size)].into_boxed_slice();
        for chain in &self.chains {
            if let Some(ends) = ends.get_mut(usize::from(chain.kept.id)) {
                *ends = (chain.submitted.entry, chain.last);
            }
        }
        PackedPast {
            region: PackedRegion {
                region: region.clone(),
                counter: self.chains.len() as u64,
                free_head: self.free_head,
                used: self.used,
                next: self.next,
                ends,
                batch: Vec::with_capacity(usize::from(size)),
            },
            used: self.used,
            chains: self.chains.into_iter().map(|chain| chain.kept).collect(),
            descriptors: self.descriptors,
        }
    }
}

/// Where the next used descriptor is as the driver sees it, and where the free list begins that goes with it:
/// the last batch counts if its first descriptor is not available any more.
fn committed(
    region: &QueueRegion,
    size: u16,
    flags: impl Fn(u16) -> u16,
) -> Result<(Cursor, u16), &'static str> {
    let [i0, i1, j0, j1, wrap, old_wrap, ..] = region.load_u64(USED).to_le_bytes();
    let cursor = |index: u16, wrap: u8| {
        (index < size && wrap <= 1).then_some(Cursor {
            index,
            wrap: wrap == 1,
        })
    };
    let used = cursor(u16::from_le_bytes([i0, i1]), wrap);
    let old = cursor(u16::from_le_bytes([j0, j1]), old_wrap);
    let (Some(used), Some(old)) = (used, old) else {
        return Err("it goes on at no place of the ring");
    };
    let [f0, f1, g0, g1] = region.load_u32(FREE_HEAD).to_le_bytes();
    let is_shown = used != old && !old.is_available(flags(old.index));
    Ok(if is_shown {
        (used, u16::from_le_bytes([f0, f1]))
    } else {
        (old, u16::from_le_bytes([g0, g1]))
    })
}

/// A way through the entries that comes to each at most once.
struct Walk {
    next: Box<[u16]>,
    in_flight: Box<[bool]>,
    seen: Box<[bool]>,
    /// Entries of chains.
    taken: u16,
}

impl Walk {
    fn new(region: &QueueRegion, size: u16) -> Result<Self, &'static str> {
        let flags = (0..size).map(|index| flag(region, entry(index, ENTRY_INFLIGHT)));
        let flags: Option<Box<[bool]>> = flags.collect();
        let next = (0..size).map(|index| region.load_u16(entry(index, ENTRY_NEXT)));
        Ok(Self {
            next: next.collect(),
            in_flight: flags.ok_or("an entry is neither in flight nor not")?,
            seen: vec![false; usize::from(size)].into_boxed_slice(),
            taken: 0,
        })
    }

    fn is_open(&self, index: u16) -> bool {
        let open = self.in_flight.get(usize::from(index));
        open.copied().unwrap_or(false)
    }

    fn see(&mut self, index: u16) -> Result<(), &'static str> {
        match self.seen.get_mut(usize::from(index)) {
            None => Err("a chain in it goes on outside of it"),
            Some(true) => Err("an entry of it is there twice"),
            Some(seen) => {
                *seen = true;
                Ok(())
            }
        }
    }

    fn follower(&self, index: u16) -> u16 {
        let next = self.next.get(usize::from(index));
        next.copied().unwrap_or(u16::MAX)
    }

    /// The free list, which ends outside: entries of it that say that they are in flight.
    fn free(&mut self, head: u16) -> Result<Vec<u16>, &'static str> {
        let mut ended = Vec::new();
        let mut at = head;
        while let Some(open) = self.in_flight.get_mut(usize::from(at)) {
            if std::mem::take(open) {
                ended.push(at);
            }
            self.see(at)?;
            at = self.follower(at);
        }
        Ok(ended)
    }

    /// The chain that begins at an entry.
    fn chain(&mut self, region: &QueueRegion, first: u16) -> Result<Chain, &'static str> {
        let count = region.load_u16(entry(first, ENTRY_NUM));
        let mut descriptors = Vec::new();
        let mut at = first;
        for left in (0..count).rev() {
            self.see(at)?;
            let descriptor = descriptor(region, at);
            if descriptor.has(NEXT) != (left > 0) || (descriptor.has(INDIRECT) && left > 0) {
                return Err("a chain in it is longer or shorter than its descriptors");
            }
            descriptors.push(descriptor);
            if left > 0 {
                at = self.follower(at);
            }
        }
        let last = region.load_u16(entry(first, ENTRY_LAST));
        let Some(tail) = descriptors.last().filter(|_| last == at) else {
            return Err("a chain in it ends somewhere else");
        };
        self.taken += count;
        Ok(Chain {
            submitted: Submitted {
                counter: region.load_u64(entry(first, ENTRY_COUNTER)),
                entry: first,
            },
            last,
            kept: Kept {
                // Of a packed descriptor, what follows is its buffer ID.
                id: tail.next,
                descriptors: descriptors.into_boxed_slice(),
            },
        })
    }
}

/// The copy of a descriptor.
fn descriptor(region: &QueueRegion, index: u16) -> Descriptor {
    Descriptor {
        addr: region.load_u64(entry(index, ENTRY_ADDR)),
        len: region.load_u32(entry(index, ENTRY_LEN)),
        flags: region.load_u16(entry(index, ENTRY_FLAGS)),
        next: region.load_u16(entry(index, ENTRY_ID)),
    }
}

/// Whether so many descriptors from the next used one on can be in flight in the ring as it is: the driver made
/// all of them available in this turn, and has seen none as used.
fn fits(
    used: Cursor,
    count: u16,
    size: u16,
    flags: impl Fn(u16) -> u16,
) -> Result<(), &'static str> {
    let first_is_open = count == 0 || used.is_available(flags(used.index));
    let is_of_turn = |step: u16| {
        let at = used.advanced(step, size);
        at.was_made_available(flags(at.index))
    };
    if first_is_open && (0..count).all(is_of_turn) {
        return Ok(());
    }
    Err("more is in flight in it than the ring has made available")
}
