//! Kills of the process that serves a verified load's disks, again and again.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::fences::Fences;
use super::load::{Load, LoadError};
use super::points::Switch;
use super::times::Times;
use crate::host::{Host, HostError};
use crate::processes::{Process, ProcessError, binary};
use crate::random::Random;

/// How long disks may be away after a kill before it is called a failure: far longer than any target, since
/// machines are slow at times.
pub const BACK_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to come by a point.
const REACH_PATIENCE: Duration = Duration::from_secs(20);
/// How long a successor may take to come by a point on its way, if it was told in time.
const EARLY_PATIENCE: Duration = Duration::from_secs(1);
/// How often it is tried to tell a successor in time, for each death that is wanted.
const TRIES: u32 = 10;
/// How long a successor may take to be started.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// Why kills ended early.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A program.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A signal or a file.
    #[error("kill: {0}")]
    Io(#[from] io::Error),
    /// Something did not stay as it was.
    #[error("{0}")]
    Grown(String),
    /// It did not die at a point.
    #[error("the data plane did not come by {0} within {REACH_PATIENCE:?}")]
    NotReached(&'static str),
    /// No successor.
    #[error("no successor was started within {0:?}")]
    NoSuccessor(Duration),
}

/// Whom to kill.
pub trait Victim {
    /// Sends SIGKILL, and returns once the process is dead: when the signal was sent. A successor is started
    /// by whoever does that.
    ///
    /// # Errors
    /// See [`KillError`].
    fn kill(&mut self) -> Result<Instant, KillError>;

    /// What was seen of the last death, once the disks are back.
    fn seen(&mut self) -> Seen {
        Seen::default()
    }

    /// What everything has printed.
    fn log(&self) -> String;
}

/// What was seen of a death from outside.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// When the successor had taken everything over, and waited for nothing but the fence.
    pub ready: Option<Instant>,
    /// When the dead process's last request had ended.
    pub fence: Option<Instant>,
}

/// How long disks were away.
#[derive(Debug, Clone, Default)]
pub struct Away {
    /// Kills.
    pub kills: u32,
    /// From the kill to the first completion of each disk.
    pub whole: Times,
    /// From the kill until the successor was ready.
    pub without_fence: Times,
    /// From the kill until the last request of the dead process had ended.
    pub fence: Times,
    /// From there to the first completion of each disk; where the successor was ready later than that, it waited for no
    /// fence, and it is from then on.
    pub behind_fence: Times,
}

impl Away {
    /// Adds what was seen of other deaths.
    pub fn add(&mut self, other: Self) {
        self.kills += other.kills;
        self.whole.add(other.whole);
        self.without_fence.add(other.without_fence);
        self.fence.add(other.fence);
        self.behind_fence.add(other.behind_fence);
    }

    /// Notes a death, what was seen of it, and how long each disk was away.
    pub fn note(&mut self, killed_at: Instant, seen: Seen, times: &[Duration]) {
        let since = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(killed_at));
        let (ready, fence) = (since(seen.ready), since(seen.fence));
        self.without_fence.extend(ready);
        self.fence.extend(fence);
        if let Some(fence) = fence {
            let both = ready.map_or(fence, |ready| ready.max(fence));
            let behind = times.iter().map(|time| time.saturating_sub(both));
            self.behind_fence.extend(behind);
        }
        self.whole.extend(times.iter().copied());
    }
}

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Kills.
    pub kills: u32,
    /// Milliseconds between a disk's return and the next kill, at most; a random part of it is waited.
    pub pause_ms: u64,
    /// The successor is killed too, up to so many times, within this many milliseconds after its start: while it
    /// recovers.
    pub again: Option<(u32, u64)>,
}

/// Kills as planned, each time waiting until all disks are back: how long they were away.
///
/// # Errors
/// See [`KillError`].
pub fn kill_often(
    victim: &mut dyn Victim,
    load: &mut Load,
    plan: &Plan,
    random: &mut Random,
) -> Result<Away, KillError> {
    let mut away = Away::default();
    while away.kills < plan.kills {
        std::thread::sleep(Duration::from_millis(random.below(plan.pause_ms.max(1))));
        let mut at = victim.kill()?;
        load.killed(at);
        away.kills += 1;
        if let Some((most, within_ms)) = plan.again {
            for _ in 0..random.below(u64::from(most) + 1) {
                std::thread::sleep(Duration::from_millis(random.below(within_ms.max(1))));
                at = victim.kill()?;
                load.killed(at);
                away.kills += 1;
            }
        }
        let times = load.wait_back(BACK_PATIENCE)?;
        away.note(at, victim.seen(), &times);
    }
    Ok(away)
}

/// Has the data plane die at a point, once or more often, each time waiting until all disks are back. Each time
/// the point is passed first as often as `random` says, at most `most_before` times.
///
/// # Errors
/// See [`KillError`]; [`KillError::NotReached`] if it does not come by there.
pub fn die_at(
    victim: &mut Child<'_>,
    load: &mut Load,
    point: &'static str,
    times: u32,
    most_before: u64,
    random: &mut Random,
) -> Result<Away, KillError> {
    let mut away = Away::default();
    for _ in 0..times {
        let pid = victim.pid()?;
        Switch::find(pid)?.arm(point, random.below(most_before + 1))?;
        let at = victim.wait_for_death(point)?;
        load.killed(at);
        away.kills += 1;
        let times = load.wait_back(BACK_PATIENCE)?;
        away.note(at, victim.seen(), &times);
    }
    Ok(away)
}

/// Kills the data plane, and has its successor die at a point on its way to where it serves; each time until the disks
/// are back.
///
/// # Errors
/// See [`KillError`]; [`KillError::NotReached`] if no successor comes by there.
pub fn successor_dies_at(
    victim: &mut Child<'_>,
    load: &mut Load,
    point: &'static str,
    times: u32,
    random: &mut Random,
) -> Result<Away, KillError> {
    let mut away = Away::default();
    let mut died = 0;
    for _ in 0..times * TRIES {
        if died == times {
            return Ok(away);
        }
        std::thread::sleep(Duration::from_millis(random.below(20)));
        let mut at = victim.kill()?;
        load.killed(at);
        away.kills += 1;
        if let Some(death) = victim.dies_early(point)? {
            at = death;
            load.killed(at);
            away.kills += 1;
            died += 1;
        }
        let times = load.wait_back(BACK_PATIENCE)?;
        away.note(at, victim.seen(), &times);
    }
    Err(KillError::NotReached(point))
}

/// Kills a process and waits until it is dead: when the signal was sent.
///
/// # Errors
/// What `kill` fails with.
pub fn kill_pid(pid: u32) -> io::Result<Instant> {
    let target = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
    let at = Instant::now();
    kill(target, Signal::SIGKILL)?;
    while is_alive(pid) {
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(at)
}

/// Whether a process has threads that may still run.
pub(super) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may have blanks and parentheses in it.
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    !(state.is_empty() || state.starts_with(['Z', 'X']))
}

/// A process of a host that rot starts again when it has died.
#[derive(Debug)]
pub struct Child<'a> {
    host: &'a Host,
    role: &'static str,
    /// Lines of the log that were looked at.
    read: usize,
    /// Who runs, and since when.
    running: Option<(u32, Instant)>,
    /// When the one that runs said that it serves.
    ready: Option<Instant>,
    fence: Option<JoinHandle<Option<Instant>>>,
}

impl<'a> Child<'a> {
    /// The data plane that runs now.
    #[must_use]
    pub fn data_plane(host: &'a Host) -> Self {
        Self::of(host, "dataplane")
    }

    /// The process of this role that runs now.
    #[must_use]
    pub fn of(host: &'a Host, role: &'static str) -> Self {
        Self {
            host,
            role,
            read: 0,
            running: None,
            ready: None,
            fence: None,
        }
    }

    fn look(&mut self) {
        let lines = self.host.log_from(self.read);
        self.read += lines.len();
        let role = format!(" role={} ", self.role);
        let started = |line: &str| -> Option<u32> {
            // After a death, and after an upgrade.
            let runs = ["INFO started role=", "runs in the place of the one before"];
            if !runs.iter().any(|text| line.contains(text)) {
                return None;
            }
            let rest = line.split_once(&role)?.1;
            let pid = rest.split_whitespace().find_map(|w| w.strip_prefix("pid="));
            pid?.parse().ok()
        };
        for (at, line) in lines {
            self.running = started(&line).map(|pid| (pid, at)).or(self.running);
            if line.contains("locked in and serving") {
                self.ready = Some(at);
            }
        }
    }

    /// What there is to be seen of the death that comes.
    fn before_death(&mut self) {
        if self.role != "dataplane" {
            return;
        }
        self.fence = Some(Fences::of(self.host.rot_pid()).watch());
    }

    /// Waits until it has died at a point: when it had.
    fn wait_for_death(&mut self, point: &'static str) -> Result<Instant, KillError> {
        let pid = self.pid()?;
        self.before_death();
        let deadline = Instant::now() + REACH_PATIENCE;
        while is_alive(pid) {
            if Instant::now() > deadline {
                return Err(KillError::NotReached(point));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        self.running = None;
        Ok(Instant::now())
    }

    /// The process id of the one that runs, once one does.
    ///
    /// # Errors
    /// [`KillError::NoSuccessor`].
    pub fn pid(&mut self) -> Result<u32, KillError> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            self.look();
            match self.running {
                Some((pid, _)) => return Ok(pid),
                None if Instant::now() > deadline => {
                    return Err(KillError::NoSuccessor(START_PATIENCE));
                }
                None => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }
}

impl Child<'_> {
    /// The switch of the one that runs or is just being started, and its process id.
    pub(super) fn switch(&mut self) -> Result<(Switch, u32), KillError> {
        let pid = self.pid()?;
        let deadline = Instant::now() + START_PATIENCE;
        // Between fork and exec it has none.
        loop {
            match Switch::find(pid) {
                Ok(switch) => return Ok((switch, pid)),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    /// It has died by itself: the next one is not that.
    pub(super) fn has_died(&mut self) {
        self.running = None;
    }

    /// Has the one that is just being started die at a point, if it is told in time: when it had died.
    fn dies_early(&mut self, point: &'static str) -> Result<Option<Instant>, KillError> {
        let (switch, pid) = self.switch()?;
        switch.arm(point, 0)?;
        self.before_death();
        let deadline = Instant::now() + EARLY_PATIENCE;
        while is_alive(pid) {
            if Instant::now() > deadline {
                switch.arm("", 0)?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        self.running = None;
        Ok(Some(Instant::now()))
    }
}

impl Victim for Child<'_> {
    fn kill(&mut self) -> Result<Instant, KillError> {
        let pid = self.pid()?;
        self.before_death();
        self.running = None;
        Ok(kill_pid(pid)?)
    }

    fn seen(&mut self) -> Seen {
        self.look();
        let fence = self.fence.take().and_then(|watch| watch.join().ok());
        Seen {
            ready: self.ready.take(),
            fence: fence.flatten(),
        }
    }

    fn log(&self) -> String {
        self.host.log()
    }
}

/// A `serve` without anybody who keeps something for it: its successors find the file, frontends connect again.
#[derive(Debug)]
pub struct Serve {
    program: PathBuf,
    arguments: Vec<String>,
    process: Process,
}

impl Serve {
    /// Starts it with these arguments, and waits until it listens.
    ///
    /// # Errors
    /// See [`KillError`].
    pub fn start(arguments: &[&str]) -> Result<Self, KillError> {
        let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        let program = binary("serve", "bulkhead-benches")?;
        let process = start(&program, &arguments)?;
        if !process.wait_for_log("listening", START_PATIENCE) {
            return Err(KillError::NoSuccessor(START_PATIENCE));
        }
        Ok(Self {
            program,
            arguments,
            process,
        })
    }
}

fn start(program: &Path, arguments: &[String]) -> Result<Process, ProcessError> {
    let mut command = Command::new(program);
    command.args(arguments);
    Process::start_command(command)
}

impl Victim for Serve {
    fn kill(&mut self) -> Result<Instant, KillError> {
        let at = Instant::now();
        self.process.kill();
        self.process = start(&self.program, &self.arguments)?;
        Ok(at)
    }

    fn log(&self) -> String {
        self.process.log()
    }
}
