//! A verified load on some disks of one guest: a thread that keeps requests under way on all of them, checks
//! everything that comes back, and says how long a disk was away.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::disk::{DiskSpec, Habits, Room, Stage, VerifiedDisk};
use super::finding::{Finding, Problem, Report};
use super::lane::Place;
use crate::disk::DiskError;
use crate::driver::memory::GuestMemory;

/// Rings, headers and status bytes.
const CONTROL: u64 = 0x4000_0000;
/// Data.
const DATA: u64 = 0x1_0000_0000;
/// With more findings than these a load ends.
const MOST_FINDINGS: usize = 16;
/// How long the thread sleeps at most: connections that are gone are tried again that often.
const NAP_MS: u16 = 2;

/// A load.
#[derive(Debug, Clone)]
pub struct LoadSpec {
    /// The disks.
    pub disks: Vec<DiskSpec>,
    /// How they are used.
    pub habits: Habits,
    /// Memory of the guest in bytes; at least what requests need.
    pub memory_bytes: u64,
}

impl LoadSpec {
    /// Eight requests of at most 16 KiB on each queue, 64 MiB of memory.
    #[must_use]
    pub fn new(disks: Vec<DiskSpec>, run: u64) -> Self {
        let habits = Habits {
            depth: 8,
            most_sectors: 32,
            message_every: 50,
            rewrite: false,
            patience: Duration::from_secs(30),
            run,
        };
        Self {
            disks,
            habits,
            memory_bytes: 64 << 20,
        }
    }
}

/// Why a load could not begin, or what was waited for did not come.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A disk.
    #[error("disk {number}: {source}")]
    Attach {
        /// Which.
        number: u16,
        /// Why.
        source: DiskError,
    },
    /// Memory, or a thread.
    #[error("load: {0}")]
    Io(#[from] io::Error),
    /// It did not come in time.
    #[error("{what} within {patience:?}\n{problems}")]
    Late {
        /// What.
        what: &'static str,
        /// How long it was waited for.
        patience: Duration,
        /// What the load says.
        problems: String,
    },
}

enum Command {
    /// Number of the kill, and when it was.
    Killed(u64, Instant),
    Finish,
    /// Forget the pauses so far.
    Watch,
    /// Say what the longest ones were.
    Pauses,
}

enum Event {
    Filled,
    /// The longest pause of each disk.
    Pauses(Vec<Duration>),
    /// Number of the kill, and how long each disk was away.
    Back(u64, Vec<Duration>),
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    thread: Option<JoinHandle<Report>>,
    commands: Sender<Command>,
    events: Receiver<Event>,
    wake: Arc<EventFd>,
    kills: u64,
}

impl Load {
    /// Attaches the disks, and starts to fill them.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn start(spec: &LoadSpec) -> Result<Self, LoadError> {
        let worker_wake = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(io::Error::from)?,
        );
        let wake = Arc::clone(&worker_wake);
        let (commands, inbox) = channel();
        let (outbox, events) = channel();
        let (memory, disks) = attach(spec)?;
        let mut runner = Runner {
            memory,
            disks,
            inbox,
            outbox,
            wake: worker_wake,
            report: Report::default(),
            is_filled: false,
            kill: None,
            back: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("verified-load".to_owned())
            .spawn(move || runner.run())?;
        Ok(Self {
            thread: Some(thread),
            commands,
            events,
            wake,
            kills: 0,
        })
    }

    fn tell(&self, command: Command) {
        // A thread that ended early says why in its report.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    fn wait(&mut self, what: &'static str, patience: Duration) -> Result<Event, LoadError> {
        match self.events.recv_timeout(patience) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => Err(LoadError::Late {
                what,
                patience,
                problems: String::new(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(LoadError::Late {
                what,
                patience,
                problems: self.join().problems(),
            }),
        }
    }

    /// Waits until every sector of every disk was written once.
    ///
    /// # Errors
    /// [`LoadError::Late`].
    pub fn wait_filled(&mut self, patience: Duration) -> Result<(), LoadError> {
        let what = "the disks were not filled";
        while !matches!(self.wait(what, patience)?, Event::Filled) {}
        Ok(())
    }

    /// Says that the disks' back-end was killed at a moment, and is dead by now: what was completed so far is
    /// its work, what follows is its successor's.
    pub fn killed(&mut self, at: Instant) {
        self.kills += 1;
        self.tell(Command::Killed(self.kills, at));
    }

    /// Waits until each disk has completed something after the last [`Load::killed`]: how long after that
    /// moment.
    ///
    /// # Errors
    /// [`LoadError::Late`].
    pub fn wait_back(&mut self, patience: Duration) -> Result<Vec<Duration>, LoadError> {
        loop {
            match self.wait("the disks did not come back", patience)? {
                Event::Back(kill, times) if kill == self.kills => return Ok(times),
                Event::Back(..) | Event::Filled | Event::Pauses(_) => {}
            }
        }
    }

    /// From now on pauses are measured, of which [`Load::longest_pauses`] tells.
    pub fn watch(&self) {
        self.tell(Command::Watch);
    }

    /// For how long each disk completed nothing although it was asked to, at most, since [`Load::watch`].
    ///
    /// # Errors
    /// [`LoadError::Late`].
    pub fn longest_pauses(&mut self, patience: Duration) -> Result<Vec<Duration>, LoadError> {
        self.tell(Command::Pauses);
        loop {
            if let Event::Pauses(pauses) = self.wait("the load does not say", patience)? {
                return Ok(pauses);
            }
        }
    }

    /// Lets everything end that is under way, reads every sector of every disk, and says how it went.
    #[must_use]
    pub fn finish(mut self) -> Report {
        self.tell(Command::Finish);
        self.join()
    }

    fn join(&mut self) -> Report {
        let report = self.thread.take().map(JoinHandle::join);
        match report {
            Some(Ok(report)) => report,
            Some(Err(_)) | None => {
                let mut report = Report::default();
                report.findings.push(Finding {
                    disk: 0,
                    problem: Problem::Disconnected("the load's thread panicked".to_owned()),
                });
                report
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.tell(Command::Finish);
            let _ = self.join();
        }
    }
}

fn attach(spec: &LoadSpec) -> Result<(GuestMemory, Vec<VerifiedDisk>), LoadError> {
    let queues: u64 = spec.disks.iter().map(|disk| u64::from(disk.queues)).sum();
    let data = queues * Place::data_bytes(spec.habits.most_sectors);
    let round = |bytes: u64| bytes.next_multiple_of(1 << 20);
    let layout = [
        (CONTROL, round(queues * Place::CONTROL_BYTES), 0),
        (DATA, round(data.max(spec.memory_bytes)), 0),
    ];
    let memory = GuestMemory::new(&layout)?;
    let mut room = Room {
        control: CONTROL,
        data: DATA,
    };
    let mut disks = Vec::new();
    for (number, disk) in (0u16..).zip(&spec.disks) {
        let attached = VerifiedDisk::attach(number, disk.clone(), spec.habits, &memory, room);
        disks.push(attached.map_err(|source| LoadError::Attach { number, source })?);
        let queues = u64::from(disk.queues);
        room.control += queues * Place::CONTROL_BYTES;
        room.data += queues * Place::data_bytes(spec.habits.most_sectors);
    }
    Ok((memory, disks))
}

struct Runner {
    memory: GuestMemory,
    disks: Vec<VerifiedDisk>,
    inbox: Receiver<Command>,
    outbox: Sender<Event>,
    wake: Arc<EventFd>,
    report: Report,
    is_filled: bool,
    /// Number of the kill after which not all disks are back.
    kill: Option<u64>,
    back: Vec<Duration>,
}

impl Runner {
    fn run(&mut self) -> Report {
        loop {
            self.obey();
            let mut completed = 0;
            for disk in &mut self.disks {
                let count = disk.turn(&self.memory, &mut self.report);
                if count > 0
                    && let Some(at) = disk.killed_at.take()
                {
                    self.back.push(at.elapsed());
                }
                completed += count;
            }
            self.tell();
            let is_done = self.disks.iter().all(|disk| disk.stage == Stage::Done);
            if is_done || self.report.findings.len() >= MOST_FINDINGS {
                return std::mem::take(&mut self.report);
            }
            if completed == 0 {
                self.sleep();
            }
        }
    }

    fn obey(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Killed(number, at) => {
                    for disk in &mut self.disks {
                        disk.reap(&self.memory, &mut self.report);
                        disk.killed_at = Some(at);
                    }
                    self.back.clear();
                    self.kill = Some(number);
                }
                Command::Watch => {
                    for disk in &mut self.disks {
                        disk.longest_pause = Duration::ZERO;
                    }
                }
                Command::Pauses => {
                    let pauses = self.disks.iter().map(VerifiedDisk::pause).collect();
                    let _ = self.outbox.send(Event::Pauses(pauses));
                }
                Command::Finish => self.disks.iter_mut().for_each(VerifiedDisk::finish),
            }
        }
    }

    /// Tells what has come true. Nobody may be listening.
    fn tell(&mut self) {
        if !self.is_filled && self.disks.iter().all(|disk| disk.stage != Stage::Fill) {
            self.is_filled = true;
            let _ = self.outbox.send(Event::Filled);
        }
        if self.disks.iter().all(|disk| disk.killed_at.is_none())
            && let Some(kill) = self.kill.take()
        {
            let times = std::mem::take(&mut self.back);
            let _ = self.outbox.send(Event::Back(kill, times));
        }
    }

    /// Sleeps until a queue calls, a connection ends, or somebody wants something.
    fn sleep(&mut self) {
        for disk in &mut self.disks {
            match disk.ask_for_calls(&self.memory, &mut self.report) {
                Ok(false) => {}
                Ok(true) => {
                    if let Some(at) = disk.killed_at.take() {
                        self.back.push(at.elapsed());
                    }
                    return;
                }
                Err(problem) => {
                    self.report.findings.push(Finding { disk: 0, problem });
                    disk.stage = Stage::Done;
                }
            }
        }
        let ended = self.poll();
        for index in ended {
            if let Some(disk) = self.disks.get_mut(index) {
                disk.lost_connection(&mut self.report, "the back-end closed it");
            }
        }
    }

    /// Waits; which disks' connections ended.
    fn poll(&self) -> Vec<usize> {
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let connections = self.disks.iter().enumerate();
        let connections: Vec<_> = connections
            .filter_map(|(index, disk)| Some((index, disk.connection()?)))
            .collect();
        fds.extend(
            connections
                .iter()
                .map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN)),
        );
        let lanes = self.disks.iter().flat_map(VerifiedDisk::lanes);
        fds.extend(lanes.map(|lane| PollFd::new(lane.ring.call.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut fds, PollTimeout::from(NAP_MS));
        let _ = self.wake.read();
        let signalled = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let watched = fds.iter().skip(1).zip(&connections);
        watched
            .filter(|(fd, _)| signalled(fd))
            .map(|(_, (index, _))| *index)
            .collect()
    }
}
