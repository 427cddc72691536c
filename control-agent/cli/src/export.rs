//! A volume's bytes without any Bulkhead running: decrypted with the recovery key, to a stream or a
//! file. A volume whose re-key was interrupted is read under both of its keys.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::arguments::VolumeExport;
use crate::decrypt::Plain;
use crate::failure::Failure;
use crate::image::check_existing;
use crate::output;
use crate::recover::find;
use crate::show::Shown;

/// Bytes that are read, decrypted and written at a time: a multiple of every data unit.
const CHUNK_BYTES: usize = 1 << 20;
/// A run of zeroes of this length (in bytes) becomes a hole of the file.
const HOLE_BYTES: usize = 64 << 10;
/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// `volume export`
pub(crate) fn export(arguments: &VolumeExport) -> Result<(), Failure> {
    let shown = Shown::load(&arguments.bundle)?;
    let volume = find(shown.volumes(), &arguments.volume)?;
    let file = check_existing(&arguments.file, volume.size_bytes)?;
    lock(&file, arguments)?;
    let recovery = arguments.recovery.as_deref();
    let plain = Plain::of(volume, recovery, &file, &arguments.file)?;
    let mut out = Out::open(arguments, &file)?;
    let copied = copy(&plain, arguments, volume.size_bytes, &mut out);
    copied.and_then(|()| out.finish(volume.size_bytes))
}

/// Nobody shall write to the volume meanwhile; a data plane that serves it holds the other lock.
fn lock(file: &File, arguments: &VolumeExport) -> Result<(), Failure> {
    let path = &arguments.file;
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(fs::TryLockError::WouldBlock) if arguments.force => {
            eprintln!(
                "bulkhead: warning: {} is in use: what is written to it meanwhile may be missing \
                 or half there",
                path.display()
            );
            Ok(())
        }
        Err(fs::TryLockError::WouldBlock) => Err(Failure::at(
            path,
            "is in use (locked): a guest may be writing to it; stop the guest, or add --force \
             to read it all the same",
        )),
        Err(fs::TryLockError::Error(error)) => Err(Failure::at(path, error)),
    }
}

fn copy(
    volume: &Plain<'_>,
    arguments: &VolumeExport,
    size_bytes: u64,
    out: &mut Out,
) -> Result<(), Failure> {
    let mut stored = vec![0; CHUNK_BYTES];
    let mut plain = vec![0; CHUNK_BYTES];
    let mut progress = Progress::new(size_bytes);
    let mut at = 0;
    while at < size_bytes {
        let length = usize::try_from(size_bytes - at).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
        let (stored, plain) = (&mut stored[..length], &mut plain[..length]);
        volume
            .read(at, stored, plain)
            .map_err(|e| Failure::at(&arguments.file, e))?;
        out.write(plain)?;
        at += length as u64;
        progress.show(at);
    }
    Ok(())
}

/// Where the bytes go.
#[derive(Debug)]
enum Out {
    Stream(io::Stdout),
    File {
        file: File,
        path: PathBuf,
        /// It was empty at first: what is skipped reads as zero.
        sparse: bool,
        /// Removed again unless it is finished.
        unfinished: bool,
    },
}

impl Out {
    fn open(arguments: &VolumeExport, volume: &File) -> Result<Self, Failure> {
        let path = &arguments.out;
        if path.as_os_str() == "-" {
            let stdout = io::stdout();
            if stdout.is_terminal() {
                return Err(Failure::new(
                    "the volume's bytes are not for a terminal: name a file with --out, or pipe \
                     them into a program",
                ));
            }
            return Ok(Self::Stream(stdout));
        }
        let options = || {
            let mut options = OpenOptions::new();
            options.write(true).mode(0o600);
            options
        };
        match options().create_new(true).open(path) {
            Ok(file) => Ok(Self::File {
                file,
                path: path.clone(),
                sparse: true,
                unfinished: true,
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !arguments.force {
                    return Err(Failure::at(
                        path,
                        "exists: choose another --out, or add --force to overwrite it",
                    ));
                }
                // Without waiting for the reader of a pipe of that name.
                let file = options()
                    .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
                    .open(path)
                    .map_err(|e| Failure::at(path, e))?;
                Self::overwrite(file, path, volume)
            }
            Err(error) => Err(Failure::at(path, error)),
        }
    }

    /// Another file or device than the volume's own, its contents thrown away.
    fn overwrite(file: File, path: &Path, volume: &File) -> Result<Self, Failure> {
        let at = |e: io::Error| Failure::at(path, e);
        let (ours, theirs) = (file.metadata().map_err(at)?, volume.metadata()?);
        let device = ours.file_type().is_block_device();
        if !ours.is_file() && !device {
            return Err(Failure::at(path, "is neither a file nor a block device"));
        }
        let same = if device {
            theirs.file_type().is_block_device() && ours.rdev() == theirs.rdev()
        } else {
            (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino())
        };
        if same {
            return Err(Failure::at(
                path,
                "is the volume itself, which the export would destroy",
            ));
        }
        if !device {
            file.set_len(0).map_err(at)?;
        }
        Ok(Self::File {
            file,
            path: path.to_owned(),
            sparse: !device,
            unfinished: false,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Stream(stdout) => stdout
                .write_all(bytes)
                .map_err(|e| Failure::new(format!("standard output: {e}"))),
            Self::File {
                file, path, sparse, ..
            } => write_sparse(file, bytes, *sparse).map_err(|e| Failure::at(path, e)),
        }
    }

    /// All is written; it lasts when this has returned.
    fn finish(mut self, size_bytes: u64) -> Result<(), Failure> {
        match &mut self {
            Self::Stream(stdout) => stdout
                .flush()
                .map_err(|e| Failure::new(format!("standard output: {e}"))),
            Self::File {
                file,
                path,
                sparse,
                unfinished,
            } => {
                let lasts = || -> io::Result<()> {
                    if *sparse {
                        file.set_len(size_bytes)?; // a hole at the end
                    }
                    file.sync_all()?;
                    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
                };
                lasts().map_err(|e| Failure::at(path, e))?;
                *unfinished = false;
                Ok(())
            }
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if let Self::File {
            path,
            unfinished: true,
            ..
        } = self
        {
            // The error that brought us here is already on its way to the operator.
            let _ = fs::remove_file(path);
        }
    }
}

fn write_sparse(mut file: &File, bytes: &[u8], sparse: bool) -> io::Result<()> {
    for part in bytes.chunks(HOLE_BYTES) {
        if sparse && part.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(part.len() as i64))?;
        } else {
            file.write_all(part)?;
        }
    }
    Ok(())
}

/// A line on standard error, if somebody sees it.
#[derive(Debug)]
struct Progress {
    size_bytes: u64,
    next: Option<Instant>,
}

impl Progress {
    fn new(size_bytes: u64) -> Self {
        let shown = io::stderr().is_terminal();
        Self {
            size_bytes,
            next: shown.then(|| Instant::now() + PROGRESS_EVERY),
        }
    }

    fn show(&mut self, at: u64) {
        let end = at >= self.size_bytes;
        let Some(next) = self.next.filter(|next| end || Instant::now() >= *next) else {
            return;
        };
        let percent = u128::from(at) * 100 / u128::from(self.size_bytes.max(1));
        let of = output::size(self.size_bytes);
        eprint!(
            "\rbulkhead: {percent} % of {of}{}",
            if end { "\n" } else { "" }
        );
        self.next = Some(next + PROGRESS_EVERY);
    }
}
