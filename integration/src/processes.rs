//! Programs under test: found, started, their log collected, ended with the value that holds them.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Environment variable that names the folder of the binaries under test.
pub const BIN_DIR_ENV: &str = "BULKHEAD_BIN_DIR";

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It was not built.
    #[error("{path} is not there: build it with `cargo build -p {package} --bin {name}`")]
    NotBuilt {
        /// Where it was looked for.
        path: PathBuf,
        /// Which binary.
        name: String,
        /// The package that makes it.
        package: String,
    },
    /// The system refused.
    #[error("can't start {name}: {source}")]
    Start {
        /// Which binary.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// The folder where binaries are looked for: [`BIN_DIR_ENV`], else the one that the running
/// test was built into.
#[must_use]
pub fn binary_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os(BIN_DIR_ENV) {
        return PathBuf::from(dir);
    }
    let mut dir = std::env::current_exe().unwrap_or_default();
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    dir
}

/// Path of a binary of this workspace.
///
/// # Errors
/// [`ProcessError::NotBuilt`] with the command that builds it.
pub fn binary(name: &str, package: &str) -> Result<PathBuf, ProcessError> {
    let path = binary_dir().join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(ProcessError::NotBuilt {
        path,
        name: name.to_owned(),
        package: package.to_owned(),
    })
}

/// A program that `PATH` has, if it has it: for tests that are skipped by name without it.
#[must_use]
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// KiB of memory that a process does not share.
///
/// # Errors
/// When it is gone.
pub fn own_kib(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let text = line.map(|line| line.trim().trim_end_matches(" kB"));
    let count = text.and_then(|text| text.parse().ok());
    count.ok_or_else(|| io::Error::other("it has no memory any more"))
}

/// Process ids of the programs that run now.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

fn running() -> std::sync::MutexGuard<'static, Vec<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks every program that was started here and still runs to end, and kills those that have not
/// after a while: for a program that is itself told to end.
pub fn end_all(patience: Duration) {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let pids: Vec<Pid> = running()
        .iter()
        .filter_map(|pid| i32::try_from(*pid).ok().map(Pid::from_raw))
        .collect();
    for pid in &pids {
        let _ = kill(*pid, Signal::SIGTERM);
    }
    let alive =
        |pid: &Pid| nix::sys::wait::waitpid(*pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
    let deadline = Instant::now() + patience;
    let still = |pid: &Pid| matches!(alive(pid), Ok(nix::sys::wait::WaitStatus::StillAlive));
    while pids.iter().any(still) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    for pid in pids.iter().filter(|pid| still(pid)) {
        let _ = kill(*pid, Signal::SIGKILL);
    }
}

/// Lines of a log, each with the moment at which it came.
type Log = Arc<Mutex<Vec<(Instant, String)>>>;

/// A running program. Dropped, it is killed by its process id and waited for.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Log,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts a program; both of its outputs become its log.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start<S: AsRef<OsStr>>(program: &Path, args: &[S]) -> Result<Self, ProcessError> {
        let mut command = Command::new(program);
        command.args(args);
        Self::start_command(command)
    }

    /// Starts a prepared command; its outputs are taken over.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start_command(mut command: Command) -> Result<Self, ProcessError> {
        let name = Path::new(command.get_program())
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| ProcessError::Start {
                name: name.clone(),
                source,
            })?;
        running().push(child.id());
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(out) = child.stdout.take() {
            readers.push(collect(out, Arc::clone(&log)));
        }
        if let Some(err) = child.stderr.take() {
            readers.push(collect(err, Arc::clone(&log)));
        }
        Ok(Self {
            name,
            child,
            log,
            readers,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
        lines.join("\n")
    }

    /// The lines of its log from number `from` on, each with the moment at which it came.
    #[must_use]
    pub fn log_from(&self, from: usize) -> Vec<(Instant, String)> {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        lines.get(from..).unwrap_or_default().to_vec()
    }

    /// Waits until a line of its log contains `text`.
    #[must_use]
    pub fn wait_for_log(&self, text: &str, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let found = self
                .log
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .any(|(_, line)| line.contains(text));
            if found || Instant::now() >= deadline {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    /// What reading `/proc/<pid>/fd` fails with.
    pub fn open_fds(&self) -> io::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// How many of them are sockets.
    ///
    /// # Errors
    /// As [`Process::open_fds`].
    pub fn open_sockets(&self) -> io::Result<usize> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid()))?.flatten();
        let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let is_socket = |target: &PathBuf| target.to_string_lossy().starts_with("socket:");
        Ok(targets.filter(is_socket).count())
    }

    /// What its descriptors are, for messages: one line each.
    #[must_use]
    pub fn describe_fds(&self) -> String {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid())) else {
            return "gone".to_owned();
        };
        let mut lines: Vec<String> = entries
            .flatten()
            .map(|entry| {
                let target = fs::read_link(entry.path()).unwrap_or_default();
                format!("{} {}", entry.file_name().display(), target.display())
            })
            .collect();
        lines.sort();
        lines.join("\n")
    }

    /// KiB of memory that are its own.
    ///
    /// # Errors
    /// As [`own_kib`].
    pub fn own_kib(&self) -> io::Result<u64> {
        own_kib(self.pid())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Kills it and waits for it; its log stays readable.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let pid = self.child.id();
        running().retain(|other| *other != pid);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        for reader in self.readers.drain(..) {
            // A descendant may keep the pipe open; the reader ends with it.
            if reader.is_finished() {
                let _ = reader.join();
            }
        }
    }
}

fn collect(from: impl io::Read + Send + 'static, log: Log) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = (Instant::now(), String::from_utf8_lossy(&line).into_owned());
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(line);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_logged_and_ends_with_its_value() {
        let process = Process::start(Path::new("/bin/sh"), &["-c", "echo up; sleep 60"])
            .expect("a shell starts");
        assert!(process.wait_for_log("up", Duration::from_secs(5)));
        assert!(process.open_fds().expect("it lives") >= 3);
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_missing_binary_names_the_command() {
        let error = binary("no-such", "bulkhead-benches").expect_err("it does not exist");
        assert!(
            error
                .to_string()
                .contains("cargo build -p bulkhead-benches --bin no-such")
        );
    }
}
