//! Runs beside single chains: two drivers do the same in two memories, one queue is served by runs and the other chain by
//! chain. Whatever the driver does, both take the same, refuse the same, and leave the same bytes: in rings, data, dirty
//! logs and in-flight regions. (Only where one used entry may stand for several, rings differ, and say the same.)

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_dataplane::memory::{DirtyLog, GuestMemory, RegionSpec, SharedArea, anonymous};
use bulkhead_dataplane::virtqueue::run::MOST_CHAINS;
use bulkhead_dataplane::virtqueue::{
    Chain, Format, QueueFeatures, QueueRegion, RingError, Run, Virtqueue,
};
use bulkhead_dataplane::worker::message::RingLayout;
use bulkhead_integration::driver::desc::Desc;
use bulkhead_integration::driver::memory::GuestMemory as Shared;
use bulkhead_integration::driver::ring::{Format as RingFormat, Ring};
use bulkhead_integration::random::Random;

const BASE: u64 = 0x10_0000;
const TABLES: u64 = BASE + 0x1_0000;
const DATA: u64 = BASE + 0x2_0000;
const BYTES: u64 = 0x4_0000;
/// A second region lies right behind the first, and a third one elsewhere.
const SECOND: u64 = BASE + BYTES;
const THIRD: u64 = 0x100_0000;
const LOG_BYTES: u64 = 0x1000;

/// What a queue is, beside its size.
#[derive(Debug, Clone, Copy)]
struct Shape {
    features: QueueFeatures,
    /// Its frames are written by the device.
    writes: bool,
    region: bool,
}

impl Shape {
    fn all() -> impl Iterator<Item = Self> {
        (0..32u8).map(|bits| {
            let bit = |at: u8| bits >> at & 1 != 0;
            Self {
                features: QueueFeatures {
                    packed: bit(0),
                    event_idx: bit(1),
                    indirect: true,
                    in_order: bit(2),
                },
                writes: bit(3),
                region: bit(4),
            }
        })
    }

    fn run(self) -> Run {
        if self.writes {
            Run::to_write()
        } else {
            Run::to_read()
        }
    }
}

/// A driver with its memory, and the queue that serves it.
struct Side {
    memory: Shared,
    ring: Ring,
    queue: Virtqueue,
    log: File,
    region: Option<OwnedFd>,
    /// A used entry may stand for several.
    batches: bool,
}

impl Side {
    fn new(size: u16, shape: Shape) -> Self {
        let layout = [(BASE, BYTES, 0), (SECOND, BYTES, 0), (THIRD, BYTES, 0)];
        let memory = Shared::new(&layout).expect("memory");
        let format = if shape.features.packed {
            RingFormat::Packed
        } else {
            RingFormat::Split
        };
        let mut ring = Ring::with_format(&memory, BASE, size, format).expect("ring");
        ring.event_idx = shape.features.event_idx;
        ring.in_order = shape.features.in_order;
        let specs = memory.regions().iter().map(|region| {
            let entry = region.entry();
            let spec = RegionSpec {
                guest_addr: entry.guest_addr,
                bytes: entry.size_bytes,
                user_addr: entry.user_addr,
                file_offset: entry.mmap_offset,
            };
            (spec, region.file())
        });
        let mapped = GuestMemory::map(&specs.collect::<Vec<_>>()).expect("mapped");
        let (_, log) = anonymous(LOG_BYTES).expect("log");
        let dirty = Arc::new(DirtyLog::default());
        let area = SharedArea::map(log.as_fd(), 0, LOG_BYTES).expect("mapped");
        dirty.set_area(Some(area));
        dirty.enable(true);
        let mapped = Arc::new(mapped.with_log(&dirty));
        let layout = RingLayout {
            size,
            desc: ring.desc,
            avail: ring.avail,
            used: ring.used,
        };
        let queue = Virtqueue::new(&mapped, layout, ring.base(), shape.features);
        let mut queue = queue.expect("the ring lies in memory");
        queue.set_log(Some(ring.used));
        let region = shape.region.then(|| {
            let format = shape.features.format();
            let (region, file) = region(format, size);
            queue.track(region).expect("it fits");
            file
        });
        Self {
            memory,
            ring,
            queue,
            log: log.into(),
            region,
            batches: shape.features.in_order && !shape.writes,
        }
    }

    /// All bytes that anybody may look at.
    fn bytes(&self) -> Vec<Vec<u8>> {
        let of = |file: &File, bytes: u64| {
            let mut all = vec![0; usize::try_from(bytes).expect("small")];
            file.read_exact_at(&mut all, 0).expect("read");
            all
        };
        let guest = |at: u64, len: usize| self.memory.read(at, len).expect("inside");
        let mut all = vec![of(&self.log, LOG_BYTES)];
        if !self.batches {
            all.push(guest(BASE, 0x6000));
        }
        all.extend([DATA, SECOND, THIRD].map(|at| guest(at, 0x2000)));
        if let Some(region) = &self.region {
            let file = File::from(region.try_clone().expect("a descriptor"));
            let bytes = file.metadata().expect("stat").len();
            all.push(of(&file, bytes));
        }
        all
    }
}

fn region(format: Format, size: u16) -> (QueueRegion, OwnedFd) {
    let bytes = format.region_bytes(size);
    let (_, file) = anonymous(bytes).expect("region");
    let area = SharedArea::map(file.as_fd(), 0, bytes).expect("mapped");
    let region = QueueRegion::new(&Arc::new(area), format, 0, size);
    (region.expect("it fits"), file)
}

/// The same ring twice: served by runs, and chain by chain.
struct Twins {
    runs: Side,
    singles: Side,
    shape: Shape,
    size: u16,
    free: Vec<u16>,
    run: Run,
    taken: Vec<(usize, u32)>,
    /// Chains of runs that ended.
    ended: usize,
}

/// What was taken: its id, and what the device reads or would write.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    id: u16,
    readable: Vec<u8>,
    writable: u64,
}

fn seen(id: u16, chain: &Chain) -> Seen {
    let mut readable = vec![0; usize::try_from(chain.readable.bytes()).expect("small")];
    assert!(chain.readable.copy_out(0, &mut readable));
    Seen {
        id,
        readable,
        writable: chain.writable.bytes(),
    }
}

impl Twins {
    fn new(size: u16, shape: Shape) -> Self {
        Self {
            runs: Side::new(size, shape),
            singles: Side::new(size, shape),
            shape,
            size,
            free: (0..size).collect(),
            run: shape.run(),
            taken: Vec::new(),
            ended: 0,
        }
    }

    /// Has both drivers do the same.
    fn both<T>(&mut self, act: impl Fn(&mut Side) -> T) -> T {
        act(&mut self.runs);
        act(&mut self.singles)
    }

    /// Most chains are plain; others have two descriptors, the other direction, a table, no bytes, or lie in two regions
    /// or none.
    fn chain(&self, id: u16, random: &mut Random, bad: bool) -> Vec<Desc> {
        let at = [DATA, SECOND, THIRD][random.index(3)] + 0x80 * u64::from(id % 64);
        let bytes = 1 + u32::try_from(random.below(0x80)).expect("small");
        let desc = |at, bytes| match self.shape.writes {
            true => Desc::writable(at, bytes),
            false => Desc::readable(at, bytes),
        };
        match random.below(if bad { 16 } else { 40 }) {
            0 if self.size > 1 => vec![desc(at, bytes), desc(at + 0x40, 8)],
            1 => vec![Desc::writable(at, bytes)],
            2 => vec![Desc::readable(at, bytes)],
            3 => vec![desc(at, 0)],
            4 => vec![desc(SECOND - 4, 16)],
            5 if bad => vec![desc(THIRD + BYTES - 4, 5 + bytes)],
            6 if bad => vec![desc(0x40, bytes)],
            _ => vec![desc(at, bytes)],
        }
    }

    /// Offers chains until there is no id or no room, or enough.
    fn offer(&mut self, random: &mut Random, bad: bool) {
        for _ in 0..random.below(u64::from(self.size) + 4) {
            // No more than there are: one that breaks its ring that way is for [`spoil`].
            let base = u16::try_from(self.runs.queue.base() & 0xffff).expect("16 bits");
            let open = self.runs.ring.next_avail.wrapping_sub(base);
            if !self.shape.features.packed && open >= self.size {
                break;
            }
            let Some(id) = self.free.pop() else { break };
            let (descs, stamp) = (self.chain(id, random, bad), random.bytes(0x80));
            let table = random.below(30) == 0;
            // The table of a split queue has the rest of a chain behind its head.
            let fits = self.shape.features.packed || descs.len() == 1 || table;
            let descs = if fits { &descs[..] } else { &descs[..1] };
            let offered = self.both(|side| {
                if let Some(first) = descs.first() {
                    let _ = side.memory.write(first.addr, &stamp);
                }
                let at = TABLES + 0x40 * u64::from(id);
                if table {
                    side.ring.offer_table(&side.memory, id, at, descs)
                } else {
                    side.ring.offer(&side.memory, id, descs)
                }
            });
            if offered.is_err() {
                self.free.push(id);
                break;
            }
        }
        self.both(|side| side.ring.publish_quietly(&side.memory).expect("inside"));
    }

    /// Takes a turn: some chains are taken, as runs as far as they are plain, some end, the others are put back. Whether
    /// the ring is still good.
    fn turn(&mut self, random: &mut Random, most: usize) -> Result<(), RingError> {
        let mut left = most;
        loop {
            let count = self.take_run(random, left);
            left -= count;
            // What is behind a run is taken while the run is out, or after it has ended.
            let early = random.below(2) == 0;
            if early {
                let some = random_count(random, count);
                self.end_run(random, some);
            }
            let single = self.take_single()?;
            if let Some(id) = single {
                let back = random.below(3) == 0;
                let len = u32::try_from(random.below(9)).expect("small");
                self.both(|side| match back {
                    true => side.queue.unpop(id),
                    false => side.queue.push_used(id, len),
                });
                if back {
                    left = 0;
                }
                if !back && self.run.out() > 0 {
                    // It can't be put back any more: neither can what came before.
                    self.end_run(random, self.run.out());
                }
            }
            if !early {
                let some = random_count(random, count);
                self.end_run(random, some);
            }
            let put_back = self.run.out();
            self.put_back_run();
            if left == 0 || put_back > 0 || (count == 0 && single.is_none()) {
                return Ok(());
            }
            left = left.saturating_sub(1);
        }
    }

    /// What comes next: plain chains as a run on one side, one by one on the other.
    fn take_run(&mut self, random: &mut Random, most: usize) -> usize {
        // A hint, which changes nothing.
        let ahead = random.index(2 * MOST_CHAINS);
        self.runs.queue.announce_run(ahead, 12, random.index(200));
        let count = self.runs.queue.pop_run(&mut self.run, most);
        assert!(count <= most.min(MOST_CHAINS) && count == self.run.len());
        assert_eq!((self.run.first_out(), self.run.out()), (0, count));
        self.taken.clear();
        for index in 0..count {
            let mut chain = Chain::default();
            let id = self.singles.queue.pop(&mut chain);
            let id = id.expect("a good ring").expect("as many");
            let (slice, bytes) = (self.run.get(index), self.run.bytes(index));
            assert_eq!(slice.bytes(), bytes);
            let mut content = vec![0; bytes];
            assert!(slice.copy_out(0, &mut content));
            if self.shape.writes {
                let stamp = random.bytes(bytes);
                assert!(slice.copy_in(0, &stamp) && chain.writable.copy_in(0, &stamp));
                self.run.mark(index, bytes);
                chain.writable.mark_front(bytes);
                assert_eq!(chain.writable.bytes(), bytes as u64);
            } else {
                assert_eq!(seen(id, &chain).readable, content);
            }
            let (readable, writable) = (chain.readable.bytes(), chain.writable.bytes());
            assert_eq!(readable + writable, bytes as u64, "nothing else is in it");
            self.taken
                .push((usize::from(id), u32::try_from(bytes).expect("small")));
        }
        assert_eq!(self.runs.queue.in_flight(), self.singles.queue.in_flight());
        assert_eq!(self.runs.queue.base(), self.singles.queue.base());
        count
    }

    /// The next chain, whatever it is.
    fn take_single(&mut self) -> Result<Option<u16>, RingError> {
        let [runs, singles] = [&mut self.runs, &mut self.singles].map(|side| {
            let mut chain = Chain::default();
            let id = side.queue.pop(&mut chain)?;
            Ok(id.map(|id| seen(id, &chain)))
        });
        assert_eq!(runs, singles);
        Ok(singles?.map(|seen| seen.id))
    }

    /// The first of those that are out end.
    fn end_run(&mut self, random: &mut Random, count: usize) {
        let count = count.min(self.run.out());
        let first = self.run.first_out();
        let ended = &self.taken[first..first + count];
        let lengths: Vec<u32> = ended
            .iter()
            .map(|(_, bytes)| match self.shape.writes {
                true => u32::try_from(random.below(u64::from(*bytes) + 1)).expect("small"),
                false => 0,
            })
            .collect();
        if self.shape.writes {
            self.runs.queue.push_run(&mut self.run, &lengths);
        } else {
            self.runs.queue.push_read(&mut self.run, count);
        }
        for ((id, _), len) in ended.iter().zip(lengths) {
            let id = u16::try_from(*id).expect("an id");
            self.singles.queue.push_used(id, len);
        }
        assert_eq!(self.run.first_out(), first + count);
        self.ended += count;
    }

    fn put_back_run(&mut self) {
        let first = self.run.first_out();
        self.runs.queue.unpop_run(&mut self.run);
        for (id, _) in self.taken[first..].iter().rev() {
            self.singles.queue.unpop(u16::try_from(*id).expect("an id"));
        }
        self.taken.truncate(first);
        assert_eq!((self.run.out(), self.run.len()), (0, first));
    }

    /// Both show what was used, and are the same in every byte; the driver takes it.
    fn show(&mut self) {
        let [runs, singles] = [&mut self.runs, &mut self.singles].map(|side| side.queue.publish());
        assert_eq!(runs, singles, "a call is wanted");
        assert_eq!(self.runs.queue.in_flight(), self.singles.queue.in_flight());
        assert_eq!(self.runs.queue.base(), self.singles.queue.base());
        assert!(self.runs.bytes() == self.singles.bytes(), "bytes differ");
        loop {
            let [runs, singles] = [&mut self.runs, &mut self.singles]
                .map(|side| side.ring.poll_used(&side.memory).expect("in flight"));
            assert_eq!(runs, singles);
            let Some(used) = singles else { break };
            self.free.push(u16::try_from(used.id).expect("an id"));
        }
    }
}

fn random_count(random: &mut Random, count: usize) -> usize {
    match random.below(3) {
        0 => count,
        _ => random.index(count + 1),
    }
}

/// Rings of any size, over many turns.
#[test]
fn a_queue_that_is_served_by_runs_is_as_one_that_is_served_chain_by_chain() {
    for (seed, shape) in (0u64..).zip(Shape::all()) {
        for size in [1, 2, 7, 16, 100, 256] {
            if !shape.features.packed && !u16::is_power_of_two(size) {
                continue;
            }
            let mut random = Random::new(seed << 16 | u64::from(size));
            let mut twins = Twins::new(size, shape);
            for _ in 0..60 {
                twins.offer(&mut random, false);
                let most = random.index(2 * MOST_CHAINS);
                twins.turn(&mut random, most).expect("a good ring");
                twins.show();
            }
            assert!(twins.ended > 20, "{shape:?}: {}", twins.ended);
            assert_eq!(twins.runs.queue.in_flight(), 0, "{shape:?}");
        }
    }
}

/// A driver that wants chains in order sees many end by one entry: of a run to read that was taken while nothing else was
/// in flight.
#[test]
fn one_used_entry_stands_for_a_run_that_was_read_in_order() {
    for packed in [false, true] {
        for in_order in [false, true] {
            let shape = Shape {
                features: QueueFeatures {
                    packed,
                    in_order,
                    ..QueueFeatures::default()
                },
                writes: false,
                region: false,
            };
            let (mut side, mut run) = (Side::new(16, shape), shape.run());
            for id in 0..12 {
                let desc = Desc::readable(DATA, 8);
                let offered = side.ring.offer(&side.memory, id, &[desc]);
                offered.expect("room");
            }
            side.ring.publish_quietly(&side.memory).expect("inside");
            let entries = |side: &Side| {
                let (at, each, id) = match packed {
                    true => (side.ring.desc, 16, 14),
                    false => (side.ring.used + 4, 8, 0),
                };
                let half = |place: u64| side.memory.load_u16(at + each * place + id);
                let written = |place: &u64| {
                    let half = half(*place).expect("inside");
                    if packed {
                        half & 0x8080 == 0x8080
                    } else {
                        half != 0
                    }
                };
                (0..16).filter(written).count()
            };
            assert_eq!(side.queue.pop_run(&mut run, 64), 12);
            side.queue.push_read(&mut run, 12);
            side.queue.publish();
            // Split: that of head 0 is all zeroes.
            let each = if packed { 12 } else { 11 };
            let expected = if in_order { 1 } else { each };
            assert_eq!(entries(&side), expected, "{shape:?}");
            let used = std::iter::from_fn(|| side.ring.poll_used(&side.memory).expect("good"));
            let ids: Vec<u32> = used.map(|used| used.id).collect();
            assert_eq!(ids, (0..12).collect::<Vec<_>>());
        }
    }
}

/// Drivers that break their rings somewhere: the same is refused in the same place.
#[test]
fn a_queue_that_is_served_by_runs_refuses_what_is_refused_chain_by_chain() {
    let (mut broken, mut good) = (0, 0);
    for (seed, shape) in (0u64..150).flat_map(|seed| Shape::all().map(move |shape| (seed, shape))) {
        if shape.region {
            continue;
        }
        let mut random = Random::new(seed << 8);
        let mut twins = Twins::new(16, shape);
        for round in 0..6 {
            twins.offer(&mut random, true);
            let ends = random.below(2) == 0 && spoil(&mut twins, &mut random, round == 0);
            let result = twins.turn(&mut random, 40);
            if result.is_err() {
                broken += 1;
                break;
            }
            good += 1;
            if ends {
                break;
            }
            let [runs, singles] =
                [&mut twins.runs, &mut twins.singles].map(|side| side.queue.publish());
            assert_eq!(runs, singles);
            assert!(twins.runs.bytes() == twins.singles.bytes(), "bytes differ");
            twins.free.clear();
            twins.free.extend(0..16);
        }
    }
    assert!(broken > 500 && good > 500, "{broken} broken, {good} good");
}

/// Writes noise to a field of the ring, the same on both sides. Whether that was the avail index. Runs may read it sooner
/// than single chains do, so that it is only spoilt where nobody has read it, and not made good again.
fn spoil(twins: &mut Twins, random: &mut Random, first: bool) -> bool {
    let (packed, value) = (twins.shape.features.packed, random.next_u64());
    let (what, place) = (random.below(if first { 5 } else { 4 }), random.below(16));
    twins.both(|side| {
        let write = |at: u64, bytes: &[u8]| side.memory.write(at, bytes).expect("inside");
        let desc = side.ring.desc + 16 * place;
        let small = u16::try_from(value % 18).expect("small");
        match (what, packed) {
            (0, _) => write(desc, &value.to_le_bytes()),
            (1, _) => write(desc + 8, &(value & 0x1_ffff).to_le_bytes()[..4]),
            // Flags, or a buffer ID.
            (2, _) => write(desc + 12, &small.to_le_bytes()),
            (3, true) => write(desc + 14, &(value & 0x8087).to_le_bytes()[..2]),
            (3, false) => write(side.ring.avail + 4 + 2 * place, &small.to_le_bytes()),
            (_, true) => write(desc + 12, &0xffff_u16.to_le_bytes()),
            (_, false) => {
                let index = side.ring.next_avail.wrapping_add(small);
                write(side.ring.avail + 2, &index.to_le_bytes());
            }
        }
    });
    !packed && what == 4
}
