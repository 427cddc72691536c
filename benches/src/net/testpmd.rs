//! DPDK's `testpmd`, told what to do line by line: as a frontend (`net_virtio_user`) and as the back-end that ours is
//! measured beside (`net_vhost`, `net_tap`).
//!
//! One core of it forwards and polls all the time; told to stop, it sleeps. So frontends and back-ends of all sides
//! stay connected, and only those whose turn it is have the CPUs. How many packets pass in a second is its own
//! figure: it counts and looks at the clock in one go, whatever the pipe to it does meanwhile.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_integration::processes::installed;

use crate::block::BlockError;

/// The program.
pub const PROGRAM: &str = "dpdk-testpmd";
/// How long an answer may take, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// Its memory, in MiB: packets and rings.
const MEMORY_MIB: u64 = 128;
/// What it says as it starts, and goes on, without a port that was wanted.
const FAILURES: [&str; 3] = [
    "No probed ethernet devices",
    "failed to initialize",
    "Start ports failed",
];
/// What it says of a line that it does not understand.
const COMPLAINTS: [&str; 4] = [
    "Bad arguments",
    "Command not found",
    "Ambiguous command",
    "Incomplete command",
];

/// Packets a second at one of its ports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Received.
    pub rx: f64,
    /// Sent.
    pub tx: f64,
}

/// A running one; it ends with this value.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    input: ChildStdin,
    said: Arc<Said>,
    line: String,
}

/// What it said and nobody read yet.
#[derive(Debug, Default)]
struct Said {
    texts: Mutex<Texts>,
    more: Condvar,
}

/// By where it said it: what comes from one pipe may stand in the middle of a word from the other.
#[derive(Debug, Default)]
struct Texts {
    output: String,
    errors: String,
    /// It says no more.
    ended: bool,
}

impl Texts {
    fn of(&mut self, from: Pipe) -> &mut String {
        match from {
            Pipe::Output => &mut self.output,
            Pipe::Errors => &mut self.errors,
        }
    }
}

/// Where it says something.
#[derive(Debug, Clone, Copy)]
enum Pipe {
    Output,
    Errors,
}

/// Whether it is installed.
#[must_use]
pub fn is_installed() -> bool {
    installed(PROGRAM).is_some()
}

impl Testpmd {
    /// Starts one with these ports (DPDK's `--vdev`), whose forwarding core is that CPU, and waits until it can be
    /// told what to do. A `net_vhost` port listens by then, a `net_virtio_user` port is connected.
    ///
    /// # Errors
    /// [`BlockError::Program`], with what it said.
    pub fn start(cpu: usize, ports: &[String], options: &[&str]) -> Result<Self, BlockError> {
        // Its output is a pipe, which the C library would keep back in blocks.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", PROGRAM, "--no-pci", "--no-telemetry"]);
        command.args(memory_options(free_huge_pages()));
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}")]);
        for port in ports {
            command.args(["--vdev", port]);
        }
        command.args(["--", "--interactive", "--total-num-mbufs=4096"]);
        command.args(options);
        let line = format!("{command:?}");
        let failed = |source| BlockError::Program {
            what: line.clone(),
            source,
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().map_err(failed)?;
        let said = Arc::new(Said::default());
        if let Some(from) = child.stdout.take() {
            said.collect(from, Pipe::Output);
        }
        if let Some(from) = child.stderr.take() {
            said.collect(from, Pipe::Errors);
        }
        let input = child.stdin.take();
        let input = input.ok_or_else(|| failed(io::Error::other("no pipe")))?;
        let testpmd = Self {
            child,
            input,
            said,
            line,
        };
        let began = testpmd.answer("testpmd>", false)?;
        if FAILURES.iter().any(|text| began.contains(text)) {
            return Err(testpmd.failed(&began));
        }
        Ok(testpmd)
    }

    /// Says what it is to be from the next [`Testpmd::begin`] on, as `set fwd rxonly`; a mistake in it is found there.
    ///
    /// # Errors
    /// [`BlockError::Program`] if it is gone.
    pub fn set(&mut self, what: &str) -> Result<(), BlockError> {
        self.tell(&format!("set {what}"))
    }

    /// Its core polls from now on.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn begin(&mut self) -> Result<(), BlockError> {
        self.tell("start")?;
        self.answer("packets/burst", true).map(drop)
    }

    /// As [`Testpmd::begin`], after so many bursts of 32 packets from each port.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn begin_with(&mut self, bursts: u32) -> Result<(), BlockError> {
        self.tell(&format!("start tx_first {bursts}"))?;
        self.answer("packets/burst", true).map(drop)
    }

    /// Its core sleeps from now on.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn end(&mut self) -> Result<(), BlockError> {
        self.tell("stop")?;
        self.answer("Done.", true).map(drop)
    }

    /// Packets a second since the last look at this port.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn rates(&mut self, port: u16) -> Result<Rates, BlockError> {
        self.tell(&format!("show port stats {port}"))?;
        let text = self.answer("Tx-pps:", true)?;
        let rates = figure(&text, "Rx-pps:").zip(figure(&text, "Tx-pps:"));
        let rates = rates.map(|(rx, tx)| Rates { rx, tx });
        rates.ok_or_else(|| self.failed(&text))
    }

    fn tell(&mut self, line: &str) -> Result<(), BlockError> {
        let written = self.input.write_all(format!("{line}\n").as_bytes());
        let written = written.and_then(|()| self.input.flush());
        written.map_err(|source| BlockError::Program {
            what: self.line.clone(),
            source,
        })
    }

    /// What it says up to the line that has `mark`, or to the mark itself.
    fn answer(&self, mark: &str, whole_line: bool) -> Result<String, BlockError> {
        let deadline = Instant::now() + PATIENCE;
        let mut said = self.said.lock();
        loop {
            if let Some(end) = end_of(&said.output, mark, whole_line) {
                let rest = said.output.split_off(end);
                let mut answer = std::mem::take(&mut said.errors);
                answer.push_str(&std::mem::replace(&mut said.output, rest));
                drop(said);
                if COMPLAINTS.iter().any(|text| answer.contains(text)) {
                    return Err(self.failed(&answer));
                }
                return Ok(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if said.ended || left.is_zero() {
                let text = format!("{}{}", said.output, said.errors);
                drop(said);
                return Err(self.failed(&text));
            }
            let waited = self.said.more.wait_timeout(said, left);
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn failed(&self, said: &str) -> BlockError {
        BlockError::Program {
            what: self.line.clone(),
            source: io::Error::other(format!("it said:\n{}", last(said))),
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Said {
    fn lock(&self) -> std::sync::MutexGuard<'_, Texts> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the end, on a thread that ends with the program.
    fn collect(self: &Arc<Self>, mut pipe: impl Read + Send + 'static, from: Pipe) {
        let said = Arc::clone(self);
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                let count = pipe.read(&mut piece).unwrap_or(0);
                let bytes = piece.get(..count).unwrap_or_default();
                let mut texts = said.lock();
                texts.of(from).push_str(&String::from_utf8_lossy(bytes));
                texts.ended |= count == 0;
                said.more.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
    }
}

/// Where the answer that has `mark` ends.
fn end_of(text: &str, mark: &str, whole_line: bool) -> Option<usize> {
    let at = text.find(mark)? + mark.len();
    if !whole_line {
        return Some(at);
    }
    let line = text.get(at..)?.find('\n')?;
    Some(at + line + 1)
}

/// The number behind a name.
fn figure(text: &str, name: &str) -> Option<f64> {
    let rest = text.get(text.rfind(name)? + name.len()..)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Its last lines.
fn last(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let from = lines.len().saturating_sub(20);
    lines.get(from..).unwrap_or_default().join("\n")
}

/// Huge pages that nobody has, of 2 MiB.
fn free_huge_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.and_then(|line| line.trim().parse().ok()).unwrap_or(0)
}

/// Its memory is a file that can be shared with a back-end, in either case: of huge pages if there are enough, else the
/// one memfd that it makes of ordinary ones. (Other ways give more files than the 8 that vhost-user takes.)
fn memory_options(free_huge_pages: u64) -> Vec<String> {
    let mut options = vec!["--iova-mode=va".to_owned()];
    options.extend(["-m".to_owned(), MEMORY_MIB.to_string()]);
    let kind: &[&str] = if free_huge_pages >= MEMORY_MIB / 2 + 8 {
        &["--in-memory", "--single-file-segments"]
    } else {
        &["--no-huge", "--no-shconf"]
    };
    options.extend(kind.iter().map(|option| (*option).to_owned()));
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_once_their_line_is_whole() {
        let text = "  Rx-pps:            7          Rx-bps:            0\n  Tx-pps:      1234567          Tx-bps:   99\n more";
        let end = end_of(text, "Tx-pps:", true).expect("whole");
        assert_eq!(text.get(end..), Some(" more"));
        assert_eq!(figure(text, "Rx-pps:"), Some(7.0));
        assert_eq!(figure(text, "Tx-pps:"), Some(1_234_567.0));
        assert_eq!(end_of("  Tx-pps:      12", "Tx-pps:", true), None);
        assert_eq!(end_of("testpmd> ", "testpmd>", false), Some(8));
    }

    #[test]
    fn memory_can_be_shared_with_and_without_huge_pages() {
        assert!(memory_options(640).contains(&"--in-memory".to_owned()));
        assert!(memory_options(3).contains(&"--no-huge".to_owned()));
    }
}
