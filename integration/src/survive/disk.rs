//! A verified disk: its connection, its queues, what it was asked last and what it must hold.
//!
//! It does what a virtual machine monitor does when its back-end goes away: it keeps the rings, the eventfds
//! and the in-flight region, connects again and starts the queues again, with the base that QEMU or
//! cloud-hypervisor would give.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::finding::{Finding, Problem, Report};
use super::journal::{Journal, Kind, Work};
use super::lane::{Lane, Place, QUEUE_SIZE, SLOTS};
use crate::disk::{DiskError, Options, feature, negotiate_features};
use crate::driver::memory::GuestMemory;
use crate::driver::ring::Format;
use crate::frontend::message::{self, Inflight, protocol_feature, request};
use crate::frontend::{Frontend, FrontendError};
use crate::random::Random;

/// Which index a frontend gives as a queue's base when its back-end was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// QEMU: the used index; for a packed ring, which it can't look into, where the queue began.
    Used,
    /// cloud-hypervisor: the avail index.
    Avail,
    /// cloud-hypervisor with IN_ORDER: the used index if nothing is under way, else the avail index.
    InOrder,
}

/// A disk to be attached.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Where its back-end listens.
    pub socket: PathBuf,
    /// Queues that are used.
    pub queues: u16,
    /// Packed rings.
    pub packed: bool,
    /// Chains are used in order.
    pub in_order: bool,
    /// The frontend keeps an in-flight region.
    pub inflight: bool,
    /// What it says after a reconnect.
    pub base: Base,
}

impl DiskSpec {
    /// A disk with one split queue and an in-flight region, on a frontend like QEMU.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            queues: 1,
            packed: false,
            in_order: false,
            inflight: true,
            base: Base::Used,
        }
    }
}

/// Where a disk is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Every sector is written once.
    Fill,
    /// Reads, writes, zeroes and flushes, anywhere.
    Mixed,
    /// What is under way ends.
    Drain,
    /// Every sector is read once.
    Sweep,
    /// Nothing is under way any more.
    Done,
}

/// How a disk is used.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    /// Requests under way on each queue.
    pub depth: usize,
    /// Sectors of a request at most.
    pub most_sectors: u32,
    /// Most writes are of what was written just before.
    pub rewrite: bool,
    /// Messages are sent while requests run: one in so many turns; 0: none.
    pub message_every: u64,
    /// How long a request may be under way, or a connection gone.
    pub patience: Duration,
    /// The run's own number.
    pub run: u64,
}

/// Where a disk's lanes lie in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Its control area.
    pub control: u64,
    /// Its data.
    pub data: u64,
}

/// An attached disk.
#[derive(Debug)]
pub struct VerifiedDisk {
    number: u16,
    spec: DiskSpec,
    habits: Habits,
    /// None while the back-end is gone.
    frontend: Option<Frontend>,
    gone_since: Instant,
    lanes: Vec<Lane>,
    journal: Journal,
    kept: Option<(Inflight, OwnedFd)>,
    features: u64,
    /// Where it is.
    pub stage: Stage,
    last_completion: Instant,
    /// The longest time between two completions, while something was under way.
    pub longest_pause: Duration,
    /// When its back-end was killed, until something is completed.
    pub killed_at: Option<Instant>,
    random: Random,
}

impl VerifiedDisk {
    /// Connects for the first time, and starts the queues.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn attach(
        number: u16,
        spec: DiskSpec,
        habits: Habits,
        memory: &GuestMemory,
        room: Room,
    ) -> Result<Self, DiskError> {
        let patience = habits.patience;
        let (frontend, features) = negotiate(&spec, patience)?;
        let (sectors, block_bytes) = geometry(&frontend)?;
        let lanes = lanes(&spec, &habits, memory, room, features)?;
        let owner = habits.run << 16 | u64::from(number);
        let block = u64::from(block_bytes) / crate::driver::SECTOR_BYTES;
        let mut disk = Self {
            number,
            habits,
            frontend: None,
            gone_since: Instant::now(),
            lanes,
            journal: Journal::new(owner, sectors, block),
            kept: None,
            features,
            stage: Stage::Fill,
            last_completion: Instant::now(),
            longest_pause: Duration::ZERO,
            killed_at: None,
            random: Random::new(habits.run ^ u64::from(number)),
            spec,
        };
        if disk.spec.inflight {
            let asked = Inflight::question(disk.spec.queues, QUEUE_SIZE);
            disk.kept = Some(frontend.get_inflight(&asked)?);
        }
        disk.start(&frontend, memory)?;
        disk.frontend = Some(frontend);
        Ok(disk)
    }

    /// Gives memory, region and queues to a connection on which features were negotiated.
    fn start(&self, frontend: &Frontend, memory: &GuestMemory) -> Result<(), DiskError> {
        if let Some((region, file)) = &self.kept {
            frontend.set(request::SET_INFLIGHT_FD, &region.body(), &[file.as_fd()])?;
        }
        share(frontend, memory)?;
        for index in 0..self.lanes.len() {
            self.start_queue(frontend, memory, index, None)?;
        }
        Ok(())
    }

    fn start_queue(
        &self,
        frontend: &Frontend,
        memory: &GuestMemory,
        index: usize,
        base: Option<u32>,
    ) -> Result<(), DiskError> {
        let Some(lane) = self.lanes.get(index) else {
            return Ok(());
        };
        let ring = &lane.ring;
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let small = u8::try_from(index).unwrap_or(u8::MAX);
        let base = match base {
            Some(base) => base,
            None => self.base(lane, memory)?,
        };
        frontend.set_vring_state(request::SET_VRING_NUM, number, u32::from(ring.size))?;
        frontend.set_vring_state(request::SET_VRING_BASE, number, base)?;
        let addresses = message::vring_addresses(
            number,
            memory.user_addr(ring.desc)?,
            memory.user_addr(ring.used)?,
            memory.user_addr(ring.avail)?,
        );
        frontend.set(request::SET_VRING_ADDR, &addresses, &[])?;
        frontend.set_vring_fd(request::SET_VRING_ERR, small, Some(ring.err.as_fd()))?;
        frontend.set_vring_fd(request::SET_VRING_CALL, small, Some(ring.call.as_fd()))?;
        frontend.set_vring_fd(request::SET_VRING_KICK, small, Some(ring.kick.as_fd()))?;
        Ok(frontend.set_vring_state(request::SET_VRING_ENABLE, number, 1)?)
    }

    /// What the frontend gives as base, when it has not heard it from the back-end.
    fn base(&self, lane: &Lane, memory: &GuestMemory) -> Result<u32, DiskError> {
        let ring = &lane.ring;
        let avail = ring.next_avail;
        let used = match ring.format {
            Format::Split => memory.load_u16(ring.used + 2)?,
            Format::Packed => crate::driver::packed::START,
        };
        let place = match self.spec.base {
            Base::Used => used,
            Base::InOrder if lane.under_way() == 0 => ring.last_used,
            Base::Avail | Base::InOrder => avail,
        };
        Ok(match ring.format {
            Format::Split => u32::from(place),
            Format::Packed => u32::from(place) << 16 | u32::from(place),
        })
    }

    /// What has to be watched beside the queues: the connection.
    #[must_use]
    pub fn connection(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.frontend.as_ref().map(|f| f.stream().as_fd())
    }

    /// The queues.
    #[must_use]
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// Whether something is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.lanes.iter().any(|lane| lane.under_way() > 0)
    }

    fn found(&self, report: &mut Report, problem: Problem) {
        let disk = self.number;
        report.findings.push(Finding { disk, problem });
    }

    /// The connection ended.
    pub fn lost_connection(&mut self, report: &mut Report, why: &str) {
        if self.frontend.take().is_none() {
            return;
        }
        self.gone_since = Instant::now();
        report.disconnects += 1;
        if !self.spec.inflight {
            // What was under way then is nobody's.
            self.found(report, Problem::Disconnected(why.to_owned()));
            self.stage = Stage::Done;
        }
    }

    fn connect_again(&mut self, memory: &GuestMemory, report: &mut Report) {
        let outcome = negotiate(&self.spec, Duration::ZERO).and_then(|(frontend, features)| {
            if features != self.features {
                return Err(DiskError::NotOffered(features ^ self.features));
            }
            self.start(&frontend, memory)?;
            Ok(frontend)
        });
        match outcome {
            Ok(frontend) => self.frontend = Some(frontend),
            Err(error) if self.gone_since.elapsed() > self.habits.patience => {
                self.found(report, Problem::Connection(error));
                self.stage = Stage::Done;
            }
            Err(_) => {}
        }
    }

    /// Looks at what was completed, and asks for more; how many were completed.
    pub fn turn(&mut self, memory: &GuestMemory, report: &mut Report) -> usize {
        if self.stage == Stage::Done {
            return 0;
        }
        if self.frontend.is_none() {
            self.lanes.iter_mut().for_each(Lane::is_alone);
            self.connect_again(memory, report);
        }
        let completed = self.reap(memory, report);
        self.next_stage();
        if let Err(problem) = self.offer(memory) {
            self.found(report, problem);
            self.stage = Stage::Done;
        }
        self.look_for_lost(report);
        let every = self.habits.message_every;
        // A connection may end within a reply, and without a region what is under way is lost with it.
        let talks = every > 0 && self.spec.inflight;
        if self.stage == Stage::Mixed && talks && self.random.below(every) == 0 {
            self.say_something(memory, report);
        }
        completed
    }

    /// Takes what was completed.
    pub fn reap(&mut self, memory: &GuestMemory, report: &mut Report) -> usize {
        let mut completed = 0;
        for lane in &mut self.lanes {
            match lane.reap(memory, &mut self.journal, report) {
                Ok(count) => completed += count,
                Err(problem) => report.findings.push(Finding {
                    disk: self.number,
                    problem,
                }),
            }
        }
        if completed > 0 {
            let pause = self.last_completion.elapsed();
            report.longest_pause = report.longest_pause.max(pause);
            self.longest_pause = self.longest_pause.max(pause);
            self.last_completion = Instant::now();
        }
        completed
    }

    fn next_stage(&mut self) {
        self.stage = match self.stage {
            Stage::Fill if self.journal.is_through() && !self.is_busy() => Stage::Mixed,
            Stage::Drain if !self.is_busy() => {
                self.journal.rewind();
                Stage::Sweep
            }
            Stage::Sweep if self.journal.is_through() && !self.is_busy() => Stage::Done,
            same => same,
        };
    }

    fn offer(&mut self, memory: &GuestMemory) -> Result<(), Problem> {
        let depth = self.habits.depth.min(usize::from(SLOTS) / 2);
        for index in 0..self.lanes.len() {
            let mut offered = false;
            while self
                .lanes
                .get(index)
                .is_some_and(|lane| lane.under_way() < depth)
            {
                let Some(work) = self.choose() else { break };
                if let Some(lane) = self.lanes.get_mut(index) {
                    lane.offer(memory, &self.journal, work, &mut self.random)?;
                    offered = true;
                }
            }
            if let Some(lane) = self.lanes.get_mut(index).filter(|_| offered) {
                lane.ring.publish(memory)?;
            }
        }
        Ok(())
    }

    fn choose(&mut self) -> Option<Work> {
        let most = self.habits.most_sectors;
        match self.stage {
            Stage::Fill => self.journal.in_order(Kind::Write, most),
            Stage::Sweep => self.journal.in_order(Kind::Read, most),
            Stage::Mixed => {
                let zeroes = self.features & feature::BLK_WRITE_ZEROES != 0;
                if self.habits.rewrite
                    && self.random.below(4) > 0
                    && let Some(work) = self.journal.again()
                {
                    return Some(work);
                }
                let kind = match self.random.below(100) {
                    0..6 => return Some(Work::FLUSH),
                    6..10 if zeroes => Kind::Zeroes,
                    6..44 => Kind::Read,
                    _ => Kind::Write,
                };
                self.journal.anywhere(kind, most, &mut self.random)
            }
            Stage::Drain | Stage::Done => None,
        }
    }

    fn look_for_lost(&mut self, report: &mut Report) {
        let patience = self.habits.patience;
        let lost = self.lanes.iter().find_map(|lane| lane.overdue(patience));
        if let Some(problem) = lost {
            self.found(report, problem);
            self.stage = Stage::Done;
        }
    }

    /// Sends a message of the kinds that a frontend sends while its guest runs.
    fn say_something(&mut self, memory: &GuestMemory, report: &mut Report) {
        let Some(frontend) = self.frontend.take() else {
            return;
        };
        let outcome = self.message(&frontend, memory);
        self.frontend = Some(frontend);
        match outcome {
            Ok(()) => report.messages += 1,
            Err(error) => {
                if !is_end(&error) {
                    self.found(report, Problem::Message(error));
                }
                self.lost_connection(report, "while a message was answered");
            }
        }
    }

    fn message(&mut self, frontend: &Frontend, memory: &GuestMemory) -> Result<(), DiskError> {
        let index = self.random.index(self.lanes.len().max(1));
        let number = u32::try_from(index).unwrap_or(0);
        match self.random.below(6) {
            0 => geometry(frontend).map(drop),
            1 => Ok(frontend.ask_u64(request::GET_FEATURES).map(drop)?),
            2 => share(frontend, memory),
            3 => {
                frontend.set_vring_state(request::SET_VRING_ENABLE, number, 0)?;
                Ok(frontend.set_vring_state(request::SET_VRING_ENABLE, number, 1)?)
            }
            4 => self.new_call(frontend, index),
            _ => {
                let base = frontend.get_vring_base(number)?;
                self.start_queue(frontend, memory, index, Some(base))?;
                // What was offered meanwhile nobody may have looked at.
                if let Some(lane) = self.lanes.get(index) {
                    lane.ring.kick.write(1)?;
                }
                Ok(())
            }
        }
    }

    /// Another eventfd to be called with; what the old one was told is looked for at once.
    fn new_call(&mut self, frontend: &Frontend, index: usize) -> Result<(), DiskError> {
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        let call = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let small = u8::try_from(index).unwrap_or(u8::MAX);
        lane.new_call(call);
        Ok(frontend.set_vring_fd(request::SET_VRING_CALL, small, Some(lane.ring.call.as_fd()))?)
    }

    /// Asks for a call with the next completion on each queue; whether something was completed already.
    ///
    /// # Errors
    /// [`Problem`], if the ring is not in memory.
    pub fn ask_for_calls(
        &mut self,
        memory: &GuestMemory,
        report: &mut Report,
    ) -> Result<bool, Problem> {
        for lane in &self.lanes {
            lane.ask_for_call(memory)?;
        }
        let completed = self.reap(memory, report) > 0;
        if !completed {
            self.lanes.iter_mut().for_each(Lane::was_asked);
        }
        Ok(completed)
    }

    /// The longest pause, which may still last.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.longest_pause.max(self.last_completion.elapsed())
    }

    /// Lets what is under way end, then reads everything.
    pub fn finish(&mut self) {
        if self.stage != Stage::Done {
            self.stage = Stage::Drain;
        }
    }
}

/// Whether a connection has just ended, with no answer that is wrong.
fn is_end(error: &DiskError) -> bool {
    match error {
        DiskError::Frontend(FrontendError::Closed) => true,
        DiskError::Frontend(FrontendError::Io(error)) => {
            error.kind() == std::io::ErrorKind::BrokenPipe
        }
        _ => false,
    }
}

/// Connects, and negotiates what the specification of a disk asks for.
fn negotiate(spec: &DiskSpec, patience: Duration) -> Result<(Frontend, u64), DiskError> {
    let mut frontend = Frontend::connect(&spec.socket, patience)?;
    let mut options = Options::default();
    options.features |= feature::BLK_WRITE_ZEROES | feature::EVENT_IDX;
    if spec.packed {
        options.features |= feature::RING_PACKED;
    }
    if spec.in_order {
        options.features |= feature::IN_ORDER;
    }
    if spec.inflight {
        options.protocol_features |= protocol_feature::INFLIGHT_SHMFD;
    }
    let features = negotiate_features(&mut frontend, &options)?;
    Ok((frontend, features))
}

/// Sectors of the disk, and bytes of its logical block.
fn geometry(frontend: &Frontend) -> Result<(u64, u32), DiskError> {
    let bytes = frontend.get_config(0, 24)?;
    let (Some(sectors), Some(block)) = (bytes.first_chunk::<8>(), bytes.last_chunk::<4>()) else {
        return Err(FrontendError::Closed.into());
    };
    Ok((u64::from_le_bytes(*sectors), u32::from_le_bytes(*block)))
}

/// SET_MEM_TABLE with all of the memory.
fn share(frontend: &Frontend, memory: &GuestMemory) -> Result<(), DiskError> {
    let entries: Vec<_> = memory.regions().iter().map(|r| r.entry()).collect();
    let fds: Vec<_> = memory.regions().iter().map(|r| r.file()).collect();
    Ok(frontend.set_memory_table(&entries, &fds)?)
}

fn lanes(
    spec: &DiskSpec,
    habits: &Habits,
    memory: &GuestMemory,
    room: Room,
    features: u64,
) -> Result<Vec<Lane>, DiskError> {
    let most_sectors = habits.most_sectors;
    let format = if features & feature::RING_PACKED != 0 {
        Format::Packed
    } else {
        Format::Split
    };
    let mut lanes = Vec::new();
    for index in 0..u64::from(spec.queues) {
        let place = Place {
            control: room.control + index * Place::CONTROL_BYTES,
            data: room.data + index * Place::data_bytes(most_sectors),
            most_sectors,
        };
        let indirect = features & feature::INDIRECT_DESC != 0;
        let mut lane = Lane::new(memory, place, format, indirect)?;
        lane.ring.event_idx = features & feature::EVENT_IDX != 0;
        lane.ring.in_order = features & feature::IN_ORDER != 0;
        lanes.push(lane);
    }
    Ok(lanes)
}
