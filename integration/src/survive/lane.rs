//! One queue of a verified disk: its ring, the requests under way on it, and what becomes of them.
//!
//! A slot whose request ended is used again last of all, so that a second completion of it finds the slot
//! empty.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use super::finding::{Problem, Report};
use super::journal::{Journal, Kind, Work};
use crate::driver::memory::GuestMemory;
use crate::driver::ring::{Desc, Format, Ring, Used};
use crate::driver::{DriverError, HEADER_BYTES, header, kind, status};
use crate::frontend::wait_readable;
use crate::random::Random;

/// Entries of a ring.
pub const QUEUE_SIZE: u16 = 128;
/// Descriptors of a request: header, two segments, status.
const DESCS: u16 = 4;
/// Requests for which a ring has places.
pub const SLOTS: u16 = QUEUE_SIZE / DESCS;
/// Bytes of a slot beside its data: header, status byte, a range, an indirect table.
const SLOT_BYTES: u64 = 256;
const STATUS_AT: u64 = 32;
const RANGE_AT: u64 = 48;
const TABLE_AT: u64 = 128;
/// How long a call may be on its way, on a busy machine.
const CALL_PATIENCE: Duration = Duration::from_secs(5);

/// Where a lane lies in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its ring, [`Ring::SPAN_BYTES`] long, and behind it its slots.
    pub control: u64,
    /// The data of its slots.
    pub data: u64,
    /// Sectors of a request at most.
    pub most_sectors: u32,
}

impl Place {
    /// Bytes that a lane takes at [`Place::control`].
    pub const CONTROL_BYTES: u64 = Ring::SPAN_BYTES + SLOTS as u64 * SLOT_BYTES;

    /// Bytes that it takes at [`Place::data`].
    #[must_use]
    pub fn data_bytes(most_sectors: u32) -> u64 {
        u64::from(most_sectors) * crate::driver::SECTOR_BYTES * u64::from(SLOTS)
    }

    fn slot(&self, slot: u16) -> u64 {
        self.control + Ring::SPAN_BYTES + u64::from(slot) * SLOT_BYTES
    }

    fn data(&self, slot: u16) -> u64 {
        let bytes = u64::from(self.most_sectors) * crate::driver::SECTOR_BYTES;
        self.data + u64::from(slot) * bytes
    }
}

#[derive(Debug, Clone, Copy)]
struct UnderWay {
    work: Work,
    since: Instant,
}

/// A queue with what is under way on it.
#[derive(Debug)]
pub struct Lane {
    /// The ring.
    pub ring: Ring,
    place: Place,
    slots: Vec<Option<UnderWay>>,
    free: VecDeque<u16>,
    /// Every other request lies in an indirect table.
    indirect: bool,
    /// The device was asked for a call, and none was seen since.
    asked: bool,
    /// Since when something is completed whose call did not come yet.
    call_due: Option<Instant>,
    /// How long a call may be on its way.
    pub call_patience: Duration,
}

impl Lane {
    /// An empty ring in guest memory.
    ///
    /// # Errors
    /// [`DriverError`] if it does not lie there, or an eventfd can't be made.
    pub fn new(
        memory: &GuestMemory,
        place: Place,
        format: Format,
        indirect: bool,
    ) -> Result<Self, DriverError> {
        Ok(Self {
            ring: Ring::with_format(memory, place.control, QUEUE_SIZE, format)?,
            place,
            slots: vec![None; usize::from(SLOTS)],
            free: (0..SLOTS).collect(),
            indirect,
            asked: false,
            call_due: None,
            call_patience: CALL_PATIENCE,
        })
    }

    /// Requests under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The request that is under way for longest, if it is for longer than `patience`.
    #[must_use]
    pub fn overdue(&self, patience: Duration) -> Option<Problem> {
        let oldest = self.slots.iter().flatten().min_by_key(|u| u.since)?;
        let (work, age) = (oldest.work, oldest.since.elapsed());
        (age > patience).then_some(Problem::Lost { work, age })
    }

    /// Offers a request; the device sees it with [`Ring::publish`]. Nothing is offered without a free slot.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn offer(
        &mut self,
        memory: &GuestMemory,
        journal: &Journal,
        work: Work,
        random: &mut Random,
    ) -> Result<(), DriverError> {
        let Some(slot) = self.free.pop_front() else {
            return Err(DriverError::Full);
        };
        let descs = self.descriptors(memory, journal, &work, slot, random)?;
        let head = slot * DESCS;
        if self.indirect && random.below(2) == 0 {
            let table = self.place.slot(slot) + TABLE_AT;
            self.ring.offer_table(memory, head, table, &descs)?;
        } else {
            self.ring.offer(memory, head, &descs)?;
        }
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            let since = Instant::now();
            *place = Some(UnderWay { work, since });
        }
        Ok(())
    }

    fn descriptors(
        &self,
        memory: &GuestMemory,
        journal: &Journal,
        work: &Work,
        slot: u16,
        random: &mut Random,
    ) -> Result<Vec<Desc>, DriverError> {
        let (at, data) = (self.place.slot(slot), self.place.data(slot));
        let (number, sector) = match work.kind {
            Kind::Read => (kind::IN, work.first),
            Kind::Write => (kind::OUT, work.first),
            Kind::Zeroes => (kind::WRITE_ZEROES, 0),
            Kind::Flush => (kind::FLUSH, 0),
        };
        memory.write(at, &header(number, sector))?;
        memory.write(at + STATUS_AT, &[status::UNTOUCHED])?;
        let mut descs = vec![Desc::readable(at, HEADER_BYTES)];
        match work.kind {
            Kind::Write => {
                memory.write(data, &journal.data(work))?;
                descs.extend(
                    pieces(work, random).map(|(from, len)| Desc::readable(data + from, len)),
                );
            }
            Kind::Read => {
                // What a slot's request before left there must not pass for what this one reads.
                for sector in 0..u64::from(work.sectors) {
                    memory.write(data + sector * crate::driver::SECTOR_BYTES, &[0xdd; 8])?;
                }
                descs.extend(
                    pieces(work, random).map(|(from, len)| Desc::writable(data + from, len)),
                );
            }
            Kind::Zeroes => {
                let mut range = work.first.to_le_bytes().to_vec();
                range.extend(work.sectors.to_le_bytes());
                range.extend([0; 4]);
                memory.write(at + RANGE_AT, &range)?;
                descs.push(Desc::readable(at + RANGE_AT, 16));
            }
            Kind::Flush => {}
        }
        descs.push(Desc::writable(at + STATUS_AT, 1));
        Ok(descs)
    }

    /// Takes what the device has used, and looks at it; how many were right.
    ///
    /// # Errors
    /// The first problem; what follows it is taken by the next call.
    pub fn reap(
        &mut self,
        memory: &GuestMemory,
        journal: &mut Journal,
        report: &mut Report,
    ) -> Result<usize, Problem> {
        let mut count = 0;
        while let Some(used) = self.ring.poll_used(memory)? {
            self.take(memory, journal, used, report)?;
            count += 1;
        }
        if count > 0 && std::mem::take(&mut self.asked) {
            self.call_due.get_or_insert_with(Instant::now);
        }
        self.look_for_call()?;
        Ok(count)
    }

    /// Sees whether the call came that belongs to what was completed.
    fn look_for_call(&mut self) -> Result<(), Problem> {
        let Some(due) = self.call_due else {
            return Ok(());
        };
        if wait_readable(self.ring.call.as_fd(), Duration::ZERO) {
            let _ = self.ring.call.read();
            self.call_due = None;
        } else if due.elapsed() > self.call_patience {
            self.call_due = None;
            return Err(Problem::NoCall);
        }
        Ok(())
    }

    /// Nobody is there to call: a call that is due comes when somebody is again.
    pub fn is_alone(&mut self) {
        if let Some(due) = &mut self.call_due {
            *due = Instant::now();
        }
    }

    /// Asks for a call with what is used next; what was used already has to be looked at once more, and
    /// [`Lane::was_asked`] told.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn ask_for_call(&self, memory: &GuestMemory) -> Result<(), DriverError> {
        if self.call_due.is_none() {
            // Of what was looked at already, or to say that a back-end is there again.
            let _ = self.ring.call.read();
        }
        Ok(self.ring.ask_for_call(memory)?)
    }

    /// What is used from now on comes with a call.
    pub fn was_asked(&mut self) {
        self.asked = true;
    }

    /// Has the device call another eventfd; a call on the old one is not waited for any more.
    pub fn new_call(&mut self, call: EventFd) {
        self.ring.call = call;
        self.asked = false;
        self.call_due = None;
    }

    fn take(
        &mut self,
        memory: &GuestMemory,
        journal: &mut Journal,
        used: Used,
        report: &mut Report,
    ) -> Result<(), Problem> {
        let doubled = Problem::Doubled { id: used.id };
        let slot = u16::try_from(used.id).ok().filter(|id| id % DESCS == 0);
        let Some(slot) = slot.map(|id| id / DESCS) else {
            return Err(doubled);
        };
        let place = self.slots.get_mut(usize::from(slot));
        let Some(UnderWay { work, .. }) = place.and_then(Option::take) else {
            return Err(doubled);
        };
        self.free.push_back(slot);
        let read = if work.kind == Kind::Read {
            work.bytes()
        } else {
            0
        };
        let data = memory.read(self.place.data(slot), read)?;
        let checked = self.check(memory, &work, slot, used.len);
        let right = journal.acknowledged(&work, &data);
        checked?;
        right?;
        match work.kind {
            Kind::Read => report.reads += 1,
            Kind::Write | Kind::Zeroes => report.writes += 1,
            Kind::Flush => report.flushes += 1,
        }
        Ok(())
    }

    fn check(
        &self,
        memory: &GuestMemory,
        work: &Work,
        slot: u16,
        given: u32,
    ) -> Result<(), Problem> {
        let work = *work;
        let byte = memory.read(self.place.slot(slot) + STATUS_AT, 1)?;
        match byte.first().copied().unwrap_or(status::UNTOUCHED) {
            status::OK => {}
            status::UNTOUCHED => return Err(Problem::NoStatus { work }),
            status => return Err(Problem::Failed { work, status }),
        }
        let written = if work.kind == Kind::Read {
            work.bytes()
        } else {
            0
        };
        let expected = u32::try_from(written + 1).unwrap_or(u32::MAX);
        if given != expected {
            return Err(Problem::Length {
                work,
                given,
                expected,
            });
        }
        Ok(())
    }
}

/// The data of a request in one segment or two: where each begins, and its bytes.
fn pieces(work: &Work, random: &mut Random) -> impl Iterator<Item = (u64, u32)> {
    let sector = u32::try_from(super::content::SECTOR).unwrap_or(0);
    let all = work.sectors * sector;
    let first = match u32::try_from(random.below(u64::from(work.sectors.max(1)))) {
        Ok(cut) if cut > 0 && random.below(2) == 0 => cut * sector,
        _ => all,
    };
    let both = [(0, first), (u64::from(first), all - first)];
    both.into_iter().filter(|(_, bytes)| *bytes > 0)
}
