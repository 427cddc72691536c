//! A backend process with two devices, of which a test attacks the first: and what must hold
//! afterwards, whatever the test did.
//!
//! The first device is a file (plain or encrypted), the second is memory. After each test:
//! the process lives, the second device serves verified I/O, the first can be attached again and
//! holds what it held but for the ranges that the test says it wrote, the file has its length and,
//! outside those ranges, its bytes; no descriptor is left over.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::disk::{Disk, DiskError, Options};
use crate::driver::SECTOR_BYTES;
use crate::processes::{Process, ProcessError, binary};
use crate::random::Random;

/// Bytes of the first device's file.
pub const FILE_BYTES: usize = 2 << 20;
/// Sectors of the first device.
pub const FILE_SECTORS: u64 = FILE_BYTES as u64 / SECTOR_BYTES;

/// What serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `serve`, plain.
    Plain,
    /// `serve --xts` with this data unit in bytes.
    Xts(u32),
    /// `serve --reference`: the stock vhost-user crates, the baseline.
    Reference,
    /// `qemu-storage-daemon`: keeps the frontend and driver here honest.
    Qemu,
}

impl Backend {
    /// Sectors of a logical block of its devices, of which every request has whole ones.
    #[must_use]
    pub fn block_sectors(self) -> u64 {
        match self {
            Self::Xts(unit) => u64::from(unit) / SECTOR_BYTES,
            Self::Plain | Self::Reference | Self::Qemu => 1,
        }
    }
}

/// What `serve` is told beside its disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serve {
    /// What stands before the specification of the first device's file: a storage for tests.
    pub storage: &'static str,
    /// More options.
    pub options: &'static [&'static str],
}

/// Options of `serve` with which its queues are moved between two workers all the time.
pub const MOVING: &[&str] = &["--workers", "2", "--shuffle", "1"];

/// Why an arena failed.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A program.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A disk.
    #[error("{device} device: {source}")]
    Disk {
        /// Which of the two.
        device: &'static str,
        /// Why.
        source: DiskError,
    },
    /// A file.
    #[error("arena: {0}")]
    Io(#[from] io::Error),
    /// What must hold does not.
    #[error("{0}")]
    Broken(String),
}

/// A running backend and what it must keep.
#[derive(Debug)]
pub struct Arena {
    /// The backend.
    pub process: Process,
    /// Socket of the first device, the one under attack.
    pub socket: PathBuf,
    /// Socket of the second device.
    pub other_socket: PathBuf,
    /// File of the first device.
    pub file: PathBuf,
    /// What serves.
    pub backend: Backend,
    /// What the first device holds, as its guest sees it.
    pub contents: Vec<u8>,
    /// virtio features that guests negotiate beside those of their options: packed rings, say.
    pub guest_features: u64,
    /// Byte ranges of the first device that the test may have changed.
    pub touched: Vec<Range<usize>>,
    file_bytes: Vec<u8>,
    fds: usize,
    random: Random,
    _dir: TempDir,
}

fn first(source: DiskError) -> ArenaError {
    ArenaError::Disk {
        device: "the first",
        source,
    }
}

fn second(source: DiskError) -> ArenaError {
    ArenaError::Disk {
        device: "the second",
        source,
    }
}

impl Arena {
    /// Starts a backend with `queues` queues per device, and looks at what it has.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn start(backend: Backend, queues: u16, name: &str) -> Result<Self, ArenaError> {
        Self::start_with(backend, queues, name, &Serve::default())
    }

    /// As [`Arena::start`], with more said to `serve`.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn start_with(
        backend: Backend,
        queues: u16,
        name: &str,
        serve: &Serve,
    ) -> Result<Self, ArenaError> {
        let dir = tempfile::tempdir()?;
        let mut random = Random::named(name);
        let file = dir.path().join("volume");
        let file_bytes = random.bytes(FILE_BYTES);
        fs::write(&file, &file_bytes)?;
        let socket = dir.path().join("a.sock");
        let other_socket = dir.path().join("b.sock");
        let process = start_backend(backend, queues, serve, [&file, &socket, &other_socket])?;
        let mut arena = Self {
            process,
            socket,
            other_socket,
            file,
            backend,
            contents: Vec::new(),
            guest_features: 0,
            touched: Vec::new(),
            file_bytes,
            fds: 0,
            random,
            _dir: dir,
        };
        arena.check_other()?;
        arena.contents = arena.read_first()?;
        arena.fds = arena.settled_fds()?;
        Ok(arena)
    }

    /// The options with what every guest of this arena negotiates.
    #[must_use]
    pub fn options(&self, options: &Options) -> Options {
        Options {
            features: options.features | self.guest_features,
            ..*options
        }
    }

    /// Attaches the first device with these options and those of the arena.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn attach(&self, options: &Options) -> Result<Disk, ArenaError> {
        Disk::attach(&self.socket, &self.options(options)).map_err(|e| self.explain(first(e)))
    }

    /// As [`Arena::attach`], without memory and queues.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn negotiate(&self, options: &Options) -> Result<Disk, ArenaError> {
        Disk::negotiate(&self.socket, &self.options(options)).map_err(|e| self.explain(first(e)))
    }

    /// Says that a test may have changed this range of the first device. Rounded out to 4096
    /// bytes, since a data unit is written as a whole.
    pub fn touch(&mut self, bytes: Range<usize>) {
        let end = bytes.end.next_multiple_of(4096).min(FILE_BYTES);
        self.touched.push(bytes.start / 4096 * 4096..end);
    }

    fn explain(&self, error: ArenaError) -> ArenaError {
        ArenaError::Broken(format!("{error}\n--- log:\n{}", self.process.log()))
    }

    fn read_first(&mut self) -> Result<Vec<u8>, ArenaError> {
        let attach = Disk::attach(&self.socket, &self.options(&Options::default()));
        let mut disk = attach.map_err(|e| self.explain(first(e)))?;
        let sectors = disk.capacity_sectors().map_err(first)?;
        if sectors != FILE_SECTORS {
            return Err(ArenaError::Broken(format!(
                "the first device has {sectors} sectors, its file {FILE_SECTORS}"
            )));
        }
        disk.read_all(sectors).map_err(|e| self.explain(first(e)))
    }

    /// Verified I/O on the second device, on a connection of its own.
    ///
    /// # Errors
    /// [`ArenaError::Disk`].
    pub fn check_other(&mut self) -> Result<(), ArenaError> {
        let attach = Disk::attach(&self.other_socket, &self.options(&Options::default()));
        let mut disk = attach.map_err(|e| self.explain(second(e)))?;
        exercise(&mut disk, &mut self.random).map_err(|e| self.explain(second(e)))
    }

    /// The number of open descriptors once it no longer changes: on a loaded machine a backend may
    /// need a while to see that a connection is closed. Ours closes it last: when it has no socket but
    /// its listeners, nothing is left of the connection.
    fn settled_fds(&self) -> Result<usize, ArenaError> {
        let ours = matches!(self.backend, Backend::Plain | Backend::Xts(_));
        let deadline = Instant::now() + Duration::from_secs(3);
        while ours && self.process.open_sockets()? > 2 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut last = self.process.open_fds()?;
        let mut same = 0;
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.process.open_fds()?;
            same = if now == last { same + 1 } else { 0 };
            if same == 5 {
                return Ok(now);
            }
            last = now;
        }
        Ok(last)
    }

    /// Everything that must hold after a test whose connections are closed.
    ///
    /// # Errors
    /// [`ArenaError::Broken`] with what does not hold and the backend's log.
    pub fn check(&mut self) -> Result<(), ArenaError> {
        if let Some(status) = self.process.ended() {
            return Err(self.broken(&format!("the backend ended: {status}")));
        }
        self.check_other()?;
        let now = self.read_first()?;
        if let Some(at) = self.first_difference(&self.contents, &now) {
            return Err(self.broken(&format!("byte {at} of the first device changed")));
        }
        self.check_file()?;
        self.check_fds()
    }

    fn check_file(&self) -> Result<(), ArenaError> {
        let now = fs::read(&self.file)?;
        if now.len() != FILE_BYTES {
            return Err(self.broken(&format!(
                "the file has {} bytes, it had {FILE_BYTES}",
                now.len()
            )));
        }
        match self.first_difference(&self.file_bytes, &now) {
            Some(at) => Err(self.broken(&format!("byte {at} of the file changed"))),
            None => Ok(()),
        }
    }

    fn first_difference(&self, before: &[u8], after: &[u8]) -> Option<usize> {
        (0..before.len().max(after.len())).find(|&at| {
            before.get(at) != after.get(at) && !self.touched.iter().any(|r| r.contains(&at))
        })
    }

    fn check_fds(&self) -> Result<(), ArenaError> {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let now = self.process.open_fds()?;
            if now == self.fds {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.broken(&format!(
                    "{} descriptors were open before, {now} are now:\n{}",
                    self.fds,
                    self.process.describe_fds()
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn broken(&self, what: &str) -> ArenaError {
        ArenaError::Broken(format!("{what}\n--- log:\n{}", self.process.log()))
    }
}

/// Writes, reads back and compares some ranges of a disk.
///
/// # Errors
/// See [`DiskError`].
pub fn exercise(disk: &mut Disk, random: &mut Random) -> Result<(), DiskError> {
    for _ in 0..4 {
        let sector = random.below(256) * 8;
        let len = (1 + random.index(16)) * 4096;
        let bytes = random.bytes(len);
        disk.write(0, sector, &bytes)?;
        let back = disk.read(0, sector, u32::try_from(len).unwrap_or(0))?;
        if back != bytes {
            return Err(io::Error::other(format!(
                "{len} bytes at sector {sector} did not read back as written"
            ))
            .into());
        }
    }
    Ok(())
}

fn start_backend(
    backend: Backend,
    queues: u16,
    how: &Serve,
    [file, socket, other]: [&Path; 3],
) -> Result<Process, ArenaError> {
    if backend == Backend::Qemu {
        return start_qemu(queues, file, socket, other);
    }
    let serve = binary("serve", "bulkhead-benches")?;
    let mut args = vec![
        "--socket".to_owned(),
        socket.display().to_string(),
        "--blk".to_owned(),
        format!("{}file:{}", how.storage, file.display()),
        "--socket".to_owned(),
        other.display().to_string(),
        "--blk".to_owned(),
        "ram:64MiB".to_owned(),
        "--queues".to_owned(),
        queues.to_string(),
    ];
    args.extend(how.options.iter().map(|&option| option.to_owned()));
    match backend {
        Backend::Xts(unit) => {
            args.extend(["--xts", "--data-unit"].map(str::to_owned));
            args.push(unit.to_string());
        }
        Backend::Reference => args.push("--reference".to_owned()),
        Backend::Plain | Backend::Qemu => {}
    }
    Ok(Process::start(&serve, &args)?)
}

fn start_qemu(
    queues: u16,
    file: &Path,
    socket: &Path,
    other: &Path,
) -> Result<Process, ArenaError> {
    let other_file = other.with_extension("raw");
    fs::File::create(&other_file)?.set_len(64 << 20)?;
    let mut args = Vec::new();
    for (node, path, at) in [("a", file, socket), ("b", other_file.as_path(), other)] {
        args.push("--blockdev".to_owned());
        args.push(format!(
            "driver=file,filename={},node-name={node}",
            path.display()
        ));
        args.push("--export".to_owned());
        args.push(format!(
            "type=vhost-user-blk,id=e{node},addr.type=unix,addr.path={},node-name={node},\
             writable=on,num-queues={queues}",
            at.display()
        ));
    }
    Ok(Process::start(Path::new("qemu-storage-daemon"), &args)?)
}
