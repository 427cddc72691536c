//! A guest that reads, writes, zeroes, discards and flushes at random, many requests at a time, and compares
//! every byte that it reads. No two requests in flight overlap if one of them changes something, so that what
//! each unit must hold is known.

use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_integration::disk::{DATA, Disk, GROUP, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::ring::{Format, Used};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::random::Random;

use crate::content::{Content, Value};

/// Most bytes of a request.
const MOST_BYTES: usize = 0x2_0000;
/// From one slot's data to the next.
const SLOT_BYTES: u64 = 0x4_0000;

/// A request in flight.
#[derive(Debug)]
struct Pending {
    queue: usize,
    slot: u16,
    request: Request,
    units: Range<usize>,
    /// What the units become.
    value: Option<Value>,
}

/// A guest on a disk.
#[derive(Debug)]
pub struct Guest<'a> {
    disk: Disk,
    content: &'a mut Content,
    random: &'a mut Random,
    pending: Vec<Pending>,
    /// Around here half of its requests are.
    focus: Range<usize>,
    /// Requests that came back.
    pub done: u64,
}

impl<'a> Guest<'a> {
    /// Attaches a disk.
    pub fn attach(
        socket: &Path,
        format: Format,
        queues: u16,
        content: &'a mut Content,
        random: &'a mut Random,
    ) -> Result<Self, Box<dyn Error>> {
        let mut options = Options {
            queues,
            ..Options::default()
        };
        options.features |= feature::BLK_WRITE_ZEROES | feature::BLK_DISCARD;
        if format == Format::Packed {
            options.features |= feature::RING_PACKED;
        }
        let disk = Disk::attach(socket, &options)?;
        let wanted = feature::BLK_WRITE_ZEROES | feature::BLK_DISCARD;
        if disk.features & wanted != wanted {
            return Err("zeroes and discards are not offered".into());
        }
        let units = content.units();
        Ok(Self {
            disk,
            content,
            random,
            pending: Vec::new(),
            focus: 0..units,
            done: 0,
        })
    }

    /// Half of all requests are to be in this part of the disk.
    pub fn focus(&mut self, bytes: Range<u64>) -> Result<(), Box<dyn Error>> {
        let unit = self.content.unit_bytes;
        let (start, end) = (usize::try_from(bytes.start)?, usize::try_from(bytes.end)?);
        let end = (end / unit).min(self.content.units());
        self.focus = (start / unit).min(end.saturating_sub(1))..end;
        Ok(())
    }

    /// Keeps requests in flight for a while.
    pub fn run(&mut self, how_long: Duration) -> Result<(), Box<dyn Error>> {
        let end = Instant::now() + how_long;
        let mut last = Instant::now();
        while Instant::now() < end {
            self.offer()?;
            if self.collect()? > 0 {
                last = Instant::now();
            } else if last.elapsed() > PATIENCE {
                return Err(format!("nothing comes back of {:?}", self.pending).into());
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    /// Waits for all requests, and reads the whole disk.
    pub fn read_all(&mut self) -> Result<(), Box<dyn Error>> {
        let sectors = (self.content.units() * self.content.unit_bytes) as u64 / SECTOR_BYTES;
        let bytes = self.disk.read_all(sectors)?;
        match self.content.first_wrong(0, &bytes) {
            Some(unit) => Err(format!("unit {unit} read other bytes").into()),
            None => Ok(()),
        }
    }

    /// The device is gone: takes what it gave back, and leaves the rest in doubt. How many of those would
    /// have changed something.
    pub fn lose(mut self) -> Result<usize, Box<dyn Error>> {
        self.collect()?;
        let mut open = 0;
        for pending in self.pending {
            if let Some(value) = pending.value {
                self.content.doubt(pending.units, value);
                open += 1;
            }
        }
        Ok(open)
    }

    /// Fills some of the free slots.
    fn offer(&mut self) -> Result<(), Box<dyn Error>> {
        for queue in 0..self.disk.rings.len() {
            let first = u16::try_from(queue)? * GROUP;
            let busy = |slot| self.pending.iter().any(|p: &Pending| p.slot == slot);
            let free: Vec<u16> = (first..first + GROUP).filter(|slot| !busy(*slot)).collect();
            // Sometimes few, so that zones are found without a request, too.
            if free.is_empty() || self.random.below(4) == 0 {
                continue;
            }
            for slot in free {
                if let Some(pending) = self.request(queue, slot)? {
                    self.disk.push(queue, slot, &pending.request)?;
                    self.pending.push(pending);
                }
            }
            self.disk.publish(queue)?;
        }
        Ok(())
    }

    /// A random request, unless what it would touch is being used.
    fn request(&mut self, queue: usize, slot: u16) -> Result<Option<Pending>, Box<dyn Error>> {
        let units = self.range();
        let (kind, value) = match self.random.below(32) {
            0..12 => (kind::IN, None),
            12..26 => (kind::OUT, Some(self.content.next_stamp())),
            26..29 => (kind::WRITE_ZEROES, Some(Value::Zeroes)),
            29 => (kind::DISCARD, Some(Value::Anything)),
            _ => (kind::FLUSH, None),
        };
        let overlaps = |other: &Pending| {
            (value.is_some() || other.value.is_some())
                && other.units.start < units.end
                && units.start < other.units.end
        };
        if kind != kind::FLUSH && self.pending.iter().any(overlaps) {
            return Ok(None);
        }
        let unit_bytes = self.content.unit_bytes;
        let sector = (units.start * unit_bytes) as u64 / SECTOR_BYTES;
        let bytes = units.len() * unit_bytes;
        let at = DATA + u64::from(slot) * SLOT_BYTES;
        let (sector, segments) = match kind {
            kind::FLUSH => (0, Vec::new()),
            kind::IN => {
                self.disk.memory.fill(at, bytes, 0xdd)?;
                (sector, self.segments(at, bytes)?)
            }
            kind::OUT => {
                let stamp = value.unwrap_or(Value::Zeroes);
                let content = units.clone().flat_map(|unit| stamp.bytes(unit, unit_bytes));
                let content: Vec<u8> = content.collect();
                self.disk.memory.write(at, &content)?;
                (sector, self.segments(at, bytes)?)
            }
            _ => {
                let sectors = u32::try_from(bytes as u64 / SECTOR_BYTES)?;
                let mut range = sector.to_le_bytes().to_vec();
                range.extend(sectors.to_le_bytes());
                range.extend([0; 4]);
                self.disk.memory.write(at, &range)?;
                (0, vec![(at, 16)])
            }
        };
        let units = if kind == kind::FLUSH { 0..0 } else { units };
        Ok(Some(Pending {
            queue,
            slot,
            request: Request {
                kind,
                sector,
                segments,
            },
            units,
            value,
        }))
    }

    /// Some units, most often few.
    fn range(&mut self) -> Range<usize> {
        let most = MOST_BYTES / self.content.unit_bytes;
        let most = [1, 8, most][self.random.index(3)].min(most);
        let length = 1 + self.random.index(most);
        let from = if self.random.below(2) == 0 {
            self.focus.clone()
        } else {
            0..self.content.units()
        };
        let start = from.start + self.random.index(from.len().max(1));
        start..(start + length).min(self.content.units())
    }

    /// One to three segments, cut at sectors: at 4096 bytes within data units, too.
    fn segments(&mut self, at: u64, bytes: usize) -> Result<Vec<(u64, u32)>, Box<dyn Error>> {
        let sectors = bytes / 512;
        let mut cuts: Vec<usize> = (0..self.random.below(3))
            .map(|_| self.random.index(sectors) * 512)
            .collect();
        cuts.extend([0, bytes]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut segments = Vec::new();
        for pair in cuts.windows(2) {
            segments.push((at + pair[0] as u64, u32::try_from(pair[1] - pair[0])?));
        }
        Ok(segments)
    }

    /// Takes and checks what came back: how many.
    fn collect(&mut self) -> Result<usize, Box<dyn Error>> {
        let mut taken = 0;
        for queue in 0..self.disk.rings.len() {
            while let Some(used) = self.disk.rings[queue].poll_used(&self.disk.memory)? {
                self.take(queue, used)?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    fn take(&mut self, queue: usize, used: Used) -> Result<(), Box<dyn Error>> {
        let is_it = |p: &Pending| p.queue == queue && u32::from(Disk::head(p.slot)) == used.id;
        let at = self.pending.iter().position(is_it);
        let pending = self
            .pending
            .swap_remove(at.ok_or("a head that is not in flight was used")?);
        let check = self.disk.check(pending.slot, &pending.request, used.len);
        check.map_err(|e| format!("{e}: {pending:?}"))?;
        if pending.request.kind == kind::IN {
            let bytes = pending.units.len() * self.content.unit_bytes;
            let at = DATA + u64::from(pending.slot) * SLOT_BYTES;
            let read = self.disk.memory.read(at, bytes)?;
            if let Some(unit) = self.content.first_wrong(pending.units.start, &read) {
                return Err(format!("unit {unit} read other bytes: {pending:?}").into());
            }
        }
        if let Some(value) = pending.value {
            self.content.set(pending.units, value);
        }
        self.done += 1;
        Ok(())
    }
}
