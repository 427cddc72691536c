//! Processes that serve a disk at a socket, bound to the CPU that serves.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_integration::processes::Process;

use super::BlockError;
use super::bench::Bench;
use crate::serve::cpus;

/// How long one may take to begin.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process that serves; it ends with this value.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    /// Where it listens, in the order of its disks.
    pub sockets: Vec<PathBuf>,
}

impl Backend {
    /// The first socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        self.sockets.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it says.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// `serve` of a folder, with a disk for each of `disks`, and more options; `name` makes its sockets' names.
///
/// # Errors
/// [`BlockError::Backend`], [`BlockError::Program`].
pub fn serve(
    bench: &Bench,
    bin: &Path,
    name: &str,
    disks: &[&str],
    options: &[&str],
) -> Result<Backend, BlockError> {
    let sockets = (0..disks.len()).map(|number| bench.on_disk(&format!("{name}-{number}")));
    let sockets: Vec<PathBuf> = sockets.collect();
    let mut command = Command::new(bin.join("serve"));
    for (socket, disk) in sockets.iter().zip(disks) {
        command.arg("--socket").arg(socket).args(["--blk", disk]);
    }
    command.args(options);
    let last = sockets.last().map(|socket| socket.display().to_string());
    let line = format!("listening on {}", last.unwrap_or_default());
    start(command, sockets, None, |process| {
        process.wait_for_log(&line, Duration::from_millis(20))
    })
}

/// `serve` of the bench with a worker on the CPU that serves.
///
/// # Errors
/// As [`serve`].
pub fn ours(
    bench: &Bench,
    name: &str,
    disks: &[&str],
    options: &[&str],
) -> Result<Backend, BlockError> {
    let cpu = bench.worker_cpu.to_string();
    let mut all = vec!["--cpu", cpu.as_str()];
    all.extend(options);
    serve(bench, &bench.bin, name, disks, &all)
}

/// `qemu-storage-daemon` with one disk, of a block device by its options.
///
/// # Errors
/// As [`serve`].
pub fn qemu(bench: &Bench, name: &str, blockdev: &str) -> Result<Backend, BlockError> {
    let socket = bench.on_disk(name);
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io"]);
    command.args(["--blockdev", &format!("{blockdev},node-name=disk")]);
    command.args([
        "--export",
        &format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,addr.type=unix,addr.path={}",
            socket.display()
        ),
    ]);
    let there = socket.clone();
    start(command, vec![socket], Some(bench.worker_cpu), |_| {
        std::thread::sleep(Duration::from_millis(5));
        there.exists()
    })
}

/// Starts a program, on one CPU if there is one for it, and waits until it serves.
///
/// # Errors
/// [`BlockError::Backend`], [`BlockError::Program`].
pub fn start(
    command: Command,
    sockets: Vec<PathBuf>,
    cpu: Option<usize>,
    mut serves: impl FnMut(&Process) -> bool,
) -> Result<Backend, BlockError> {
    let line = format!("{command:?}");
    let failed = |source| BlockError::Program {
        what: line.clone(),
        source,
    };
    // A child inherits the CPUs of the thread that starts it, and so do its threads.
    let process = std::thread::scope(|scope| {
        let starter = scope.spawn(move || {
            let bound = cpu.map_or(Ok(()), |cpu| cpus::pin(&[cpu]));
            bound.map_err(std::io::Error::other)?;
            Process::start_command(command).map_err(std::io::Error::other)
        });
        let started = starter.join();
        started.unwrap_or_else(|_| Err(std::io::Error::other("the starting thread panicked")))
    });
    let mut process = process.map_err(failed)?;
    let deadline = Instant::now() + PATIENCE;
    while !serves(&process) {
        if process.ended().is_some() || Instant::now() > deadline {
            // Its last words may still be on their way.
            std::thread::sleep(Duration::from_millis(50));
            return Err(BlockError::Backend {
                command: line.chars().take(400).collect(),
                seconds: PATIENCE.as_secs(),
                log: process.log(),
            });
        }
    }
    Ok(Backend { process, sockets })
}
