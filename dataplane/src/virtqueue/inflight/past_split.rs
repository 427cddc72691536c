//! What was in flight of a split queue when whoever served it died ("When reconnecting", split virtqueues).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::past::{Past, Submitted, flag, is_of, renumber};
use super::split::{ENTRY_COUNTER, ENTRY_INFLIGHT, ENTRY_NEXT, LAST_BATCH_HEAD, USED_IDX, entry};
use super::{QueueRegion, SplitRegion};
use crate::virtqueue::RingError;

/// What the driver says, read when the queue starts.
#[derive(Debug)]
pub(in crate::virtqueue) struct AvailRing<F> {
    /// The used index as the driver sees it.
    pub(in crate::virtqueue) used_idx: u16,
    /// The avail index.
    pub(in crate::virtqueue) avail_idx: u16,
    /// The head that was made available at an index.
    pub(in crate::virtqueue) head: F,
}

/// A queue's past: its region goes on, and these heads are in flight, in the order in which they were taken.
#[derive(Debug)]
pub(in crate::virtqueue) struct SplitPast {
    pub(in crate::virtqueue) region: SplitRegion,
    pub(in crate::virtqueue) heads: Vec<u16>,
}

impl SplitPast {
    /// Reads the region of a queue of `size` descriptors, and puts it in order.
    ///
    /// # Errors
    /// [`RingError::RegionVersion`].
    pub(in crate::virtqueue) fn of(
        region: &QueueRegion,
        size: u16,
        ring: &AvailRing<impl Fn(u16) -> u16>,
    ) -> Result<Past<Self>, RingError> {
        match is_of(region, size)? {
            None => return Ok(Past::Fresh),
            Some(false) => return Ok(Past::Stale("it was kept for a ring of another size")),
            Some(true) => {}
        }
        let found = match Found::read(region, size, ring) {
            Ok(found) => found,
            Err(why) => return Ok(Past::Stale(why)),
        };
        Ok(Past::Kept(found.adopt(region, size, ring.used_idx)))
    }
}

/// What a region says, which may be true.
struct Found {
    /// Heads whose used entries the driver sees: the last batch.
    shown: Vec<u16>,
    open: Vec<Submitted>,
    last_batch_head: u16,
}

impl Found {
    fn read(
        region: &QueueRegion,
        size: u16,
        ring: &AvailRing<impl Fn(u16) -> u16>,
    ) -> Result<Self, &'static str> {
        let flags = (0..size).map(|head| flag(region, entry(head, ENTRY_INFLIGHT)));
        let flags: Option<Box<[bool]>> = flags.collect();
        let mut in_flight = flags.ok_or("an entry is neither in flight nor not")?;
        let last_batch_head = region.load_u16(LAST_BATCH_HEAD);
        let shown = if in_flight.contains(&true) {
            let batch = ring.used_idx.wrapping_sub(region.load_u16(USED_IDX));
            end_batch(region, &mut in_flight, last_batch_head, batch)?
        } else {
            // Of an idle ring the index is the truth, whatever the region has of it.
            Vec::new()
        };
        let open: Vec<Submitted> = (0..size)
            .zip(&in_flight)
            .filter(|(_, open)| **open)
            .map(|(head, _)| Submitted {
                counter: region.load_u64(entry(head, ENTRY_COUNTER)),
                entry: head,
            })
            .collect();
        fits(&in_flight, open.len(), ring)?;
        Ok(Self {
            shown,
            open,
            last_batch_head,
        })
    }

    /// Puts the region in order. Each store leaves it as true as it was.
    fn adopt(mut self, region: &QueueRegion, size: u16, used_idx: u16) -> SplitPast {
        for head in &self.shown {
            region.store_u8(entry(*head, ENTRY_INFLIGHT), 0);
        }
        region.store_u16(USED_IDX, used_idx);
        self.open.sort_unstable();
        let open = self.open.iter().copied();
        renumber(region, open, |head| entry(head, ENTRY_COUNTER));
        SplitPast {
            heads: self.open.iter().map(|chain| chain.entry).collect(),
            region: SplitRegion::go_on(
                region.clone(),
                size,
                self.open.len() as u64,
                self.last_batch_head,
            ),
        }
    }
}

/// Ends what the driver has seen: so many heads of the list that begins with the last one.
fn end_batch(
    region: &QueueRegion,
    in_flight: &mut [bool],
    last: u16,
    batch: u16,
) -> Result<Vec<u16>, &'static str> {
    if usize::from(batch) > in_flight.len() {
        return Err("the ring has used more since than can have been in flight");
    }
    let mut seen = vec![false; in_flight.len()];
    let mut shown = Vec::with_capacity(usize::from(batch));
    let mut head = last;
    for _ in 0..batch {
        match seen.get_mut(usize::from(head)) {
            None => return Err("its last batch has a head that is not in the ring"),
            Some(true) => return Err("its last batch has a head twice"),
            Some(seen) => *seen = true,
        }
        if let Some(open) = in_flight.get_mut(usize::from(head)) {
            *open = false;
        }
        shown.push(head);
        head = region.load_u16(entry(head, ENTRY_NEXT));
    }
    Ok(shown)
}

/// Whether so many heads, these, can be in flight in the ring as it is.
fn fits(
    in_flight: &[bool],
    count: usize,
    ring: &AvailRing<impl Fn(u16) -> u16>,
) -> Result<(), &'static str> {
    if count == 0 {
        return Ok(());
    }
    let ahead = ring.avail_idx.wrapping_sub(ring.used_idx);
    if usize::from(ahead) > in_flight.len() {
        return Err("the ring has more available than it has descriptors");
    }
    if usize::from(ahead) < count {
        return Err("more is in flight in it than the ring has made available");
    }
    // What is available behind them was not taken, and no head is twice on its way.
    let available_again = |index: u16| {
        let head = (ring.head)(ring.used_idx.wrapping_add(index));
        in_flight.get(usize::from(head)).copied().unwrap_or(false)
    };
    let first = u16::try_from(count).unwrap_or(u16::MAX);
    if (first..ahead).any(available_again) {
        return Err("a head that is in flight in it is available in the ring");
    }
    Ok(())
}
