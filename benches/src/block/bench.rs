//! What all measurements have: two CPUs, folders, how long things take, and which peers are installed.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_integration::processes::installed;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::BlockError;
use super::arguments::Arguments;
use crate::figures::header::cpus;

/// How long is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Rounds of each case, in which every side has a turn.
    pub rounds: usize,
    /// How long a turn is measured.
    pub sample: Duration,
    /// And loaded before.
    pub warm_up: Duration,
    /// How many more rounds there are at most, instead of those in which CPUs moved.
    pub more: usize,
    /// What stands alone takes so many samples' time.
    pub long: u32,
}

/// Long enough for ratios that repeat to some hundredths.
const FULL: Pace = Pace {
    rounds: 5,
    sample: Duration::from_millis(160),
    warm_up: Duration::from_millis(30),
    more: 4,
    long: 15,
};
/// Shows that it works.
const QUICK: Pace = Pace {
    rounds: 1,
    sample: Duration::from_millis(15),
    warm_up: Duration::from_millis(5),
    more: 0,
    long: 4,
};

/// A run of the bench. Its files are gone when it drops.
#[derive(Debug)]
pub struct Bench {
    /// Where back-ends serve.
    pub worker_cpu: usize,
    /// Where they are driven from.
    pub driver_cpu: usize,
    /// How long is measured.
    pub pace: Pace,
    /// The short form.
    pub quick: bool,
    /// Folder of `serve`.
    pub bin: PathBuf,
    /// Folder of another `serve`.
    pub against: Option<PathBuf>,
    /// `qemu-storage-daemon` is installed.
    pub has_qemu: bool,
    /// `fio` is installed.
    pub has_fio: bool,
    only: Option<String>,
    folder: tempfile::TempDir,
    tmpfs: tempfile::TempDir,
}

impl Bench {
    /// As the command line says.
    ///
    /// # Errors
    /// [`BlockError::Cpus`], [`BlockError::File`].
    pub fn new(arguments: &Arguments) -> Result<Self, BlockError> {
        let cpus = cpus();
        let [worker_cpu, driver_cpu, ..] = cpus[..] else {
            return Err(BlockError::Cpus(cpus.len()));
        };
        raise_descriptors();
        std::fs::create_dir_all(&arguments.out).map_err(in_file(&arguments.out))?;
        let folder = |at: &Path| {
            let folder = tempfile::Builder::new()
                .prefix("bulkhead-bench")
                .tempdir_in(at);
            folder.map_err(in_file(at))
        };
        let own = std::env::current_exe().unwrap_or_default();
        let own = own.parent().unwrap_or(Path::new(".")).to_owned();
        Ok(Self {
            worker_cpu,
            driver_cpu,
            pace: if arguments.quick { QUICK } else { FULL },
            quick: arguments.quick,
            bin: arguments.bin.clone().unwrap_or(own),
            against: arguments.against.clone(),
            has_qemu: installed("qemu-storage-daemon").is_some(),
            has_fio: installed("fio").is_some(),
            only: arguments.only.clone(),
            folder: folder(&arguments.out)?,
            tmpfs: folder(&arguments.tmpfs)?,
        })
    }

    /// A file of the run on the disk; sockets lie there, too.
    #[must_use]
    pub fn on_disk(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of the run on the tmpfs.
    #[must_use]
    pub fn on_tmpfs(&self, name: &str) -> PathBuf {
        self.tmpfs.path().join(name)
    }

    /// Whether a part of that name is to be measured: all of it, or cases in it.
    #[must_use]
    pub fn wants_part(&self, name: &str) -> bool {
        let within = |only: &String| name == "storages" && super::storages::has(only);
        self.only
            .as_ref()
            .is_none_or(|only| only == name || within(only))
    }

    /// Whether a group of the storages' cases is to be measured.
    #[must_use]
    pub fn wants_group(&self, name: &str) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|only| only == "storages" || only == name)
    }
}

/// A back-end with hundreds of devices has thousands of descriptors, and inherits our limit.
fn raise_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What a file's error becomes.
pub fn in_file(path: &Path) -> impl FnOnce(std::io::Error) -> BlockError {
    let path = path.to_owned();
    move |source| BlockError::File { path, source }
}
