//! Power cuts: what a flush, or a write in write-through mode, has promised is in every image that a cut may
//! leave; of the rest, each sector by itself is as old or as new as it ever was since.

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_dataplane::storage::{DelaySpec, RamSpec, StorageSpec, VolatileCache};

use super::rig::{
    CONFIG_WCE, DISCARD, FLUSH, OK, Op, Rig, SECTOR, SECTORS, Shape, WRITE_ZEROES, key,
};
use super::{Random, rounds};

/// What a sector held, from the oldest that a cut may leave: `stable` is an index.
#[derive(Debug, Clone)]
struct History {
    versions: Vec<Content>,
    /// Of the last write that was completed.
    completed: usize,
    /// Nothing older may be left.
    stable: usize,
    /// A write of it is in flight.
    busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Whatever: what was there before, or what a discard left.
    Anything,
    Zero,
    Stamp(u32),
}

fn stamped(sector: u64, stamp: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for chunk in bytes.chunks_exact_mut(12) {
        chunk[..8].copy_from_slice(&sector.to_le_bytes());
        chunk[8..].copy_from_slice(&stamp.to_le_bytes());
    }
    bytes
}

impl Content {
    fn is(self, sector: u64, bytes: &[u8]) -> bool {
        match self {
            Self::Anything => true,
            Self::Zero => bytes.iter().all(|b| *b == 0),
            Self::Stamp(stamp) => bytes == stamped(sector, stamp),
        }
    }
}

/// What is in flight: what it was, and for a flush what was complete when it began.
struct InFlight {
    op: Op,
    sectors: std::ops::Range<u64>,
    /// Of each sector, the version that completes with it.
    versions: Vec<usize>,
    covers: Vec<usize>,
}

struct Model {
    cache: Arc<VolatileCache>,
    shape: Shape,
    rig: Rig,
    random: Random,
    sectors: Vec<History>,
    in_flight: HashMap<(u16, u16), InFlight>,
    stamp: u32,
    /// Writes are stable when they complete.
    through: bool,
}

impl Model {
    fn new(shape: Shape, slow: bool, seed: u64) -> Self {
        let stable = RamSpec::new(SECTORS * SECTOR as u64).expect("memory");
        let cache = VolatileCache::new(stable);
        let mut storage = StorageSpec::Volatile(Arc::clone(&cache));
        if slow {
            let most = std::time::Duration::from_micros(200);
            storage = StorageSpec::Delay(DelaySpec::new(storage, most));
        }
        let before = History {
            versions: vec![Content::Anything],
            completed: 0,
            stable: 0,
            busy: false,
        };
        Self {
            cache,
            shape,
            rig: Rig::new(storage, shape),
            random: Random(seed),
            sectors: vec![before; usize::try_from(SECTORS).expect("few")],
            in_flight: HashMap::new(),
            stamp: 0,
            through: shape.features & FLUSH == 0,
        }
    }

    fn history(&mut self, sector: u64) -> &mut History {
        &mut self.sectors[usize::try_from(sector).expect("few")]
    }

    /// Puts something random into a random queue, where there is room.
    fn submit(&mut self) {
        let queue = u16::try_from(self.random.below(u64::from(self.shape.queues))).expect("few");
        if !self.rig.has_room(queue) {
            return self.take(queue);
        }
        let flush = self.shape.features & FLUSH != 0 && self.random.below(6) == 0;
        let covers = self.sectors.iter().map(|h| h.completed).collect();
        let (op, sectors, content) = if flush {
            (Op::Flush, 0..0, None)
        } else {
            match self.change() {
                Some((op, sectors, content)) => (op, sectors, Some(content)),
                None => return self.take(queue),
            }
        };
        let mut versions = Vec::new();
        for sector in sectors.clone() {
            let history = self.history(sector);
            history.versions.extend(content);
            history.busy = true;
            versions.push(history.versions.len() - 1);
        }
        let slot = self.rig.submit(queue, &op);
        let in_flight = InFlight {
            op,
            sectors,
            versions,
            covers,
        };
        self.in_flight.insert((queue, slot), in_flight);
    }

    /// A change of sectors of which none is in flight.
    fn change(&mut self) -> Option<(Op, std::ops::Range<u64>, Content)> {
        let block = self.shape.block();
        let count = (1 + self.random.below(3)) * block;
        let first = self.random.below((SECTORS - count) / block + 1) * block;
        let sectors = first..first + count;
        if sectors.clone().any(|sector| self.history(sector).busy) {
            return None;
        }
        let length = u32::try_from(count).expect("few");
        match self.random.below(10) {
            0 => Some((Op::Discard(first, length), sectors, Content::Anything)),
            1 => {
                let unmap = self.random.below(2) == 0;
                Some((Op::Zero(first, length, unmap), sectors, Content::Zero))
            }
            _ => {
                self.stamp += 1;
                let stamp = self.stamp;
                let bytes = sectors.clone().flat_map(|s| stamped(s, stamp)).collect();
                Some((Op::Write(first, bytes), sectors, Content::Stamp(stamp)))
            }
        }
    }

    /// Takes in what ended of a queue.
    fn take(&mut self, queue: u16) {
        while let Some((slot, status, _)) = self.rig.poll(queue, 0) {
            assert_eq!(status, OK);
            let ended = self.in_flight.remove(&(queue, slot)).expect("it was");
            if let Op::Flush = ended.op {
                for (history, covered) in self.sectors.iter_mut().zip(&ended.covers) {
                    history.stable = history.stable.max(*covered);
                }
            }
            let through = self.through;
            for (sector, version) in ended.sectors.clone().zip(&ended.versions) {
                let history = self.history(sector);
                history.busy = false;
                history.completed = *version;
                if through {
                    history.stable = *version;
                }
            }
            if through && !ended.sectors.is_empty() {
                // What was written before the change to write-through is no less stable.
                for (history, covered) in self.sectors.iter_mut().zip(&ended.covers) {
                    history.stable = history.stable.max(*covered);
                }
            }
        }
    }

    fn drain(&mut self) {
        while !self.in_flight.is_empty() {
            (0..self.shape.queues).for_each(|queue| self.take(queue));
        }
    }

    /// Cuts the power, and looks at every sector.
    fn cut(&mut self) {
        let random = &mut self.random;
        let mut image = self.cache.cut(|n| random.index(n));
        if let Some(unit) = self.shape.unit {
            let unit = bulkhead_crypto::DataUnit::new(unit).expect("unit");
            let stored = image.clone();
            key()
                .decrypt(unit, 0, &stored, &mut image)
                .expect("whole units");
        }
        for (sector, bytes) in (0..).zip(image.chunks_exact(SECTOR)) {
            let history = self.history(sector);
            let allowed = &history.versions[history.stable..];
            assert!(
                allowed.iter().any(|content| content.is(sector, bytes)),
                "sector {sector} has none of {allowed:?}: {:x?}",
                &bytes[..24]
            );
        }
    }

    /// So many cuts, with some requests between two of them.
    fn cuts(&mut self, count: usize) {
        for _ in 0..count {
            for _ in 0..=self.random.below(12) {
                self.submit();
            }
            // However fast the machine is, some have ended.
            let most = self.random.index(12);
            while self.in_flight.len() > most {
                (0..self.shape.queues).for_each(|queue| self.take(queue));
            }
            self.cut();
        }
    }

    fn set_writeback(&mut self, writeback: bool) {
        self.drain();
        self.rig.device.set_writeback(writeback);
        self.through = !writeback;
    }

    fn end(mut self) {
        self.drain();
        self.cut();
        assert!(
            self.sectors.iter().any(|h| h.stable > 0),
            "nothing was stable"
        );
        self.rig.end();
    }
}

const UNITS: [Option<u32>; 3] = [None, Some(512), Some(4096)];

/// T50: 2,000 images.
#[test]
fn what_was_flushed_is_in_every_image() {
    for (seed, unit) in (1..).zip(UNITS) {
        for slow in [false, true] {
            let shape = Shape {
                unit,
                ..Shape::PLAIN
            };
            let mut model = Model::new(shape, slow, seed);
            model.cuts(rounds(334));
            model.end();
        }
    }
}

/// T51: 500 images of four queues on two workers.
#[test]
fn a_flush_is_for_all_queues_and_workers() {
    for (seed, unit) in (10..).zip([None, Some(4096)]) {
        for slow in [false, true] {
            let shape = Shape {
                unit,
                queues: 4,
                workers: 2,
                ..Shape::PLAIN
            };
            let mut model = Model::new(shape, slow, seed);
            model.cuts(rounds(125));
            model.end();
        }
    }
}

/// T52: 500 images without FLUSH, where every write is stable when it completes, ...
#[test]
fn without_flush_a_completed_write_is_stable() {
    for (seed, unit) in (20..).zip(UNITS) {
        let shape = Shape {
            unit,
            queues: 2,
            workers: 2,
            features: DISCARD | WRITE_ZEROES,
        };
        let mut model = Model::new(shape, true, seed);
        model.cuts(rounds(167));
        model.end();
    }
}

/// ... and 500 with the cache mode changed under way.
#[test]
fn in_write_through_mode_a_completed_write_is_stable() {
    for (seed, unit) in (30..).zip(UNITS) {
        let shape = Shape {
            unit,
            queues: 2,
            workers: 2,
            features: FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES,
        };
        let mut model = Model::new(shape, true, seed);
        for round in 0..rounds(17) {
            model.set_writeback(round % 2 == 0);
            model.cuts(10);
        }
        model.end();
    }
}
