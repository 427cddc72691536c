//! Kills of the process that serves a verified load's disks, again and again.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::load::{Load, LoadError};
use super::times::Times;
use crate::host::{Host, HostError};
use crate::processes::{Process, ProcessError, binary};
use crate::random::Random;

/// How long disks may be away after a kill before it is called a failure: far longer than any target, since
/// machines are slow at times.
pub const BACK_PATIENCE: Duration = Duration::from_secs(60);
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

    /// What everything has printed.
    fn log(&self) -> String;
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
) -> Result<Times, KillError> {
    let mut times = Times::default();
    let mut kills = 0;
    while kills < plan.kills {
        std::thread::sleep(Duration::from_millis(random.below(plan.pause_ms.max(1))));
        load.killed(victim.kill()?);
        kills += 1;
        if let Some((most, within_ms)) = plan.again {
            for _ in 0..random.below(u64::from(most) + 1) {
                std::thread::sleep(Duration::from_millis(random.below(within_ms.max(1))));
                load.killed(victim.kill()?);
                kills += 1;
            }
        }
        times.extend(load.wait_back(BACK_PATIENCE)?);
    }
    Ok(times)
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
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may have blanks and parentheses in it.
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    !(state.is_empty() || state.starts_with(['Z', 'X']))
}

/// The data plane of a host; rot starts its successors.
#[derive(Debug)]
pub struct DataPlane<'a> {
    host: &'a Host,
    /// Lines of the log that were looked at.
    read: usize,
    /// Who runs, and since when.
    running: Option<(u32, Instant)>,
}

impl<'a> DataPlane<'a> {
    /// The one that runs now.
    #[must_use]
    pub fn of(host: &'a Host) -> Self {
        Self {
            host,
            read: 0,
            running: None,
        }
    }

    fn look(&mut self) {
        let lines = self.host.log_from(self.read);
        self.read += lines.len();
        let started = |line: &str| -> Option<u32> {
            let rest = line.split_once("started role=dataplane ")?.1;
            let pid = rest.split_whitespace().find_map(|w| w.strip_prefix("pid="));
            pid?.parse().ok()
        };
        for (at, line) in lines {
            self.running = started(&line).map(|pid| (pid, at)).or(self.running);
        }
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

impl Victim for DataPlane<'_> {
    fn kill(&mut self) -> Result<Instant, KillError> {
        let pid = self.pid()?;
        self.running = None;
        Ok(kill_pid(pid)?)
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
